"""The version of the package, where nothing else need be imported to read it."""

VERSION = "0.2.0"
