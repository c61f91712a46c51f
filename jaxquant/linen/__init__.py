"""Quantization of Flax Linen modules, their code unchanged: rules, training, ranges, freezing.

quantized = jq.linen.quantize(module, {".*": "w8a8"})    # the same parameters, quantized products
variables = quantized.init(key, x)                        # or those that the module was trained with
variables = jq.linen.calibrate(quantized, variables, batches)    # fixed ranges of activations
frozen = jq.linen.freeze(quantized, variables, x)         # stored integers
quantized.apply(frozen, x)                                # the same logits bit for bit
jq.linen.save(folder, quantized, frozen, x)               # a folder, and load(folder, module, x) from it
"""

from jaxquant.linen.calibrating import calibrate
from jaxquant.linen.freezing import freeze
from jaxquant.linen.quantizing import Quantized, coverage, quantize
from jaxquant.linen.saving import load, save

__all__ = ["Quantized", "calibrate", "coverage", "freeze", "load", "quantize", "save"]
