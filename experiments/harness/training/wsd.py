"""A trunk of training from which branches leave, each cooled down to a length of its own."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from jax.sharding import Mesh

from experiments.harness.training import train


@dataclasses.dataclass
class Trunk:
    """A run whose state stays where the last branch left it.

    Attributes:
        step: of `train.make_step`.
        state: of the trunk; donated as it trains on.
        batches: at the state's position.
        mesh: of the state.
        checkpoints: from the name of the trunk or of a branch to where it is saved.
        stops: the steps where branches leave it.
        options: further arguments of `train.fit`.
        history: of the trunk.
    """

    step: Callable
    state: train.TrainState
    batches: Any
    mesh: Mesh
    checkpoints: Callable[[str], contextlib.AbstractContextManager]
    stops: Collection[int]
    options: dict[str, Any]
    history: train.History = dataclasses.field(default_factory=list)

    def grow(self, schedule: train.Schedule, steps: int) -> None:
        """Trains the trunk to a step.

        Its history does not tell whether it ended at the stops on its way, or began anew after being cut off.
        """
        self.state, self.history = self._fit(self.state, schedule, steps, "trunk", self.stops)

    def branch(
        self, schedule: train.Schedule, steps: int, name: str
    ) -> tuple[train.TrainState, train.History]:
        """Trains a copy to a step: its state and its whole history."""
        position = self.batches.get_state()
        found = self._fit(train.copy_state(self.state), schedule, steps, name)
        self.batches.set_state(position)
        return found

    def _fit(
        self,
        state: train.TrainState,
        schedule: train.Schedule,
        steps: int,
        name: str,
        log_at: Collection[int] = (),
    ):
        with self.checkpoints(name) as checkpoints:
            return train.fit(
                self.step,
                state,
                self.batches,
                schedule,
                steps,
                self.mesh,
                history=self.history,
                checkpoints=checkpoints,
                log_at=log_at,
                **self.options,
            )
