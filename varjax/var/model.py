"""The VAR transformer: predicts every token of the next, finer scale at once (VAR, section 3.1)."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from varjax.errors import InputError, check_setting
from varjax.nn.attention import MAX_HEADS, block_causal_mask
from varjax.nn.class_embedding import embed_classes
from varjax.nn.compute import ComputeConfig, batch_devices, shard_batch
from varjax.nn.linear import OutputHead, dense
from varjax.nn.stack import KVCache, init_stack, run_stack, stacked_param
from varjax.nn.transformer import MODULATIONS, Block, modulate
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, Pyramid, Scale
from varjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class VARConfig:
    """Settings of the transformer. Raises InputError for sizes that do not fit together.

        config = varjax.VARConfig.preset("d16")  # a size of the paper
        small = varjax.VARConfig(depth=2, width=64, heads=2, classes=10, scales=(1, 2, 4))

    Attributes:
        depth: number of layers.
        width: number of channels of a token.
        heads: attention heads, which divide the width.
        classes: number of classes; the class of that number means "no class" (for guidance and
            in-painting).
        scales: side length or (h, w) of each token map, coarse to fine.
        vocab: number of the tokenizer's codes.
        code_channels: number of channels of a code.
        shared_adaln: whether all blocks share one AdaLN layer, as in d36.
        cosine_attention: whether queries and keys are L2-normalized, as in all released models.
        gate_init: factor on the initial spread of the AdaLN gates.
    """

    depth: int
    width: int
    heads: int
    classes: int = 1000
    scales: tuple[Scale, ...] = SCALES_256
    vocab: int = 4096
    code_channels: int = 32
    shared_adaln: bool = False
    cosine_attention: bool = True
    gate_init: float = 1e-3

    def __post_init__(self):
        self.pyramid  # noqa: B018  (computed for its checks)
        for name in ("depth", "width", "heads", "classes", "vocab", "code_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be 1 or more")
        check_setting("heads", self.heads, self.heads <= MAX_HEADS, f"at most {MAX_HEADS}")
        if self.width % self.heads:
            raise InputError(f"width={self.width} is not a multiple of heads={self.heads}")

    @classmethod
    def preset(cls, name: str) -> "VARConfig":
        """Returns the config of a released model: d16, d20, d24, d30 (256 px) or d36 (512 px)."""
        gates = {"d16": 1e-3, "d20": 1e-3, "d24": 1e-4, "d30": 1e-5, "d36": 5e-6}
        if name not in gates:
            raise InputError(f"preset {name!r}: allowed are {', '.join(gates)}")
        depth, is_512 = int(name[1:]), name == "d36"
        return cls(
            depth=depth,
            width=64 * depth,
            heads=depth,
            scales=SCALES_512 if is_512 else SCALES_256,
            shared_adaln=is_512,
            gate_init=gates[name],
        )

    @property
    def pyramid(self) -> Pyramid:
        """Sizes of the scales, and their positions in the sequence."""
        return Pyramid(self.scales)

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters, all float32, as the reference does."""
        return VAR(self).init(key, method="init_all")["params"]


def check_fit(tokenizer: VQConfig, var: VARConfig) -> None:
    """Raises InputError, with all differences, where a transformer cannot read these tokens."""
    fields = ("scales", "vocab", "code_channels")
    pairs = {name: (getattr(tokenizer, name), getattr(var, name)) for name in fields}
    if lines := [f"{n}: tokenizer {a}, transformer {b}" for n, (a, b) in pairs.items() if a != b]:
        raise InputError("tokenizer and transformer do not fit:\n  " + "\n  ".join(lines))


@flax.struct.dataclass
class Condition:
    """Holds everything that depends on the labels alone, so a sampler computes it once.

    Attributes:
        class_BC: the class embedding, from which the first scale is predicted.
        modulation_SB6C: AdaLN modulation of every block.
        head_B2C: scale and shift of the last norm.
    """

    class_BC: jax.Array
    modulation_SB6C: jax.Array
    head_B2C: jax.Array

    def first(self, batch: int) -> "Condition":
        """Keeps the first `batch` labels."""
        return Condition(
            self.class_BC[:batch], self.modulation_SB6C[:, :batch], self.head_B2C[:batch]
        )


class Prediction(NamedTuple):
    """Holds the result of predicting one scale.

    Attributes:
        logits_BlV: logits of the scale's tokens, float32.
        cache: keys and values of this scale and all coarser ones.
    """

    logits_BlV: jax.Array
    cache: KVCache


class VAR(nn.Module):
    """The block-causal transformer: a token attends to its own scale and all coarser ones.

        logits_BLV = model(input_BlZ, label_B)                 # training: all scales at once
        cond, cache = model.condition(label_B), model.empty_cache(len(label_B))
        logits_BlV, cache = model.predict(None, cond, 0, cache)  # sampling: scale by scale

    Logits are always float32.

    Attributes:
        config: config of the transformer.
        compute: dtype and execution.
    """

    config: VARConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self):
        c, C = self.config, self.config.width
        std = (3 * C) ** -0.5
        normal = nn.initializers.normal(std)
        self.dtype = self.compute.jax_dtype
        self.class_embed = self.param("class_embed", normal, (c.classes + 1, C), jnp.float32)
        self.pos_start = self.param("pos_start", normal, (c.pyramid.lengths[0], C), jnp.float32)
        self.pos_embed = self.param("pos_embed", normal, (c.pyramid.length, C), jnp.float32)
        self.level_embed = self.param("level_embed", normal, (len(c.pyramid), C), jnp.float32)
        self.token_proj = dense(C, self.dtype, normal, None)
        if c.shared_adaln:
            self.shared_adaln = dense(MODULATIONS * C, self.dtype, normal, None)
        self.block = Block(
            heads=c.heads,
            depth=c.depth,
            cosine=c.cosine_attention,
            shared_adaln=c.shared_adaln,
            init_std=std,
            gate_init=c.gate_init,
            compute=self.compute,
            parent=None,
        )
        self.blocks = stacked_param(self, "blocks", self._init_blocks, c.depth)
        self.head_adaln = dense(2 * C, jnp.float32, nn.initializers.normal(std / 2), None)
        self.head = OutputHead(c.vocab, self.dtype, nn.initializers.normal(std * 0.02))

    def __call__(
        self, input_BlZ: jax.Array, label_B: jax.Array, branch_scale_S2B: jax.Array | None = None
    ) -> jax.Array:
        """Predicts all scales at once by teacher forcing.

        Args:
            input_BlZ: inputs of all scales but the first, from `Quantizer.teacher_forcing_input`.
            label_B: classes; `config.classes` means "no class".
            branch_scale_S2B: factors on each block's two residual branches, from `drop_path`; None
                for 1.

        Returns:
            Logits (B, L, V) float32.
        """
        class_BC, cond, head_B2C = self._embed_classes(label_B)
        first_BlC = class_BC[:, None] + self.pos_start[None]  # scale 0 sees the class alone
        x_BLC = jnp.concatenate([first_BlC, self._embed_tokens(input_BlZ)], axis=1)
        x_BLC, _ = run_stack(
            self.block,
            self.blocks,
            (x_BLC + self._positions()[None]).astype(self.dtype),
            self.compute,
            by_layer={"branch_scale_2B": branch_scale_S2B},
            cond=cond,
            mask_lL=block_causal_mask(self.config.pyramid.level_L),
        )
        return self._logits(x_BLC, head_B2C)

    def condition(self, label_B: jax.Array) -> Condition:
        """Computes what `predict` needs from the labels, once for all scales.

        label_B: classes (B,), or weights (B, classes + 1) that mix them.
        """
        class_BC, cond, head_B2C = self._embed_classes(label_B)
        modulation_SB6C = jax.lax.map(
            lambda params: self.block.apply({"params": params}, cond, method=Block.modulation),
            self.blocks,
        )
        return Condition(class_BC, modulation_SB6C, head_B2C)

    def predict(
        self,
        input_BlZ: jax.Array | None,
        cond: Condition,
        k: int,
        cache: KVCache,
        first: int | None = None,
    ) -> Prediction:
        """Predicts scale k from the coarser scales in the cache.

        Args:
            input_BlZ: result of `Quantizer.next_input` after scale k-1; None for k = 0. With
                `first`, those of all scales from `first` to k, without the first scale's.
            cond: class conditioning, from `condition`.
            k: index of the scale, from 0.
            cache: keys and values of all scales before `first`; `empty_cache` for none.
            first: first scale that is not in the cache; all from there to k are processed in one
                block-causal pass. None for k.
        """
        first, pyramid = k if first is None else first, self.config.pyramid
        assert (input_BlZ is None) == (k == 0)
        scales = slice(pyramid.slices[first].start, pyramid.slices[k].stop)
        parts = [] if input_BlZ is None else [self._embed_tokens(input_BlZ)]
        if first == 0:  # whose input is the class
            parts = [cond.class_BC[:, None] + self.pos_start[None], *parts]
        x_BlC = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        # The residual stream stays float32: bfloat16 would nearly double the logits' error.
        x_BlC, new_cache = run_stack(
            self.block,
            self.blocks,
            x_BlC + self._positions()[scales][None],
            self.compute,
            cache=cache,
            start=scales.start,
            stop=scales.stop,
            by_layer={"modulation_B6C": cond.modulation_SB6C},
            mask_lL=None
            if first == k
            else block_causal_mask(pyramid.level_L[: scales.stop])[scales],
        )
        assert new_cache is not None
        x_BlC = x_BlC[:, -pyramid.lengths[k] :]
        return Prediction(self._logits(x_BlC, cond.head_B2C), new_cache)

    def empty_cache(self, batch: int, length: int | None = None) -> KVCache:
        """Makes the cache of `predict` for a number of sequences of `length` tokens, or all."""
        return KVCache.allocate(
            depth=self.config.depth,
            batch=batch,
            length=length or self.config.pyramid.length,
            width=self.config.width,
            dtype=self.dtype,
            # On a mesh, the partitioner does not know how to shard memory that is only allocated.
            zeros=batch_devices() > 1,
        )

    def init_all(self):
        """Runs everything once, so that `init` makes every parameter; without the mask of L x L."""
        cond = self.condition(jnp.zeros(1, jnp.int32))
        self._embed_tokens(jnp.zeros((1, 1, self.config.code_channels)))
        return self.predict(None, cond, 0, self.empty_cache(1))

    def _init_blocks(self, key):
        C = self.config.width
        x_BlC = jnp.zeros((1, 1, C), self.dtype)
        cond = jnp.zeros((1, MODULATIONS, C) if self.config.shared_adaln else (1, C))
        return init_stack(
            lambda key: self.block.init(key, x_BlC, cond=cond), key, self.config.depth
        )

    def _embed_classes(self, label_B):
        """Returns the class embedding, the blocks' condition, and the last norm's modulation."""
        class_BC = shard_batch(embed_classes(label_B, self.class_embed))
        silu_BC, C = nn.silu(class_BC), self.config.width
        cond = class_BC
        if self.config.shared_adaln:
            cond = self.shared_adaln(silu_BC).reshape(-1, MODULATIONS, C)
        return class_BC, cond, self.head_adaln(silu_BC).reshape(-1, 2, C)

    def _embed_tokens(self, input_BlZ):
        return self.token_proj(input_BlZ).astype(jnp.float32)

    def _positions(self):
        return self.level_embed[self.config.pyramid.level_L] + self.pos_embed

    def _logits(self, x_BlC, head_B2C):
        scale_B1C, shift_B1C = jnp.split(head_B2C, 2, axis=1)
        return self.head(modulate(x_BlC, scale_B1C, shift_B1C, self.dtype))
