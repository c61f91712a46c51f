"""One trial, trained from its newest checkpoint to a record's results."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxquant as jq
from experiments.harness.running import machine, trials
from experiments.harness.training import arms, sharding, train
from experiments.harness.training.arms import HINDSIGHT, budget_of, first_pass
from experiments.optimizer_states.tasks import Task, Trial, make_task, step_cost


@functools.lru_cache(maxsize=8)
def _compiled(trial: Trial) -> tuple[Task, Any, Any, Any]:
    """(task, transformation, mesh, step) of an arm: schedules and seeds are data of one compiled step."""
    task, mesh = make_task(dataclasses.replace(trial, arm="")), sharding.make_mesh()
    tx = arms.optimizer(trial.arm, trial.interval, trial.steps)
    step = train.make_step(task.loss, tx, mesh, apply=arms.apply_of(trial.arm))
    return task, tx, mesh, step


class _Run:
    """A trial under way; `name` is its checkpoints'."""

    def __init__(self, trial: Trial, context: trials.Context, name: str = "run"):
        self.trial, self.context, self._name = trial, context, name
        self.task, tx, self._mesh, self._step = _compiled(
            dataclasses.replace(trial, schedule="", seed=0, peak_lr=0.0, is_tuning=False)
        )
        self.state = train.init_state(self._weights, tx, self._mesh)
        self._batches, self.curve = self.task.batches(trial.seed), []

    def _weights(self) -> Any:
        """The first weights, in the type of the arm."""
        dtype = arms.weights_dtype(self.trial.arm)
        return jax.tree.map(
            lambda x: x.astype(dtype), nnx.state(self.task.make(self.trial.seed), nnx.Param)
        )

    def to(self, steps: int) -> None:
        """Trains to a step, from the newest checkpoint where there is one."""
        with self.context.checkpoints(self._name) as checkpoints:
            self.state, self.curve = train.fit(
                self._step,
                self.state,
                self._batches,
                self.trial.plan(),
                steps,
                self._mesh,
                history=self.curve,
                checkpoints=checkpoints,
                log_every=self.trial.log_every,
                log_at=self.trial.stops,
                checkpoint_every=self.trial.checkpoint_every,
                on_log=lambda n, loss: self.context.progress(
                    n * step_cost(self.trial), f"{self.trial.arm}: loss {loss:.3f}"
                ),
            )

    def start_with(self, scores: Any) -> None:
        """Sets the scores that the first step decides the widths by."""
        first, own, *rest = self.state.opt_state
        opt_state = (first, arms.with_scores(own, scores), *rest)
        self.state = dataclasses.replace(self.state, opt_state=opt_state)

    def widths(self, steps: int) -> dict:
        """Trains to a step and looks at the widths there."""
        self.to(steps)
        return _widths(steps, self.state.opt_state)


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, looking at the widths now and then, and returns the record's results."""
    run = _Run(trial, context)
    if (budget_of(trial.arm) or ("",))[0] == HINDSIGHT:
        scores = context.cached("scores", functools.partial(_scores, trial, context))
        run.start_with(scores)
    elements = sum(x.size for x in jax.tree.leaves(run.state.params))
    head = {"versions": machine.versions(), "parameters": elements}
    try:
        found = [
            context.cached(f"widths-{stop}", functools.partial(run.widths, stop))
            for stop in trial.stops
        ]
        run.to(trial.steps)
    except train.Diverged as error:
        return head | {"status": "diverged", "step": error.step}
    return head | {
        "status": "done",
        "measures": run.task.evaluate(run.state.params),
        "curve": [list(entry) for entry in run.curve],
        "state_bytes": arms.state_bytes(trial.arm, run.state.opt_state),
        "snapshots": [x for x in found if x["leaves"]],
    }


def _scores(trial: Trial, context: trials.Context) -> Any:
    """The scores at the end of a run of the same seed, for the hindsight of its budget."""
    first = _Run(dataclasses.replace(trial, arm=first_pass(trial.arm)), context, "first")
    first.to(trial.steps)
    found = arms.scores_of(arms.state_of(first.state.opt_state))
    return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def _widths(steps: int, opt_state: Any) -> dict:
    """Bits of each coded leaf now; none of an arm whose widths are not ours."""
    rows = jq.optim.report(opt_state).rows if arms.is_quantized(opt_state) else ()
    leaves = [
        {"slot": row.slot, "path": row.path, "role": row.role, "bits": row.bits}
        | {"elements": int(np.prod(row.shape))}
        for row in rows
        if not row.reason
    ]
    return {"step": steps, "leaves": leaves}
