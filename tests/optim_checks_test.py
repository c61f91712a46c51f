"""What does not belong together is refused in words, not taken by its place."""

from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.optim import (
    Companded,
    Logarithmic,
    Policy,
    UpdateSensitivity,
    adaptive,
    by_role,
    diagnose,
    fixed,
    from_optax,
    quantize_state,
    report,
    state_bytes,
    to_optax,
    uniform,
)

ONE = jnp.ones((16, 16))
TX = optax.trace(0.9)
QUANTIZED = quantize_state(TX, fixed(8))
STATE: Any = QUANTIZED.init({"a": ONE, "b": ONE})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_optax(STATE, optax.TraceState({"b": ONE, "c": ONE})), "'trace/a' here"),
        (
            lambda: to_optax(TX, STATE, {"b": ONE, "c": ONE}),
            "'a' in place 0, where params have 'b'",
        ),
        (lambda: QUANTIZED.update({"x": ONE, "y": ONE}, STATE), "where updates have 'x'"),
        (lambda: QUANTIZED.update({"a": jnp.ones((8, 32)), "b": ONE}, STATE), "the shape"),
        (lambda: QUANTIZED.update({"a": ONE}, STATE), "where updates have 'nothing'"),
        (lambda: QUANTIZED.update({"a": ONE, "b": ONE}, TX.init(ONE)), "got TraceState"),
        (lambda: diagnose(TX, cast(Any, TX.init(ONE)), ONE, ONE), "got TraceState"),
        (lambda: quantize_state(cast(Any, "adam"), fixed(8)), "an optax transformation"),
        (lambda: quantize_state(TX, fixed(8), codec=cast(Any, Companded())), "a function"),
        (lambda: quantize_state(TX, fixed(8), seed=cast(Any, "0")), "seed must be an integer"),
        (lambda: quantize_state(TX, fixed(8), mesh=cast(Any, "x")), "a jax.sharding.Mesh"),
        (lambda: adaptive(5.0, score=UpdateSensitivity), "such as UpdateSensitivity"),
        (lambda: by_role(cast(Any, None)), "a mapping"),
        (lambda: Logarithmic(cast(Any, 2.5)), "must be an integer number of binades"),
        (lambda: quantize_state(TX, Policy("m", lambda leaf: 9)).init(ONE), "from 2 to 8; got 9"),
    ],
)
def test_what_does_not_belong_together_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_meshes_of_explicit_and_auto_axes_are_taken(kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    own = quantize_state(TX, fixed(8), mesh=mesh).init(ONE)
    chex.assert_trees_all_equal(
        jax.tree.leaves(own), jax.tree.leaves(quantize_state(TX, fixed(8)).init(ONE))
    )


def test_a_mesh_of_manual_axes_is_refused():
    manual = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Manual,))
    with pytest.raises(ValueError, match="Manual"):
        quantize_state(TX, fixed(8), mesh=manual)


def test_an_nnx_optimizer_trains_and_its_state_is_reported():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, quantize_state(optax.adam(1e-2), fixed(8)), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean(m(ONE.reshape(4, 64)) ** 2))(model)
    before = model.kernel[...]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        optimizer.update(model, grads)  # optax's and nnx's own arithmetic
    assert float(jnp.max(jnp.abs(model.kernel[...] - before))) > 1e-3
    found = report(optimizer.opt_state)
    assert {row.bits for row in found.rows if row.role == "matrix"} == {8.0}
    assert found.nbytes == state_bytes(optimizer.opt_state)


@pytest.mark.parametrize("policy", [fixed(5, 4), uniform(6.0), adaptive(6.0)])
def test_bytes_are_known_from_shapes(policy):
    tx = quantize_state(optax.adam(1e-3), policy)
    params = {"w": jnp.ones((256, 256))}
    assert state_bytes(jax.eval_shape(tx.init, params)) == state_bytes(tx.init(params))


def test_a_codec_that_is_none_is_named():
    tx = jq.optim.quantize_state(optax.adam(1e-3), jq.optim.fixed(4), codec=lambda leaf: jq.NF4)
    with pytest.raises(ValueError, match=r"codec must return a jaxquant.optim.Codec.*got Codebook"):
        tx.init({"w": jnp.ones((64, 64))})
