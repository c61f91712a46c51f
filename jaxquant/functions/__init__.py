"""The entry point for any function of a pytree of parameters, whoever wrote what it calls.

`quantize` gives the same function with quantized products, `coverage` says what that makes of each product,
`freeze` stores its parameters in few bits, `save` and `load` keep these in a folder, `monitor` gives
statistics of its quantizers, `delayed` has its ranges as state, and `products` lists them.
"""

from jaxquant.engine.products import Product
from jaxquant.engine.walking import products
from jaxquant.functions.coverage import Coverage, coverage
from jaxquant.functions.delaying import DelayedScaling, delayed
from jaxquant.functions.freezing import freeze
from jaxquant.functions.monitoring import monitor
from jaxquant.functions.quantizing import quantize
from jaxquant.functions.saving import load, save

__all__ = [
    "Coverage",
    "DelayedScaling",
    "Product",
    "coverage",
    "delayed",
    "freeze",
    "load",
    "monitor",
    "products",
    "quantize",
    "save",
]
