"""Allocations against enumeration where there are few, and an integer programme's solver where many."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.ptq.search import allocate

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def enumerated(costs, losses, budget) -> float:
    """The least loss of all choices within a budget."""
    rows = range(len(costs))
    return min(
        sum(losses[r][c] for r, c in zip(rows, choices, strict=True))
        for choices in itertools.product(*(range(len(row)) for row in costs))
        if sum(costs[r][c] for r, c in zip(rows, choices, strict=True)) <= budget
    )


@st.composite
def problems(draw):
    layers, choices = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    table = lambda numbers: draw(  # noqa: E731
        st.lists(
            st.lists(numbers, min_size=choices, max_size=choices),
            min_size=layers,
            max_size=layers,
        )
    )
    costs = table(st.integers(0, 30))
    losses = table(st.floats(-2, 5).map(lambda v: round(v, 2)))
    least, most = (sum(f(row) for row in costs) for f in (min, max))
    return costs, losses, draw(st.integers(least, most + 3))


@settings(max_examples=400, deadline=None)
@given(problems())
def test_an_allocation_is_the_best_of_all(problem):
    costs, losses, budget = problem
    found = allocate(costs, losses, budget)
    best = enumerated(costs, losses, budget)
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert found.bound == found.loss
    pairs = list(enumerate(found.choices))
    assert found.bytes == sum(costs[r][c] for r, c in pairs) <= budget
    assert found.loss == pytest.approx(sum(losses[r][c] for r, c in pairs), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 4))
def test_with_little_room_the_gap_is_told(problem, states):
    costs, losses, budget = problem
    found = allocate(costs, losses, budget, states=states)
    best = enumerated(costs, losses, budget)
    assert found.bound - 1e-9 <= best <= found.loss + 1e-9
    assert found.bytes <= budget


def model(seed: int, layers: int, noise: float = 0.0):
    """Bytes and losses as of a model's layers at six widths."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.125, 3.125, 4.125, 5.125, 6.125, 8.125])
    costs = np.floor(rng.integers(10_000, 1_000_000, (layers, 1)) * bits / 8).astype(int)
    losses = np.exp(1.5 * rng.normal(size=(layers, 1))) * 4.0**-bits
    losses = losses * np.exp(0.3 * rng.normal(size=losses.shape))
    return costs, losses + noise * rng.normal(size=losses.shape), int(costs[:, 2].sum())


def by_integer_programming(costs, losses, budget) -> float:
    layers, choices = losses.shape
    one_each = scipy.sparse.kron(scipy.sparse.eye(layers), np.ones((1, choices)))
    done = scipy.optimize.milp(
        losses.ravel(),
        integrality=np.ones(losses.size),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(costs.ravel()[None].astype(float), 0, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert done.success
    return float(done.fun)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("seed", range(4))
def test_an_allocation_of_many_layers_is_that_of_integer_programming(seed, noise):
    costs, losses, budget = model(seed, 60, noise)
    found = allocate(costs, losses, budget)
    assert found.gap == 0
    assert found.loss == pytest.approx(by_integer_programming(costs, losses, budget), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_losses_that_are_bytes_but_for_little_are_solved_exactly(seed):
    """All choices lie near one line, so that hardly any can be ruled out before they are looked at."""
    rng = np.random.default_rng(seed)
    costs = rng.integers(10**6, 10**7, (6, 5))
    losses = -costs / 1e7 + 1e-7 * rng.normal(size=costs.shape)
    budget = int(rng.integers(costs.min(1).sum(), costs.max(1).sum()))
    found = allocate(costs, losses, budget)
    assert found.gap == 0
    assert found.loss == pytest.approx(enumerated(costs, losses, budget), abs=1e-12)


def test_hundreds_of_layers_are_solved():
    costs, losses, budget = model(0, 300)
    found = allocate(costs, losses, budget)
    uniform = losses[:, 2].sum()
    assert found.bytes <= budget
    assert found.gap <= 1e-3 * found.loss
    assert found.loss < uniform


def test_more_bytes_never_lose_more():
    costs, losses, _ = model(1, 20, 1e-3)
    least, most = costs.min(1).sum(), costs.max(1).sum()
    found = [allocate(costs, losses, int(b)).loss for b in np.linspace(least, most, 25)]
    assert (np.diff(found) <= 1e-12).all()
    assert found[-1] == pytest.approx(losses.min(1).sum())


def test_a_choice_with_infinite_loss_is_forbidden():
    costs, losses = [[1, 2, 3], [1, 2, 3]], [[np.inf, 1.0, 0.0], [0.5, np.inf, 0.0]]
    assert allocate(costs, losses, 3).choices == (1, 0)
    with pytest.raises(ValueError, match="the cheapest choices need 3"):
        allocate(costs, losses, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[4, 8]], [[1.0, 0.0]], 3), "budget of 3 bytes.*need 4"),
        (([[4, 8]], [[1.0, 0.0]], float("nan")), "finite; got nan"),
        (([[4, 8]], [[1.0, 0.0]], float("inf")), "finite; got inf"),
        (([[4, 8]], [[1.0, 0.0]], "8"), "budget must be a number of bytes that is finite; got '8'"),
        (([4, 8], [1.0, 0.0], 8), "one shape"),
        (([[4, 8]], [[1.0]], 8), "one shape"),
        (([], [], 8), "one shape"),
        (([[4.5]], [[1.0]], 8), "whole numbers"),
        (([[-4]], [[1.0]], 8), "whole numbers"),
        (([[4, 8]], [[1.0, np.nan]], 8), "losses are numbers"),
        (([[4, 8]], [[1.0, -np.inf]], 8), "losses are numbers"),
        (([[4], [4]], [[1.0], [np.inf]], 8), "layer 1 has no allowed choice"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


def test_no_states_is_named():
    with pytest.raises(ValueError, match="states"):
        allocate([[1]], [[0.0]], 1, states=0)
