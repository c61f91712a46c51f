"""Transformer++ language models in Flax NNX: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Shape suffixes: B batch, T tokens, D width, H query heads, K key-value heads, d head size.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A model's shape.

    Attributes:
        layers: blocks.
        width: D, a multiple of `heads`, with an even head size.
        heads: query heads.
        kv_heads: key-value heads, each serving heads / kv_heads query heads.
        hidden: width of the SwiGLU.
        vocab_size: tokens.
        dtype: what the matrix products compute in; parameters are float32.
        scan: one program for all blocks, whose parameters are stacked: deep models compile sooner.
        remat: blocks are computed again in the backward pass, and only what goes between them is kept.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab_size: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan: bool = False
    remat: bool = False

    def __post_init__(self):
        for name in ("layers", "width", "heads", "kv_heads", "hidden", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"a model's {name} is at least 1; got {getattr(self, name)}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"width {self.width} must be {self.heads} heads (heads) of an even size each"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is 'float32' or 'bfloat16'; got {self.dtype!r}")

    @property
    def non_embedding_parameters(self) -> int:
        """N: the weights of the blocks' matrix products, without norms, embedding and head.

        >>> SIZES["83k"].non_embedding_parameters
        82944
        """
        kv_width = self.width // self.heads * self.kv_heads
        attention = 2 * self.width * (self.width + kv_width)
        return self.layers * (attention + 3 * self.width * self.hidden)

    @property
    def step_cost(self) -> int:
        """Weights that a token meets in a matrix product: N and the head. Proportional to time."""
        return self.non_embedding_parameters + self.width * self.vocab_size

    def step_flops(self, batch: int, sequence: int) -> int:
        """Returns operations of a training step that the model needs: what is computed twice counts once.

        Six for each weight and token, and 12 · layers · width · T for attention, in which no mask is seen.

        Source: Chowdhery et al. 2022, arXiv 2204.02311, Appendix B.

        >>> SIZES["83k"].step_flops(1, 1)
        573120
        """
        attention = 12 * self.layers * self.width * sequence
        return batch * sequence * (6 * self.step_cost + attention)


def _shape(layers: int, width: int, heads: int) -> LMConfig:
    """Returns the usual proportions: a SwiGLU of about 8/3 the width makes N about 12 · layers · width²."""
    return LMConfig(layers, width, heads, heads, width * 8 // 3 // 8 * 8)


# Named by their non-embedding parameters N.  Blocks of 32 divide 10k, 94k, 332k, 1.3m and the larger ones.
SIZES = {
    "3k": _shape(2, 12, 2),
    "10k": LMConfig(1, 32, 2, 2, 64),
    "14k": _shape(2, 24, 2),
    "21k": _shape(3, 24, 3),
    "38k": _shape(2, 40, 2),
    "83k": _shape(3, 48, 3),
    "94k": LMConfig(2, 64, 2, 2, 160),
    "332k": _shape(3, 96, 3),
    "1.3m": _shape(3, 192, 3),
    "14m": _shape(8, 384, 6),
    "30m": _shape(17, 384, 6),
    "57m": _shape(8, 768, 6),
    "113m": _shape(16, 768, 6),
    "223m": _shape(14, 1152, 9),
    # In multiples of 256, so that each of 256 chips has whole rows of a TPU's tiles.
    "1.7b": LMConfig(33, 2048, 16, 16, 5632),
    "7b": LMConfig(32, 4096, 32, 32, 11008),
}


def sized(name: str, **changes) -> LMConfig:
    """Returns the model of a named size, with any fields changed.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SIZES:
        raise ValueError(f"model size is one of {', '.join(SIZES)}; got {name!r}")
    return dataclasses.replace(SIZES[name], **changes)


def rotate(x_BxTxHxd: jax.Array) -> jax.Array:
    """Rotary positions: pairs (i, i + d/2) turned by t · 10000^(−2i/d).

    Source: Su et al. 2021, arXiv 2104.09864, in the half-split layout.
    """
    tokens, size = x_BxTxHxd.shape[1], x_BxTxHxd.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle_Txd = jnp.arange(tokens, dtype=jnp.float32)[:, None] * frequency[None, :]
    cos, sin = (f(angle_Txd)[None, :, None, :].astype(x_BxTxHxd.dtype) for f in (jnp.cos, jnp.sin))
    low, high = jnp.split(x_BxTxHxd, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def _linear(fan_in: int, fan_out: int, config: LMConfig, rngs: nnx.Rngs, gain: float = 1.0):
    return nnx.Linear(
        fan_in,
        fan_out,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(gain / math.sqrt(fan_in)),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention with rotary positions.

    `attention_fn` is where `jq.nnx.quantize` puts a quantized attention.
    """

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        self.attention_fn = jax.nn.dot_product_attention
        kv_width = config.width // config.heads * config.kv_heads
        self.head_size = config.width // config.heads
        self.query = _linear(config.width, config.width, config, rngs)
        self.key = _linear(config.width, kv_width, config, rngs)
        self.value = _linear(config.width, kv_width, config, rngs)
        self.out = _linear(
            config.width, config.width, config, rngs, gain=(2 * config.layers) ** -0.5
        )

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        def heads(y_BxTxD):
            return y_BxTxD.reshape(*y_BxTxD.shape[:2], -1, self.head_size)

        q_BxTxHxd = rotate(heads(self.query(x_BxTxD)))
        k_BxTxKxd = rotate(heads(self.key(x_BxTxD)))
        v_BxTxKxd = heads(self.value(x_BxTxD))
        y_BxTxHxd = self.attention_fn(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, is_causal=True)
        return self.out(y_BxTxHxd.reshape(x_BxTxD.shape))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)).  Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        self.gate = _linear(config.width, config.hidden, config, rngs)
        self.up = _linear(config.width, config.hidden, config, rngs)
        self.down = _linear(
            config.hidden, config.width, config, rngs, gain=(2 * config.layers) ** -0.5
        )

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BxTxD)) * self.up(x_BxTxD))


class Block(nnx.Module):
    """Pre-normalised attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.attention_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class LM(nnx.Module):
    """A causal language model: token embedding, blocks, final norm, untied head."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=dtype,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.config = config
        self.blocks = _stack(config, rngs) if config.scan else _listed(config, rngs)
        self.norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.head = _linear(config.width, config.vocab_size, config, rngs)

    def __call__(
        self, tokens_BxT: jax.Array, constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> jax.Array:
        """Returns logits of the next token, float32[B, T, vocabulary].

        Args:
            tokens_BxT: integers below the vocabulary's size.
            constrain: where activations between blocks lie, [B, T, D] -> [B, T, D].
        """

        def apply(block: Block, x_BxTxD: jax.Array) -> jax.Array:
            return constrain(block(x_BxTxD))

        if self.config.remat:
            apply = nnx.remat(apply)
        x_BxTxD = constrain(self.embed(tokens_BxT))
        if self.config.scan:
            along = nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            x_BxTxD = along(self.blocks, x_BxTxD)
        else:
            for block in self.blocks:
                x_BxTxD = apply(block, x_BxTxD)
        return self.head(self.norm(x_BxTxD)).astype(jnp.float32)


def _listed(config: LMConfig, rngs: nnx.Rngs) -> Any:
    return nnx.List([Block(config, rngs) for _ in range(config.layers)])


def _stack(config: LMConfig, rngs: nnx.Rngs) -> Any:
    """Returns all blocks as one module, its parameters with an axis of layers in front."""

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs)

    return stack(rngs)
