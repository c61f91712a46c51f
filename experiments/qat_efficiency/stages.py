"""One trial: a model trained in full precision, and every arm that starts from it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from experiments.harness.running import trials
from experiments.harness.training import sharding, train
from experiments.qat_efficiency import tasks
from experiments.qat_efficiency.measuring import all_logits, bit_operations, measure

METHODS = ("rtn", "gptq", "awq", "smoothquant", "hadamard+gptq")
ESTIMATORS = tuple(tasks.SUFFIXES)
REFERENCE, AGAIN = "float", "float again"
_AGAIN_SEED = 1_000_000  # beyond the seeds of training
_WARMUP = 0.1  # the share of a run in which the learning rate rises


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model that is compared with the reference.

    Attributes:
        family: ``"float"``, ``"ptq"`` or ``"qat"``.
        method: of quantizing after training, or the estimator of training; for float "again" or "".
        width: as `tasks.parse_width`; empty for float.
    """

    family: str
    method: str = ""
    width: str = ""

    @property
    def name(self) -> str:
        if self.family == "float":
            return f"float {self.method}".strip()
        return f"{self.family} {self.method} {self.width}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model and a seed: its training in full precision, and all arms.

    Attributes:
        task: the model and its data.
        seed: of the parameters and of the data's order.
        steps: of training in full precision.
        finetune_steps: more, of every arm that trains and of the reference.
        peak_lr: of the training in full precision.
        finetune_lr: the largest rate of the further steps.
        calibration_batches: training batches that statistics are taken from.
        widths, methods, estimators: the arms.
        log_every, checkpoint_every: steps.
    """

    task: tasks.Settings
    seed: int
    steps: int
    finetune_steps: int
    peak_lr: float
    finetune_lr: float
    calibration_batches: int
    widths: tuple[str, ...]
    methods: tuple[str, ...]
    estimators: tuple[str, ...]
    log_every: int
    checkpoint_every: int

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, the reference first."""
        quantized = [
            arm
            for width in self.widths
            for arm in (
                *(Arm("ptq", method, width) for method in self.methods if suits(method, width)),
                *(Arm("qat", estimator, width) for estimator in self.estimators),
            )
        ]
        return (Arm("float"), Arm("float", "again"), *quantized)


def suits(method: str, width: str) -> bool:
    """AWQ is for weights alone, SmoothQuant for weights and activations; the others are for both."""
    weight_only = tasks.parse_width(width)[1] == 16
    return {"awq": weight_only, "smoothquant": not weight_only}.get(method, True)


def cost(trial: Trial) -> float:
    """Training steps of a trial; an arm that does not train counts half of one that does."""
    return trial.steps + sum(_arm_cost(trial, arm) for arm in trial.arms)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return (trial.task,)


def _arm_cost(trial: Trial, arm: Arm) -> float:
    return trial.finetune_steps * (0.5 if arm.family == "ptq" else 1.0)


@functools.lru_cache
def _mesh():
    return sharding.make_mesh()


@functools.lru_cache
def _step(loss: Callable[[nnx.GraphDef], train.Loss], graphdef: nnx.GraphDef):
    """One compiled step for every seed and schedule of a model as it is quantized."""
    return train.make_step(loss(graphdef), train.adamw_and_steps(), _mesh())


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, makes and measures every arm, and returns the record's results."""
    head = {
        "versions": {
            "jaxquant": jq.__version__,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
    }
    runner = TrialRunner(trial, context)
    try:
        runner.train_reference()
    except train.Diverged as error:
        return head | {"status": "diverged", "step": error.step, "arms": []}
    arms = []
    for arm in trial.arms:
        name = arm.name.replace(" ", "-")
        result = context.cached(name, functools.partial(runner.result, arm))
        context.progress(_arm_cost(trial, arm), arm.name)
        arms.append({**dataclasses.asdict(arm), **result})
    widths = (None, *trial.widths)
    derived = {width or "": bit_operations(runner.task, width) for width in widths}
    return head | {"status": "done", "derived": derived, "arms": arms}


class TrialRunner:
    """A trial under way."""

    def __init__(self, trial: Trial, context: trials.Context):
        self.trial, self.context = trial, context
        self.task = tasks.make_task(trial.task)
        self._calibration = self.task.calibration(trial.calibration_batches, trial.seed)
        self._base: Any = None  # parameters after training in full precision
        self._position: Any = None  # of the data, there
        self._reference: Any = None  # the reference model's parameters
        self._model = self.task.make(trial.seed)

    def train_reference(self) -> None:
        """Trains in full precision, then on with the arms' further steps: the reference."""
        trial = self.trial
        batches = self.task.batches(trial.seed)
        plan = train.cosine(trial.peak_lr, trial.steps, _warmup(trial.steps))
        state = self._fit(self._model, batches, plan, trial.steps, "base")
        self._base, self._position = state.params, batches.get_state()
        self._reference = self._finetune(self._on_base(), "reference").params

    @functools.cached_property
    def _reference_logits(self) -> dict[str, np.ndarray]:
        return all_logits(self._with(self._reference), self.task)

    def _with(self, params: Any) -> nnx.Module:
        model = self.task.make(self.trial.seed)
        nnx.update(model, params)
        return model

    def _on_base(self) -> nnx.Module:
        return self._with(self._base)

    def _fit(self, model, batches, plan, steps: int, folder: str) -> train.TrainState:
        graphdef, params = nnx.split(model)
        # The step donates its state, and the model's arrays are still wanted.
        params = jax.tree.map(jnp.copy, params)
        tx = train.adamw_and_steps()
        state = train.TrainState(jnp.int32(0), params, tx.init(params))

        def on_log(count: int, loss: float) -> None:
            if folder == "base":  # the other arms are counted when they are finished
                self.context.progress(count, f"loss {loss:.3f}")

        with self._checkpoints(folder, steps) as checkpoints:
            return train.fit(
                _step(self.task.loss, graphdef),
                state,
                batches,
                plan,
                steps,
                _mesh(),
                checkpoints=checkpoints,
                log_every=self.trial.log_every,
                checkpoint_every=self.trial.checkpoint_every,
                on_log=on_log,
            )[0]

    def _checkpoints(self, folder: str, steps: int):
        """Where a run is saved: what others start from always, the others where they are long."""
        if folder in ("base", "reference") or steps > self.trial.checkpoint_every:
            return self.context.checkpoints(folder)
        return contextlib.nullcontext()

    def _finetune(self, model: nnx.Module, folder: str, seed: int | None = None):
        """The further steps: on the batches that follow those of training, or in another order."""
        batches = self.task.batches(self.trial.seed if seed is None else seed)
        if seed is None:
            batches.set_state(self._position)
        steps = self.trial.finetune_steps
        plan = train.cosine(self.trial.finetune_lr, steps, _warmup(steps), floor=0.0)
        return self._fit(model, batches, plan, steps, folder)

    def result(self, arm: Arm) -> dict:
        """An arm as it is served, measured beside the reference."""
        try:
            model = self._make(arm)
        except train.Diverged as error:
            return {"status": "diverged", "step": error.step}
        return measure(model, self.task, self._reference_logits)

    def _make(self, arm: Arm) -> nnx.Module:
        if arm.name == REFERENCE:
            return self._with(self._reference)
        if arm.name == AGAIN:
            seed = _AGAIN_SEED + self.trial.seed
            return self._with(self._finetune(self._on_base(), "again", seed).params)
        chosen = tasks.rules(self.task.settings.model, arm.width)
        if arm.family == "ptq":
            model = self._with(self._reference)
            return jq.ptq.quantize(model, chosen, self._calibration, arm.method, progress=False)
        model = quantized(self._on_base(), self.task, arm, self._calibration)
        state = self._finetune(model, arm.name.replace(" ", "-"))
        nnx.update(model, state.params)
        return jq.nnx.freeze(model)


def quantized(model: nnx.Module, task: tasks.Task, arm: Arm, calibration: list) -> nnx.Module:
    """A float model as it is trained in an arm; learned steps have their start."""
    name = task.settings.model
    model = jq.nnx.quantize(model, tasks.rules(name, arm.width, arm.method))
    if arm.method == "lsq" and tasks.parse_width(arm.width)[1] != 16:
        jq.nnx.calibrate(model, calibration)
        # The first and the last layer find their ranges at each call, as in every other arm.
        model = jq.nnx.quantize(model, tasks.outer_rules(name, arm.width))
    return model


def _warmup(steps: int) -> int:
    return max(1, round(_WARMUP * steps))
