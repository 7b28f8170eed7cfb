"""Exports models as programs that JAX runs without varjax; see docs/export.md."""
