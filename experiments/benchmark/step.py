"""A variant's train step: compiled once, run in place, and looked into for what it multiplies."""

import collections
import dataclasses
import importlib.metadata
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmark.lm import Shape
from experiments.benchmark.variants import PEERS, Apply, Variant

_LEARNING_RATE = 1e-3
_PRODUCTS = 3  # of each linear layer: forward and both gradients


@dataclasses.dataclass
class Contestant:
    """A compiled step and its state, which each run takes one step further.

    Attributes:
        variant: what it computes.
        api: of Flax.
        products: what `count_products` found in it.
        temporaries: bytes that the compiled step holds beside its arguments and results; None where
            the backend does not say.
        arguments: bytes of its arguments.
        loss: of the last step, before its update.
    """

    variant: Variant
    api: str
    products: dict[str, int]
    temporaries: int | None
    arguments: int | None
    _compiled: Any
    _state: Any
    _tokens: jax.Array
    loss: float = math.nan

    def __call__(self) -> None:
        self._state, loss = jax.block_until_ready(self._compiled(self._state, self._tokens))
        self.loss = float(loss)


def enter(
    variant: Variant, api: str, shape: Shape, tokens_BxT1: jax.Array, seed: int
) -> Contestant:
    """Builds and compiles a variant's step.

    Raises:
        RuntimeError: a peer that does not work here, with both sides' versions.
    """
    try:
        return _enter(variant, api, shape, tokens_BxT1, seed)
    except Exception as error:
        if variant.library not in PEERS:
            raise
        peer = PEERS[variant.library]
        words = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"{variant.name} in {api} fails ({peer} {importlib.metadata.version(peer)}, jax "
            f"{jax.__version__}): {type(error).__name__}: {words}. --config.peers=False leaves peers out"
        ) from error


def _enter(variant: Variant, api: str, shape: Shape, tokens_BxT1: jax.Array, seed: int):
    params, apply = variant.models[api](shape, seed)
    tx = optax.adamw(_LEARNING_RATE)
    state = (params, tx.init(params))
    traced = _make_step(apply, tx).trace(state, tokens_BxT1)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    return Contestant(
        variant,
        api,
        count_products(traced.jaxpr.jaxpr),
        getattr(memory, "temp_size_in_bytes", None),
        getattr(memory, "argument_size_in_bytes", None),
        compiled,
        state,
        tokens_BxT1,
    )


def _make_step(apply: Apply, tx: optax.GradientTransformation):
    def loss(params, tokens_BxT1: jax.Array) -> jax.Array:
        logits = apply(params, tokens_BxT1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT1[:, 1:]).mean()

    def step(state, tokens_BxT1: jax.Array):
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, tokens_BxT1)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.jit(step, donate_argnums=0)


# ---------------------------------------------------------------------------------------------------
# What a step multiplies


def count_products(jaxpr: Any) -> dict[str, int]:
    """Products of 8-bit integers, their multiply-adds, and roundings to nearest in a traced program.

    Floating-point products are not counted: a trace holds dead ones, which the compiler drops.

    >>> int8 = jnp.zeros((4, 4), jnp.int8)
    >>> count_products(jax.make_jaxpr(jnp.dot)(int8, int8).jaxpr)
    {'int8': 1, 'int8_multiply_adds': 64, 'roundings': 0}
    """
    none = collections.Counter(int8=0, int8_multiply_adds=0, roundings=0)
    return dict(_count(jaxpr, none))


def _count(jaxpr: Any, none: collections.Counter) -> collections.Counter:
    """Adds up the equations, those of inner programs (jit, custom_vjp, …) included."""
    found = none.copy()
    for equation in jaxpr.eqns:
        inner = [_count(program, none) for program in _inner_programs(equation)]
        if equation.primitive.name == "cond":
            # One branch for each platform: the same product in the layout that suits it.
            inner = [min(inner, key=lambda counts: counts["int8"])]
        for counts in inner:
            found.update(counts)
        if equation.primitive.name == "round":
            found["roundings"] += 1
        elif equation.primitive.name == "dot_general":
            lhs, rhs = (v.aval for v in equation.invars)
            if lhs.dtype == rhs.dtype == jnp.int8:
                (contracting, _), _ = equation.params["dimension_numbers"]
                terms = math.prod(lhs.shape[a] for a in contracting)
                found["int8"] += 1
                found["int8_multiply_adds"] += terms * equation.outvars[0].aval.size
    return found


def _inner_programs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def deviation(contestant: Contestant, shape: Shape, tokens: int) -> str:
    """How what it quantizes differs from what every variant should; empty where it does not.

    Native products are compared by number and by multiply-adds, which tell a linear's from attention's.
    Simulated ones show as the two operands that each linear rounds.
    """
    found, each = contestant.products, contestant.variant.int8_products
    linears = len(shape.linears)
    multiply_adds = tokens * sum(a * b for a, b in shape.linears)
    if found["int8"] != each * linears:
        return f"{found['int8']} int8 products where the linears have {each * linears}"
    if found["int8_multiply_adds"] != each * multiply_adds:
        share = found["int8_multiply_adds"] / (_PRODUCTS * multiply_adds)
        return f"its int8 products are not the linears': {share:.0%} of their multiply-adds"
    if contestant.variant.is_simulated and found["roundings"] != 2 * linears:
        return f"{found['roundings']} tensors rounded where the linears have {2 * linears} operands"
    return ""
