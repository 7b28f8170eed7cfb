"""What the authors of released models report of them, each at 50 samples a class."""

from typing import Any

from varjax.mar.model import MARConfig
from varjax.var.model import VARConfig

# VAR: arXiv 2404.02905, its first version, cfg 1.5, top-k 900, top-p 0.96. MAR: arXiv 2406.11838,
# table 4, 256 steps. Against the statistics of ImageNet's training set at their size (ADM's files).
PUBLISHED: dict[str, dict[str, float]] = {
    "var_d16": {"fid": 3.55},
    "var_d20": {"fid": 2.95},
    "var_d24": {"fid": 2.33},
    "var_d30": {"fid": 1.97},
    "var_d36": {"fid": 2.63},
    "mar_b": {"fid": 2.31, "inception_score": 281.7},
    "mar_l": {"fid": 1.78, "inception_score": 296.0},
    "mar_h": {"fid": 1.55, "inception_score": 303.7},
}


def published_model(config: Any) -> str | None:
    """Returns the name of the released model of these sizes; None where there is none."""
    for name in PUBLISHED:
        kind, _, size = name.partition("_")
        preset = VARConfig.preset(size) if kind == "var" else MARConfig.preset(name)
        compared = "width", "classes", *(("scales",) if kind == "var" else ("head", "latent_map"))
        if type(config) is type(preset) and all(
            getattr(config, field) == getattr(preset, field) for field in compared
        ):
            return name
    return None
