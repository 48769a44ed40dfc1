"""For tools that want a setup.py; all settings are in pyproject.toml."""

from setuptools import setup

setup()
