"""One training run, and the loss that rounding its weights adds, by width, granularity and scope."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxquant as jq
from experiments.harness import data, lengths
from experiments.harness.reporting.statistics import mean_and_error
from jaxquant.numerics.groups import Granularity

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


def measure(trial: Trial, graphdef: nnx.GraphDef, params, corpus: data.Corpus) -> dict:
    """Base loss, and the loss that each quantization adds, per split: means and standard errors."""
    base, added, counts = {}, [], {}
    for split in corpus.evaluation:
        windows = data.evaluation_windows(corpus, split, trial.sequence, trial.evaluation_windows)
        counts[split] = len(windows)
        reference = np.asarray(
            make_evaluate(graphdef, None)(params, jnp.float32(0), windows), np.float64
        )
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
    return {"windows": counts, "base": base, "added": added}
