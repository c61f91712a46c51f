"""Bits side by side: codes of b bits in exactly b bits each."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.checks import check_whole
from jaxquant.formats import code_dtype

NIBBLE_BITS = 4


def pack_bits(
    codes: jt.UInt[jax.Array, "*rows n"], bits: int
) -> jt.UInt8[jax.Array, "*rows bytes"]:
    """Packs each row of codes into bit planes: b · ⌈n/8⌉ bytes.

    Byte j · ⌈n/8⌉ + g of a row holds bit j of the row's codes 8g … 8g + 7, the first in the lowest bit.
    Rows are packed separately, so leading axes can be mapped over, scanned and sharded.

    Args:
        codes: unsigned integers below 2^bits, of at least one axis.
        bits: b, 1 to 32.

    >>> pack_bits(jnp.array([1, 0, 3, 2], jnp.uint8), 2)  # low bits 1,0,1,0 and high bits 0,0,1,1
    Array([ 5, 12], dtype=uint8)
    """
    _check_bits(bits)
    if codes.ndim == 0:
        raise ValueError("pack_bits takes an array of at least one axis; got a scalar")
    *rows, n = codes.shape
    groups, word = -(-n // 8), _word(bits)
    padded = jnp.pad(codes.astype(word), [(0, 0)] * len(rows) + [(0, groups * 8 - n)])
    padded = padded.reshape(*rows, groups, 8)
    # One plane at a time: no array of a byte per bit is made.
    planes = [_sum_bits((padded >> word(j)) & word(1), 8) for j in range(bits)]
    return jnp.stack(planes, axis=-2).astype(jnp.uint8).reshape(*rows, bits * groups)


def packed_bytes(length: int, bits: int) -> int:
    """Returns bytes of a row of codes.

    >>> packed_bytes(9, 3)
    6
    """
    return bits * -(-length // 8)


def unpack_bits(
    packed: jt.UInt8[jax.Array, "*rows bytes"], bits: int, length: int
) -> jt.UInt[jax.Array, "*rows n"]:
    """Returns the codes that `pack_bits` packed.

    Args:
        packed: bit planes.
        bits: b, as packed.
        length: n, the codes in a row.

    Raises:
        ValueError: packed is not uint8 or of another length than b · ⌈n/8⌉.

    >>> unpack_bits(jnp.array([5, 12], jnp.uint8), 2, 4)
    Array([1, 0, 3, 2], dtype=uint8)
    """
    _check_bits(bits)
    groups, word = -(-length // 8), _word(bits)
    if packed.dtype != jnp.uint8 or packed.ndim == 0 or packed.shape[-1] != bits * groups:
        raise ValueError(
            f"{length} codes of {bits} bits are {bits * groups} bytes of uint8 in a row; "
            f"got {packed.dtype}{list(packed.shape)}"
        )
    rows = packed.shape[:-1]
    planes = packed.reshape(*rows, bits, groups, 1)
    place = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * (len(rows) + 2) + (8,))
    spread = ((planes >> place) & jnp.uint8(1)).astype(word)
    weights = word(1) << jnp.arange(bits, dtype=word)
    weights = weights.reshape((1,) * len(rows) + (bits, 1, 1))
    codes = jnp.sum(spread * weights, axis=-3, dtype=word)
    return codes.reshape(*rows, groups * 8)[..., :length].astype(code_dtype(bits))


def nibble_words(
    packed: jt.UInt8[jax.Array, "*rows bytes"], bits: int, length: int
) -> jt.Int32[jax.Array, "*rows groups"]:
    """Returns two's complement codes of at most 4 bits, eight to a 32-bit word, for `nibbles` to take out.

    A few operations on whole words, where `unpack_bits` takes several for each code.

    Args:
        packed: bit planes, as `pack_bits` makes them.
        bits: b, 2 to 4.
        length: n, the codes in a row.

    >>> packed = pack_bits(jnp.array([1, 0, 3, 2], jnp.uint8), 2)
    >>> nibbles(nibble_words(packed, 2, 4)[..., None])
    Array([[ 1,  0, -1, -2,  0,  0,  0,  0]], dtype=int32)
    """
    planes = packed.reshape(*packed.shape[:-1], bits, -(-length // 8)).astype(jnp.uint32)
    # Plane j's byte goes to bits 8j … 8j + 7; the last plane is the sign, and fills the rest.
    bytes_ = (planes[..., min(j, bits - 1), :] << jnp.uint32(8 * j) for j in range(NIBBLE_BITS))
    word = functools.reduce(operator.or_, bytes_)
    # Bit j of code p lies at 8j + p.  Two exchanges bring a code's bits together.
    for shift, mask in ((14, 0x0000CCCC), (7, 0x00AA00AA)):
        moved = (word ^ (word >> jnp.uint32(shift))) & jnp.uint32(mask)
        word = word ^ moved ^ (moved << jnp.uint32(shift))
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def nibbles(words: jt.Int32[jax.Array, "*words one"]) -> jt.Int32[jax.Array, "*words codes"]:
    """Returns the eight codes of each of `nibble_words`' words, in their order, along the last axis."""
    # The exchanges left code 4c + 2b + a in nibble 4b + 2a + c.
    places = [4 * (p >> 1 & 1) + 2 * (p & 1) + (p >> 2) for p in range(8)]
    left = jnp.array([28 - 4 * place for place in places], jnp.int32)
    shape = (*words.shape[:-1], 8)
    codes = jnp.broadcast_to(words, shape) << jnp.broadcast_to(left, shape)
    return codes >> jnp.int32(28)  # with its sign


def _sum_bits(bits: jax.Array, count: int) -> jax.Array:
    weights = jnp.asarray(1, bits.dtype) << jnp.arange(count, dtype=bits.dtype)
    weights = weights.reshape((1,) * (bits.ndim - 1) + (count,))
    return jnp.sum(bits * weights, axis=-1, dtype=bits.dtype)


def _word(bits: int) -> Any:
    """Returns the smallest unsigned type that is worth computing codes of so many bits in."""
    return jnp.uint16 if bits <= 16 else jnp.uint32


def _check_bits(bits: int) -> None:
    check_whole("bits of a packed code", bits, 1, 32)
