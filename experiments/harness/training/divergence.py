"""Policies for spikes and for losses that are not finite."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

ACTIONS = ("stop", "skip", "roll_back")
_RECENT = 10  # entries of the history that say what is usual
_FEWEST = 3


class Diverged(RuntimeError):
    """Training reached a loss that is not finite, or a spike; `step` is the first step known to be so."""

    def __init__(self, step: int, loss: float, tried: str = ""):
        super().__init__(
            f"training diverged: the loss is {loss} by step {step}{tried}; a lower learning rate, stronger "
            "clipping or wider formats may help"
        )
        self.step, self.loss = step, loss


@dataclasses.dataclass(frozen=True)
class DivergencePolicy:
    """A policy for losses and gradients that are not finite, and for spikes.

    Attributes:
        action: "stop" ends the run; "skip" leaves out the update of that step, and stops where all of an
            interval are; "roll_back" goes back to a checkpoint and on from there with the data that follows.
        spike: a loss so many times the usual one, the median of the last ten entries of the history, counts
            as one; infinity for none.
        steps: to roll back at least.
        most: rollbacks in a row.
    """

    action: str = "stop"
    spike: float = math.inf
    steps: int = 1
    most: int = 3

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise ValueError(
                f"the divergence policy's action must be one of {', '.join(ACTIONS)}; got {self.action!r}"
            )
        if not self.spike > 1:
            raise ValueError(
                f"the divergence policy's spike must be a factor above 1; got {self.spike}"
            )
        if self.steps < 1 or self.most < 1:
            raise ValueError(
                f"the divergence policy's steps and most must be at least 1; got {self.steps} and {self.most}"
            )

    def limit(self, history: Sequence[tuple[int, float]]) -> float:
        """Returns the loss above which a step is a spike, after (step, loss) so far.

        >>> DivergencePolicy(spike=2.0).limit([(10, 5.0), (20, 3.0), (30, 4.0)])
        8.0
        """
        if len(history) < _FEWEST:
            return math.inf
        return self.spike * statistics.median(loss for _, loss in history[-_RECENT:])
