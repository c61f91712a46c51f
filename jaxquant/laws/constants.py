"""Published constants, each with where it was printed."""

import dataclasses
from types import MappingProxyType
from typing import Any

from jaxquant.laws.forms import CHEN_QAT, KUMAR, KUMAR_PTQ, SUN_FLOAT, free_efficiency
from jaxquant.laws.law import Law, check_params


@dataclasses.dataclass(frozen=True)
class Published:
    """A law with the constants that were published for it.

    Attributes:
        law: the form.
        params: a number for each of its parameters.
        source: where they stand.
        within: from column to the range that they were fitted over, where that is known.
    """

    law: Law
    params: Any
    source: str
    within: Any = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_params(self.law, self.params)
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        object.__setattr__(self, "within", MappingProxyType(dict(self.within)))


_TABLE_2 = "arXiv 2411.04330, Table 2: 465 runs and more, Transformer++, integers, forward only"
_KUMAR_RANGE = {"N": (30e6, 220e6), "D": (1.5e9, 26e9)}

KUMAR_2024 = Published(
    KUMAR,
    {
        "A": 4.299e3,
        "alpha": 0.4965,
        "B": 1.806e4,
        "beta": 0.4965,
        "E": 2.7648,
        "gamma_w": 2.6745,
        "n_w": 0.3037,
        "gamma_a": 2.2102,
        "n_a": 1.4072,
        "gamma_kv": 0.9578,
        "n_kv": 2.4185,
    },
    f"{_TABLE_2}; α and β were fitted as one",
    # Trained from 3 bits on; at 3 bits of activations the table's constants make f negative.
    _KUMAR_RANGE | {"P_w": (3, 16), "P_a": (4, 16), "P_kv": (3, 16)},
)

# The printed exponent is −P_post/γ_post + b; C_T here is C_T e^b.
_KUMAR_B = 1.1277
KUMAR_2024_PTQ = Published(
    KUMAR_PTQ,
    {
        "C_T": 0.0598 * 2.718281828459045**_KUMAR_B,
        "gamma_D": 0.5068,
        "gamma_N": 0.3439,
        "gamma_post": 0.5907,
    },
    f"{_TABLE_2}; C_T = 0.0598 e^b with the table's b = {_KUMAR_B}",
    _KUMAR_RANGE,
)

# QuEST's own efficiencies (W = A bits), beside bfloat16's 1; its A and α, with E = 0.0014, are a joint fit
# that identifies neither, so that the law takes Kumar's of N and D.
QUEST_2025_EFFICIENCY = MappingProxyType({1: 0.0205, 2: 0.152, 3: 0.433, 4: 0.692, 8: 1.016})
QUEST_2025_A, QUEST_2025_ALPHA, QUEST_2025_N = 8.134, 0.0627, 30e6
QUEST_2025 = Published(
    free_efficiency(*QUEST_2025_EFFICIENCY),
    {name: KUMAR_2024.params[name] for name in ("A", "alpha", "B", "beta", "E")}
    | {f"eff_{bits}": value for bits, value in QUEST_2025_EFFICIENCY.items()},
    "efficiencies of arXiv 2502.05003; A, B, α, β, E and the range of arXiv 2411.04330, Table 2",
    _KUMAR_RANGE,
)

# Losses of its 30M models by estimator, with bfloat16's, from which efficiencies follow (arXiv 2502.05003).
QUEST_2025_BF16 = 3.2071
QUEST_2025_LOSSES = MappingProxyType(
    {
        "ste": {8: 3.222, 7: 3.239, 6: 3.336, 5: 3.522, 4: 3.792, 3: 4.449, 2: 4.793, 1: 5.256},
        "lsq": {8: 3.230, 7: 3.236, 6: 3.243, 5: 3.265, 4: 3.310, 3: 3.410, 2: 3.600, 1: 3.990},
        "quest": {8: 3.209, 7: 3.211, 6: 3.218, 5: 3.232, 4: 3.272, 3: 3.372, 2: 3.574, 1: 3.945},
    }
)

SUN_2025 = Published(
    SUN_FLOAT,
    {
        "n": 69.2343,
        "alpha": 0.2368,
        "d": 68973.06,
        "beta": 0.5162,
        "epsilon": 1.9061,
        "gamma": 11334.52,
        "delta": 3.1926,
        "nu": 2.9543,
    },
    "arXiv 2501.02423",
)

CHEN_2025_W4A4 = Published(
    CHEN_QAT,
    {"k": 0.1582, "gamma_N": 0.2186, "gamma_D": 0.0745, "gamma_G": 0.7779},
    "arXiv 2505.14302, W4A4 (read second-hand)",
)
