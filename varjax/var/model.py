"""The VAR transformer: predicts every token of the next, finer scale at once (VAR, section 3.1)."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from varjax.errors import InputError, check_setting
from varjax.nn.attention import MAX_HEADS
from varjax.nn.compute import ComputeConfig, batch_devices, shard_batch
from varjax.nn.kv_cache import KVCache
from varjax.nn.linear import OutputHead, dense
from varjax.nn.transformer import (
    SIGNALS,
    Block,
    adaln_signals,
    init_blocks,
    modulate,
    run_blocks,
)
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, Pyramid, Scale
from varjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class VARConfig:
    """Settings of the transformer. Raises InputError where sizes do not fit one another.

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
        self.pyramid  # noqa: B018  (its own checks)
        for name in ("depth", "width", "heads", "classes", "vocab", "code_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be 1 or more")
        check_setting("heads", self.heads, self.heads <= MAX_HEADS, f"at most {MAX_HEADS}")
        if self.width % self.heads:
            raise InputError(f"width={self.width} is not a multiple of heads={self.heads}")

    @classmethod
    def preset(cls, name: str) -> "VARConfig":
        """Returns a released model's: d16, d20, d24, d30 (256 px) or d36 (512 px)."""
        gates = {"d16": 1e-3, "d20": 1e-3, "d24": 1e-4, "d30": 1e-5, "d36": 5e-6}
        if name not in gates:
            raise InputError(f"preset {name!r}: allowed are {', '.join(gates)}")
        depth = int(name[1:])
        large = {"scales": SCALES_512, "shared_adaln": True} if name == "d36" else {}
        return cls(depth, 64 * depth, depth, gate_init=gates[name], **large)

    @property
    def pyramid(self) -> Pyramid:
        """Sizes and places of the scales."""
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
    """Holds all that labels contribute; it depends on no token, so a sampler computes it once.

    Attributes:
        start_BC: the class embedding, from which the first scale is predicted.
        signals_SB6C: AdaLN signals of every layer.
        head_B2C: scale and shift of the last norm.
    """

    start_BC: jax.Array
    signals_SB6C: jax.Array
    head_B2C: jax.Array


class VAR(nn.Module):
    """The block-causal transformer: a token sees its own scale and all coarser ones.

    `__call__` predicts all scales at once from the tokens of an image (training); `condition` and
    `predict` one scale after another (sampling). Logits are float32 whatever the format.

    Attributes:
        config: config of the transformer.
        compute: number format and execution.
    """

    config: VARConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self):
        c, C = self.config, self.config.width
        std = (3 * C) ** -0.5
        normal = nn.initializers.normal(std)
        self.dtype = self.compute.jax_dtype
        self.class_embed = self.param("class_embed", normal, (c.classes + 1, C), jnp.float32)
        self.start = self.param("pos_start", normal, (c.pyramid.lengths[0], C), jnp.float32)
        self.pos_LC = self.param("pos_embed", normal, (c.pyramid.length, C), jnp.float32)
        self.level_KC = self.param("level_embed", normal, (len(c.pyramid), C), jnp.float32)
        self.token_proj = dense(C, self.dtype, normal, None)
        if c.shared_adaln:
            self.shared_ada = dense(SIGNALS * C, self.dtype, normal, None)
        self.block = Block(
            c.heads, c.depth, c.cosine_attention, c.shared_adaln, std, c.gate_init, self.compute,
            parent=None,
        )  # fmt: skip
        cond = jnp.zeros((1, SIGNALS, C) if c.shared_adaln else (1, C))
        self.blocks = self.param("blocks", lambda key: init_blocks(self.block, key, cond))
        self.head_adaln = dense(2 * C, jnp.float32, nn.initializers.normal(std / 2), None)
        self.head = OutputHead(c.vocab, self.dtype, nn.initializers.normal(std * 0.02))

    def __call__(
        self, input_BlZ: jax.Array, label_B: jax.Array, keep_S2B: jax.Array | None = None
    ) -> jax.Array:
        """Predicts all scales at once by teacher forcing.

        Args:
            input_BlZ: inputs of all scales but the first, from `VQTokenizer.teacher_forcing_input`.
            label_B: classes; `config.classes` means "no class".
            keep_S2B: factors on each layer's two branches, from `drop_path`; None keeps every
                branch.

        Returns:
            Logits (B, L, V) float32.
        """
        start_BC = self._start(label_B)
        x_BLC = jnp.concatenate([self._first(start_BC), self._words(input_BlZ)], axis=1)
        x_BLC = (x_BLC + self._places(slice(None))[None]).astype(self.dtype)
        x_BLC, _ = run_blocks(
            self.block,
            self.blocks,
            x_BLC,
            cond=self._shared(start_BC),
            mask_lL=self.config.pyramid.mask_LL,
            keep_S2B=keep_S2B,
        )
        return self._logits(x_BLC, self._head_signals(start_BC))

    def condition(self, label_B: jax.Array) -> Condition:
        """Computes what `predict` needs of the labels, for all scales."""
        start_BC = self._start(label_B)
        signals_SB6C = adaln_signals(self.block, self.blocks, self._shared(start_BC))
        return Condition(start_BC, signals_SB6C, self._head_signals(start_BC))

    def predict(
        self, input_BlZ: jax.Array | None, cond: Condition, k: int, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Predicts scale k.

        Args:
            input_BlZ: result of `Quantizer.next_input` after scale k-1; None for k = 0.
            cond: class conditioning, from `condition`.
            k: index of the scale, from 0.
            cache: cache with keys and values of scales 0 … k-1; `empty_cache` before the first.

        Returns:
            Logits (B, l, V) float32, and the cache with scale k.
        """
        assert (input_BlZ is None) == (k == 0)
        scale = self.config.pyramid.slices[k]
        x_BlC = self._first(cond.start_BC) if input_BlZ is None else self._words(input_BlZ)
        # The residual stream stays float32: in bfloat16 nearly twice the logits' error.
        x_BlC, after = run_blocks(
            self.block,
            self.blocks,
            x_BlC + self._places(scale)[None],
            signals_SB6C=cond.signals_SB6C,
            cache=cache,
            start=scale.start,
        )
        assert after is not None
        return self._logits(x_BlC, cond.head_B2C), after

    def empty_cache(self, batch: int) -> KVCache:
        """Makes the cache of `predict` for a number of sequences."""
        c = self.config
        sizes = c.depth, batch, c.pyramid.length, c.width
        # On a mesh the partitioner would not know how to share out what is only allocated.
        return KVCache.allocate(*sizes, self.dtype, zeros=batch_devices() > 1)

    def init_all(self):
        """Runs everything once, so that `init` makes every parameter; without the mask of L x L."""
        cond = self.condition(jnp.zeros(1, jnp.int32))
        self._words(jnp.zeros((1, 1, self.config.code_channels)))
        return self.predict(None, cond, 0, self.empty_cache(1))

    def _start(self, label_B):
        return shard_batch(jnp.take(self.class_embed, label_B, axis=0, mode="clip"))

    def _first(self, start_BC):
        return start_BC[:, None] + self.start[None]

    def _words(self, input_BlZ):
        return self.token_proj(input_BlZ).astype(jnp.float32)

    def _places(self, tokens):
        return (self.level_KC[self.config.pyramid.level_L] + self.pos_LC)[tokens]

    def _shared(self, start_BC):
        if not self.config.shared_adaln:
            return start_BC
        return self.shared_ada(nn.silu(start_BC)).reshape(-1, SIGNALS, self.config.width)

    def _head_signals(self, start_BC):
        return self.head_adaln(nn.silu(start_BC)).reshape(-1, 2, self.config.width)

    def _logits(self, x_BlC, head_B2C):
        scale_B1C, shift_B1C = jnp.split(head_B2C, 2, axis=1)
        return self.head(modulate(x_BlC, scale_B1C, shift_B1C, self.dtype))
