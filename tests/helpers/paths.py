"""Paths of the project's files, for tests."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
