"""What does training in P bits cost, and which P is best?

Language models of several sizes N are trained to several lengths D with weights, activations and the
attention's keys and values in P_w, P_a and P_kv bits, by straight-through rounding, learned steps (LSQ) or
QuEST, on integer or floating-point grids.  Bits are data: one compiled step serves all widths of a size and a
method. Each trained model is also served with its weights at other widths.  Laws of precision are fitted to
the records and ranked; each gives the precision that is best for a budget, with its interval.

    python -m experiments.training_precision --preset=laptop --workdir=DIR

Sources: Kumar et al. 2024, "Scaling Laws for Precision", arXiv 2411.04330; Panferov et al. 2025 (QuEST),
arXiv 2502.05003; Esser et al. 2020 (LSQ), arXiv 1902.08153.
"""

from experiments.training_precision.report import to_text
from experiments.training_precision.study import PRESETS, STUDY, Config, load, run

__all__ = ["PRESETS", "STUDY", "Config", "load", "run", "to_text"]
