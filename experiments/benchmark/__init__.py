"""How long do a quantized train step and a frozen model's pass take, beside float32's and the peers'?

The same transformer's train step, written in Flax Linen and in Flax NNX, is timed with the linears'
products computed in float32, in bfloat16, by jaxquant, and by its peers Qwix and AQT: all in one process,
in turn, round after round.  Reported are ratios within a round, for on a shared machine the times
themselves say little.  Beside that, `fake_quant` of a large matrix is timed against one pass over it.

Serving is timed in the same way: forward passes of the model in float32, in bfloat16, frozen by jaxquant and
quantized by Qwix, and the decoding of one token with weights alone quantized.

Optimizers are timed on a matrix, on the model's parameters and within a train step, beside the bytes of their
state: optax's AdamW in float32, jaxquant's quantized state, and the codecs of torchao and bitsandbytes.
``--config.parts=train``, ``=serve`` or ``=optim`` measures one of the three.

    python -m experiments.benchmark --preset=laptop --workdir=DIR

The peers come with ``pip install "jaxquant[experiments,benchmark]"``; ``--config.peers=False`` leaves
them out.
"""

from experiments.benchmark.report import to_text
from experiments.benchmark.study import PRESETS, Config, run

__all__ = ["PRESETS", "Config", "run", "to_text"]
