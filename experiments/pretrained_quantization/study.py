"""The study: configs, trials, and what a trial runs."""

import dataclasses

import jax

import jaxquant as jq
from experiments.harness.data import images
from experiments.harness.running import cli, trials
from experiments.harness.running.cli import option
from experiments.harness.study import Study
from experiments.pretrained_quantization import models, report
from experiments.pretrained_quantization.arms import ARMS


@dataclasses.dataclass
class Config:
    """What the study does."""

    models: tuple[str, ...] = option(("smollm2", "minilm", "vit"), "smollm2, minilm, vit")
    arms: tuple[str, ...] = option((), "names of arms to run; all where empty")
    windows: int = option(20, "windows of text that the language model is measured on")
    calibration_windows: int = option(16, "windows of older text that methods look at")
    length: int = option(512, "tokens of a window")
    memory_mb: int = option(20, "megabytes of calibration statistics held at once")
    search_windows: int = option(1, "windows that the search measures on")
    images: str = option("fashion_mnist", "fashion_mnist or digits")
    images_path: str = option("", "where images lie; the package's own place where empty")
    steps: int = option(1500, "training steps of the vision transformer")
    seeds: int = option(3, "vision transformers")
    workers: int = option(1, "processes; models are large, so one by one")


PRESETS = {
    "smoke": Config(models=("vit",), images="digits", steps=60, seeds=1),
    "laptop": Config(),
    "full": Config(windows=100, calibration_windows=64, search_windows=4, steps=10_000, seeds=5),
    "tpu": Config(windows=400, calibration_windows=128, search_windows=8, steps=20_000, seeds=5),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model in one arm; what of the config does not concern the model is zero or empty."""

    model: str
    arm: str
    seed: int = 0
    windows: int = 0
    calibration_windows: int = 0
    length: int = 0
    memory_mb: int = 0
    search_windows: int = 0
    images: str = ""
    images_path: str = ""
    steps: int = 0
    fingerprint: str = ""


def make_trials(config: Config) -> list[Trial]:
    """The config's trials.

    Raises:
        ValueError: a field out of range; an unknown model or arm; a package of weights that is not there.
    """
    cli.check_positive(
        config, "windows", "calibration_windows", "length", "memory_mb", "search_windows", "steps"
    )
    cli.check_positive(config, "seeds")
    if not config.models or len(set(config.models)) != len(config.models):
        raise ValueError(f"config.models needs at least one, each once; got {config.models}")
    for model in config.models:
        if model not in ARMS:
            raise ValueError(f"config.models are of {', '.join(ARMS)}; got {model!r}")
    known = {arm for model in config.models for arm in ARMS[model]}
    for arm in config.arms:
        if arm not in known:
            raise ValueError(f"config.arms are of {'; '.join(sorted(known))}; got {arm!r}")
    return [
        trial
        for model in config.models
        for arm in ARMS[model]
        if not config.arms or arm in config.arms
        for trial in _trials(config, model, arm)
    ]


def _trials(config: Config, model: str, arm: str) -> list[Trial]:
    if model == "vit":
        dataset = images.load(config.images, config.images_path)
        own = {"images": config.images, "images_path": config.images_path, "steps": config.steps}
        seeds = range(config.seeds)
        return [
            Trial(
                model, arm, seed, fingerprint=dataset.fingerprint, memory_mb=config.memory_mb, **own
            )
            for seed in seeds
        ]
    fields = ("calibration_windows", "length", "memory_mb")
    fields += ("windows", "search_windows") if model == "smollm2" else ()
    own = {name: getattr(config, name) for name in fields}
    return [Trial(model, arm, fingerprint=models.fingerprint(model), **own)]


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Quantizes, compares, judges."""
    arm = ARMS[trial.model][trial.arm]
    pretrained = models.make(trial)
    context.progress(0, f"{trial.model}: {trial.arm}")
    model, size = models.quantized(pretrained, arm, context.scratch, trial.memory_mb * 2**20)
    versions = {"jaxquant": jq.__version__, "jax": jax.__version__}
    head = {"versions": versions, "bytes": size, "arm": dataclasses.asdict(arm)}
    head["device"] = jax.devices()[0].device_kind
    return head | pretrained.compare(model)


def cost(trial: Trial) -> float:
    """Work of a trial: about minutes."""
    base = {"smollm2": 2.0, "minilm": 0.5, "vit": 0.001 * trial.steps}[trial.model]
    arm = ARMS[trial.model][trial.arm]
    return base * (5 if arm.searched or arm.method == "gptq" else 1)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return trial.model, trial.arm


STUDY = Study(
    name="pretrained_quantization",
    question="What does quantizing real models cost, and does the gate see when it costs too much?",
    papers=(
        "2210.17323 (GPTQ)",
        "2306.00978 (AWQ)",
        "2211.10438 (SmoothQuant)",
        "2404.00456 (QuaRot)",
    ),
    presets=PRESETS,
    costs={
        "smoke": "a minute on 2 cores; a vision transformer on digits, that it runs",
        "laptop": "about two hours on 2 cores",
        "full": "hours; not yet run by us",
        "tpu": "an accelerator; not yet run by us",
    },
    make_trials=make_trials,
    run_trial=run_trial,
    cost=cost,
    compile_key=compile_key,
    report=lambda done: report.write(done.workdir, done.records, len(done.trials), done.source),
    to_text=report.to_text,
)
run = STUDY.run
