"""Curves of training runs: `varjax plot --help`."""
