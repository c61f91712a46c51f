"""Scaling laws of precision: forms as data, fits with intervals, the precision that is best, and plans.

    found = fit(KUMAR, runs)               # runs: columns N, D, P_w, P_a, P_kv, loss
    print(found, optimal_precision(found))
    print(compare([KUMAR, ADDITIVE, CHINCHILLA], runs))
    print(plan(KUMAR_2024, flops=1e21, serve_bits=4, ptq=KUMAR_2024_PTQ))

Nothing here knows of quantizers or models: runs are numbers.
"""

from jaxquant.laws.budgets import precision_at_budget, union
from jaxquant.laws.chips import OPERANDS, PEAKS, ChipCost, chip_cost
from jaxquant.laws.comparison import Comparison, Control, compare, shuffled_bits
from jaxquant.laws.constants import (
    CHEN_2025_W4A4,
    KUMAR_2024,
    KUMAR_2024_PTQ,
    QUEST_2025,
    QUEST_2025_A,
    QUEST_2025_ALPHA,
    QUEST_2025_BF16,
    QUEST_2025_EFFICIENCY,
    QUEST_2025_LOSSES,
    QUEST_2025_N,
    SUN_2025,
    Published,
)
from jaxquant.laws.fitting import Fit, fit
from jaxquant.laws.forms import (
    ADDITIVE,
    CHEN_QAT,
    CHINCHILLA,
    KUMAR,
    KUMAR_BOTH,
    KUMAR_D,
    KUMAR_ONE,
    KUMAR_PTQ,
    KUMAR_UNBIASED,
    KUMAR_UNTIED,
    PANFEROV,
    QID,
    SUN_FLOAT,
    UNIFIED,
    free_efficiency,
    quartet,
    state_law,
)
from jaxquant.laws.growing import (
    ADDITIVE_ERROR,
    ADDITIVE_ONE,
    GAP,
    GAP_ERROR,
    GROWING,
    GROWING_ERROR,
    GROWING_ONE,
    GROWING_WA,
)
from jaxquant.laws.law import COLUMNS, Law, Parameter
from jaxquant.laws.optimum import (
    ERRATA,
    Optimum,
    bits_linear,
    efficiency_from_losses,
    optimal_precision,
    step_cost,
    throughput,
)
from jaxquant.laws.passes import PassPlan, PassRow, plan_passes
from jaxquant.laws.planning import PRECISIONS, Plan, Row, plan
from jaxquant.laws.profiles import profile
from jaxquant.laws.sizes import critical_tokens, optimal_sizes, qat_share
from jaxquant.laws.terms import gaussian_mse

__all__ = [
    "ADDITIVE",
    "ADDITIVE_ERROR",
    "ADDITIVE_ONE",
    "CHEN_2025_W4A4",
    "CHEN_QAT",
    "CHINCHILLA",
    "COLUMNS",
    "ERRATA",
    "GAP",
    "GAP_ERROR",
    "GROWING",
    "GROWING_ERROR",
    "GROWING_ONE",
    "GROWING_WA",
    "KUMAR",
    "KUMAR_2024",
    "KUMAR_2024_PTQ",
    "KUMAR_BOTH",
    "KUMAR_D",
    "KUMAR_ONE",
    "KUMAR_PTQ",
    "KUMAR_UNBIASED",
    "KUMAR_UNTIED",
    "OPERANDS",
    "PANFEROV",
    "PEAKS",
    "PRECISIONS",
    "QID",
    "QUEST_2025",
    "QUEST_2025_A",
    "QUEST_2025_ALPHA",
    "QUEST_2025_BF16",
    "QUEST_2025_EFFICIENCY",
    "QUEST_2025_LOSSES",
    "QUEST_2025_N",
    "SUN_2025",
    "SUN_FLOAT",
    "UNIFIED",
    "ChipCost",
    "Comparison",
    "Control",
    "Fit",
    "Law",
    "Optimum",
    "Parameter",
    "PassPlan",
    "PassRow",
    "Plan",
    "Published",
    "Row",
    "bits_linear",
    "chip_cost",
    "compare",
    "critical_tokens",
    "efficiency_from_losses",
    "fit",
    "free_efficiency",
    "gaussian_mse",
    "optimal_precision",
    "optimal_sizes",
    "plan",
    "plan_passes",
    "precision_at_budget",
    "profile",
    "qat_share",
    "quartet",
    "shuffled_bits",
    "state_law",
    "step_cost",
    "throughput",
    "union",
]
