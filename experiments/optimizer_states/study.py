"""The grid, one trial, and the run of them all."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from experiments.harness import cli, data, images, models, train, trials, vision
from experiments.harness.checkpoints import Checkpoints
from experiments.optimizer_states import arms, report

STUDY = "optimizer_states"
SCHEDULES = ("wsd", "cosine")
TASKS = ("language", "vision")
COOLDOWN = 0.2  # the share of a WSD run in which the learning rate falls
WARMUP = 0.05
# Every matrix has at least 4096 elements, below which torchao's codecs leave a leaf exact.
LANGUAGE_SIZES = {
    "10k": models.LMConfig(layers=1, width=32, heads=2, kv_heads=2, hidden=64),
    "94k": models.LMConfig(layers=2, width=64, heads=2, kv_heads=2, hidden=160),
    "803k": models.LMConfig(layers=4, width=128, heads=4, kv_heads=4, hidden=352),
    "30m": models.sized("30m"),
}
VISION_SIZES = {
    "8k": vision.ViTConfig(layers=1, width=32, heads=2, hidden=64),
    "98k": vision.ViTConfig(layers=2, width=64, heads=2, hidden=256),
    "442k": vision.sized("small"),
    "1.8m": vision.sized("base"),
}
_LAPTOP_ARMS = (
    arms.EXACT,
    *("fixed-8", "fixed-4", "torchao-4bit", "bitsandbytes-8bit"),
    *("felt-5.0", "statistics-5.0", "even-5.0", "felt-4.0", "even-4.0"),
)


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share."""

    tasks: tuple[str, ...] = TASKS
    arms: tuple[str, ...] = _LAPTOP_ARMS
    schedules: tuple[str, ...] = SCHEDULES
    seeds: int = 3
    language_size: str = "94k"  # of study.py, by the weights of the blocks' products
    vision_size: str = "98k"
    tokens_per_parameter: int = 20
    vision_steps: int = 1000
    text: str = "sotu"  # sotu, text
    text_path: str = ""
    images: str = "fashion_mnist"  # fashion_mnist, digits
    images_path: str = ""
    grid: int = 4  # patches along a side of an image
    sequence: int = 64
    language_batch: int = 16
    vision_batch: int = 64
    language_lr: float = 8e-3  # tuned for full precision: the report shows its neighbours
    vision_lr: float = 4e-3
    tuning: tuple[float, ...] = (0.5, 2.0)  # of those rates, in full precision, one seed
    interval: int = 100  # steps between decisions of adaptive arms
    snapshots: int = 10
    evaluation_windows: int = 512
    evaluation_images: int = 5000
    log_every: int = 50
    checkpoint_every: int = 1000
    workers: int = 0  # 0: one per core on CPU, one on an accelerator


PRESETS = {
    "smoke": Config(
        tasks=("language",),
        arms=(arms.EXACT, "torchao-4bit", "felt-5.0", "even-5.0"),
        schedules=("wsd",),
        seeds=2,
        language_size="10k",
        vision_size="8k",
        tokens_per_parameter=5,
        vision_steps=60,
        images="digits",
        tuning=(),
        interval=20,
        snapshots=3,
        evaluation_windows=32,
        evaluation_images=300,
    ),
    "laptop": Config(),
    "full": Config(
        language_size="803k",
        vision_size="442k",
        seeds=5,
        vision_steps=8000,
        language_lr=4e-3,
        vision_lr=2e-3,
        evaluation_images=10_000,
        snapshots=20,
    ),
    "tpu": Config(
        language_size="30m",
        vision_size="1.8m",
        seeds=5,
        sequence=1024,
        language_batch=64,
        vision_batch=512,
        vision_steps=20_000,
        grid=7,
        language_lr=1e-3,
        vision_lr=1e-3,
        evaluation_images=10_000,
        snapshots=20,
        workers=1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    arm: str
    schedule: str
    seed: int
    size: str
    data: str
    data_path: str
    data_fingerprint: str
    grid: int
    sequence: int
    batch: int
    steps: int
    peak_lr: float
    is_tuning: bool
    interval: int
    snapshots: int
    evaluation: int
    log_every: int
    checkpoint_every: int

    def plan(self) -> train.Schedule:
        """The learning rate."""
        warmup = max(1, round(WARMUP * self.steps))
        if self.schedule == "cosine":
            return train.cosine(self.peak_lr, self.steps, warmup)
        start = self.steps - max(1, round(COOLDOWN * self.steps))
        return train.cooldown(self.peak_lr, warmup, start, self.steps)


def make_trials(config: Config) -> list[Trial]:
    """The grid as trials.

    Raises:
        ValueError: a field of the config that no run could use, named with its value; data that is not
            there.
    """
    _check(config)
    made = []
    for task in config.tasks:
        shared = _shared(config, task)
        for schedule in config.schedules:
            for arm in config.arms:
                made += [
                    Trial(arm=arm, schedule=schedule, seed=seed, is_tuning=False, **shared)
                    for seed in range(config.seeds)
                ]
            for factor in config.tuning:
                own = shared | {"peak_lr": factor * shared["peak_lr"]}
                made.append(Trial(arm=arms.EXACT, schedule=schedule, seed=0, is_tuning=True, **own))
    return made


def _shared(config: Config, task: str) -> dict[str, Any]:
    """What a task's trials have in common, once its data is there and its model can be made."""
    common = {
        "task": task,
        "peak_lr": getattr(config, f"{task}_lr"),
        "batch": getattr(config, f"{task}_batch"),
        "size": getattr(config, f"{task}_size"),
        "interval": config.interval,
        "snapshots": config.snapshots,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
    }
    if task == "vision":
        dataset = images.load(config.images, config.images_path)
        made = common | {
            "data": config.images,
            "data_path": config.images_path,
            "data_fingerprint": dataset.fingerprint,
            "grid": config.grid,
            "sequence": 0,
            "steps": config.vision_steps,
            "evaluation": config.evaluation_images,
        }
        _vision_config(config.vision_size, config.grid, dataset)
        return made
    corpus = data.load(config.text, config.text_path)
    data.check_length(corpus, config.sequence)
    tokens = (
        config.tokens_per_parameter * LANGUAGE_SIZES[config.language_size].non_embedding_parameters
    )
    return common | {
        "data": config.text,
        "data_path": config.text_path,
        "data_fingerprint": corpus.fingerprint,
        "grid": 0,
        "sequence": config.sequence,
        "steps": max(1, round(tokens / (config.language_batch * config.sequence))),
        "evaluation": config.evaluation_windows,
    }


def _check(config: Config) -> None:
    choices = {"tasks": TASKS, "schedules": SCHEDULES}
    for name in (*choices, "arms"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"config.{name} needs at least one value and each once; got {values}")
        for value in values if name in choices else ():
            if value not in choices[name]:
                known = ", ".join(choices[name])
                raise ValueError(f"config.{name} are of {known}; got {value!r}")
    if arms.EXACT not in config.arms:
        raise ValueError(
            f"config.arms has {arms.EXACT!r}, which all are compared with; got {config.arms}"
        )
    cli.check_positive(config, *_POSITIVE)
    for arm in config.arms:
        arms.moments(arm, config.interval)
    for factor in config.tuning:
        if not factor > 0 or factor == 1:
            raise ValueError(f"config.tuning holds factors other than 1 above 0; got {factor!r}")
    for task, sizes in (("language", LANGUAGE_SIZES), ("vision", VISION_SIZES)):
        size = getattr(config, f"{task}_size")
        if size not in sizes:
            raise ValueError(f"config.{task}_size is one of {', '.join(sizes)}; got {size!r}")


_POSITIVE = (
    *("seeds", "tokens_per_parameter", "vision_steps", "grid", "sequence", "language_batch"),
    *("vision_batch", "language_lr", "vision_lr", "interval", "snapshots", "evaluation_windows"),
    *("evaluation_images", "log_every", "checkpoint_every"),
)


# ---------------------------------------------------------------------------------------------------
# One run


@dataclasses.dataclass(frozen=True)
class _Task:
    """A task's model, data and measures."""

    make: Any
    graphdef: Any
    loss: Any
    batches: Any
    evaluate: Any


@functools.lru_cache(maxsize=2)
def _load(task: str, source: str, path: str, fingerprint: str) -> Any:
    loaded = data.load(source, path) if task == "language" else images.load(source, path)
    if loaded.fingerprint != fingerprint:
        raise RuntimeError(f"the data at {path or source!r} changed while the study was running")
    return loaded


def _vision_config(size: str, grid: int, dataset: images.Dataset) -> vision.ViTConfig:
    side, _, channels = dataset.shape
    if side % grid:
        raise ValueError(
            f"config.grid: images of {side} pixels cannot be cut into {grid} × {grid} patches"
        )
    return dataclasses.replace(
        VISION_SIZES[size],
        image=side,
        patch=side // grid,
        channels=channels,
        classes=len(dataset.classes),
    )


@functools.lru_cache(maxsize=4)
def _make_task(trial: Trial) -> _Task:
    """The task of a trial whose arm, schedule and rate do not matter."""
    loaded = _load(trial.task, trial.data, trial.data_path, trial.data_fingerprint)
    processes = jax.process_index(), jax.process_count()
    if isinstance(loaded, images.Dataset):
        config = _vision_config(trial.size, trial.grid, loaded)
        make = lambda seed: vision.ViT(config, nnx.Rngs(seed))  # noqa: E731
        augmentation = images.Augmentation(flip=trial.data != "digits")
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
        return _Task(
            make,
            graphdef,
            vision.classification_loss(graphdef),
            lambda seed: images.train_batches(loaded, trial.batch, seed, augmentation, *processes),
            functools.partial(_evaluate_images, graphdef, loaded, trial.evaluation),
        )
    shape = dataclasses.replace(LANGUAGE_SIZES[trial.size], vocab_size=loaded.vocab_size)
    make = lambda seed: models.LM(shape, nnx.Rngs(seed))  # noqa: E731
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
    loss = train.next_token_loss(graphdef)
    return _Task(
        make,
        graphdef,
        loss,
        lambda seed: data.train_batches(loaded, trial.sequence, trial.batch, seed, *processes),
        functools.partial(_evaluate_text, loss, loaded, trial.sequence, trial.evaluation),
    )


def _evaluate_text(loss: Any, corpus: data.Corpus, sequence: int, count: int, params: Any) -> dict:
    """Mean loss, in nats a token, of each split."""
    found = {}
    for split in corpus.evaluation:
        windows = data.evaluation_windows(corpus, split, sequence, count)
        each = jax.jit(
            lambda p, w: jax.lax.map(lambda x: loss(p, x[None]), w, batch_size=min(64, len(w)))
        )
        found[f"loss {split}"] = float(np.asarray(each(params, windows), np.float64).mean())
    return found


def _evaluate_images(graphdef: Any, dataset: images.Dataset, count: int, params: Any) -> dict:
    """Mean loss, in nats an image, and accuracy on test images."""
    at = np.linspace(0, len(dataset.test) - 1, min(count, len(dataset.test))).astype(int)
    pixels, labels = dataset.test.pixels[at], dataset.test.labels[at]
    loss = vision.classification_loss(graphdef)

    @jax.jit
    def measure(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        right = jnp.argmax(nnx.merge(graphdef, params)(x), axis=-1) == y
        return loss(params, {"pixels": x, "labels": y}), jnp.mean(right.astype(jnp.float32))

    parts = np.array_split(np.arange(len(at)), max(1, len(at) // 500))
    found = np.array(
        [[float(v) for v in measure(params, pixels[i], labels[i])] + [len(i)] for i in parts]
    )
    mean = np.average(found[:, :2], axis=0, weights=found[:, 2])
    return {"loss test": float(mean[0]), "accuracy test": float(mean[1])}


@functools.lru_cache(maxsize=8)
def _compiled(trial: Trial) -> tuple[_Task, Any, Any, Any]:
    """(task, transformation, mesh, step) of an arm: schedules and seeds are data of one compiled step."""
    task, mesh = _make_task(dataclasses.replace(trial, arm="")), train.make_mesh()
    tx = arms.optimizer(trial.arm, trial.interval)
    return task, tx, mesh, train.make_step(task.loss, tx, mesh)


class _Run:
    """A trial under way."""

    def __init__(self, trial: Trial, context: trials.Context):
        self.trial, self.context = trial, context
        self.task, tx, self._mesh, self._step = _compiled(
            dataclasses.replace(trial, schedule="", seed=0, peak_lr=0.0, is_tuning=False)
        )
        self.state = train.init_state(
            lambda: nnx.state(self.task.make(trial.seed), nnx.Param), tx, self._mesh
        )
        self._batches, self.curve = self.task.batches(trial.seed), []

    def to(self, steps: int) -> None:
        """Trains to a step, from the newest checkpoint where there is one."""
        with Checkpoints(self.context.scratch / "run") as checkpoints:
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
                checkpoint_every=self.trial.checkpoint_every,
                on_log=lambda n, loss: self.context.progress(
                    n * step_cost(self.trial), f"{self.trial.arm}: loss {loss:.3f}"
                ),
            )

    def widths(self, steps: int) -> dict:
        """Trains to a step and looks at the widths there."""
        self.to(steps)
        return _widths(steps, self.state.opt_state)


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, looking at the widths now and then, and returns the record's results."""
    run = _Run(trial, context)
    elements = sum(x.size for x in jax.tree.leaves(run.state.params))
    head = {"versions": _versions(), "parameters": elements}
    stops = sorted({round(trial.steps * (i + 1) / trial.snapshots) for i in range(trial.snapshots)})
    try:
        found = [
            context.remember(f"widths-{stop}", functools.partial(run.widths, stop))
            for stop in stops
            if stop > 0
        ]
        run.to(trial.steps)
    except train.Diverged as error:
        return head | {"status": "diverged", "step": error.step}
    return head | {
        "status": "done",
        "measures": run.task.evaluate(run.state.params),
        "curve": [list(entry) for entry in run.curve],
        "state_bytes": jq.optim.state_bytes(arms.state_of(run.state.opt_state)),
        "snapshots": [x for x in found if x["leaves"]],
    }


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


def _versions() -> dict[str, str]:
    return {
        "jaxquant": jq.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def step_cost(trial: Trial) -> float:
    """Work of a step: weights × tokens."""
    if trial.task == "language":
        return LANGUAGE_SIZES[trial.size].step_cost * trial.batch * trial.sequence
    return VISION_SIZES[trial.size].block_parameters * trial.batch * trial.grid**2


def cost(trial: Trial) -> float:
    """Work of a trial: what its progress adds up to."""
    return trial.steps * step_cost(trial)


def run(
    config: Config,
    workdir: str | Path,
    *,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    keep_checkpoints: bool = False,
) -> dict:
    """Runs what has no record yet, writes the report, and returns the summary.

    Args:
        config: the grid; one of `PRESETS`, or any.
        workdir: where records, ``summary.json`` and ``report.html`` go.
        workers: processes; the config's number where not given.
        shard: (i, n): one of n jobs; the report covers what is finished.
        keep_checkpoints: keep the trained weights in ``workdir/scratch``.

    Raises:
        ValueError: bad input.
        RuntimeError: a trial failed.
    """
    grid = make_trials(config)
    devices = train.make_mesh().size
    for task in config.tasks:
        batch = getattr(config, f"{task}_batch")
        if batch % devices:
            raise ValueError(f"config.{task}_batch {batch} does not divide over {devices} devices")
    ledger = trials.Ledger(workdir, STUDY)
    trials.run(
        grid,
        run_trial,
        ledger,
        cost=cost,
        workers=trials.worker_count(workers, config.workers),
        shard=shard,
        keep_checkpoints=keep_checkpoints,
    )
    records = [record for trial in grid if (record := ledger.read(trial)) is not None]
    return report.write(ledger.workdir, records, expected=len(grid))
