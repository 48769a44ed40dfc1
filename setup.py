"""Which packages a wheel has, which pyproject.toml cannot say beside a search: configs/ and ds_configs/, folders of
their own in a checkout, lie inside the package. All other settings are in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("configs", "ds_configs")

setup(
    packages=[*find_packages(include=["internseg_ds*"]), *(f"internseg_ds.{name}" for name in FOLDERS)],
    package_dir={f"internseg_ds.{name}": name for name in FOLDERS},
)
