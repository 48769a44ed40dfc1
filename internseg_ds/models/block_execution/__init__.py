"""How the repeated blocks of a backbone are run: compiled."""
