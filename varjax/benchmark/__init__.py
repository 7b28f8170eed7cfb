"""Benchmarks: commands that print JSON lines. `python -m varjax.benchmark --help`."""
