"""What is compiled once for a size and an arm: training, evaluation, and the error of its gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from flax import nnx

import jaxquant as jq
from experiments.gradient_precision.arms import FULL, Arm, Precision
from experiments.harness import lengths
from experiments.harness.models import lm
from experiments.harness.training import sharding, train

_SPAN = 32  # binary orders of magnitude over which losses are scaled, a draw for each


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled once for a size and an arm, whatever the bits, the rate and the seed.

    Attributes:
        init: key -> state.
        step: of `train.make_step`.
        evaluate: (params, precision, tokens) -> mean loss of each window.
        gradient: (params, precision, tokens) -> the sums of `gradient_error`.
        traces: how often each of them was traced, by name.
        mesh: of the state.
    """

    init: Any
    step: Any
    evaluate: Any
    gradient: Any
    traces: dict[str, int]
    mesh: jax.sharding.Mesh


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose blocks' products are an arm's."""

    config: lm.LMConfig
    arm: Arm

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The model in its own type."""
        return nnx.graphdef(nnx.eval_shape(lambda: lm.LM(self.config, nnx.Rngs(0))))

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters."""
        return nnx.state(lm.LM(self.config, nnx.Rngs(key)), nnx.Param)

    def loss(
        self,
        params: Any,
        tokens_BxT1: jax.Array,
        precision: Precision,
        exact_backward: bool = False,
    ) -> jax.Array:
        """Returns the mean cross-entropy of a batch, in nats per token."""
        model = nnx.merge(self.graphdef, params)
        if rules := self.arm.rules(self.config, precision, exact_backward):
            model = jq.nnx.quantize(model, rules)
        logits = model(tokens_BxT1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT1[:, 1:]).mean()


@functools.lru_cache(maxsize=1)
def programs(config: lm.LMConfig, arm: Arm, draws: int) -> Programs:
    """The programs of a size and an arm.

    Args:
        config: the model's shape.
        arm: how products are computed.
        draws: of the gradient.
    """
    model, plain, mesh = Model(config, arm), Model(config, Arm(FULL)), sharding.make_mesh()
    traces: dict[str, int] = {"step": 0, "evaluate": 0, "gradient": 0}

    def loss(params, tokens_BxT1, precision):
        traces["step"] += 1
        return model.loss(params, tokens_BxT1, precision)

    @jax.jit
    def evaluate(params, precision: Precision, tokens_WxT1: jax.Array):
        traces["evaluate"] += 1
        # One window at a time, so that windows share no scale.
        one = lambda tokens_T1: model.loss(params, tokens_T1[None], precision)  # noqa: E731
        return lengths.each_window(one, tokens_WxT1)

    @jax.jit
    def gradient(params, precision: Precision, tokens_BxT1: jax.Array):
        traces["gradient"] += 1
        return gradient_sums(model, plain, params, tokens_BxT1, precision, draws)

    return Programs(
        init=train.make_init(model.init, train.adamw(), mesh),
        step=train.make_step(loss, train.adamw(), mesh),
        evaluate=evaluate,
        gradient=gradient,
        traces=traces,
        mesh=mesh,
    )


def gradient_sums(
    model: Model,
    plain: Model,
    params: Any,
    tokens_BxT1: jax.Array,
    precision: Precision,
    draws: int,
) -> dict[str, jax.Array]:
    """Returns sums over the weights of the blocks' products, which `gradient_error` needs.

    Roundings draw by keys that are made of the gradient itself.  The loss is scaled by powers of two, by
    which all else scales exactly: each gives another draw of the same gradient.

    Args:
        model: whose gradient ĝ is drawn; its own forward pass with a backward pass in full precision has g.
        plain: the model in full precision.
        params: at which.
        tokens_BxT1: of which.
        precision: of the model.
        draws: K.
    """

    def of(loss, scale=1.0):
        found = jax.grad(lambda p: loss(p) * scale)(params)
        return jax.flatten_util.ravel_pytree(found["blocks"])[0] / scale

    exact = of(lambda p: model.loss(p, tokens_BxT1, precision, exact_backward=True))
    full = of(lambda p: plain.loss(p, tokens_BxT1, precision))

    def add(sums, scale):
        total, squares = sums
        error = of(lambda p: model.loss(p, tokens_BxT1, precision), scale) - exact
        return (total + error, squares + jnp.vdot(error, error)), None

    scales = jnp.exp2(jnp.round(jnp.linspace(-_SPAN / 2, _SPAN / 2, draws)))
    (total, squares), _ = jax.lax.scan(add, (jnp.zeros_like(exact), jnp.float32(0)), scales)
    mean = total / draws
    return {
        "norm": jnp.vdot(exact, exact),
        "mean": jnp.vdot(mean, mean),
        "squares": squares / draws,
        "forward": jnp.vdot(exact - full, exact - full),
        "full": jnp.vdot(full, full),
    }


def gradient_error(sums: dict[str, Any], draws: int) -> dict[str, float]:
    """Bias and variance of the gradient's rounding, and what the forward pass changes, relative to |g|.

    Args:
        sums: of `gradient_sums`: |g|², |mean of ĝ − g|², mean of |ĝ − g|², and of the full gradient.
        draws: K, of which they are.

    Returns:
        bias, √|E ĝ − g|² / |g|, from an estimate of the square without the share of the variance, 0 where
        that is below 0; variance, E|ĝ − E ĝ|² / |g|²; least_bias, the bias that K draws of this variance
        would show were there none; forward, |g − g of full precision| over the latter's norm.

    >>> found = gradient_error(
    ...     {"norm": 4.0, "mean": 1.0, "squares": 1.0, "forward": 1.0, "full": 4.0}, 2
    ... )
    >>> found["bias"], found["variance"], found["forward"]
    (0.5, 0.0, 0.5)
    """
    own = {name: float(value) for name, value in sums.items()}
    variance = max(0.0, own["squares"] - own["mean"]) * draws / (draws - 1)
    squared = max(0.0, own["mean"] - variance / draws)
    return {
        "bias": (squared / own["norm"]) ** 0.5,
        "variance": variance / own["norm"],
        "least_bias": (variance / draws / own["norm"]) ** 0.5,
        "forward": (own["forward"] / own["full"]) ** 0.5,
    }
