"""Curves of training runs: `python -m varjax.plot --help`."""
