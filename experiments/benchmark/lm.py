"""One decoder-only transformer, written twice: in Flax Linen and in Flax NNX.

Plain models that know of no quantization: pre-normalised attention with rotary positions and a GELU MLP
of four times the width, no biases, an untied head.  Shape suffixes: B batch, T tokens, D width, H heads,
d head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from experiments.harness.models.lm import rotate

VOCABULARY = 256  # bytes
_HIDDEN = 4  # the MLP's hidden units per unit of width


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        layers: blocks.
        width: D, a multiple of `heads`, with an even head size.
        heads: of attention.
        dtype: what the model computes in; parameters are float32.
    """

    layers: int
    width: int
    heads: int
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"width {self.width} must be {self.heads} heads (heads) of an even size each"
            )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(fan in, fan out) of every linear layer, the head last.

        >>> Shape(1, 8, 2).linears
        [(8, 8), (8, 8), (8, 8), (8, 8), (8, 32), (32, 8), (8, 256)]
        """
        width, hidden = self.width, _HIDDEN * self.width
        block = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
        return block * self.layers + [(width, VOCABULARY)]


def _attend(q_BxTxD: jax.Array, k_BxTxD: jax.Array, v_BxTxD: jax.Array, heads: int) -> jax.Array:
    """Causal attention with rotary positions; its two products stay in floating point."""
    q_BxTxHxd, k_BxTxHxd, v_BxTxHxd = (
        x.reshape(*x.shape[:2], heads, -1) for x in (q_BxTxD, k_BxTxD, v_BxTxD)
    )
    y_BxTxHxd = jax.nn.dot_product_attention(
        rotate(q_BxTxHxd), rotate(k_BxTxHxd), v_BxTxHxd, is_causal=True
    )
    return y_BxTxHxd.reshape(q_BxTxD.shape)


class LinenBlock(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    shape: Shape
    dot_general: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        width, dtype = self.shape.width, jnp.dtype(self.shape.dtype)

        def linear(name: str, features: int) -> nn.Dense:
            return nn.Dense(
                features, use_bias=False, dtype=dtype, dot_general=self.dot_general, name=name
            )

        y_BxTxD = nn.LayerNorm(use_bias=False, dtype=dtype, name="attention_norm")(x_BxTxD)
        q_BxTxD, k_BxTxD, v_BxTxD = (linear(n, width)(y_BxTxD) for n in ("query", "key", "value"))
        y_BxTxD = _attend(q_BxTxD, k_BxTxD, v_BxTxD, self.shape.heads)
        x_BxTxD = x_BxTxD + linear("out", width)(y_BxTxD)
        y_BxTxD = nn.LayerNorm(use_bias=False, dtype=dtype, name="mlp_norm")(x_BxTxD)
        hidden = jax.nn.gelu(linear("up", _HIDDEN * width)(y_BxTxD))
        return x_BxTxD + linear("down", width)(hidden)


class LinenLM(nn.Module):
    """The language model in Linen; `dot_general` computes the linears' products."""

    shape: Shape
    dot_general: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the next token, float32[B, T, vocabulary]."""
        dtype = jnp.dtype(self.shape.dtype)
        x_BxTxD = nn.Embed(VOCABULARY, self.shape.width, dtype=dtype, name="embed")(tokens_BxT)
        for i in range(self.shape.layers):
            x_BxTxD = LinenBlock(self.shape, self.dot_general, name=f"blocks_{i}")(x_BxTxD)
        x_BxTxD = nn.LayerNorm(use_bias=False, dtype=dtype, name="norm")(x_BxTxD)
        head = nn.Dense(
            VOCABULARY, use_bias=False, dtype=dtype, dot_general=self.dot_general, name="head"
        )
        return head(x_BxTxD).astype(jnp.float32)


class NnxBlock(nnx.Module):
    """`LinenBlock` in NNX."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        width, dtype = shape.width, jnp.dtype(shape.dtype)

        def linear(fan_in: int, fan_out: int) -> nnx.Linear:
            return nnx.Linear(fan_in, fan_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.heads = shape.heads
        self.attention_norm = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.mlp_norm = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        self.up, self.down = linear(width, _HIDDEN * width), linear(_HIDDEN * width, width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        y_BxTxD = self.attention_norm(x_BxTxD)
        q_BxTxD, k_BxTxD, v_BxTxD = (f(y_BxTxD) for f in (self.query, self.key, self.value))
        x_BxTxD = x_BxTxD + self.out(_attend(q_BxTxD, k_BxTxD, v_BxTxD, self.heads))
        return x_BxTxD + self.down(jax.nn.gelu(self.up(self.mlp_norm(x_BxTxD))))


class NnxLM(nnx.Module):
    """`LinenLM` in NNX."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        dtype = jnp.dtype(shape.dtype)
        self.embed = nnx.Embed(VOCABULARY, shape.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(shape, rngs) for _ in range(shape.layers)])
        self.norm = nnx.LayerNorm(shape.width, use_bias=False, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(shape.width, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits of the next token, float32[B, T, vocabulary]."""
        x_BxTxD = self.embed(tokens_BxT)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.head(self.norm(x_BxTxD)).astype(jnp.float32)
