"""Post-training quantization: from a trained model and a few batches to a frozen one.

    frozen = jq.ptq.quantize(model, {".*": "w4a16g128"}, batches, method="gptq")

`search` spends a budget of bytes where it matters; the methods' mathematics, for one layer at a time, is in
`jaxquant.ptq.solvers` and `jaxquant.ptq.smooth`.
"""

from jaxquant.operations.smoothed import Smoothed
from jaxquant.ptq.quantizing import METHODS, SharedStatistics, quantize
from jaxquant.ptq.searching import Search, search

__all__ = ["METHODS", "Search", "SharedStatistics", "Smoothed", "quantize", "search"]
