"""The command `internseg-plan`, out of a checkout: what it does stands in internseg_ds/cli/plan.py."""

from internseg_ds.cli.plan import main

if __name__ == "__main__":
    main()
