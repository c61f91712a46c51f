"""What bits cost in a plan: P/16 of a product, or what a chip's published peak rates say."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxquant import laws

KINDS = " or ".join(laws.OPERANDS)
_FORWARD_ONLY = "the runs have no backward widths: their gradient products are in 16 bits"


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What bits cost.

    Attributes:
        chip: of `laws.PEAKS`; None where a product of P bits costs P/16.
        operands: of `laws.OPERANDS`, or None for those that the fit's runs had.
    """

    chip: str | None = None
    operands: str | None = None

    def product(self, own: str) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
        """Returns (c(P) of a product, that in words).

        Args:
            own: operands that the fit's runs had.

        Raises:
            ValueError: operands without a chip; others than are known of either.
        """
        if self.chip is None:
            if self.operands is not None:
                raise ValueError(
                    f"--operands is of --chip, which is not given; got {self.operands!r}"
                )
            return laws.bits_linear, ()
        if self.operands not in (None, *laws.OPERANDS):
            raise ValueError(f"--operands is {KINDS}; got {self.operands!r}")
        try:
            cost = laws.chip_cost(self.chip, self.operands or own)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        other = f"the runs had {own} operands, and what is counted are {cost.operands} ones"
        return cost, (f"cost: {cost}", *([other] if cost.operands != own else []))

    def forward_only(self, own: str) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
        """Returns (c(P) of a step whose gradient products are in 16 bits, that in words)."""
        cost, said = self.product(own)
        if self.chip is None:
            kumar = "C = 6 N D P/16 counts all three products of a step in P bits, as Kumar et al. 2024 do"
            return cost, (f"{_FORWARD_ONLY}; {kumar}",)
        step = f"{_FORWARD_ONLY}, so that a step costs (c(P) + 2 c(16)) / 3"
        return functools.partial(laws.step_cost, cost=cost), (*said, step)

    def of_passes(self, own: str) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
        """Returns (c(P) of a product, what a step of two passes costs in words)."""
        cost, said = self.product(own)
        one = "" if self.chip else ", c(P) = P/16"
        return cost, (*said, f"a step costs (c(P_forward) + 2 c(P_backward)) / 3{one}")
