"""Numerical precision for neural networks in JAX and Flax.

    import jaxquant as jq

Formats (`Int`, `Float`, `Codebook`, `Block`) are grids.  A `Quantizer` says how a tensor is rounded to
one.  Three verbs act on it: `quantize`, `dequantize`, `fake_quant`.  `DotGeneral`, `einsum`,
`ConvGeneralDilated` and `RaggedDot` go wherever lax's own go, `recipe` names the usual ones, and
`jq.nnx.quantize` puts them into a Flax model, `jq.functions.quantize` into any function.
"""

from jaxquant import (
    artifacts,
    formats,
    functions,
    laws,
    linen,
    moved,
    nnx,
    optim,
    ptq,
    quality,
)
from jaxquant.artifacts import serving, specification, storage
from jaxquant.engine.rules import last_layers
from jaxquant.formats import (
    BF16,
    BINARY,
    DYNAMIC8,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
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
    Block,
    Codebook,
    Float,
    Format,
    Int,
    parse,
)
from jaxquant.numerics import calibration, estimators, rounding
from jaxquant.numerics.hadamard import hadamard
from jaxquant.numerics.qarray import QArray, calibrate, dequantize, fake_quant, quantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations import monitoring
from jaxquant.operations.attention import Attention, KVCache
from jaxquant.operations.backward import BackwardOperands
from jaxquant.operations.conv import ConvGeneralDilated
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.einsum import einsum
from jaxquant.operations.operands import Operands
from jaxquant.operations.platforms import PlatformTable, platforms
from jaxquant.operations.ragged import RaggedDot
from jaxquant.operations.recipes import recipe
from jaxquant.quality import versions

__version__ = "0.1.0"

moved.install()


def __getattr__(name: str):
    if name in moved.PLACES:
        return moved.module(name, stacklevel=3)
    raise AttributeError(f"module 'jaxquant' has no attribute {name!r}")


__all__ = [
    "BF16",
    "BINARY",
    "DYNAMIC8",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "E5M6",
    "E8M0",
    "FP16",
    "INT2",
    "INT4",
    "INT8",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "MXINT8",
    "NF4",
    "NVFP4",
    "TERNARY",
    "Attention",
    "BackwardOperands",
    "Block",
    "Codebook",
    "ConvGeneralDilated",
    "DotGeneral",
    "Float",
    "Format",
    "Int",
    "KVCache",
    "Operands",
    "PlatformTable",
    "QArray",
    "Quantizer",
    "RaggedDot",
    "artifacts",
    "calibrate",
    "calibration",
    "dequantize",
    "einsum",
    "estimators",
    "fake_quant",
    "formats",
    "functions",
    "hadamard",
    "last_layers",
    "laws",
    "linen",
    "monitoring",
    "nnx",
    "optim",
    "parse",
    "platforms",
    "ptq",
    "quality",
    "quantize",
    "recipe",
    "rounding",
    "serving",
    "specification",
    "storage",
    "versions",
]
