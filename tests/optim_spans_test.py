"""Whole leaves at once, as on GPUs: all elements once, and the codes that groups of pages give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.optim import fixed, quantize_state, spans, updating
from jaxquant.optim.pages import PAGE

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others
SHAPES = {"a": (3 * PAGE,), "b": (300,), "c": (5 * PAGE + 700,), "d": (130, 128), "e": (4, PAGE)}


def numbers(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in SHAPES.items()}


@pytest.fixture
def small(monkeypatch):
    """Spans of one page and more, and of two at most."""
    monkeypatch.setattr(spans.spans, "__defaults__", (1, 2))


@pytest.mark.usefixtures("small")
def test_every_element_is_in_one_place_of_one_span():
    plan = quantize_state(optax.adam(1e-2), fixed(5, 4)).init(numbers(0)).plan
    for group in plan.groups:
        found = spans.spans(group)
        assert sorted(np.concatenate([s.pages for s in found])) == list(range(np.prod(group.grid)))
        sizes = dict.fromkeys(range(len(group.parameters)), 0)
        for span in found:
            for piece in span.pieces:
                sizes[piece.place] += piece.count
                page = span.pages[piece.in_span // PAGE]
                element = page * PAGE + piece.in_span % PAGE
                assert element == group.starts[piece.place] + piece.in_leaf
        assert tuple(sizes.values()) == group.sizes


@pytest.mark.usefixtures("small", "library_promotion")
@pytest.mark.parametrize("tx", [optax.adamw(1e-2), optax.sgd(1e-2, 0.9)], ids=["adamw", "momentum"])
def test_spans_give_the_codes_of_groups_of_pages(tx, monkeypatch):
    params, states, found = numbers(0), [], []
    for by_spans in (False, True):
        if by_spans:  # what a GPU's program takes, here on a CPU
            monkeypatch.setattr(
                updating.jax.lax,
                "platform_dependent",
                lambda *operands, default, cuda=None, **_: (cuda or default)(*operands),
            )
        ours = quantize_state(tx, fixed(6, 4))
        with jax.numpy_rank_promotion("allow"):
            update, state = jax.jit(ours.update), ours.init(params)
            for step in range(3):
                updates, state = update(numbers(step + 1), state, params)
        states.append(state)
        found.append(updates)
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    one, other = (np.asarray(state.pool) for state in states)
    assert np.mean(one != other) < 1e-3  # a last bit turns a rounding here and there
