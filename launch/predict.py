"""The command `internseg-predict`, out of a checkout: what it does stands in internseg_ds/cli/predict.py."""

from internseg_ds.cli.predict import main

if __name__ == "__main__":
    main()
