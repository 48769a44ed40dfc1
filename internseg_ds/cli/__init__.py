"""The command lines: what launch/ and the console scripts run."""
