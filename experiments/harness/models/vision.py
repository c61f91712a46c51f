"""Small vision transformers (ViT) in Flax NNX: patches, learned positions, pre-norm blocks, one head.

Shape suffixes: B batch, T tokens, D width, H heads, d head size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.harness.training import sharding

Pooling = Literal["mean", "token"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A model's shape.

    Attributes:
        layers: blocks.
        width: D, a multiple of `heads`.
        heads: attention heads.
        hidden: width of the MLP.
        classes: logits per image.
        image: side of the square images in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.
        channels: of the images.
        pooling: what the head reads: ``"mean"`` of all tokens, or the class ``"token"``.
        dtype: what the matrix products compute in; parameters are float32.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    classes: int = 10
    image: int = 28
    patch: int = 4
    channels: int = 1
    pooling: Pooling = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        sizes = ("layers", "width", "heads", "hidden", "classes", "image", "patch", "channels")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"a model's {name} is at least 1; got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads (heads)")
        if self.image % self.patch:
            raise ValueError(
                f"images of {self.image} × {self.image} cannot be cut into patches of "
                f"{self.patch} × {self.patch} (patch)"
            )
        if self.pooling not in ("mean", "token"):
            raise ValueError(f"pooling is 'mean' or 'token'; got {self.pooling!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is 'float32' or 'bfloat16'; got {self.dtype!r}")

    @property
    def tokens(self) -> int:
        """T: patches, and the class token where there is one.

        >>> SIZES["tiny"].tokens
        49
        """
        return (self.image // self.patch) ** 2 + (self.pooling == "token")

    @property
    def block_parameters(self) -> int:
        """N: the weights of the blocks' matrix products, without biases, norms, patches and head.

        >>> SIZES["tiny"].block_parameters
        110592
        """
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden)


# An MLP of four times the width makes N = 12 · layers · width².
SIZES = {
    "tiny": ViTConfig(4, 48, 3, 192),
    "small": ViTConfig(4, 96, 3, 384),
    "base": ViTConfig(4, 192, 6, 768),
}


def sized(name: str, **changes: Any) -> ViTConfig:
    """Returns the model of a named size, with any fields changed.

    Raises:
        ValueError: an unknown name.

    >>> sized("tiny", image=8, patch=2).tokens
    16
    """
    if name not in SIZES:
        raise ValueError(f"model size is one of {', '.join(SIZES)}; got {name!r}")
    return dataclasses.replace(SIZES[name], **changes)


def _linear(fan_in: int, fan_out: int, config: ViTConfig, rngs: nnx.Rngs, gain: float = 1.0):
    return nnx.Linear(
        fan_in,
        fan_out,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(gain / math.sqrt(fan_in)),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Self-attention of all tokens with all; its product is `attention_fn`, which may be replaced."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.head_size = config.width // config.heads
        self.query = _linear(config.width, config.width, config, rngs)
        self.key = _linear(config.width, config.width, config, rngs)
        self.value = _linear(config.width, config.width, config, rngs)
        self.out = _linear(
            config.width, config.width, config, rngs, gain=(2 * config.layers) ** -0.5
        )
        self.attention_fn: Callable[..., jax.Array] = jax.nn.dot_product_attention

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        def heads(y_BxTxD):
            return y_BxTxD.reshape(*y_BxTxD.shape[:2], -1, self.head_size)

        q_BxTxHxd, k_BxTxHxd, v_BxTxHxd = (
            heads(project(x_BxTxD)) for project in (self.query, self.key, self.value)
        )
        y_BxTxHxd = self.attention_fn(q_BxTxHxd, k_BxTxHxd, v_BxTxHxd)
        return self.out(y_BxTxHxd.reshape(x_BxTxD.shape))


class MLP(nnx.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.up = _linear(config.width, config.hidden, config, rngs)
        self.down = _linear(
            config.hidden, config.width, config, rngs, gain=(2 * config.layers) ** -0.5
        )

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BxTxD)))


class Block(nnx.Module):
    """Pre-normalised attention and MLP, each added to the residual stream."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.attention_norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class ViT(nnx.Module):
    """A vision transformer: patch embedding, positions, blocks, final norm, pooling, head.

    Source: Dosovitskiy et al. 2020, arXiv 2010.11929; mean pooling as in Beyer, Zhai & Kolesnikov 2022,
    arXiv 2205.01580.

    >>> model = ViT(sized("tiny", layers=1), nnx.Rngs(0))
    >>> model(jnp.zeros((2, 28, 28, 1))).shape
    (2, 10)
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        side = (config.patch, config.patch)
        self.image = (config.image, config.image, config.channels)
        self.patches = nnx.Conv(
            config.channels,
            config.width,
            kernel_size=side,
            strides=side,
            padding="VALID",
            dtype=dtype,
            rngs=rngs,
        )
        init = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(init(rngs.params(), (config.tokens, config.width)))
        self.token = (
            nnx.Param(init(rngs.params(), (1, config.width))) if config.pooling == "token" else None
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.head = _linear(config.width, config.classes, config, rngs)

    def __call__(
        self, pixels_BxHxWxC: jax.Array, constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> jax.Array:
        """Returns logits of the classes, float32[B, classes], from pixels in [0, 1].

        Args:
            pixels_BxHxWxC: images.
            constrain: where activations between blocks lie, [B, T, D] -> [B, T, D].

        Raises:
            ValueError: images of another shape than the model's.
        """
        if pixels_BxHxWxC.shape[1:] != self.image:
            raise ValueError(
                f"the model takes images of {self.image}; got {pixels_BxHxWxC.shape[1:]}"
            )
        x_BxTxD = self.patches(2 * pixels_BxHxWxC - 1)
        x_BxTxD = x_BxTxD.reshape(x_BxTxD.shape[0], -1, x_BxTxD.shape[-1])
        if self.token is not None:
            shape = (x_BxTxD.shape[0], 1, x_BxTxD.shape[-1])
            token_Bx1xD = jnp.broadcast_to(self.token[...].astype(x_BxTxD.dtype)[None], shape)
            x_BxTxD = jnp.concatenate([token_Bx1xD, x_BxTxD], axis=1)
        x_BxTxD = constrain(x_BxTxD + self.positions[...].astype(x_BxTxD.dtype)[None])
        for block in self.blocks:
            x_BxTxD = constrain(block(x_BxTxD))
        x_BxTxD = self.norm(x_BxTxD)
        pooled_BxD = x_BxTxD.mean(axis=1) if self.token is None else x_BxTxD[:, 0]
        return self.head(pooled_BxD).astype(jnp.float32)


def classification_loss(
    graphdef: nnx.GraphDef, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
    """Returns mean cross-entropy, in nats, of a batch's labels: (params, batch of `images.train_batches`)."""
    by_rows = functools.partial(sharding.rows, mesh=mesh)

    def loss(params, batch: Mapping[str, jax.Array]) -> jax.Array:
        logits = nnx.merge(graphdef, params)(batch["pixels"], by_rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    return loss
