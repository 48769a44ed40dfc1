"""The command `internseg-show`, out of a checkout: what it does stands in internseg_ds/cli/show.py."""

from internseg_ds.cli.show import main

if __name__ == "__main__":
    main()
