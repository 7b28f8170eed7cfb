"""MAR's golden cases, with config and parameters converted to varjax."""

import functools
import types

import numpy as np

from tests.golden import weights
from varjax.convert import apply_map
from varjax.mar.heads import DiffusionHead
from varjax.mar.model import MARConfig
from varjax.nn.diffusion import NoiseSchedule

CASES = ("mar_base", "mar_patch2")


@functools.cache
def case(name: str) -> types.SimpleNamespace:
    """Returns config, parameters, official outputs, schedule, and what `hidden` takes."""
    settings = weights.case(name)["settings"]
    side = settings["img_size"] // settings["vae_stride"]
    config = MARConfig(
        width=settings["encoder_embed_dim"],
        encoder_depth=settings["encoder_depth"],
        decoder_depth=settings["decoder_depth"],
        encoder_heads=settings["encoder_num_heads"],
        decoder_heads=settings["decoder_num_heads"],
        head=DiffusionHead(
            channels=settings["vae_embed_dim"],
            patch=settings["patch_size"],
            depth=settings["diffloss_d"],
            width=settings["diffloss_w"],
        ),
        classes=settings["class_num"],
        latent_map=(side, side),
        buffer_size=settings["buffer_size"],
    )
    out = weights.outputs(name)
    masked = int(out["mask"][0].sum())
    known = config.length - masked
    # The reference masks the first positions of an order, so known tokens are the last ones.
    position_Bn = out["orders"][:, masked:].astype(np.int32)
    return types.SimpleNamespace(
        name=name,
        config=config,
        params=apply_map.from_official(config, weights.state_dict(name, "mar")),
        out=out,
        steps=int(settings["num_sampling_steps"]),
        schedule=NoiseSchedule(int(settings["num_sampling_steps"])),
        known=known,
        position_Bn=position_Bn,
        latents_BhwZ=out["latents"].transpose(0, 2, 3, 1),
        label_B=np.array([1, 9], np.int32),
    )
