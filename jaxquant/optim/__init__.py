"""Optimizer state in few bits, for any optax transformation.

    tx = quantize_state(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), fixed(5, 4))

States lie in pages of bit planes (`jaxquant.pages`) whose widths are data.  `Companded` and `Logarithmic` are
the codecs, `fixed` and `by_role` the policies; `whole` says which parameters' state a step decodes at once.
"""

from jaxquant.optim.codecs import Companded, Logarithmic
from jaxquant.optim.policies import Policy, by_role, fixed
from jaxquant.optim.quantizing import quantize_state, traffic, whole
from jaxquant.optim.state import QuantizedState

__all__ = [
    "Companded",
    "Logarithmic",
    "Policy",
    "QuantizedState",
    "by_role",
    "fixed",
    "quantize_state",
    "traffic",
    "whole",
]
