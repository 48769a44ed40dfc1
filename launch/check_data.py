"""The command `internseg-check-data`, out of a checkout: what it does stands in internseg_ds/cli/check_data.py."""

from internseg_ds.cli.check_data import main

if __name__ == "__main__":
    main()
