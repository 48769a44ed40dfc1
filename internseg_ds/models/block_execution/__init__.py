"""How the repeated blocks of a backbone are run: compiled, with products in float8."""
