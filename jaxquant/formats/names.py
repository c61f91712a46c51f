"""Formats by name: the usual ones as constants, and `parse`, the only door for strings."""

import re
from typing import Any

from jaxquant.formats.base import KNOWN, Format
from jaxquant.formats.block import Block
from jaxquant.formats.codebook import Codebook, dynamic_map
from jaxquant.formats.floating import CONVENTIONS, Float
from jaxquant.formats.integer import Int

INT2, INT4, INT8 = Int(2), Int(4), Int(8)
BINARY, TERNARY = Int(1, "midrise"), INT2
E2M1, E2M3, E3M2 = Float(2, 1, "finite"), Float(2, 3, "finite"), Float(3, 2, "finite")
E4M3, E5M2, E5M6 = Float(4, 3, "fn"), Float(5, 2), Float(5, 6)
E4M3FNUZ, E5M2FNUZ = Float(4, 3, "fnuz"), Float(5, 2, "fnuz")
E8M0 = Float(8, 0, "fnu")
FP16, BF16 = Float(5, 10), Float(8, 7)

# Dettmers et al. 2023, arXiv 2305.14314, appendix E: the published table, which is computed in lower
# precision than `normal_float` and is what existing checkpoints decode with.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
DYNAMIC8, UDYNAMIC8 = dynamic_map(8), dynamic_map(8, signed=False)

MXFP8, MXFP6, MXFP4 = Block(E4M3, 32, E8M0), Block(E3M2, 32, E8M0), Block(E2M1, 32, E8M0)
MXINT8 = Block(INT8, 32, E8M0)
NVFP4 = Block(E2M1, 16, E4M3, levels=2)

_NAMED: dict[str, Format | Block] = {
    "fp16": FP16,
    "bf16": BF16,
    "nf4": NF4,
    "dynamic8": DYNAMIC8,
    "udynamic8": UDYNAMIC8,
    "mxfp8": MXFP8,
    "mxfp6": MXFP6,
    "mxfp4": MXFP4,
    "mxint8": MXINT8,
    "nvfp4": NVFP4,
}
KNOWN.update({value: name for name, value in _NAMED.items()})

_INT = re.compile(r"(u?)int([1-9][0-9]*)(full|midrise)?")
_FLOAT = re.compile(r"e([1-9])m(0|[1-9][0-9]*)(fn|fnuz|finite|fnu)?")
_CODEBOOK = re.compile(r"codebook\((.*)\)")
_BLOCK = re.compile(
    r"block\((.*),([1-9][0-9]*)(?:x([1-9][0-9]*))?,([^,()]*),([12])(?:,(nearest|up|down|ocp|quartet))?\)"
)


def parse(name: str) -> Any:
    """Returns the format of a name; `str` is its inverse, and no format has two names.

    ============================== ============================================================
    name                           format
    ============================== ============================================================
    int4, int4full, int4midrise    `Int(4)` and its other levels
    uint4                          `Int(4, "unsigned")`
    e5m6, e4m3fn, e4m3fnuz, …      `Float(e, m, convention)`; e2m1finite; e8m0fnu
    fp16, bf16                     `Float(5, 10)`, `Float(8, 7)`
    nf4, dynamic8, udynamic8       `NF4`, `dynamic_map(8)`, and its unsigned sister
    codebook(-1.0,0.0,1.0)         `Codebook((-1.0, 0.0, 1.0))`
    mxfp8, mxfp6, mxfp4, mxint8    blocks of 32 with E8M0 scales (mxfp6 has E3M2 elements)
    nvfp4                          blocks of 16 with E4M3 scales under a float32 scale
    block(int4,64,fp16,1)          `Block(Int(4), 64, FP16)`
    block(int4,16x16,e4m3fn,2)     `Block(Int(4), (16, 16), E4M3, 2)`, a scale for each tile
    block(e4m3fn,32,e8m0fnu,1,ocp) `Block(E4M3, 32, E8M0, conversion="ocp")`
    ============================== ============================================================

    Raises:
        ValueError: another name, or one whose parameters make no format.

    >>> parse("int4"), str(parse("e3m4")), parse("nvfp4").size
    (Int(bits=4, levels='symmetric'), 'e3m4', 16)
    """
    if not isinstance(name, str):
        raise ValueError(f"a format's name is a string such as 'int4'; got {name!r}")
    if name in _NAMED:
        return _NAMED[name]
    if match := _INT.fullmatch(name):
        if not (match[1] and match[3]):
            levels: Any = "unsigned" if match[1] else match[3] or "symmetric"
            return Int(int(match[2]), levels)
    elif match := _FLOAT.fullmatch(name):
        convention: Any = match[3] or "ieee"
        return _canonical(name, Float(int(match[1]), int(match[2]), convention))
    elif match := _CODEBOOK.fullmatch(name):
        try:
            values = tuple(float(v) for v in match[1].split(","))
        except ValueError:
            raise ValueError(f"{name!r}: a codebook's values are numbers between commas") from None
        return _canonical(name, Codebook(values))
    elif match := _BLOCK.fullmatch(name):
        size = (int(match[2]), int(match[3])) if match[3] else int(match[2])
        conversion: Any = match[6]
        block = Block(parse(match[1]), size, parse(match[4]), int(match[5]), conversion)
        return _canonical(name, block)
    raise ValueError(
        f"no format is named {name!r}; names are like int4, uint8, int4full, int1midrise, e5m2, e4m3fn "
        f"(conventions {', '.join(CONVENTIONS)}), codebook(-1.0,0.0,1.0), block(int4,64,fp16,1), "
        f"and {', '.join(_NAMED)}"
    )


def _canonical(name: str, format: Any) -> Any:
    if str(format) != name:
        raise ValueError(f"{name!r} is written {str(format)!r}")
    return format


def is_named(format: Any) -> bool:
    """Returns whether `parse` gives a format again from its text, so that what is saved can be read."""
    try:
        return parse(str(format)) == format
    except ValueError:
        return False
