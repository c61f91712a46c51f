"""What does quantization-aware training buy over quantizing after training?

A vision transformer and a byte-level language model are trained in full precision.  From each start
quantization after training by several methods, and further training with quantized products by several
estimators, at the same widths; the reference gets the same further training in full precision.  The study
compares accuracy, calibration, robustness, bytes and measured latency, and names the regressions that the
mean does not show.

    python -m experiments.qat_efficiency --preset=laptop --workdir=DIR

Sources: Esser et al. 2020, arXiv 1902.08153 (LSQ); Panferov et al. 2025, arXiv 2502.05003 (QuEST); Frantar et
al. 2022, arXiv 2210.17323 (GPTQ); Lin et al. 2023, arXiv 2306.00978 (AWQ); Xiao et al. 2022, arXiv
2211.10438 (SmoothQuant).
"""

from experiments.qat_efficiency.report import to_text
from experiments.qat_efficiency.study import PRESETS, STUDY, Config, run

__all__ = ["PRESETS", "STUDY", "Config", "run", "to_text"]
