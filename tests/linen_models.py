"""Plain Linen models of every kind, which the tests quantize, and their inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

KEY = jax.random.key(0)
TOKENS = jnp.arange(12).reshape(2, 6) % 16


def normal(*shape, seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class MLP(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, dtype=self.dtype, name="up")(x))
        x = nn.DenseGeneral((2, 32), dtype=self.dtype, name="heads")(x)
        return nn.DenseGeneral(8, axis=(-2, -1), dtype=self.dtype, name="down")(x)


class Contraction(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((32, 2, 32), "...d,dhk->...hk", name="split")(x)
        return nn.Einsum((2, 32, 16), "...hk,hkd->...d", name="join")(nn.relu(x))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="first")(x))
        x = nn.Conv(32, (3, 3), 2, "VALID", feature_group_count=2, name="second")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(not train)(nn.Conv(32, (3, 3), use_bias=False)(x)))
        y = nn.BatchNorm(not train)(nn.Conv(32, (3, 3), use_bias=False)(y))
        return nn.relu(nn.Conv(32, (1, 1), name="project")(x) + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4, name="head")(Residual(name="block")(x, train).mean((1, 2)))


class Block(nn.Module):
    decode: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        attention = nn.MultiHeadDotProductAttention(4, decode=self.decode, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """In setup style, with a tied head."""

    def setup(self):
        self.embed = nn.Embed(16, 32)
        self.blocks = [Block() for _ in range(2)]

    def __call__(self, tokens):
        return self.embed.attend(self.encode(tokens))

    def encode(self, tokens):
        x, mask = self.embed(tokens), nn.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Scanned(nn.Module):
    remat: bool = False
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        axes = {"params": self.axis}
        x, _ = nn.scan(layer, axes, split_rngs={"params": True}, length=3)(name="layers")(x, None)
        return x


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        members = nn.vmap(MLP, {"params": 0}, {"params": True}, in_axes=None, axis_size=3)
        return members(name="members")(x).mean(0)


MODELS = {
    "mlp": (MLP(), normal(5, 32)),
    "einsum": (Contraction(), normal(2, 3, 32)),
    "cnn": (CNN(), normal(2, 8, 8, 32)),
    "resnet": (ResNet(), normal(2, 8, 8, 32)),
    "transformer": (Transformer(), TOKENS),
    "scan": (Scanned(), normal(2, 6, 32)),
    "remat": (Scanned(remat=True), normal(2, 6, 32)),
    "vmap": (Ensemble(), normal(5, 32)),
}
