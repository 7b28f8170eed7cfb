"""Where the tests find the project's own files."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
