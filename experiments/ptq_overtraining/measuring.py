"""One training run, and the loss that rounding its weights adds, by width, granularity, scope and solver."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxquant as jq
from experiments.harness import data, lengths
from experiments.harness.models import lm
from experiments.harness.reporting.statistics import mean_and_error
from experiments.harness.running.record_store import later
from jaxquant.numerics.groups import Granularity

NEAREST, GPTQ = SOLVERS = ("nearest", "gptq")
CALIBRATION_WINDOWS = 512
SCOPES = ("linears", "all")  # the blocks' linears; those, the embedding and the head


@dataclasses.dataclass(frozen=True)
class Trial(lengths.Trial):
    """One training run and what is measured along it: all branches of a WSD trunk, or one cosine."""

    size: str
    schedule: str
    tokens_per_parameter: tuple[int, ...]
    seed: int
    bits: tuple[int, ...]
    granularities: tuple[str, ...]
    scopes: tuple[str, ...]
    evaluation_windows: int
    data: str
    data_path: str
    shift_path: str
    data_fingerprint: str
    sequence: int
    batch: int
    peak_lr: float
    dtype: str
    log_every: int
    mesh_data: int
    mesh_fsdp: int
    checkpoint_every: int
    solvers: tuple[str, ...] = later((NEAREST,))
    calibration_windows: int = later(CALIBRATION_WINDOWS)

    @property
    def has_trunk(self) -> bool:
        return self.schedule == "wsd"


def parse_granularity(text: str) -> Granularity:
    """The granularity that a text names: "tensor", "channel", or a block size in digits.

    Raises:
        ValueError: anything else.

    >>> parse_granularity("128")
    128
    """
    if text in ("tensor", "channel"):
        return text
    if isinstance(text, str) and text.isdecimal() and int(text) > 0:
        return int(text)
    raise ValueError(f"config.granularities are 'tensor', 'channel' or a block size; got {text!r}")


@functools.lru_cache
def make_evaluate(graphdef: nnx.GraphDef, granularity: str | None, scope: str = "linears"):
    """A compiled (params, bits, tokens) -> mean loss of each window, float32[windows].

    Args:
        graphdef: the model.
        granularity: of the weights' round-to-nearest quantization; None quantizes nothing.
        scope: which layers, of `SCOPES`.
    """

    @jax.jit
    def evaluate(params, bits: jax.Array, tokens_WxT1: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        if granularity is not None:
            weights = jq.Quantizer(jq.Int(bits), parse_granularity(granularity))
            dot_general = jq.DotGeneral(jq.Operands(rhs=weights))
            paths = "blocks/.*" if scope == "linears" else ".*"
            model = jq.nnx.quantize(model, {paths: dot_general})

        def losses(tokens_T1):
            logits = model(tokens_T1[None, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_T1[None, 1:])
            return losses.mean()

        return lengths.each_window(losses, tokens_WxT1)

    return evaluate


def calibration(trial: Trial, corpus: data.Corpus) -> list[jax.Array]:
    """Windows of the training text for GPTQ, in another order than training's, some at a time."""
    order = _CALIBRATION_SEED + trial.seed
    windows = data.train_batches(corpus, trial.sequence, trial.calibration_windows, order)
    tokens = jnp.asarray(next(windows)[:, :-1])
    return [tokens[i : i + _TOGETHER] for i in range(0, len(tokens), _TOGETHER)]


_CALIBRATION_SEED, _TOGETHER = 1_000_003, 64


def rounded(
    model: lm.LM,
    bits: int,
    granularity: str,
    batches: list[jax.Array],
    method: str = GPTQ,
    shared: jq.ptq.SharedStatistics | None = None,
) -> nnx.State:
    """The parameters with the blocks' linears rounded by `jaxquant.ptq.quantize`, as floats.

    Blocks are taken one after another; each is given what the blocks before it became.

    Args:
        model: a language model; not changed.
        bits: of the weights.
        granularity: of their scales.
        batches: tokens that the model is called with.
        method: of `jaxquant.ptq.quantize`.
        shared: by calls on the same model and batches.
    """
    weights = jq.Quantizer(jq.Int(bits), parse_granularity(granularity))
    rules = {"blocks/.*": jq.DotGeneral(jq.Operands(rhs=weights))}
    frozen = jq.ptq.quantize(
        model,
        rules,
        batches,
        method,
        memory=_statistics_bytes(model.blocks[0]),
        shared=shared,
        progress=False,
    )
    stored = dict(nnx.to_flat_state(nnx.state(frozen, jq.nnx.Stored)))
    whole = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state([(path, _plain(stored.get(path, x))) for path, x in whole])


def _plain(x):
    return nnx.Param(jq.dequantize(jq.nnx.read(x))) if isinstance(x, jq.nnx.Stored) else x


def _statistics_bytes(block: nnx.Module) -> int:
    """Bytes of the second moments and magnitudes of the inputs of a block's linears."""
    linears = [x for _, x in nnx.iter_graph(block) if isinstance(x, nnx.Linear)]
    return sum(4 * x.in_features * (x.in_features + 2) for x in linears)


def measure(trial: Trial, graphdef: nnx.GraphDef, params, corpus: data.Corpus) -> dict:
    """Base loss, and the loss that each quantization adds, per split: means and standard errors."""
    base, added, counts = {}, [], {}
    by_gptq = list(_by_gptq(trial, graphdef, params, corpus))
    plain = make_evaluate(graphdef, None)
    for split in corpus.evaluation:
        windows = data.evaluation_windows(corpus, split, trial.sequence, trial.evaluation_windows)
        counts[split] = len(windows)
        reference = np.asarray(plain(params, jnp.float32(0), windows), np.float64)
        base[split] = mean_and_error(reference)
        for granularity in trial.granularities:
            for scope in trial.scopes:
                evaluate = make_evaluate(graphdef, granularity, scope)
                for bits in trial.bits:
                    losses = np.asarray(evaluate(params, jnp.float32(bits), windows), np.float64)
                    kind = {
                        "split": split,
                        "granularity": granularity,
                        "scope": scope,
                        "bits": bits,
                    }
                    added.append(kind | mean_and_error(losses - reference))
        for kind, weights in by_gptq:
            losses = np.asarray(plain(weights, jnp.float32(0), windows), np.float64)
            added.append({"split": split} | kind | mean_and_error(losses - reference))
    return {"windows": counts, "base": base, "added": added}


def _by_gptq(trial: Trial, graphdef: nnx.GraphDef, params, corpus: data.Corpus):
    """Yields what was done and the weights, for each quantization of the blocks' linears by GPTQ."""
    if GPTQ not in trial.solvers:
        return
    batches, model = calibration(trial, corpus), nnx.merge(graphdef, params)
    shared = jq.ptq.SharedStatistics(model, batches)
    for granularity, bits in itertools.product(trial.granularities, trial.bits):
        kind = {"granularity": granularity, "scope": "linears", "bits": bits, "solver": GPTQ}
        yield kind, rounded(model, bits, granularity, batches, shared=shared)
