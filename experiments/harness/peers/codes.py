"""The optimizer state of other libraries, bit for bit: blocks of codes with a scale.

A moment is cut into blocks of consecutive elements, row by row.  A block keeps its largest magnitude as its
scale, and of each element x the index of the codebook value next to x / scale:

    decoded = values[code] · scale

Each peer's way of going to the next value, ties and last bits included, is a row of thresholds: a code is
how many of them lie at or below x / scale.

Sources: torchao 0.18, `torchao/optim`: quant_utils.py, subclass_4bit.py, subclass_8bit.py; bitsandbytes 0.50,
`functional.py` and the CUDA kernel `kOptimizerStatic8bit2StateBlockwise` of `csrc/kernels.cu`; Dettmers et
al. 2022, arXiv 2110.02861; Li et al. 2023, arXiv 2309.01507.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant import Codebook

MIN_SIZE = 4096  # elements; a smaller leaf is exact, at both peers
# Up to so many thresholds, comparing with each is cheaper than a bisection's gathers.
_COMPARE_ALL = 15


class Coded(NamedTuple):
    """A moment as it is stored; its arrays' bytes are all that a moment takes.

    The codebook is not among them: it is a constant of the program, the same for every leaf.  torchao holds
    one more copy of it per moment (64 bytes, or 1 KiB at 8 bits), bitsandbytes one for all.

    Attributes:
        codes: uint8 of the leaf's shape; or two of 4 bits to a byte, [size / 2], the first in the upper half.
        scale: float32[⌈size / block⌉].
    """

    codes: jt.UInt8[jax.Array, "..."]
    scale: jt.Float32[jax.Array, " blocks"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rounding:
    """A codebook, and where it goes from one value to the next.

    Attributes:
        codebook: its values, rising.
        thresholds: for each value but the first, the least number that is rounded to it or beyond.
        keeps_sign: whether a negative number that would become zero becomes the value below it.
    """

    codebook: Codebook
    thresholds: np.ndarray
    keeps_sign: bool = False

    @property
    def zero(self) -> int:
        """The code of zero."""
        return list(self.codebook.values).index(0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Peer:
    """The properties that distinguish one library's optimizer state from another's.

    Attributes:
        name: as reports call it.
        bits: of a code, 4 or 8.
        block: elements that share a scale.
        only_whole_blocks: whether a leaf that is not a whole number of blocks is exact.
        least_scale: below which no scale is stored.
        mu: how the first moment is rounded.
        nu: how the second moment is rounded.
    """

    name: str
    bits: int
    block: int
    only_whole_blocks: bool
    least_scale: float
    mu: Rounding
    nu: Rounding


# ---------------------------------------------------------------------------------------------------
# Codebooks


def dynamic_map(bits: int, signed: bool) -> jt.Float32[np.ndarray, " values"]:
    """Returns the dynamic map to the peers' last bit, which is float32's in every operation.

    For i from 0 to e − 1 with e = bits − 1: 10^(i − e + 1) times the midpoints of 2^i equal intervals of
    [0.1, 1], of 2^(i+1) where unsigned; with 0 and 1, and the negatives of all but 1 where signed.
    (`jaxquant.formats.dynamic_map` rounds once, and differs in the last bit of a third of the values.)

    Args:
        bits: 2 to 8.
        signed: whether negative values are on the map.

    Source: Dettmers 2016, arXiv 1511.04561; `create_dynamic_map` of bitsandbytes and torchao.

    >>> dynamic_map(4, signed=True)[8:]
    array([0.0055    , 0.0325    , 0.0775    , 0.21249999, 0.4375    ,
           0.6625    , 0.8875    , 1.        ], dtype=float32)
    """
    values = [np.array([0, 1], np.float32)]
    for i in range(bits - 1):
        ends = _linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = np.float32(10.0 ** (i - bits + 2)) * ((ends[1:] + ends[:-1]) / np.float32(2))
        values += [means, -means] if signed else [means]
    return np.sort(np.concatenate(values))


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """Returns torch's linspace: from both ends to the middle, each number with one rounding."""
    first, last = np.float32(start), np.float32(end)
    step, i = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
    rising, falling = first + step * i, last - step * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)


def _torchao_rounding(values: np.ndarray) -> Rounding:
    """x goes up from a where x − a ≥ (b − a) / 2 in float32: ties go up."""
    below, half = values[:-1], np.diff(values) * np.float32(0.5)
    x = below + half
    # x − a is rounded, so the least x that goes up may be some floats away from a + half.
    while (too_high := np.nextafter(x, np.float32(-np.inf)) - below >= half).any():
        x = np.where(too_high, np.nextafter(x, np.float32(-np.inf)), x)
    while (too_low := x - below < half).any():
        x = np.where(too_low, np.nextafter(x, np.float32(np.inf)), x)
    return Rounding(Codebook(values.tolist()), x)


def _bitsandbytes_rounding(values: np.ndarray, signed: bool) -> Rounding:
    """x goes to the nearer, with ties to the even code, where the kernel's bisection ends."""
    middle = (values[1:] + values[:-1]) * np.float32(0.5)
    is_even = np.arange(len(middle)) % 2 == 0
    thresholds = np.where(is_even, np.nextafter(middle, np.float32(np.inf)), middle)
    return Rounding(Codebook(values.tolist()), thresholds, keeps_sign=signed)


@functools.cache
def torchao(bits: int = 4) -> Peer:
    """Returns torchao's state: `AdamW4bit`'s or `AdamW8bit`'s.

    At 4 bits: the signed dynamic map, and k/16 from k = 1, which has no zero, in blocks of 128; at 8: both
    dynamic maps in blocks of 256.

    Args:
        bits: 4 or 8.

    Raises:
        ValueError: other bits.

    >>> torchao(4).mu.codebook.bits, torchao(8).block
    (4, 256)
    """
    if isinstance(bits, bool) or bits not in (4, 8):
        raise ValueError(f"torchao's AdamW has state of bits=4 or bits=8; got bits={bits!r}")
    bits = int(bits)
    linear = np.arange(1, 17, dtype=np.float32) / np.float32(16)
    return Peer(
        name=f"torchao {bits}-bit",
        bits=bits,
        block=128 if bits == 4 else 256,
        only_whole_blocks=True,
        least_scale=1e-12,
        mu=_torchao_rounding(dynamic_map(bits, signed=True)),
        nu=_torchao_rounding(linear if bits == 4 else dynamic_map(8, signed=False)),
    )


@functools.cache
def bitsandbytes() -> Peer:
    """Returns bitsandbytes' state, `AdamW8bit`'s: both dynamic maps of 8 bits, blocks of 256.

    A negative first moment is never rounded to zero, a positive one may be: the kernel compares sign bits,
    and zero's is a positive number's.

    >>> bitsandbytes().block
    256
    """
    return Peer(
        name="bitsandbytes 8-bit",
        bits=8,
        block=256,
        only_whole_blocks=False,
        least_scale=0.0,
        mu=_bitsandbytes_rounding(dynamic_map(8, signed=True), signed=True),
        nu=_bitsandbytes_rounding(dynamic_map(8, signed=False), signed=False),
    )


# ---------------------------------------------------------------------------------------------------
# Moments


def eligible(shape: Sequence[int], peer: Peer) -> bool:
    """Returns whether the moments of a leaf of this shape are coded; the others are float32.

    >>> eligible((64, 64), torchao(4)), eligible((63, 65), torchao(4)), eligible((63, 67), bitsandbytes())
    (True, False, True)
    """
    size = math.prod(shape)
    return size >= MIN_SIZE and not (peer.only_whole_blocks and size % peer.block)


def zeros(shape: Sequence[int], peer: Peer) -> Coded | jt.Float32[jax.Array, "..."]:
    """Returns a moment before the first step: all scales are zero, so that every code is decoded to zero.

    >>> zeros((64, 64), torchao(4)).codes.nbytes, zeros((64, 64), torchao(4)).scale.nbytes
    (2048, 128)
    """
    if not eligible(shape, peer):
        return jnp.zeros(shape, jnp.float32)
    size = math.prod(shape)
    codes = jnp.zeros(shape if peer.bits == 8 else size // 2, jnp.uint8)
    return Coded(codes, jnp.zeros(-(-size // peer.block), jnp.float32))


def encode(x: jt.Float32[jax.Array, "..."], peer: Peer, rounding: Rounding) -> Coded:
    """Returns a moment's codes and scales.

    Args:
        x: of an eligible shape.
        peer: whose blocks and packing.
        rounding: the peer's `mu` or `nu`.

    >>> moment = jnp.linspace(-1, 1, 4096)
    >>> coded = encode(moment, torchao(8), torchao(8).mu)
    >>> bool(jnp.abs(decode(coded, moment.shape, torchao(8), torchao(8).mu) - moment).max() < 0.01)
    True
    """
    blocks = _blocked(x, peer)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=1), peer.least_scale)
    ratio = blocks / jnp.where(scale == 0, 1, scale)[:, None]
    codes = _rounded(ratio, rounding.thresholds)
    if rounding.keeps_sign:
        becomes_zero = jnp.signbit(ratio) & (codes == rounding.zero)
        codes = codes - becomes_zero.astype(jnp.uint8)
    codes = codes.ravel()[: x.size]
    if peer.bits == 8:
        return Coded(codes.reshape(x.shape), scale)
    return Coded(_packed(codes), scale)


def decode(
    coded: Coded, shape: Sequence[int], peer: Peer, rounding: Rounding
) -> jt.Float32[jax.Array, "..."]:
    """Returns the moment that is stored.

    Args:
        coded: its codes and scales.
        shape: the leaf's.
        peer: whose blocks and packing.
        rounding: the peer's `mu` or `nu`.
    """
    codes = _unpack(coded.codes) if peer.bits == 4 else coded.codes
    values = rounding.codebook.decode(_blocked(codes, peer)) * coded.scale[:, None]
    return values.ravel()[: math.prod(shape)].reshape(shape)


def _packed(codes_N: jax.Array) -> jax.Array:
    """Returns two codes for each byte, as one word; slices would compute all codes twice."""
    words = jax.lax.bitcast_convert_type(codes_N.reshape(-1, 2), jnp.uint16)
    return (((words & 15) << 4) | (words >> 8)).astype(jnp.uint8)


def _unpack(codes: jax.Array) -> jax.Array:
    """Returns [bytes, 2] of the codes, the upper half first, which is a word's lower byte."""
    words = codes.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((words >> 4) | ((words & 15) << 8), jnp.uint8)


def _blocked(x: jax.Array, peer: Peer) -> jax.Array:
    """Returns [blocks, block] of the elements row by row, the last block filled up with zeros."""
    return jnp.pad(x.ravel(), (0, -x.size % peer.block)).reshape(-1, peer.block)


def _rounded(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """Returns how many thresholds are at or below each element; uint8."""
    if len(thresholds) <= _COMPARE_ALL:
        below = [(x >= threshold).astype(jnp.uint8) for threshold in thresholds]
        return functools.reduce(jnp.add, below)
    # The least power of two above their number, less one, is what the bisection counts to.
    bits = len(thresholds).bit_length()
    padded = jnp.asarray(np.pad(thresholds, (0, 2**bits - len(thresholds)), constant_values=np.inf))
    count = jnp.zeros(x.shape, jnp.int32)
    for half in (1 << bit for bit in reversed(range(bits))):
        count = count + jnp.where(x >= padded[count + (half - 1)], half, 0)
    return count.astype(jnp.uint8)
