"""Recipes: the usual quantized products by name."""

import re

from jaxquant.dot import DotGeneral, Operands
from jaxquant.formats import INT_BITS, Int
from jaxquant.qarray import Quantizer

_NAME = re.compile(r"w([1-9][0-9]*)a([1-9][0-9]*)(?:g([1-9][0-9]*))?")
_FLOAT_BITS = 16


def recipe(name: str) -> DotGeneral:
    """A ready `DotGeneral` from its name ``w{weight bits}a{activation bits}[g{block size}]``.

    Weights per channel, or in blocks along the contracting axis where ``g`` says so; activations per
    tensor; both on symmetric integer grids with absmax ranges, rounded to nearest.  16 bits means
    left in floating point.  ``w8a8`` and below without blocks multiply integers; the others simulate.

    Args:
        name: such as ``"w8a8"``, ``"w4a16"``, ``"w4a16g128"``.

    Raises:
        ValueError: a name of another form, or a width that is not 2 to 8 or 16.

    Source: Kumar et al. 2024, arXiv 2411.04330, section 2.1, for the granularities.

    >>> recipe("w8a8").forward.arithmetic, recipe("w4a16g128").forward.rhs.granularity
    ('native', 128)
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"a recipe is named w{{bits}}a{{bits}}, as 'w8a8', 'w4a16' or 'w4a16g128'; got {name!r}"
        )
    weight_bits, activation_bits = int(match[1]), int(match[2])
    for bits in (weight_bits, activation_bits):
        if bits != _FLOAT_BITS and not INT_BITS[0] <= bits <= 8:
            raise ValueError(
                f"recipe {name!r}: widths are 2 to 8, or 16 for floating point; got {bits}"
            )
    if match[3] and weight_bits == _FLOAT_BITS:
        raise ValueError(f"recipe {name!r}: a block size needs quantized weights")
    granularity = int(match[3]) if match[3] else "channel"
    lhs = None if activation_bits == _FLOAT_BITS else Quantizer(Int(activation_bits), "tensor")
    rhs = None if weight_bits == _FLOAT_BITS else Quantizer(Int(weight_bits), granularity)
    native = lhs is not None and rhs is not None and granularity == "channel"
    return DotGeneral(Operands(lhs, rhs, "native" if native else "simulated"))
