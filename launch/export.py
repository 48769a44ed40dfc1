"""The command `internseg-export`, out of a checkout: what it does stands in internseg_ds/cli/export.py."""

from internseg_ds.cli.export import main

if __name__ == "__main__":
    main()
