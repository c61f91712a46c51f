"""Mixed precision: which choice each layer gets, so that a budget of bytes loses least.

Each layer has a few ways to be stored, each with its bytes and with what the model was measured to lose
when that layer alone is stored so; the losses of layers are taken to add up.  What is left is the
multiple-choice knapsack problem, in plain NumPy: a few hundred layers with a few choices each.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.checks import check_number, check_whole


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One choice for each layer.

    Attributes:
        choices: the index of each layer's choice.
        bytes: what they cost together.
        loss: what they lose together.
        bound: no choices within the budget lose less than this; it is the loss itself where the
            choices are proved to be the best.
    """

    choices: tuple[int, ...]
    bytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """The optimality gap, loss − bound: an upper bound on what better choices could gain."""
        return self.loss - self.bound


@dataclasses.dataclass(frozen=True)
class _States:
    """Choices for the first layers that may yet become the best.

    Attributes:
        bytes: of each state, rising.
        losses: falling.
        parent: the state of one layer less that it came from.
        choice: what was added to that.
    """

    bytes: np.ndarray
    losses: np.ndarray
    parent: np.ndarray
    choice: np.ndarray


def allocate(costs: Any, losses: Any, budget: int, *, states: int = 100_000) -> Allocation:
    """Returns the choices, one for each layer, that lose least within a budget.

        min Σ_l losses[l, c_l]    with    Σ_l costs[l, c_l] ≤ budget.

    Layer by layer, all choices so far that no others beat in both bytes and loss are kept, unless the
    fractional relaxation of the layers to come shows that they cannot beat choices already known.
    Where more than `states` remain, those with the least such bounds go on, and the least bound of those
    left out limits what may have been missed.

    Args:
        costs: bytes, whole numbers, [layers, choices].
        losses: what each choice loses, in any unit that adds up, [layers, choices].  They need not fall
            with bytes, and may be negative.  Inf forbids a choice.
        budget: bytes.
        states: how many partial choices are kept, at least 1; time and memory grow with it.

    Raises:
        ValueError: tables of other shapes; costs that are no whole numbers of at least 0; a loss that is NaN
            or −Inf; a layer without an allowed choice; a budget less than the cheapest choices need.

    Source: Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", on the multiple-choice problem; for its
    use, Yao et al. 2020, arXiv 2011.10680.

    >>> costs = [[4, 8], [40, 80]]
    >>> losses = [[0.5, 0.1], [0.3, 0.1]]
    >>> allocate(costs, losses, budget=50)
    Allocation(choices=(1, 0), bytes=48, loss=0.4, bound=0.4)
    """
    layers = _choices(costs, losses)
    check_whole("states", states, 1)
    least = sum(int(layer.bytes[0]) for layer in layers)
    check_number("budget", budget, unit="bytes")
    if not least <= budget < np.inf:
        raise ValueError(
            f"a budget of {budget!r} bytes is not feasible: the cheapest choices need {least}"
        )
    relaxations = _relaxations(layers)
    known = _round_down(layers, budget)
    # The sums of losses are rounded: a bound that is no less than so is not to rule out an equal.
    slack = 1e-12 * sum(float(np.abs(layer.losses).max()) for layer in layers)
    # The whole problem's relaxation is the first bound; what is cut off for room may be as good as its own.
    best, missed, history = _loss(layers, known), np.inf, []
    current = _States(*(np.zeros(1, t) for t in (np.int64, np.float64, np.int64, np.int64)))
    for layer, relaxation in zip(layers, relaxations[1:], strict=True):
        current, dropped = _extend(current, layer, relaxation, budget, best + slack, states)
        missed = min(missed, dropped)
        history.append(current)
    chosen = _trace_back(history) if len(current.losses) else known
    if _loss(layers, chosen) > best:
        chosen = known
    return _allocation(layers, chosen, missed)


def _choices(costs: Any, losses: Any) -> list[_States]:
    """Returns, for each layer, its Pareto-optimal choices, by rising bytes."""
    bytes_, lost = np.asarray(costs, np.float64), np.asarray(losses, np.float64)
    if bytes_.ndim != 2 or bytes_.shape != lost.shape or 0 in bytes_.shape:
        raise ValueError(
            "costs and losses are tables of one shape, [layers, choices]; "
            f"got {bytes_.shape} and {lost.shape}"
        )
    if not np.all((bytes_ >= 0) & (bytes_ < 2**53) & (bytes_ == np.floor(bytes_))):
        raise ValueError(f"costs are whole numbers of bytes, at least 0; got {costs!r}")
    if np.isnan(lost).any() or np.isneginf(lost).any():
        raise ValueError(
            f"losses are numbers, or Inf for a choice that is forbidden; got {losses!r}"
        )
    layers = []
    for place, (cost, loss) in enumerate(zip(bytes_.astype(np.int64), lost, strict=True)):
        allowed = np.flatnonzero(np.isfinite(loss))
        if not len(allowed):
            raise ValueError(f"layer {place} has no allowed choice: all its losses are Inf")
        none = np.zeros(len(allowed), np.int64)
        layers.append(_undominated(_States(cost[allowed], loss[allowed], none, allowed)))
    return layers


def _undominated(states: _States) -> _States:
    """Returns the Pareto-optimal states in bytes and loss; of equal ones, the first."""
    order = np.lexsort((states.losses, states.bytes))
    losses = states.losses[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(losses)))
    return _select(states, order[losses < before[:-1]])


def _select(states: _States, index: np.ndarray) -> _States:
    return _States(*(getattr(states, f.name)[index] for f in dataclasses.fields(states)))


def _hull(layer: _States) -> list[int]:
    """Returns the choices on the lower convex hull of loss over bytes, from the cheapest to the best."""
    corners: list[int] = []
    for i in range(len(layer.bytes)):
        while len(corners) > 1 and _slope(layer, corners[-2], i) <= _slope(
            layer, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(i)
    return corners


def _slope(layer: _States, i: int, j: int) -> float:
    """Returns the loss that a byte more brings between two choices; negative."""
    return float((layer.losses[j] - layer.losses[i]) / (layer.bytes[j] - layer.bytes[i]))


def _steps(layers: Sequence[_States]) -> list[tuple[float, int, int, int]]:
    """Returns every layer's steps along its convex hull, the steepest first: (slope, layer, from, to)."""
    found = []
    for place, layer in enumerate(layers):
        corners = _hull(layer)
        found += [(_slope(layer, i, j), place, i, j) for i, j in itertools.pairwise(corners)]
    return sorted(found)


def _relaxations(layers: Sequence[_States]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, for each number of leading layers left out, a lower bound on the others' loss by bytes.

    With fractions of steps allowed, the best is to take the steps in order of their worth, so that the
    least loss is convex and piecewise linear in bytes: (bytes, losses) of its corners.
    """
    steps, found = _steps(layers), []
    for first in range(len(layers) + 1):
        rest = layers[first:]
        taken = [(layers[p], i, j) for _, p, i, j in steps if p >= first]
        bytes_ = [
            sum(int(v.bytes[0]) for v in rest),
            *(v.bytes[j] - v.bytes[i] for v, i, j in taken),
        ]
        lost = [sum(float(v.losses[0]) for v in rest)]
        lost += [v.losses[j] - v.losses[i] for v, i, j in taken]
        found.append((np.cumsum(np.array(bytes_, np.float64)), np.cumsum(lost)))
    return found


def _round_down(layers: Sequence[_States], budget: int) -> list[int]:
    """Returns a first solution: the steps in order of their worth, each layer's as far as the budget goes."""
    chosen = [0] * len(layers)
    left = budget - sum(int(layer.bytes[0]) for layer in layers)
    for _, place, _, to in _steps(layers):
        layer = layers[place]
        more = int(layer.bytes[to] - layer.bytes[chosen[place]])
        if more <= left:
            chosen[place], left = to, left - more
    return chosen


def _extend(
    current: _States,
    layer: _States,
    relaxation: tuple[np.ndarray, np.ndarray],
    budget: int,
    best: float,
    limit: int,
) -> tuple[_States, float]:
    """Returns the states with one layer more, and the least bound of those that were left out for room."""
    count, choices = len(current.bytes), len(layer.bytes)
    grown = _States(
        (current.bytes[:, None] + layer.bytes[None, :]).ravel(),
        (current.losses[:, None] + layer.losses[None, :]).ravel(),
        np.repeat(np.arange(count), choices),
        np.tile(np.arange(choices), count),
    )
    left = budget - grown.bytes
    grown, left = _select(grown, left >= relaxation[0][0]), left[left >= relaxation[0][0]]
    bounds = grown.losses + np.interp(left, *relaxation)
    grown = _undominated(_select(grown, bounds <= best))
    if len(grown.bytes) <= limit:
        return grown, np.inf
    bounds = grown.losses + np.interp(budget - grown.bytes, *relaxation)
    order = np.argsort(bounds, kind="stable")
    return _select(grown, np.sort(order[:limit])), float(bounds[order[limit]])


def _trace_back(history: Sequence[_States]) -> list[int]:
    """Returns the choices of the last layer's state with the least loss."""
    chosen, state = [], int(np.argmin(history[-1].losses))
    for states in reversed(history):
        chosen.append(int(states.choice[state]))
        state = int(states.parent[state])
    return chosen[::-1]


def _loss(layers: Sequence[_States], chosen: Sequence[int]) -> float:
    return float(sum(layer.losses[c] for layer, c in zip(layers, chosen, strict=True)))


def _allocation(layers: Sequence[_States], chosen: Sequence[int], missed: float) -> Allocation:
    loss = _loss(layers, chosen)
    pairs = list(zip(layers, chosen, strict=True))
    return Allocation(
        tuple(int(layer.choice[c]) for layer, c in pairs),
        sum(int(layer.bytes[c]) for layer, c in pairs),
        loss,
        min(loss, missed),
    )
