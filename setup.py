"""Adds configs/ to the package as varjax/configs; the rest stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["varjax*"]), "varjax.configs"],
    package_dir={"varjax.configs": "configs"},
)
