"""Published peak rates of chips in matrix products, and what these make a product of P bits cost.

None of them is measured here.  A real step is slower than its chip's peak, in few bits more so: quantizing
takes time, and products of small matrices wait for memory.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxquant.laws.optimum import FULL_BITS, check_bits, throughput

_A100 = {"bf16": 312e12, "s8": 624e12}
_H100 = {"bf16": 989e12, "s8": 1979e12, "f8": 1979e12}
_B200 = {"bf16": 2250e12, "s8": 4500e12, "f8": 4500e12, "f4": 9000e12}

# Operations a second of one chip by the type of both operands: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,
# tpu7x}, and NVIDIA's data sheets of A100 (SXM), H100 (SXM), H200 and HGX B200; where a sheet has sparse
# operands, half of it.  A type that is not here is not multiplied by the chip, or its peak is not published.
PEAKS = {
    "v5e": {"bf16": 197e12, "s8": 393e12},
    "v5p": {"bf16": 459e12, "s8": 918e12},
    "v6e": {"bf16": 918e12, "s8": 1836e12},
    "tpu7x": {"bf16": 2307e12, "f8": 4614e12},
    "A100": _A100,
    "H100": _H100,
    "H200": _H100,
    "B200": _B200,
}
# The types that hold values of a kind, with the most bits of these: an integer of 8 bits or fewer is an s8,
# E2M1 an f4, and E2M1 to E4M3 and E5M2 are each an f8.
OPERANDS = {"int": {"s8": 8}, "float": {"f4": 4, "f8": 8}}


@dataclasses.dataclass(frozen=True)
class ChipCost:
    """c(P) of a chip: bf16's peak rate over that of the narrowest type it multiplies that holds P bits.

    A type that the chip does not multiply costs as the next wider one that it does, bf16 in the end.  Scales
    are taken to cost nothing: with one for each block of a tensor, chips other than B200 multiply in bf16.

    Attributes:
        chip: of `PEAKS`.
        operands: of `OPERANDS`.
        types: (most bits, type, its rate beside bf16's), narrowest first; bf16 last.
    """

    chip: str
    operands: str
    types: tuple[tuple[int, str, float], ...]

    def __call__(self, bits: Any) -> Any:
        """Returns the cost of a product whose operands both have so many bits, beside a 16-bit one.

        Raises:
            ValueError: no numbers above 0; more than 16 bits, whose rates differ from those here.
        """
        bits = np.asarray(check_bits("bits", bits), float)
        if np.any(bits > FULL_BITS):
            raise ValueError(
                f"costs of {self.chip} are of up to {FULL_BITS} bits; got {bits.max():g}"
            )
        return throughput({most: rate for most, _, rate in self.types})(bits)

    def __str__(self) -> str:
        least, found = 1, []
        for most, name, rate in self.types:
            found.append(f"{least} to {most} bits as {name} ({rate:.2f} × bf16)")
            least = most + 1
        return f"{self.operands} on {self.chip}, by published dense peaks: {', '.join(found)}"


def chip_cost(chip: str, operands: str = "int") -> ChipCost:
    """Returns c(P) = r_bf16 / r(P) of a chip, r its published peak rate in dense products.

    Args:
        chip: of `PEAKS`: v5e, v5p, v6e, tpu7x, A100, H100, H200 or B200, in either case.
        operands: what has P bits: ``"int"``, which is multiplied as s8 up to 8 bits, or ``"float"``, as f4 up
            to 4 bits and f8 up to 8.  A type that the chip does not multiply costs as the next wider one that
            it does, in the end as bf16, as do all bits from 9 to 16.

    Raises:
        ValueError: another chip, or other operands.

    Source: Google's and NVIDIA's data sheets, as `PEAKS` has them.

    >>> print(chip_cost("h100"))
    int on H100, by published dense peaks: 1 to 8 bits as s8 (2.00 × bf16), 9 to 16 bits as bf16 (1.00 × bf16)
    >>> chip_cost("b200", "float")([4, 8, 16])
    array([0.25, 0.5 , 1.  ])
    >>> chip_cost("tpu7x", "int")(8.0).item()  # it multiplies f8, and no s8
    1.0
    """
    named = {name.lower(): name for name in PEAKS}
    if not isinstance(chip, str) or chip.lower() not in named:
        raise ValueError(f"chip is one of {', '.join(PEAKS)}; got {chip!r}")
    if not isinstance(operands, str) or operands not in OPERANDS:
        raise ValueError(f"operands is one of {', '.join(OPERANDS)}; got {operands!r}")
    name = named[chip.lower()]
    peaks, base = PEAKS[name], PEAKS[name]["bf16"]
    narrow = [(most, t, peaks[t] / base) for t, most in OPERANDS[operands].items() if t in peaks]
    return ChipCost(name, operands, (*narrow, (FULL_BITS, "bf16", 1.0)))
