"""How long does a quantized train step take, beside float32's and beside the peers'?

The same transformer's train step, written in Flax Linen and in Flax NNX, is timed with the linears'
products computed in float32, in bfloat16, by jaxquant, and by its peers Qwix and AQT: all in one process,
in turn, round after round.  Reported are ratios within a round, for on a shared machine the times
themselves say little.  Beside that, `fake_quant` of a large matrix is timed against one pass over it.

    python -m experiments.benchmark --preset=laptop --workdir=DIR

The peers come with ``pip install "jaxquant[experiments,benchmark]"``; ``--config.peers=False`` leaves
them out.
"""

from experiments.benchmark.report import to_text
from experiments.benchmark.study import PRESETS, Config, run

__all__ = ["PRESETS", "Config", "run", "to_text"]
