"""One trial: a model trained in full precision, and every arm that starts from it."""

import contextlib
import dataclasses
import functools
import math
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
from experiments.qat_efficiency.measuring import all_logits, bit_operations, logits, measure

METHODS = ("rtn", "gptq", "awq", "smoothquant", "hadamard+gptq")
ESTIMATORS = tuple(tasks.SUFFIXES)
REFERENCE, AGAIN = "float", "float again"
_AGAIN_SEED = 1_000_000  # beyond the seeds of training
_STEP_BATCHES = 8  # that learned steps of activations start from
_WARMUP = 0.1  # the share of a run in which the learning rate rises


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model that is compared with the reference.

    Attributes:
        family: ``"float"``, ``"ptq"`` or ``"qat"``.
        method: of quantizing after training, or the estimator of training; for float "again" or "".
        width: as `tasks.parse_width`; empty for float.
        group: neighbours along a weight's inputs that share a scale; 0 is a whole output channel.
        ranges: of the weights after training, of `tasks.RANGES`.
        activations: what shares a scale of the activations after training, of `tasks.ACTIVATIONS`.
    """

    family: str
    method: str = ""
    width: str = ""
    group: int = 0
    ranges: str = "absmax"
    activations: str = "tensor"

    @property
    def setting(self) -> str:
        """The method with all that is chosen beside it.

        >>> Arm("ptq", "gptq", "w4a4", 32, "searched", "token").setting
        'gptq g32 searched token'
        """
        parts = [self.method]
        parts += [f"g{self.group}"] if self.group else []
        parts += [] if self.ranges == "absmax" else [self.ranges]
        parts += [] if self.activations == "tensor" else [self.activations]
        return " ".join(parts)

    @property
    def name(self) -> str:
        if self.family == "float":
            return f"float {self.method}".strip()
        return f"{self.family} {self.setting} {self.width}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model and a seed: its training in full precision, and all arms.

    Attributes:
        task: the model and its data.
        seed: of the parameters and of the data's order.
        steps: of training in full precision.
        finetune_steps: more, of every arm that trains and of the reference.
        peak_lr: of the training in full precision.
        rates: of which the largest rate of the further steps is chosen, as shares of `peak_lr`; see
            `TrialRunner`.
        calibration_batches: training batches that statistics are taken from.
        widths, methods, estimators: the arms.
        groups, activations: of the arms, as of `Arm`; where they suit the method.
        log_every, checkpoint_every: steps.
    """

    task: tasks.Settings
    seed: int
    steps: int
    finetune_steps: int
    peak_lr: float
    rates: tuple[float, ...]
    calibration_batches: int
    widths: tuple[str, ...]
    methods: tuple[str, ...]
    estimators: tuple[str, ...]
    groups: tuple[int, ...]
    activations: tuple[str, ...]
    log_every: int
    checkpoint_every: int

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, the reference first."""
        quantized = [
            arm for width in self.widths for arm in (*self._after(width), *self._with(width))
        ]
        return (Arm("float"), Arm("float", "again"), *quantized)

    def _after(self, width: str) -> list[Arm]:
        """Arms after training: rounding to nearest as it is usual, all that is to be chosen for others."""
        activations = ("tensor",) if _is_weight_only(width) else self.activations
        made = []
        for method in (method for method in self.methods if suits(method, width)):
            is_plain = method == "rtn"
            made += [
                Arm("ptq", method, width, group, ranges, rows)
                for group in self._groups(width)
                for ranges in (tasks.RANGES if tasks.is_grouped(width) else tasks.RANGES[:1])
                for rows in activations
                if not is_plain or (ranges, rows) == (tasks.RANGES[0], activations[0])
            ]
        return made

    def _with(self, width: str) -> list[Arm]:
        return [
            Arm("qat", estimator, width, group)
            for estimator in self.estimators
            for group in self._groups(width)
        ]

    def _groups(self, width: str) -> tuple[int, ...]:
        return self.groups if tasks.is_grouped(width) else (0,)


def suits(method: str, width: str) -> bool:
    """AWQ is for weights alone, SmoothQuant for weights and activations; the others are for both."""
    weight_only = _is_weight_only(width)
    return {"awq": weight_only, "smoothquant": not weight_only}.get(method, True)


def _is_weight_only(width: str) -> bool:
    return tasks.parse_width(width)[1] == 16


def cost(trial: Trial) -> float:
    """Training steps of a trial; an arm that does not train counts half of one that does."""
    return trial.steps + sum(_arm_cost(trial, arm) for arm in trial.arms)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return (trial.task,)


def _arm_cost(trial: Trial, arm: Arm) -> float:
    runs = len(trial.rates) if arm.name == REFERENCE or _is_tuned(trial, arm) else 1.0
    return trial.finetune_steps * (0.5 if arm.family == "ptq" else runs)


def _is_tuned(trial: Trial, arm: Arm) -> bool:
    """Whether an arm's rate is searched, and not another's."""
    is_first = arm.group == trial.groups[0]
    return arm.family == "qat" and tasks.is_grouped(arm.width) and is_first


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
        runner.rates[arm] = result.get("rate")
        context.progress(_arm_cost(trial, arm), arm.name)
        arms.append({**dataclasses.asdict(arm), **result})
    widths = (None, *trial.widths)
    derived = {width or "": bit_operations(runner.task, width) for width in widths}
    return head | {
        "status": "done",
        "reference_rate": runner.rate,
        "derived": derived,
        "arms": arms,
    }


class TrialRunner:
    """A trial under way.

    Rates of the further steps are chosen on the selection, in each trial: the reference's among all;
    with training at 4 bits and fewer, each estimator's at each width among all, with weights in the first of
    the groups, which other groups take over.  With more bits training takes the reference's.
    """

    def __init__(self, trial: Trial, context: trials.Context):
        self.trial, self.context = trial, context
        self.task = tasks.make_task(trial.task)
        self._calibration = self.task.calibration(trial.calibration_batches, trial.seed)
        self._base: Any = None  # parameters after training in full precision
        self._position: Any = None  # of the data, there
        self._reference: Any = None  # the reference model's parameters
        self.rate = 0.0  # of its further steps
        self.rates: dict[Arm, float | None] = {}  # of the arms that are finished
        self._model = self.task.make(trial.seed)

    def train_reference(self) -> None:
        """Trains in full precision, then on with the arms' further steps: the reference.

        Of the rates of the further steps it takes the one that is best on the selection.
        """
        trial = self.trial
        batches = self.task.batches(trial.seed)
        plan = train.cosine(trial.peak_lr, trial.steps, _warmup(trial.steps))
        state = self._fit(self._model, batches, plan, trial.steps, "base")
        self._base, self._position = state.params, batches.get_state()
        found = {
            rate: self._finetune(self._on_base(), f"reference-{rate:g}", rate).params
            for rate in trial.rates
        }
        scores = {rate: self._score(self._with(params)) for rate, params in found.items()}
        self.rate = max(scores, key=scores.__getitem__)
        self._reference = found[self.rate]

    def _score(self, model: nnx.Module) -> float:
        """What decides, accuracy or NLL on the selection, with the sign that more is better."""
        split, batch = self.task.selection, self.task.settings.evaluation_batch
        found = logits(model, split.inputs, batch)
        if not np.isfinite(found).all():
            return -math.inf
        metric, sign = tasks.PRIMARY[self.task.settings.model]
        return sign * getattr(jq.quality.compare(found, found, split.labels).quantized, metric)

    @functools.cached_property
    def _reference_logits(self) -> dict[str, np.ndarray]:
        return all_logits(self._with(self._reference), self.task)

    @functools.cached_property
    def _statistics(self) -> jq.ptq.SharedStatistics:
        """What the reference's layers are given, seen once for all arms after training."""
        return jq.ptq.SharedStatistics(self._with(self._reference), self._calibration)

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
        if folder.startswith(("base", "reference")) or steps > self.trial.checkpoint_every:
            return self.context.checkpoints(folder)
        return contextlib.nullcontext()

    def _finetune(self, model: nnx.Module, folder: str, rate: float, seed: int | None = None):
        """The further steps: on the batches that follow those of training, or in another order."""
        batches = self.task.batches(self.trial.seed if seed is None else seed)
        if seed is None:
            batches.set_state(self._position)
        steps = self.trial.finetune_steps
        plan = train.cosine(rate * self.trial.peak_lr, steps, _warmup(steps), floor=0.0)
        return self._fit(model, batches, plan, steps, folder)

    def result(self, arm: Arm) -> dict:
        """An arm as it is served, measured beside the reference; of one that is trained, its rate."""
        try:
            if arm.family == "qat":
                model, rate = self._trained(arm)
                return measure(model, self.task, self._reference_logits) | {"rate": rate}
            model = self._make(arm)
        except train.Diverged as error:
            return {"status": "diverged", "step": error.step}
        return measure(model, self.task, self._reference_logits)

    def _make(self, arm: Arm) -> nnx.Module:
        if arm.name == REFERENCE:
            return self._with(self._reference)
        if arm.name == AGAIN:
            seed = _AGAIN_SEED + self.trial.seed
            return self._with(self._finetune(self._on_base(), "again", self.rate, seed).params)
        shared = self._statistics
        rules = arm_rules(self.task, arm)
        options = {"shared": shared, "progress": False}
        return jq.ptq.quantize(shared.model, rules, self._calibration, arm.method, **options)

    def _trained(self, arm: Arm) -> tuple[nnx.Module, float]:
        """An arm that trains, frozen, at the best of its rates, and that rate."""
        found: list[tuple[float, nnx.Module, float]] = []
        diverged = None
        for rate in self._rates_of(arm):
            model = quantized(self._on_base(), self.task, arm, self._calibration[:_STEP_BATCHES])
            folder = f"{arm.name} {rate:g}".replace(" ", "-")
            try:
                nnx.update(model, self._finetune(model, folder, rate).params)
            except train.Diverged as error:
                diverged = error
                continue
            frozen = jq.nnx.freeze(model)
            found.append((self._score(frozen), frozen, rate))
        if not found:
            assert diverged is not None
            raise diverged
        _, model, rate = max(found, key=lambda one: one[0])
        return model, rate

    def _rates_of(self, arm: Arm) -> tuple[float, ...]:
        if _is_tuned(self.trial, arm):
            return self.trial.rates
        if not tasks.is_grouped(arm.width):
            return (self.rate,)
        first = self.rates.get(dataclasses.replace(arm, group=self.trial.groups[0]))
        # Where that one came to no end there is none to take over.
        return self.trial.rates if first is None else (first,)


def arm_rules(task: tasks.Task, arm: Arm) -> dict[str, str | jq.DotGeneral]:
    """An arm's recipes, by layer."""
    estimator = arm.method if arm.family == "qat" else "ste"
    settings = (estimator, arm.group, arm.ranges, arm.activations)
    return tasks.rules(task.settings.model, arm.width, *settings)


def quantized(model: nnx.Module, task: tasks.Task, arm: Arm, calibration: list) -> nnx.Module:
    """A float model as it is trained in an arm; learned steps have their start."""
    name = task.settings.model
    model = jq.nnx.quantize(model, arm_rules(task, arm))
    if arm.method == "lsq" and tasks.parse_width(arm.width)[1] != 16:
        jq.nnx.calibrate(model, calibration)
        # The first and the last layer find their ranges at each call, as in every other arm.
        model = jq.nnx.quantize(model, tasks.outer_rules(name, arm.width))
    return model


def _warmup(steps: int) -> int:
    return max(1, round(_WARMUP * steps))
