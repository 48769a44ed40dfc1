"""The command `internseg-test`, out of a checkout: what it does stands in internseg_ds/cli/test.py."""

from internseg_ds.cli.test import main

if __name__ == "__main__":
    main()
