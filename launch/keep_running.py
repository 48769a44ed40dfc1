"""The command `internseg-keep-running`, out of a checkout: what it does stands in internseg_ds/cli/keep_running.py."""

from internseg_ds.cli.keep_running import main

if __name__ == "__main__":
    main()
