"""Benchmarks: commands that print JSON lines. `varjax benchmark --help`."""
