"""The grid, and the run of it all."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.harness import data
from experiments.harness.data import images
from experiments.harness.models import lm, vision
from experiments.harness.running import cli
from experiments.harness.running.cli import option
from experiments.harness.study import Study
from experiments.harness.training import arms, coarse
from experiments.optimizer_states import report
from experiments.optimizer_states.running import run_trial
from experiments.optimizer_states.tasks import (
    LANGUAGE_SIZES,
    VISION_SIZES,
    Trial,
    compile_key,
    cost,
    vision_config,
)

SCHEDULES = ("wsd", "cosine")
TASKS = ("language", "vision")
_ARMS = (
    arms.EXACT,
    *("fixed-8", "fixed-4", "torchao-4bit", "bitsandbytes-8bit"),
    *("felt-5.0", "statistics-5.0", "even-5.0", "felt-4.0", "even-4.0"),
)


_BUDGETS = (2.6, 3.0, 4.0)
_LEAST = {"split3": 3.0}  # 4 + 1 bits and the scales
_CONTESTANTS = (
    *("even", "split1", "split2", "split3", "role"),
    *("felt", "felt-once", "felt-lasting", "statistics", "ranked", arms.HINDSIGHT),
)
_CONTESTANTS_VISION = ("even", "split1", "split2", "role", "felt", "felt-once", "ranked")


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share."""

    tasks: tuple[str, ...] = option(TASKS, "language, vision")
    arms: tuple[str, ...] = option(_ARMS, "how the optimizer's state is held")
    schedules: tuple[str, ...] = option(SCHEDULES, "of the learning rate: wsd, cosine")
    seeds: int = option(3, "runs of everything, each from its own initialization and data order")
    language_sizes: tuple[str, ...] = option(
        ("94k",), "language models, by the weights of the blocks' products"
    )
    tokens_per_parameter: tuple[int, ...] = option(
        (20,), "lengths of training for each of those sizes"
    )
    vision_size: str = option(
        "98k", "of the vision transformer, by the weights of the blocks' products"
    )
    vision_steps: int = option(1000, "training steps of the vision transformer")
    text: str = option("sotu", "sotu or text")
    text_path: str = option("", "where text lies")
    images: str = option("fashion_mnist", "fashion_mnist or digits")
    images_path: str = option("", "where images lie; the package's own place where empty")
    grid: int = option(4, "patches along a side of an image")
    sequence: int = option(64, "tokens of a window")
    language_batch: int = option(16, "windows of a step")
    vision_batch: int = option(64, "images of a step")
    language_lr: float = option(8e-3, "the language model's learning rate")
    vision_lr: float = option(4e-3, "the vision transformer's learning rate")
    tuning: tuple[float, ...] = option(
        (0.5, 2.0), "factors of those rates, tried in full precision with one seed"
    )
    interval: int = option(100, "steps between decisions of adaptive arms")
    snapshots: int = option(10, "records of the widths in a run")
    evaluation_windows: int = option(512, "windows of text that are evaluated, of each split")
    evaluation_images: int = option(5000, "images that are evaluated")
    log_every: int = option(50, "steps between records of the loss")
    checkpoint_every: int = option(1000, "steps between saves, at most")
    workers: int = option(0, "processes; 0 is one per core on CPU, one on an accelerator")


PRESETS = {
    "smoke": Config(
        tasks=("language",),
        arms=(arms.EXACT, "torchao-4bit", "felt-5.0", "even-5.0"),
        schedules=("wsd",),
        seeds=2,
        language_sizes=("10k",),
        vision_size="8k",
        tokens_per_parameter=(5,),
        vision_steps=60,
        images="digits",
        tuning=(),
        interval=20,
        snapshots=3,
        evaluation_windows=32,
        evaluation_images=300,
    ),
    # Others' codecs beside ours, two of them at torchao's bytes: 4.3 bits, all counted.
    "laptop": Config(
        tasks=("language",),
        arms=(
            arms.EXACT,
            *("fixed-8", "bitsandbytes-8bit", "fixed-4", "torchao-4bit"),
            *("even-5.0", "felt-5.0", "even-4.3", "split1-4.3"),
        ),
        schedules=("wsd",),
        language_sizes=("41k",),
        seeds=4,
    ),
    "full": Config(
        language_sizes=("803k",),
        vision_size="442k",
        seeds=5,
        vision_steps=8000,
        language_lr=4e-3,
        vision_lr=2e-3,
        evaluation_images=10_000,
        snapshots=20,
    ),
    # Whether moving widths pays, where it could: budgets under 4 bits as well.
    "contest": Config(
        tasks=("language",),
        arms=(
            arms.EXACT,
            *(
                f"{kind}-{bits}"
                for bits in _BUDGETS
                for kind in _CONTESTANTS
                if bits >= _LEAST.get(kind, 0)
            ),
        ),
        schedules=("wsd",),
        language_sizes=("41k",),
        seeds=6,
        interval=50,
        tuning=(),
    ),
    # Whether adaptive widths win back what coarse scales lose: simulated, with scales of other sizes.
    "scales": Config(
        tasks=("language",),
        arms=(
            arms.EXACT,
            *(
                f"{scale}:{kind}-{bits}"
                for bits in (3.0, 4.0, 5.0)
                for scale in (*coarse.SCALES, "linear")
                for kind in ("even", "split1", "felt", "statistics")
            ),
        ),
        schedules=("wsd",),
        language_sizes=("41k",),
        seeds=6,
        interval=50,
        tuning=(),
    ),
    "contest_vision": Config(
        tasks=("vision",),
        arms=(arms.EXACT, *(f"{kind}-4.0" for kind in _CONTESTANTS_VISION)),
        schedules=("wsd",),
        seeds=6,
        tuning=(),
    ),
    # Weights in bfloat16 without a copy in float32: updates rounded stochastically, and to nearest.
    "bf16_weights": Config(
        tasks=("language",),
        arms=(
            *(arms.EXACT, "even-5.0"),
            *(
                f"{weights}:{state}"
                for weights in (arms.STOCHASTIC, arms.NEAREST)
                for state in (arms.EXACT, "even-5.0")
            ),
        ),
        schedules=("wsd",),
        language_sizes=("41k",),
        seeds=6,
        tuning=(),
    ),
    # Sizes, lengths and widths that a law of the state's bits can be fitted to.
    "law": Config(
        tasks=("language",),
        arms=(arms.EXACT, *(f"fixed-{bits}" for bits in (2, 3, 4, 6, 8))),
        schedules=("wsd",),
        language_sizes=("10k", "20k", "41k"),
        tokens_per_parameter=(10, 20, 40),
        tuning=(),
    ),
    "tpu": Config(
        language_sizes=("30m",),
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


def make_trials(config: Config) -> list[Trial]:
    """The grid as trials.

    Raises:
        ValueError: a field of the config that no run could use, named with its value; data that is not
            there.
    """
    _check(config)
    made = []
    shared = [s for task in config.tasks for s in _shared(config, task)]
    for own in shared:
        for schedule in config.schedules:
            for arm in config.arms:
                made += [
                    Trial(arm=arm, schedule=schedule, seed=seed, is_tuning=False, **own)
                    for seed in range(config.seeds)
                ]
            for factor in config.tuning:
                other = own | {"peak_lr": factor * own["peak_lr"]}
                made.append(
                    Trial(arm=arms.EXACT, schedule=schedule, seed=0, is_tuning=True, **other)
                )
    return made


def _shared(config: Config, task: str) -> list[dict[str, Any]]:
    """What trials of a model and a length have in common, once their data is there and the model can be."""
    common = {
        "task": task,
        "peak_lr": getattr(config, f"{task}_lr"),
        "batch": getattr(config, f"{task}_batch"),
        "interval": config.interval,
        "snapshots": config.snapshots,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
    }
    if task == "vision":
        return [common | _vision(config)]
    corpus = data.load(config.text, config.text_path)
    data.check_length(corpus, config.sequence)
    return [
        common | _language(config, corpus, size, d)
        for size in config.language_sizes
        for d in config.tokens_per_parameter
    ]


def _vision(config: Config) -> dict[str, Any]:
    dataset = images.load(config.images, config.images_path)
    shape = vision_config(config.vision_size, config.grid, dataset)
    _check_budgets(config, lambda: vision.ViT(shape, nnx.Rngs(0)))
    return {
        "size": config.vision_size,
        "data": config.images,
        "data_path": config.images_path,
        "data_fingerprint": dataset.fingerprint,
        "grid": config.grid,
        "sequence": 0,
        "steps": config.vision_steps,
        "evaluation": config.evaluation_images,
    }


def _language(
    config: Config, corpus: data.Corpus, size: str, tokens_per_parameter: int
) -> dict[str, Any]:
    shape = dataclasses.replace(LANGUAGE_SIZES[size], vocab_size=corpus.vocab_size)
    _check_budgets(config, lambda: lm.LM(shape, nnx.Rngs(0)))
    tokens = tokens_per_parameter * shape.non_embedding_parameters
    return {
        "size": size,
        "data": config.text,
        "data_path": config.text_path,
        "data_fingerprint": corpus.fingerprint,
        "grid": 0,
        "sequence": config.sequence,
        "steps": max(1, round(tokens / (config.language_batch * config.sequence))),
        "evaluation": config.evaluation_windows,
    }


def _check_budgets(config: Config, make: Callable[[], nnx.Module]) -> None:
    """Raises a ValueError where an arm's state cannot be made for a model, as with too small a budget."""
    params = nnx.eval_shape(lambda: nnx.state(make(), nnx.Param))
    for arm in config.arms:
        try:
            jax.eval_shape(arms.optimizer(arm, config.interval, 1).init, params)
        except ValueError as error:
            raise ValueError(f"config.arms: {arm!r} cannot be: {error}") from None


def _check(config: Config) -> None:
    choices = {"tasks": TASKS, "schedules": SCHEDULES, "language_sizes": tuple(LANGUAGE_SIZES)}
    cli.check_each_once(config, *choices, "arms", "tokens_per_parameter")
    for name, known in choices.items():
        cli.check_choices(config, name, known)
    if arms.EXACT not in config.arms:
        raise ValueError(
            f"config.arms has {arms.EXACT!r}, which all are compared with; got {config.arms}"
        )
    cli.check_positive(config, *_POSITIVE)
    for arm in config.arms:
        arms.optimizer(arm, config.interval, 1)
    for factor in config.tuning:
        if not factor > 0 or factor == 1:
            raise ValueError(f"config.tuning holds factors other than 1 above 0; got {factor!r}")
    if config.vision_size not in VISION_SIZES:
        known = ", ".join(VISION_SIZES)
        raise ValueError(f"config.vision_size is one of {known}; got {config.vision_size!r}")
    cli.check_whole(config, "tokens_per_parameter")


_POSITIVE = (
    *("seeds", "vision_steps", "grid", "sequence", "language_batch"),
    *("vision_batch", "language_lr", "vision_lr", "interval", "snapshots", "evaluation_windows"),
    *("evaluation_images", "log_every", "checkpoint_every"),
)


STUDY = Study(
    name="optimizer_states",
    question="How few bits can an optimizer's state have, and does it pay to move them?",
    papers=(
        "2604.06836 (STQuant)",
        "2110.02861 (8-bit optimizers)",
        "2309.01507 (4-bit optimizers)",
    ),
    presets=PRESETS,
    costs={
        "smoke": "a minute or two on 2 cores; that it runs",
        "laptop": "33 minutes on 2 busy cores; codecs of others beside ours, 4 seeds",
        "full": "days on 2 cores, by estimate; not yet run by us",
        "contest": "an hour on 2 cores; all allocations at three budgets, 6 seeds",
        "scales": "about an hour on 2 cores, by estimate; not yet run by us",
        "contest_vision": "15 minutes on 2 cores; allocations at 4.0 bits on the ViT, 6 seeds",
        "bf16_weights": "24 minutes on 2 busy cores; weights in bfloat16, 6 seeds",
        "law": "half an hour on 2 cores; fixed widths at three sizes and lengths",
        "tpu": "an accelerator; not yet run by us",
    },
    make_trials=make_trials,
    run_trial=run_trial,
    cost=cost,
    compile_key=compile_key,
    report=lambda done: report.write(done.workdir, done.records, len(done.trials), done.source),
    to_text=report.to_text,
    batches=lambda config: [f"{task}_batch" for task in config.tasks],
)
run = STUDY.run
