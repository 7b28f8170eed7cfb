"""Describes a loaded model as text: kind, sizes, classes and options."""

import dataclasses
import textwrap
from typing import Any

import jax

WIDTH = 100


def describe_pipeline(pipeline: Any) -> str:
    """Returns what `print(model)` shows of a family's pipeline.

    pipeline: pipeline with `config`, `params`, `labels`, `sampling`, `compute` and `devices`.
    """
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params))
        for name, params in pipeline.params.items()
    }
    lines = {
        name: f"{_rounded(sizes[name])} parameters: {_fields(config)}"
        for name, config in pipeline.config.items()
        if config is not None
    }
    companions = [name for name in sizes if name not in pipeline.config]
    lines |= {role: f"{_rounded(sizes[role])} parameters" for role in companions}
    if pipeline.config.get("tokenizer") is not None:
        H, W, channels = pipeline.image_shape
        lines["images"] = f"{H}x{W} pixels, {channels} {'channel' if channels == 1 else 'channels'}"
    lines["classes"] = f"{pipeline.classes:,}: {pipeline.labels!r}"
    lines["options"] = _fields(pipeline.sampling)
    device = pipeline.devices[0].device_kind
    lines["compute"] = f"{pipeline.compute.jax_dtype.name} on {len(pipeline.devices)} x {device}"
    wide = max(map(len, lines)) + 2
    indent = " " * (2 + wide)
    text = [
        textwrap.fill(f"  {name:{wide}}{line}", WIDTH, subsequent_indent=indent)
        for name, line in lines.items()
    ]
    return "\n".join([type(pipeline).__name__, *text])


def _fields(config: Any) -> str:
    """Returns the fields of a dataclass, except for those that are None."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _rounded(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"
