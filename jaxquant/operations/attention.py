"""Attention whose products and whose cache of keys and values are quantized.

Shape suffixes: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, d head size.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
from jax.sharding import PartitionSpec

from jaxquant.numerics.qarray import QArray, dequantize, fake_quant, quantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.sharding import call_with_auto_axes, drop_repeated, spec_of
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.einsum import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention with quantized products: softmax(Q_qk(q) · Q_qk(k)ᵀ / √d) · v, and v likewise.

    A frozen callable that goes wherever `flax.nnx.dot_product_attention`, Linen's, or
    `jax.nn.dot_product_attention` goes.  The softmax is computed in float32.

    Args:
        qk: the product of queries and keys; None for floating point.
        pv: the product of probabilities (lhs) and values (rhs), which sums over keys.
        kv: the quantizer of the cache: keys and values as they would be stored, each token's and head's
            vector along its d; None for floating point.  A `KVCache` stores them so.

    Raises:
        ValueError: a part of another type; kv with a traced format or a rounding that needs a key.

    >>> from jaxquant.formats import INT8
    >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    >>> Attention(kv=Quantizer(INT8, "channel"))(x, x, x, is_causal=True).shape
    (1, 4, 2, 8)
    """

    qk: DotGeneral | None = None
    pv: DotGeneral | None = None
    kv: Quantizer | None = None

    def __post_init__(self):
        for name, kind in (("qk", DotGeneral), ("pv", DotGeneral), ("kv", Quantizer)):
            value = getattr(self, name)
            if value is not None and type(value) is not object and not isinstance(value, kind):
                raise ValueError(f"{name} is a {kind.__name__} or None; got {value!r}")

    def __call__(
        self,
        query: jt.Float[jax.Array, "*B T H d"],
        key: jt.Float[jax.Array, "*B S K d"],
        value: jt.Float[jax.Array, "*B S K d"],
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        force_fp32_for_softmax: bool = True,
    ) -> jt.Float[jax.Array, "*B T H d"]:
        """Attends as Flax's and JAX's `dot_product_attention`, with the same arguments.

        Args:
            query, key, value: with heads; fewer key-value heads are each shared by H / K query heads.
            bias: added to the logits, broadcast to [*B, H, T, S].
            mask: where False, a key is not attended to; broadcast likewise.
            scale: of the logits; 1/√d where not given.
            is_causal: whether query t sees the keys up to t alone.
            broadcast_dropout, dropout_rng, dropout_rate, deterministic: dropout on the probabilities.
            dtype: type that the operands are cast to.
            precision: of floating-point products.
            module: what attention weights would be sown into; refused.
            force_fp32_for_softmax: taken for its callers' sake; the softmax is in float32 always.

        Raises:
            ValueError: heads that do not divide; `module`, since no weights are sown here.
        """
        del force_fp32_for_softmax
        if module is not None:
            raise ValueError(
                "quantized attention does not sow its weights; call without sow_weights"
            )
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        if deterministic:
            dropout_rate = 0.0
        compute = functools.partial(
            Attention._computed,
            is_causal=is_causal,
            dropout=(dropout_rate, broadcast_dropout),
            precision=precision,
        )
        operands = (self, query, key, value, bias, mask, scale, dropout_rng)
        return call_with_auto_axes(compute, operands, lambda: _spec(query, value))

    def _computed(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: Any,
        mask: Any,
        scale: Any,
        dropout_rng: Any,
        *,
        is_causal: bool,
        dropout: tuple[float, bool],
        precision: Any,
    ) -> jax.Array:
        key, value = self.stored(key), self.stored(value)
        dots = [jax.lax.dot_general if dot is None else dot for dot in (self.qk, self.pv)]
        logits = _logits(query, key, dots[0], scale, precision)
        weights = _probabilities(logits, bias, mask, is_causal)
        if dropout[0] > 0:
            weights = _dropout(weights, dropout_rng, *dropout)
        return _weighted(weights.astype(value.dtype), value, dots[1], precision)

    def stored(self, x: jax.Array) -> jax.Array:
        """Returns keys or values as the cache gives them back."""
        return x if self.kv is None else fake_quant(x, self.kv, axis=-1)


def _spec(query: jax.Array, value: jax.Array) -> PartitionSpec:
    """Returns the result's PartitionSpec: that of the queries, and along d that of the values."""
    return drop_repeated((*tuple(spec_of(query))[:-1], tuple(spec_of(value))[-1]))


def _logits(query, key, dot_general: Any, scale: float | None, precision: Any) -> jax.Array:
    """Returns q · k, float32[*B, K, G, T, S]."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
    grouped = query.reshape(*query.shape[:-2], kv_heads, heads // kv_heads, query.shape[-1])
    logits = einsum("...tkgd,...skd->...kgts", grouped, key, dot_general, precision, jnp.float32)
    return logits * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)


def _probabilities(logits, bias: Any, mask: Any, is_causal: bool) -> jax.Array:
    """Returns Softmax over the keys that may be seen; none at all gives zeros."""
    *batch, kv_heads, group, queries, keys = logits.shape
    logits = logits.reshape(*batch, kv_heads * group, queries, keys)
    if bias is not None:
        logits = logits + _of_rank(bias.astype(jnp.float32), logits.ndim)
    seen = jnp.ones((1,) * logits.ndim, bool)
    if mask is not None:
        seen = seen & _of_rank(mask.astype(bool), logits.ndim)
    if is_causal:
        seen = seen & _of_rank(jnp.tril(jnp.ones((queries, keys), bool)), logits.ndim)
    logits = jnp.where(seen, logits, -jnp.inf)
    # A row that sees nothing would be NaN.
    top = jnp.max(logits, axis=-1, keepdims=True)
    terms = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(terms, axis=-1, keepdims=True)
    weights = terms / jnp.where(total == 0, 1, total)
    return weights.reshape(*batch, kv_heads, group, queries, keys)


def _of_rank(x: jax.Array, ndim: int) -> jax.Array:
    """Returns x with leading axes of size one up to a rank."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _dropout(weights, rng: Any, rate: float, broadcast: bool) -> jax.Array:
    if rng is None:
        raise ValueError("dropout needs dropout_rng; got None")
    *batch, kv_heads, group, queries, keys = weights.shape
    heads = kv_heads * group
    shape = (
        (*[1] * (len(batch) + 1), queries, keys) if broadcast else (*batch, heads, queries, keys)
    )
    kept = jax.random.bernoulli(rng, 1 - rate, shape)
    kept = jnp.broadcast_to(kept, (*batch, heads, queries, keys)).reshape(weights.shape)
    return jnp.where(kept, weights / (1 - rate), 0)


def _weighted(weights, value, dot_general: Any, precision: Any) -> jax.Array:
    out = einsum("...kgts,...skd->...tkgd", weights, value, dot_general, precision)
    heads = out.shape[-3] * out.shape[-2]
    return out.reshape(*out.shape[:-3], heads, out.shape[-1]).astype(value.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of the tokens so far, quantized as they come in.

    A pytree: `update` gives a new cache, and one compiled step serves every position.  Each token's and
    head's vector has scales of its own along d, so that what was stored does not change with what comes.

    Attributes:
        key, value: [B, length, K, d], a packed QArray, or an array where there is no quantizer.
        quantizer: how they are stored; None in floating point.

    >>> from jaxquant.formats import Int
    >>> cache = KVCache.zeros(1, 16, 2, 8, Quantizer(Int(4), "channel"))
    >>> x = jnp.ones((1, 3, 2, 8))
    >>> cache = cache.update(x, x, position=0)
    >>> cache.attend(x[:, -1:], position=2).shape, cache.nbytes
    ((1, 1, 2, 8), 512)
    """

    key: Any
    value: Any
    quantizer: Quantizer | None = None

    @classmethod
    def zeros(
        cls,
        batch: int,
        length: int,
        heads: int,
        size: int,
        quantizer: Quantizer | None = None,
        dtype: Any = jnp.float32,
    ) -> "KVCache":
        """Returns an empty cache.

        Args:
            batch, length, heads, size: B, the most tokens, K, d.
            quantizer: how keys and values are stored, along d; None stores them as they are.
            dtype: their type.

        Raises:
            ValueError: a quantizer whose format is traced, or whose scales are shared between tokens.
        """
        shape = (batch, length, heads, size)
        if quantizer is None:
            return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        if quantizer.granularity == "tensor" or isinstance(quantizer.granularity, tuple):
            raise ValueError(
                "a cache's scales belong to one token: granularity is 'channel' or a block size; "
                f"got {quantizer.granularity!r}"
            )
        make = jax.jit(lambda: _quantize(jnp.zeros(shape, dtype), quantizer))
        return cls(make(), make(), quantizer)

    @property
    def nbytes(self) -> int:
        """Bytes that are really held, scales included."""
        return sum(x.nbytes for x in (self.key, self.value))

    @property
    def length(self) -> int:
        """The most tokens that it holds."""
        return self.key.shape[1]

    def update(self, key: jax.Array, value: jax.Array, position: Any) -> "KVCache":
        """Returns the cache with the keys and values [B, T, K, d] of tokens position … position + T − 1.

        Raises:
            ValueError: more tokens than it holds.
        """
        if key.shape[1] > self.length:
            raise ValueError(f"{key.shape[1]} tokens do not fit a cache of {self.length}")

        own = (self.key, self.value)
        found = call_with_auto_axes(
            _update,
            (*own, key, value, self.quantizer, position),
            lambda: jax.tree.map(spec_of, own),
        )
        return dataclasses.replace(self, key=found[0], value=found[1])

    def attend(
        self, query: jt.Float[jax.Array, "B T H d"], position: Any, scale: float | None = None
    ) -> jt.Float[jax.Array, "B T H d"]:
        """Attention of queries at position … position + T − 1 to all keys up to their own.

        Args:
            query: with heads, rotated where the keys are.
            position: the first query's.
            scale: of the logits; 1/√d where not given.
        """
        key, value = (dequantize(x) if isinstance(x, QArray) else x for x in (self.key, self.value))
        operands = (query, key, value, position, scale)
        return call_with_auto_axes(_attend, operands, lambda: _spec(query, value))


def _update(old_key, old_value, key, value, quantizer: Quantizer | None, position: Any) -> Any:
    """Returns (keys, values) with those of some more tokens from a position on."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)

    def put(old: Any, new: jax.Array) -> Any:
        new = new.astype(old.dtype)
        return jax.tree.map(write, old, new if quantizer is None else _quantize(new, quantizer))

    return put(old_key, key), put(old_value, value)


def _attend(query, key, value, position: Any, scale: Any) -> jax.Array:
    queries, length = query.shape[1], key.shape[1]
    seen = jnp.arange(length)[None, :] <= position + jnp.arange(queries)[:, None]
    logits = _logits(query, key, jax.lax.dot_general, scale, None)
    weights = _probabilities(logits, None, seen[None, None], False)
    return _weighted(weights.astype(value.dtype), value, jax.lax.dot_general, None)


def _quantize(x: jax.Array, quantizer: Quantizer) -> QArray:
    return quantize(x, quantizer, axis=-1).pack()
