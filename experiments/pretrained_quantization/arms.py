"""The arms of the study: what is done to each model."""

import dataclasses
from types import MappingProxyType
from typing import Any

_LINEARS, _ATTENTION = r"blocks/\d+/.*", r"blocks/\d+/attention"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to quantize a model.

    Attributes:
        rules: from paths to recipes.
        method: of `jaxquant.ptq.quantize`; None where no weights are quantized.
        searched: recipes that a search chooses among, for the bytes that `rules` would take.
        by_layer: the search chooses for each layer by itself; otherwise for a block's attention and its MLP,
            which a large model measures in a seventh of the time.
        broken: multiply one layer's scales by 1.1, which a gate must notice.
    """

    rules: tuple[tuple[str, str], ...]
    method: str | None = "rtn"
    searched: tuple[str, ...] = ()
    by_layer: bool = False
    broken: bool = False


def _linears(recipe: str, method: str = "rtn", **options: Any) -> Arm:
    return Arm(((_LINEARS, recipe),), method, **options)


_CHOICES = ("w2a16", "w3a16", "w4a16")
_MORE_CHOICES = (*_CHOICES, "w5a16", "w6a16")

ARMS: MappingProxyType[str, dict[str, Arm]] = MappingProxyType(
    {
        "smollm2": {
            "kv8": Arm(((_ATTENTION, "kv8"),), None),
            "kv4": Arm(((_ATTENTION, "kv4"),), None),
            "w8a8 per tensor": _linears("w8a8"),
            "w8a8 per token": _linears("w8a8-token"),
            "w8a8 per token, smoothquant": _linears("w8a8-token", "smoothquant"),
            "w8a8 per token, hadamard": _linears("w8a8-token", "hadamard"),
            "w3 rtn": _linears("w3a16"),
            "w3 gptq": _linears("w3a16", "gptq"),
            "searched, the bytes of w3": _linears("w3a16", searched=_CHOICES),
        },
        "minilm": {
            "w8a8 per tensor": _linears("w8a8"),
            "w8a8 per token": _linears("w8a8-token"),
            "w8a8 per token, broken": _linears("w8a8-token", broken=True),
            "w4g128 rtn": _linears("w4a16g128"),
            "w4g128 gptq": _linears("w4a16g128", "gptq"),
            "w4g128 awq": _linears("w4a16g128", "awq"),
        },
        "vit": {
            "w8a8 per tensor": _linears("w8a8"),
            "w3 rtn": _linears("w3a16"),
            "w3 gptq": _linears("w3a16", "gptq"),
            "searched, the bytes of w3": _linears("w3a16", searched=_MORE_CHOICES, by_layer=True),
        },
    }
)
