"""launch/train.py without its refusal of float8 products on CPUs, which multiply float8 too, slowly: for
benchmarks/formats_over_seeds.py, which looks at losses and not at seconds."""

from internseg_ds.cli.train import main
from internseg_ds.preflight import settings_checks

if __name__ == "__main__":
    settings_checks.check_float8 = lambda *_: None  # type: ignore[assignment]
    main()
