"""What do few bits in the forward and in the backward pass cost, and which recipe costs least?

Language models of several sizes N are trained to several lengths D with P_forward bits in the forward
products and P_backward bits in both gradient products, rounded to nearest, stochastically or by EDEN, with
and without a random Hadamard rotation; and by published recipes, beside full precision.  Bits are data: one
compiled step serves all pairs of a size and a method.  At the end of each run the bias and the variance of
its gradient are measured.

    python -m experiments.gradient_precision --preset=laptop --workdir=DIR

Sources: NVIDIA 2025, arXiv 2509.25149 (NVFP4); Castro et al. 2025, arXiv 2505.14669 (Quartet); Panferov et
al. 2026, arXiv 2601.22813 (Quartet II); Mishra et al. 2025, arXiv 2506.08027 (MXFP8).
"""

from experiments.gradient_precision.report import to_text
from experiments.gradient_precision.study import PRESETS, STUDY, Config, run

__all__ = ["PRESETS", "STUDY", "Config", "run", "to_text"]
