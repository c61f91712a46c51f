"""Number formats as grids: the values that a format can represent, and nothing about where they are used.

A format is a frozen pytree.  Its precision is *data*: parameters given as Python numbers are static,
and such a format can be stored; parameters given as arrays are traced, one compiled program serves
all their values, and such a format can only be simulated.
"""

from jaxquant.formats.base import Format, code_dtype, divide, in_float32, is_format, is_static
from jaxquant.formats.block import Block
from jaxquant.formats.codebook import Codebook, dynamic_map, normal_float
from jaxquant.formats.floating import CONVENTIONS, Convention, Float
from jaxquant.formats.integer import INT_BITS, Int, Levels
from jaxquant.formats.names import (
    BF16,
    BINARY,
    DYNAMIC8,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E5M6,
    E8M0,
    FP16,
    INT2,
    INT4,
    INT8,
    MXFP4,
    MXFP6,
    MXFP8,
    MXINT8,
    NF4,
    NVFP4,
    TERNARY,
    UDYNAMIC8,
    parse,
)

__all__ = [
    "BF16",
    "BINARY",
    "CONVENTIONS",
    "DYNAMIC8",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "E5M6",
    "E8M0",
    "FP16",
    "INT2",
    "INT4",
    "INT8",
    "INT_BITS",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "MXINT8",
    "NF4",
    "NVFP4",
    "TERNARY",
    "UDYNAMIC8",
    "Block",
    "Codebook",
    "Convention",
    "Float",
    "Format",
    "Int",
    "Levels",
    "code_dtype",
    "divide",
    "dynamic_map",
    "in_float32",
    "is_format",
    "is_static",
    "normal_float",
    "parse",
]
