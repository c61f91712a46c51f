"""Does longer training make a model more fragile to quantization?

Models of several sizes N are trained to several lengths D, under two learning-rate schedules, and then
quantized after training (round to nearest, weights only).  The study reports the loss that this adds
against D/N, and the exponent γ_D of δ ∝ D^γ_D beside the published 0.507.

    python -m experiments.ptq_overtraining --preset=laptop --workdir=DIR

Source: Kumar et al. 2024, "Scaling Laws for Precision", arXiv 2411.04330, section 3; the confounding
with the schedule is from Catalan-Tatjer et al. 2025, arXiv 2510.06213.
"""

from experiments.ptq_overtraining.report import to_text
from experiments.ptq_overtraining.study import PRESETS, STUDY, Config, run

__all__ = ["PRESETS", "STUDY", "Config", "run", "to_text"]
