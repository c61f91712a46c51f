"""What does quantizing real models cost, and does the gate see when it costs too much?

SmolLM2-135M (bits per byte of text), MiniLM-L6 (agreement with human judgements) and a vision transformer
(accuracy) are quantized after training in the usual ways; each is compared with what it was, and judged.

    python -m experiments.pretrained_quantization --preset=laptop --workdir=DIR

The language model's weights come from files that already lie on a 4-bit grid in groups of 32 (Q4_1): what is
said here about its weights is about fewer bits, or coarser groups, than those.

Sources: GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978; SmoothQuant, arXiv 2211.10438; rotations, QuaRot,
arXiv 2404.00456.
"""

from experiments.pretrained_quantization.report import to_text
from experiments.pretrained_quantization.study import PRESETS, STUDY, Config, run

__all__ = ["PRESETS", "STUDY", "Config", "run", "to_text"]
