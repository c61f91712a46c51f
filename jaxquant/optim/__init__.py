"""Optimizer state in few bits, for any optax transformation.

    tx = quantize_state(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), adaptive(4.5))

The state is stored in pages of bit planes (`jaxquant.optim.pages`), and the width of each page is data.
`Companded` and `Logarithmic` are the codecs; `Codec` is the base class for others.  The policies are
`fixed`, `by_role`, `uniform`, `split` and `adaptive`.  `explain_full_decode` names the parameters whose
state a step decodes at once, and gives the reason.  `stochastic_apply` trains parameters in bfloat16
without a copy in float32.
"""

from typing import Any

from jaxquant.optim.adapting import adaptive
from jaxquant.optim.applying import in_float32, stochastic_apply
from jaxquant.optim.codecs import Codec, Companded, Logarithmic
from jaxquant.optim.deprecated import warn_renamed
from jaxquant.optim.diagnosing import Diagnosis, diagnose
from jaxquant.optim.exchange import from_optax, load, save, to_optax
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.policies import Policy, by_role, fixed, split, uniform
from jaxquant.optim.quantizing import apply, bytes_moved, explain_full_decode, quantize_state
from jaxquant.optim.report import Report, report, state_bytes
from jaxquant.optim.scoring import LayerStatistics, UpdateSensitivity
from jaxquant.optim.state import QuantizedState

__all__ = [
    "Codec",
    "Companded",
    "Diagnosis",
    "LayerStatistics",
    "Leaf",
    "Logarithmic",
    "Policy",
    "QuantizedState",
    "Report",
    "UpdateSensitivity",
    "adaptive",
    "apply",
    "by_role",
    "bytes_moved",
    "diagnose",
    "explain_full_decode",
    "fixed",
    "from_optax",
    "in_float32",
    "load",
    "quantize_state",
    "report",
    "save",
    "split",
    "state_bytes",
    "stochastic_apply",
    "to_optax",
    "uniform",
]

_RENAMED = {
    "Felt": "UpdateSensitivity",
    "Statistics": "LayerStatistics",
    "even": "uniform",
    "traffic": "bytes_moved",
    "whole": "explain_full_decode",
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warn_renamed(f"{__name__}.{name}", new)
    return globals()[new]
