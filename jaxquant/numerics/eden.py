"""EDEN's correction of scales, which makes rounding to nearest unbiased in randomly rotated coordinates."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.formats import Block
from jaxquant.numerics.groups import normalize_axes
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.rounding import Eden, stochastic
from jaxquant.numerics.scales import Scales


def correct_scales(
    ratio: jax.Array,
    grid: jax.Array,
    scales: Scales,
    groups: tuple[int, ...],
    shape: tuple[int, ...],
    quantizer: Quantizer,
    axis: int | Sequence[int],
    key: jax.Array | None,
) -> Scales:
    """Returns scales times c = ⟨x, x⟩ / ⟨x, x̂⟩ of each of `Eden`'s blocks, rounded stochastically.

    Args:
        ratio: x / s, in `split_groups`'s view.
        grid: q, its values on the grid.
        scales: s, of which x̂ = s · q was computed.
        groups: the scales' shape in an array of the tensor's rank.
        shape: the tensor's.
        quantizer: whose rounding is an `Eden`.
        axis: the contracting axes; the blocks of the correction lie along the last.
        key: PRNG key of the scales' rounding.

    Raises:
        ValueError: a correction's block that does not divide the axis, or that scales do not divide; an
            asymmetric range.
    """
    along, blocks = _blocks(quantizer, groups, shape, axis)
    if scales.zero is not None:
        raise ValueError(
            "Eden corrects the scales of symmetric ranges; got a range with a zero point"
        )
    scale = scales.scale.reshape(groups)
    # In units of the block's largest scale no square leaves float32.
    largest = _of_blocks(scale, along, blocks, jnp.max)
    relative = scale / _repeated(jnp.where(largest > 0, largest, 1), groups, along)
    weights = relative.reshape(scales.scale.shape)
    x, values = ((weights * part).reshape(shape) for part in (ratio, grid))
    squares = _of_blocks(x * x, along, blocks, jnp.sum)
    products = _of_blocks(x * values, along, blocks, jnp.sum)
    # A block that rounds to zero as a whole stays there.
    factor = jnp.where(products > 0, squares / jnp.where(products > 0, products, 1), 1)
    corrected = scale * _repeated(factor, groups, along)
    if isinstance(quantizer.format, Block):
        corrected = _rounded(corrected, scale, quantizer.format, key)
    return dataclasses.replace(scales, scale=corrected.reshape(scales.scale.shape))


def _rounded(corrected: jax.Array, scale: jax.Array, format: Block, key: Any) -> jax.Array:
    """Rounds corrected scales stochastically; those of empty blocks, and NaN, stay as they are."""
    found = format.scale.round(corrected, lambda x: stochastic(x, key))
    return jnp.where(scale > 0, found, scale)


def _blocks(
    quantizer: Quantizer, groups: tuple[int, ...], shape: tuple[int, ...], axis: Any
) -> tuple[int, int]:
    """Returns the axis of the corrections, and how many there are along it."""
    assert isinstance(quantizer.rounding, Eden)
    axes = normalize_axes(shape, axis)
    if not axes:
        raise ValueError("Eden corrects blocks along a contracting axis; got none")
    along, block = axes[-1], quantizer.rounding.block
    blocks = shape[along] // block
    if shape[along] % block or (blocks and groups[along] % blocks):
        raise ValueError(
            f"Eden's block of {block} divides the contracting axis, and is divided by the scales' blocks; "
            f"got {groups[along]} scales along axis {along} of shape {shape}"
        )
    return along, blocks


def _of_blocks(x: jax.Array, along: int, blocks: int, reduce: Any) -> jax.Array:
    """Returns a sum or maximum over each of the blocks along an axis, which stay as axes of size 1."""
    before, n, after = x.shape[:along], x.shape[along], x.shape[along + 1 :]
    view = x.reshape(*before, blocks, n // max(1, blocks), *after)
    return reduce(view, axis=along + 1)


def _repeated(x: jax.Array, groups: tuple[int, ...], along: int) -> jax.Array:
    """Returns one number for each scale, of one for each block."""
    return jnp.repeat(x, groups[along] // max(1, x.shape[along]), axis=along)
