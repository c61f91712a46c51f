"""Quantization of Flax NNX models, their code unchanged: rules, training, statistics, freezing.

quantized = jq.nnx.quantize(model, {".*": "w8a8"})   # the same parameters, quantized products
jq.nnx.calibrate(quantized, batches)                 # activations' ranges, or where learned steps start
frozen = jq.nnx.freeze(quantized)                    # stored integers, the same logits bit for bit
"""

from jaxquant.nnx.freezing import freeze
from jaxquant.nnx.modules import Observation, StepSize, Stored, read, write
from jaxquant.nnx.observing import calibrate, observe
from jaxquant.nnx.quantizing import coverage, quantize
from jaxquant.nnx.saving import load, save

__all__ = [
    "Observation",
    "StepSize",
    "Stored",
    "calibrate",
    "coverage",
    "freeze",
    "load",
    "observe",
    "quantize",
    "read",
    "save",
    "write",
]
