"""The command `internseg-report`, out of a checkout: what it does stands in internseg_ds/cli/report.py."""

from internseg_ds.cli.report import main

if __name__ == "__main__":
    main()
