"""Bits of the backward products as data: one program for a whole grid of (P_forward, P_backward)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant import rounding
from jaxquant.formats import Block

DIMS = (((1,), (0,)), ((), ()))
FORWARD, BACKWARD = (2, 4, 8), (3, 4, 6, 8)
FLOATS = ((2, 1), (2, 3), (3, 2), (4, 3), (5, 2))  # E2M1 to E5M2


def integers(forward, backward):
    """A recipe of integers in blocks of 16, its gradients stochastic in random Hadamard coordinates."""
    each = jq.Quantizer(Block(jq.Int(forward), 16, jq.E4M3, 2))
    return _both_ways(each, Block(jq.Int(backward), 16, jq.E4M3, 2, "up"))


def floats(forward, backward):
    """The same of small floats."""
    each = jq.Quantizer(Block(jq.Float(*forward, "finite"), 16, jq.E4M3, 2))
    return _both_ways(each, Block(jq.Float(*backward, "finite"), 16, jq.E4M3, 2, "up"))


def _both_ways(each, block):
    gradient = jq.Quantizer(block, rounding=rounding.stochastic)
    kept = jq.Quantizer(block)
    backward = jq.BackwardOperands(gradient, kept, hadamard=16)
    return jq.DotGeneral(jq.Operands(each, each), backward, backward)


def operands():
    rng = np.random.default_rng(0)
    return [jnp.array(rng.normal(size=(32, 32)), jnp.float32) for _ in range(3)]


def gradients(dot, x, w, g):
    return jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)[1](g)


@pytest.mark.parametrize("family", [integers, floats])
def test_a_grid_of_forward_and_backward_precision_compiles_once(family):
    x, w, g = operands()

    traces = []

    @jax.jit
    def traced(forward, backward):
        traces.append(family)
        return gradients(family(forward, backward), x, w, g)

    exact = g @ w.T, x.T @ g
    widths = FLOATS if family is floats else None
    grid = [(f, b) for f in widths or FORWARD for b in widths or BACKWARD]
    errors = {}
    for forward, backward in grid:
        as_data = jax.tree.map(jnp.int32, (forward, backward))
        found = traced(*as_data)
        if grid.index((forward, backward)) % 5 == 0:
            known = jax.jit(lambda f=forward, b=backward: gradients(family(f, b), x, w, g))()
            for one, other in zip(found, known, strict=True):
                # The draws are keyed by the gradient, so they are the same; a sum may round otherwise.
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)
        errors[forward, backward] = float(jnp.linalg.norm(found[0] - exact[0]))
    assert len(traces) == 1
    # More bits of the backward products, less error, whatever the forward's.
    order = BACKWARD if widths is None else ((2, 1), (2, 3), (4, 3))
    for forward in {f for f, _ in grid}:
        along = [errors[forward, b] for b in order]
        assert along == sorted(along, reverse=True)


def test_a_model_takes_precision_of_both_passes_as_arguments():
    x, w, _ = operands()
    model = nnx.Linear(32, 32, use_bias=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(state, forward, backward):
        def loss(state):
            own = jq.nnx.quantize(nnx.merge(graph, state), {".*": integers(forward, backward)})
            return jnp.sum((own(x) - w) ** 2)

        return jax.grad(loss)(state)

    found = [
        np.asarray(gradient(state, jnp.int32(f), jnp.int32(b))["kernel"][...])
        for f in FORWARD
        for b in BACKWARD
    ]
    assert len({a.tobytes() for a in found}) == len(found)
