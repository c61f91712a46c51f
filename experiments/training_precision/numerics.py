"""A language model whose matrix products are quantized with bits that are data.

A *method* says how a tensor is laid onto its grid and what stands in for the gradient; a `Precision` says how
many bits weights, activations and cache have.  Blocks' linears are quantized forward alone, weights per
output channel, activations per tensor, keys and values per token and head (Kumar et al. 2024, section 2);
embedding and head are not.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxquant as jq
from experiments.harness.models import lm
from jaxquant import calibration, estimators

# From a method to the smallest bits that it has a grid for.
METHODS = {"ste": 2, "lsq": 2, "quest": 1, "float": 4}
MOST_BITS = 16  # as good as float32 here
# Exponent bits of a float of so many bits: E2M1, E2M2, E3M2, E3M3, E4M3; from 9 bits on five, as in float16.
_EXPONENT_BITS = (0, 0, 0, 0, 2, 2, 3, 3, 4, *[5] * 8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Precision:
    """Bits of weights, activations and cache; data of a compiled step.

    >>> Precision.of(4, 8, 16).weights
    Array(4., dtype=float32)
    """

    weights: jax.Array
    activations: jax.Array
    cache: jax.Array

    @classmethod
    def of(cls, weights: int, activations: int, cache: int) -> "Precision":
        return cls(*(jnp.float32(bits) for bits in (weights, activations, cache)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """What is trained.

    Attributes:
        model: the model's parameters.
        steps: of LSQ, {path of a linear: {"lhs": [], "rhs": [1, channels]}}; empty for other methods.
    """

    model: Any
    steps: dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """A model as it is trained by a method.

    Args:
        config: the model's shape.
        method: one of `METHODS`.
    """

    config: lm.LMConfig
    method: str

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The model in float."""
        return nnx.graphdef(nnx.eval_shape(lambda: lm.LM(self.config, nnx.Rngs(0))))

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """Of the linears that are quantized."""
        model = nnx.eval_shape(lambda: lm.LM(self.config, nnx.Rngs(0)))
        found = ("/".join(map(str, path)) for path, _ in _linears(model))
        return tuple(path for path in found if path.startswith("blocks/"))

    @property
    def hadamard(self) -> int:
        """QuEST's blocks: the largest power of two up to 32 that divides what each linear sums over."""
        return math.gcd(self.config.width, self.config.hidden, 32)

    def init(self, key: jax.Array, precision: Precision, tokens_BxT1: jax.Array) -> Params:
        """Fresh parameters; LSQ's steps start at 2 · mean|x| / √Q_P of a batch in float."""
        model = lm.LM(self.config, nnx.Rngs(key))
        params = nnx.state(model, nnx.Param)
        if self.method != "lsq":
            return Params(params, {})
        seen = _mean_inputs(nnx.merge(self.graphdef, params), tokens_BxT1[:, :-1])
        bits = {"lhs": precision.activations, "rhs": precision.weights}
        root = {name: jnp.sqrt(_top(b)) for name, b in bits.items()}
        steps = {}
        for path, linear in _linears(model):
            name = "/".join(map(str, path))
            if name in self.paths:
                mean = jnp.mean(jnp.abs(linear.kernel[...]), axis=0, keepdims=True)
                steps[name] = {"lhs": 2 * seen[name] / root["lhs"], "rhs": 2 * mean / root["rhs"]}
        return Params(params, steps)

    def loss(self, params: Params, tokens_BxT1: jax.Array, precision: Precision) -> jax.Array:
        """Mean cross-entropy in nats of a batch."""
        return self.losses(params, tokens_BxT1, precision, precision.weights).mean()

    def losses(
        self, params: Params, tokens_BxT1: jax.Array, precision: Precision, serving: jax.Array
    ) -> jax.Array:
        """Cross-entropy of each token, with the trained weights at `serving` bits: float32[B, T].

        Where these are the bits of training, nothing is lost.  Elsewhere LSQ's range is what training made it
        or the weights' largest magnitude, whichever is less.
        """
        model = nnx.merge(self.graphdef, params.model)
        model = jq.nnx.quantize(model, self._rules(model, params, precision, serving))
        logits = model(tokens_BxT1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT1[:, 1:])

    def _rules(
        self, model: nnx.Module, params: Params, precision: Precision, serving: jax.Array
    ) -> dict[str, Any]:
        cache = jq.Quantizer(self._format(precision.cache, "cache"), "channel")
        rules: dict[str, Any] = {"blocks/.*/attention": jq.Attention(kv=cache)}
        lhs = self._quantizer(precision.activations, "tensor")
        rhs = self._quantizer(serving, "channel")
        if self.method != "lsq":
            return rules | {"blocks/.*": jq.DotGeneral(jq.Operands(lhs, rhs))}
        linears = {"/".join(map(str, path)): linear for path, linear in _linears(model)}
        for path in self.paths:
            # A step that training carries below zero keeps its size.
            lhs_step, rhs_step = (jnp.abs(params.steps[path][name]) for name in ("lhs", "rhs"))
            largest = jnp.max(jnp.abs(linears[path].kernel[...]), axis=0, keepdims=True)
            served = jnp.minimum(rhs_step * _top(precision.weights), largest) / _top(serving)
            rhs_step = jnp.where(serving == precision.weights, rhs_step, served)
            operands = jq.Operands(
                dataclasses.replace(lhs, calibration=calibration.Step(lhs_step)),
                dataclasses.replace(rhs, calibration=calibration.Step(rhs_step)),
            )
            rules[re.escape(path)] = jq.DotGeneral(operands)
        return rules

    def _format(self, bits: jax.Array, of: str = "") -> jq.Format:
        if self.method == "float":
            exponent = jnp.array(_EXPONENT_BITS, jnp.float32)[bits.astype(jnp.int32)]
            mantissa = jnp.minimum(bits - 1 - exponent, 10)
            return jq.Float(exponent, mantissa, "finite")
        # A cache of one bit has no zero either.
        return jq.Int(bits, "midrise" if self.method == "quest" else "symmetric")

    def _quantizer(self, bits: jax.Array, granularity: Any) -> jq.Quantizer:
        format = self._format(bits)
        if self.method == "quest":
            return jq.Quantizer(
                format,
                granularity,
                calibration.gaussian,
                estimator=estimators.trust,
                hadamard=self.hadamard,
            )
        estimator = estimators.lsq if self.method == "lsq" else estimators.straight_through
        return jq.Quantizer(format, granularity, estimator=estimator)


def _top(bits: jax.Array) -> jax.Array:
    """Q_P, the largest of a symmetric grid's integers."""
    return jnp.exp2(bits - 1) - 1


def _linears(model: nnx.Module) -> list[tuple[Any, nnx.Linear]]:
    return [(path, x) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Linear)]


def _mean_inputs(model: nnx.Module, tokens_BxT: jax.Array) -> dict[str, jax.Array]:
    """mean|x| of what each linear is given."""
    found = {}

    def seen_by(name: str):
        def dot_general(lhs, rhs, *args, **kwargs):
            found[name] = jnp.maximum(jnp.mean(jnp.abs(lhs.astype(jnp.float32))), 1e-12)
            return jax.lax.dot_general(lhs, rhs, *args, **kwargs)

        return dot_general

    for path, linear in _linears(model):
        linear.dot_general = seen_by("/".join(map(str, path)))
    model(tokens_BxT)
    return found
