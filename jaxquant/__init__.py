"""Numerical precision for neural networks in JAX and Flax.

    import jaxquant as jq

Formats (`Int`, `Float`) are grids.  A `Quantizer` says how a tensor is laid onto one.  Three verbs act
on it: `quantize`, `dequantize`, `fake_quant`.  `DotGeneral` goes wherever `jax.lax.dot_general` goes,
`recipe` names the usual ones, and `jq.nnx.quantize` puts them into a Flax model.
"""

from jaxquant import calibration, nnx, rounding
from jaxquant.dot import DotGeneral, Operands
from jaxquant.formats import BF16, E2M1, E4M3, E5M2, FP16, INT4, INT8, Float, Format, Int
from jaxquant.qarray import QArray, Quantizer, dequantize, fake_quant, quantize
from jaxquant.recipes import recipe

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "E2M1",
    "E4M3",
    "E5M2",
    "FP16",
    "INT4",
    "INT8",
    "DotGeneral",
    "Float",
    "Format",
    "Int",
    "Operands",
    "QArray",
    "Quantizer",
    "calibration",
    "dequantize",
    "fake_quant",
    "nnx",
    "quantize",
    "recipe",
    "rounding",
]
