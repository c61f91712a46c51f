"""One training run at any scale: a language model, a corpus, a schedule, a mesh.

    python -m experiments.train --preset=laptop --workdir=runs/train
    python -m experiments.train --config.size=83k --config.mesh_data=2 --config.mesh_fsdp=4
    python -m experiments.train --preset=tpu --compile_only --topology=v5e:16x16

Writes ``metrics.json`` (the loss curve) and ``result.json`` (loss on each evaluation split) beside the
checkpoints; stopped at any point, the same command goes on, on the same mesh or another.
``--compile_only`` compiles that very step for TPUs or GPUs that are not there, and says what it takes.
"""

from experiments.train.program import PRESETS, Config
from experiments.train.running import run
from experiments.train.watching import Watching

__all__ = ["PRESETS", "Config", "Watching", "run"]
