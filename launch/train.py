"""The command `internseg-train`, out of a checkout: what it does stands in internseg_ds/cli/train.py."""

from internseg_ds.cli.train import main

if __name__ == "__main__":
    main()
