"""The command `internseg-consolidate`, out of a checkout: what it does stands in internseg_ds/cli/consolidate.py."""

from internseg_ds.cli.consolidate import main

if __name__ == "__main__":
    main()
