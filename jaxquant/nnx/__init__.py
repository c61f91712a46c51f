"""Quantization of Flax NNX models, their code unchanged: rules, training, statistics, freezing.

quantized = jq.nnx.quantize(model, {".*": "w8a8"})   # the same parameters, quantized products
jq.nnx.calibrate(quantized, batches)                 # activations' ranges, or where learned steps start
frozen = jq.nnx.freeze(quantized)                    # stored integers, the same logits bit for bit
"""

from jaxquant.nnx.adapting import add_lora, merge_lora, unfreeze
from jaxquant.nnx.calibrating import calibrate
from jaxquant.nnx.delaying import value_and_grad
from jaxquant.nnx.modules import (
    ChannelScale,
    DelayedScales,
    InputRange,
    StepSize,
    Stored,
    read,
    write,
)
from jaxquant.nnx.monitoring import monitor
from jaxquant.nnx.observing import Statistic, observe
from jaxquant.nnx.quantizing import coverage, quantize
from jaxquant.nnx.saving import load, save
from jaxquant.nnx.storing import freeze

__all__ = [
    "ChannelScale",
    "DelayedScales",
    "InputRange",
    "Statistic",
    "StepSize",
    "Stored",
    "add_lora",
    "calibrate",
    "coverage",
    "freeze",
    "load",
    "merge_lora",
    "monitor",
    "observe",
    "quantize",
    "read",
    "save",
    "unfreeze",
    "value_and_grad",
    "write",
]
