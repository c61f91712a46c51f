"""A trunk of training from which branches leave, each cooled down to a length of its own."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from experiments.harness import train


@dataclasses.dataclass
class Trunk:
    """A run whose state stays where the last branch left it.

    Attributes:
        step: of `train.make_step`.
        state: of the trunk; donated as it trains on.
        batches: at the state's position.
        mesh: of the state.
        checkpoints: from the name of the trunk or of a branch to where it is saved.
        options: further arguments of `train.fit`.
        history: of the trunk.
    """

    step: Callable
    state: train.TrainState
    batches: Any
    mesh: Mesh
    checkpoints: Callable[[str], contextlib.AbstractContextManager]
    options: dict[str, Any]
    history: train.History = dataclasses.field(default_factory=list)

    def grow(self, schedule: train.Schedule, steps: int) -> None:
        """Trains the trunk to a step."""
        self.state, self.history = self._fit(self.state, schedule, steps, "trunk")

    def branch(
        self, schedule: train.Schedule, steps: int, name: str
    ) -> tuple[train.TrainState, train.History]:
        """Trains a copy to a step: its state and its whole history."""
        position = self.batches.get_state()
        found = self._fit(train.copy_state(self.state), schedule, steps, name)
        self.batches.set_state(position)
        return found

    def _fit(self, state: train.TrainState, schedule: train.Schedule, steps: int, name: str):
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
                **self.options,
            )
