"""Defines paths of the project, for tests."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
