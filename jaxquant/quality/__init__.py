"""A model beside its quantized twin: a paired comparison, a verdict, and a monitor of drift.

`compare` (or `per_example` by batches, then `summarize`) tells what quantization changed, example by
example; `compare_embeddings` does so for encoders, and `compare_weights` looks at each layer's weights.
`gate` turns reports into pass, fail or inconclusive, with reasons.  `activation_statistics` and `drift`
watch a model that is in use.
"""

from jaxquant.quality.comparison import calibration_error, compare, summarize
from jaxquant.quality.corruption import CorruptionReport, corruption_error
from jaxquant.quality.embeddings import (
    EmbeddingReport,
    JudgmentReport,
    PairReport,
    compare_embeddings,
)
from jaxquant.quality.examples import Examples, per_example
from jaxquant.quality.gates import TIERS, Check, Tier, Verdict, gate
from jaxquant.quality.intervals import Interval
from jaxquant.quality.monitor import (
    ActivationDrift,
    ActivationStatistics,
    Alarm,
    DriftReport,
    activation_statistics,
    drift,
)
from jaxquant.quality.report import Divergence, Flips, Group, MarginBin, Report, Scores
from jaxquant.quality.weights import WeightReport, WeightRow, compare_weights

__all__ = [
    "TIERS",
    "ActivationDrift",
    "ActivationStatistics",
    "Alarm",
    "Check",
    "CorruptionReport",
    "Divergence",
    "DriftReport",
    "EmbeddingReport",
    "Examples",
    "Flips",
    "Group",
    "Interval",
    "JudgmentReport",
    "MarginBin",
    "PairReport",
    "Report",
    "Scores",
    "Tier",
    "Verdict",
    "WeightReport",
    "WeightRow",
    "activation_statistics",
    "calibration_error",
    "compare",
    "compare_embeddings",
    "compare_weights",
    "corruption_error",
    "drift",
    "gate",
    "per_example",
    "summarize",
]
