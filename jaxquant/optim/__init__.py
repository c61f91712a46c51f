"""Optimizer state in few bits, for any optax transformation.

    tx = quantize_state(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), adaptive(4.5))

States lie in pages of bit planes (`jaxquant.optim.pages`) whose widths are data.  `Companded` and
`Logarithmic` are the codecs, `Codec` what others need; `fixed`, `by_role`, `even` and `adaptive` the
policies; `whole` says which parameters' state a step decodes at once.
"""

from jaxquant.optim.adapting import adaptive
from jaxquant.optim.codecs import Codec, Companded, Logarithmic
from jaxquant.optim.diagnosing import Diagnosis, diagnose
from jaxquant.optim.exchange import from_optax, load, save, to_optax
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.policies import Policy, by_role, even, fixed
from jaxquant.optim.quantizing import quantize_state, traffic, whole
from jaxquant.optim.report import Report, report, state_bytes
from jaxquant.optim.scoring import Felt, Statistics
from jaxquant.optim.state import QuantizedState

__all__ = [
    "Codec",
    "Companded",
    "Diagnosis",
    "Felt",
    "Leaf",
    "Logarithmic",
    "Policy",
    "QuantizedState",
    "Report",
    "Statistics",
    "adaptive",
    "by_role",
    "diagnose",
    "even",
    "fixed",
    "from_optax",
    "load",
    "quantize_state",
    "report",
    "save",
    "state_bytes",
    "to_optax",
    "traffic",
    "whole",
]
