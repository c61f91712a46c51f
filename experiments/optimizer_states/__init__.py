"""How few bits can an optimizer's state have, and does it pay to move them?

A byte-level language model and a vision transformer are trained with AdamW whose state is held in full
precision, in fixed widths, in the codecs of torchao and bitsandbytes, and in widths that adapt under a
budget; beside each adaptive arm stands an even allocation of the same budget.  Seeds, data order and
schedules are the same in all arms, so that differences are paired.

    python -m experiments.optimizer_states --preset=laptop --workdir=DIR

Sources: STQuant 2026, arXiv 2604.06836; Dettmers et al. 2022, arXiv 2110.02861; Li et al. 2023,
arXiv 2309.01507.
"""

from experiments.optimizer_states.report import to_text
from experiments.optimizer_states.study import PRESETS, STUDY, Config, run

__all__ = ["PRESETS", "STUDY", "Config", "run", "to_text"]
