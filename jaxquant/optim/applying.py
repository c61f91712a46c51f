"""Train parameters in bfloat16 without a copy in float32: updates are added and rounded stochastically."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.numerics.rounding import mix_bits, random_bits
from jaxquant.numerics.sharding import call_with_auto_axes, spec_of
from jaxquant.optim.checks import transformation
from jaxquant.optim.leaves import path_of
from jaxquant.optim.named import bare


def in_float32(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with its state, its computation and its updates in float32, whatever the parameters are.

    optax gives a state the types of the parameters.  In bfloat16, second moments stall: at β₂ = 0.999 a
    step changes them by less than the distance to the next number.  The state is that of `tx`, so
    `quantize_state` goes inside or around.

    Args:
        tx: any optax transformation.

    >>> params = {"w": jnp.ones(4, jnp.bfloat16)}
    >>> tx = in_float32(optax.adam(1e-3))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["w"].dtype, state[0].nu["w"].dtype
    (dtype('float32'), dtype('float32'))
    """
    tx = transformation(tx)
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"tx must be an optax transformation; got {tx!r}")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(_widened(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return inner.update(_widened(updates), state, _widened(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def stochastic_apply(params: Any, updates: Any, step: Any, *, seed: int = 0) -> Any:
    r"""Adds updates to parameters; those in bfloat16 are rounded stochastically, so no update is lost.

    The sum x = p + u is computed in float32.  Between the neighbours a ≤ x ≤ b in bfloat16 it becomes b with
    probability (x − a) / (b − a), so that the expectation is x.  Rounding to nearest, as
    `optax.apply_updates` does, loses every update below half the distance of neighbours: 1/512 to 1/256 of
    the parameter.

    A draw is a hash of the seed, of the step, of the parameter's path and of the element's place.  It
    depends neither on the sharding nor on the other parameters, and a resumed run repeats it.

    Parameters of other types are computed as `optax.apply_updates` computes them: those in float32 exactly
    so.  NaN and infinities stay what they are; a sum above the largest number in bfloat16 may become
    infinite, as it may in rounding to nearest.

    Args:
        params: the parameters, of any shapes.
        updates: what is added, a tree like `params`.  In bfloat16 they would be rounded before they are
            added: `in_float32` gives them in float32.
        step: the number of the step, an integer, which must be another one at each step.
        seed: the seed of the draws.

    Raises:
        ValueError: if a parameter is of another type of fewer than 32 bits, shapes differ, or step or seed
            is no integer.

    Source: Gupta et al. 2015, arXiv 1502.02551, for stochastic rounding; Zamirai et al. 2020, arXiv
    2010.06192, for bfloat16 weights without a copy in float32.

    >>> params, updates = {"w": jnp.ones(10_000, jnp.bfloat16)}, {"w": jnp.full(10_000, 1e-3)}
    >>> bool((optax.apply_updates(params, updates)["w"] == 1).all())
    True
    >>> found = stochastic_apply(params, updates, 0)["w"]
    >>> found.dtype, abs(float(found.astype(jnp.float32).mean()) - 1.001) < 2e-4
    (dtype(bfloat16), True)
    """
    _check(params, updates, seed)
    word = _step_word(step, seed)

    def apply(params: Any, updates: Any, word: jax.Array) -> Any:
        def one(keys: Any, p: Any, u: Any) -> Any:
            if getattr(p, "dtype", None) != jnp.bfloat16:
                return optax.apply_updates(p, u)
            total = p.astype(jnp.float32) + u.astype(jnp.float32)
            return _rounded(total, jnp.stack([word, _leaf_word(keys)]))

        return jax.tree.map_with_path(one, params, updates, is_leaf=lambda x: x is None)

    operands = (params, updates, word)
    return call_with_auto_axes(apply, operands, lambda: jax.tree.map(spec_of, params))


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16: the upper half of the bits, after 16 random bits are added to the lower.

    Between two neighbours the bits of a float32 are linear in its value, so the probabilities are exact.
    """
    draws = random_bits(key, x.shape) >> 16
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + draws) >> 16
    found = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    # Carries would turn an infinity into NaN, and a NaN into a number.
    return jnp.where(jnp.isfinite(x), found, x.astype(jnp.bfloat16))


def _step_word(step: Any, seed: int) -> jax.Array:
    """Returns a random word for each seed and step."""
    is_whole = jnp.issubdtype(jnp.result_type(step), jnp.integer) and jnp.ndim(step) == 0
    if isinstance(step, bool) or not is_whole:
        raise ValueError(f"step must be one integer, the number of the step; got {step!r}")
    return mix_bits(mix_bits(jnp.asarray(step).astype(jnp.uint32)) ^ jnp.uint32(seed % 2**32))


def _leaf_word(keys: Any) -> jax.Array:
    return jnp.uint32(zlib.crc32(bare(path_of(keys)).encode()))


def _check(params: Any, updates: Any, seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer; got {seed!r}")

    def one(keys: Any, p: Any, u: Any) -> None:
        if np.shape(p) != np.shape(u):
            raise ValueError(
                f"updates must have the shapes of params; {path_of(keys)!r} is {np.shape(p)} and its "
                f"update {np.shape(u)}"
            )
        dtype = jnp.result_type(p)
        if _is_narrow(dtype) and dtype != jnp.bfloat16:
            raise ValueError(
                f"stochastic_apply rounds to bfloat16, and leaves float32 as it is; {path_of(keys)!r} is "
                f"{dtype}"
            )

    jax.tree.map_with_path(one, params, updates)


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _widened(tree: Any) -> Any:
    """Returns a tree with its floating-point leaves of fewer than 32 bits in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x.dtype) else x, tree)
