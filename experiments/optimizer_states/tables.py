"""The tables of this study in the pages, and what they say of it in sentences."""

from collections.abc import Callable, Iterable
from typing import Any

from experiments.harness.reporting.law_tables import interval
from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds
from experiments.harness.training.arms import EXACT, NEAREST, STOCHASTIC, budget_of, fixed_bits
from experiments.optimizer_states.contest import BEST, EVEN
from experiments.optimizer_states.transformations import PARTS
from jaxquant import laws

_LAPTOP, _LAW = "optimizer_states/laptop/summary.json", "optimizer_states/law/summary.json"
_CONTEST = "optimizer_states/contest/summary.json"
_VISION = "optimizer_states/contest_vision/summary.json"
_WEIGHTS = "optimizer_states/bf16_weights/summary.json"
_PAGES = ("experiments/README.md", "docs/studies/optimizer_states.md")
_WIDTHS = ("8 bits", "5 + 4 bits")

# ---------------------------------------------------------------------------------------------------
# Codecs


def codecs(summary: dict) -> str:
    """Each arm's bits and paired gap, the widest first."""
    rows = sorted((r for r in summary["gaps"] if r["arm"] != EXACT), key=lambda r: -r["bits"])
    cells = [
        [_name(r["arm"]), f"{r['bits']:.2f}", bounds(r["gap"], r["low"], r["high"], "+.4f")]
        for r in rows
    ]
    return to_markdown(["state", "bits, all counted", "gap, nats"], cells)


def _name(arm: str) -> str:
    """An arm in words.

    >>> _name("felt-5.0"), _name("split1-4.3"), _name("fixed-8"), _name("bitsandbytes-8bit")
    ('`felt`, 5.0', 'momentum + 1 bit, 4.3', 'fixed, 8', 'bitsandbytes, 8 bits')
    """
    if budget := budget_of(arm):
        return f"{_ALLOCATIONS[budget[0]]}, {budget[1]}"
    if bits := fixed_bits(arm):
        return f"fixed, {bits}"
    codec, width = arm.split("-")
    return f"{codec}, {width.removesuffix('bit')} bits"


def codec_phrases(summary: dict) -> dict[str, list[str]]:
    """Full precision's own spread over seeds."""
    rows = {r["arm"]: r for r in summary["gaps"]}
    said = [f"SD over {rows[EXACT]['seeds']} seeds is {rows[EXACT]['exact_sd']:.4f}"]
    return dict.fromkeys(_PAGES, said)


# ---------------------------------------------------------------------------------------------------
# The contest

_ALLOCATIONS = {
    "even": "even",
    "split1": "momentum + 1 bit",
    "split2": "momentum + 2 bits",
    "split3": "momentum + 3 bits",
    "role": "momentum, embedding and head + 1 bit",
    "felt": "`felt`",
    "felt-once": "`felt` for a tenth of the steps",
    "felt-lasting": "`felt`, with how long errors last",
    "statistics": "`statistics`",
    "ranked": "`statistics` within slots",
    "hindsight": "`felt`, known beforehand",
}


def contest(summary: dict) -> str:
    """The gap to full precision of each allocation at each budget."""
    rows: dict[str, dict[float, str]] = {}
    for row in summary["gaps"]:
        if found := budget_of(row["arm"]):
            gap = bounds(row["gap"], row["low"], row["high"], "+.3f")
            rows.setdefault(found[0], {})[found[1]] = gap
    budgets = sorted({budget for own in rows.values() for budget in own})
    head = ["allocation", *(f"{budget} bits" for budget in budgets)]
    kinds = [kind for kind in _ALLOCATIONS if kind in rows]
    cells = [[_ALLOCATIONS[kind], *(rows[kind].get(b, "") for b in budgets)] for kind in kinds]
    return to_markdown(head, cells)


def contest_phrases(summary: dict) -> dict[str, list[str]]:
    """Who beats whom, with q-values over all contests."""
    rows = _by_contest(summary)

    def gain(arm: str, against: str = EVEN) -> str:
        return _gain(rows[arm, against])

    split = f"{gain('split1-2.6')} at 2.6 bits and {gain('split1-3.0')} at 3.0"
    adaptive = f"`felt` beats it by {gain('felt-2.6')} at 2.6 bits"
    behind = [gain(f"felt-{b}", BEST) for b in ("2.6", "3.0", "4.0")]
    against = f"against the best static split it is {behind[0]}, {behind[1]} and {behind[2]}"
    half = {a: (r["high"] - r["low"]) / 2 for (a, b), r in rows.items() if b == EVEN}
    power = f"six seeds could show {half['felt-4.0']:.3f}"
    own = dict.fromkeys(_PAGES, (split, adaptive, against, power))
    seeds = f"{summary['gaps'][0]['seeds']} seeds"
    return {page: list(said) for page, said in own.items()} | {"README.md": [split, seeds]}


def vision_phrases(summary: dict) -> dict[str, list[str]]:
    """What beats the even allocation on the ViT, and what adaptive widths do there."""
    rows = _by_contest(summary)
    said = [
        f"One bit more for momentum, embedding and head gains {_gain(rows['role-4.0', EVEN])}",
        f"`felt` is {_gain(rows['felt-4.0', EVEN])} beside even widths",
        f"and `felt` for a tenth of the steps {_gain(rows['felt-once-4.0', BEST])} beside that split",
    ]
    return dict.fromkeys(_PAGES, said)


def _by_contest(summary: dict) -> dict[tuple[str, str], dict]:
    return {(row["arm"], row["against"]): row for row in summary["contests"]}


def _gain(row: dict) -> str:
    return f"{bounds(row['gap'], row['low'], row['high'], '+.3f')} (q = {row['q_value']:.1g})"


# ---------------------------------------------------------------------------------------------------
# Weights in bfloat16

_ROUNDED = {STOCHASTIC: "stochastically", NEAREST: "to nearest"}
_STATES = {EXACT: "float32", "even-5.0": "`even` 5.0"}


def weights(summary: dict) -> str:
    """Gaps to float32 weights with the same state, and bytes of weights and state for each parameter."""
    head = ["weights rounded", "state", "bytes", "float32's", "gap, nats", "q"]
    rows = sorted(summary["weights"], key=lambda r: list(_ROUNDED).index(r["weights"]))
    return to_markdown(head, [_of_weights(row) for row in rows])


def _of_weights(row: dict) -> list[str]:
    nbytes = [f"{row[name]:.2f}" for name in ("bytes", "bytes_float32")]
    gap = bounds(row["gap"], row["low"], row["high"], "+.4f")
    return [
        _ROUNDED[row["weights"]],
        _STATES[row["state"]],
        *nbytes,
        gap,
        f"{row['q_value']:.1g}",
    ]


def weights_phrases(summary: dict) -> dict[str, list[str]]:
    """Full precision's spread, within which the gap is to lie."""
    row = summary["weights"][0]
    said = [f"{row['seeds']} paired seeds", f"SD over seeds, {row['exact_sd']:.4f}"]
    even = next(r for r in summary["gaps"] if r["arm"] == "even-5.0")
    gap = bounds(even["gap"], even["low"], even["high"], "+.4f")
    said.append(gap)
    return dict.fromkeys(_PAGES, said) | {"README.md": [gap]}


# ---------------------------------------------------------------------------------------------------
# The laws of the state's bits


def law_phrases(summary: dict) -> dict[str, list[str]]:
    """What the laws say, and the gaps that decide it."""
    found, rows = summary["law"], summary["gaps"]
    said = [*_ranks(found), *_of_two_bits(rows), *_of_more_bits(rows)]
    trials = f"{summary['trials']['finished']} trials of the law"
    return dict.fromkeys(_PAGES, said) | {"README.md": [trials]}


def _ranks(found: dict) -> list[str]:
    """Over all widths, and without the narrowest, by how much in AICc."""
    fits = {fit["law"]: fit for fit in found["fits"]}
    added, params, tokens = (laws.state_law(place).name for place in "END")
    scale = next(p for p in fits[added]["parameters"] if p["name"] == "gamma_state")
    every = {r["law"]: r for r in found["laws"]}
    rest = {r["law"]: r["delta_aicc"] for r in found["without_narrowest"]}
    apart = " and ".join(f"{every[n]['aicc'] - every[added]['aicc']:.0f}" for n in (params, tokens))
    r2 = ", ".join(f"{every[n]['r2']:.3f}" for n in (added, params, tokens))
    return [
        f"γ = {interval(scale, '.2f')} bits",
        f"(AICc less by {apart}; R² {r2})",
        f"(AICc less by {rest[added] - rest[tokens]:.0f} than the added loss, by "
        f"{rest[params] - rest[tokens]:.0f} than parameters)",
    ]


def _of_two_bits(rows: list[dict]) -> list[str]:
    """The least and the largest size at 2 bits, and the losses at all."""
    two = [r for r in rows if r["arm"] == "fixed-2"]
    exact = [r["loss"] for r in rows if r["arm"] == EXACT]
    sizes = list(dict.fromkeys(r["size"] for r in two))
    small = [r["gap"] for r in two if r["size"] == sizes[0]]
    large = sorted((r for r in two if r["size"] == sizes[-1]), key=lambda r: r["steps"])
    first, last = (bounds(r["gap"], r["low"], r["high"], ".2f") for r in (large[0], large[-1]))
    return [
        f"the mean loss stays between {_range((r['loss'] for r in two), ' and ')}",
        f"full precision goes from {max(exact):.2f} to {min(exact):.2f}",
        f"({_range(small)} nats at {sizes[0]}, {first} to {last} at {sizes[-1]})",
    ]


def _of_more_bits(rows: list[dict]) -> list[str]:
    gap: Callable[[int], list[float]] = lambda bits: [  # noqa: E731
        r["gap"] for r in rows if r["arm"] == f"fixed-{bits}"
    ]
    largest = max(map(abs, [*gap(6), *gap(8)]))
    three, four = gap(3), gap(4)
    return [
        f"At 3 bits the gap is {_range(three)}, at 4 bits {min(four):+.3f} to {max(four):+.3f}, at 6 "
        f"and 8 within {_up(largest)}"
    ]


def _range(values: Iterable[float], joint: str = " to ") -> str:
    """The least and the largest.

    >>> _range([0.11, 0.031])
    '0.03 to 0.11'
    """
    given = list(values)
    return f"{min(given):.2f}{joint}{max(given):.2f}"


def _up(value: float) -> str:
    """A bound that holds: rounded up, to thousandths.

    >>> _up(0.0074)
    '0.008'
    """
    return f"{-(-value // 0.001) * 0.001:.3f}"


# ---------------------------------------------------------------------------------------------------
# Every transformation


def transformations(rows: dict[str, dict[str, Any]]) -> str:
    """Optimizers and wrappers as a table, and what they are made of as a list."""
    head = ("transformation", "state", "slots", "loss, optax", *_WIDTHS)
    whole = {name: row for name, row in rows.items() if name not in PARTS}
    cells = [
        [name, row["kind"], row["slots"], *(_shown(row.get(k, "")) for k in ("plain", *_WIDTHS))]
        for name, row in whole.items()
    ]
    return f"{to_markdown(head, cells)}\n\n{_parts(rows)}"


def _shown(loss: float | str) -> str:
    return loss if isinstance(loss, str) else f"{loss:.4f}"


def _parts(rows: dict[str, dict[str, Any]]) -> str:
    """Transformations that optimizers are made of, by what becomes of their state."""
    by_kind: dict[str, list[str]] = {}
    for name, row in rows.items():
        if name in PARTS:
            is_refused = row["kind"] == "refused"
            said = "nothing to code" if is_refused else f"{row['kind']} ({row['slots']})"
            by_kind.setdefault(said, []).append(name)
    return "\n".join(f"- {said}: {', '.join(names)}" for said, names in by_kind.items())


TABLES = {
    "optimizer_states/allocations": Table(_CONTEST, contest),
    "optimizer_states/allocations_vision": Table(_VISION, contest),
    "optimizer_states/bf16_weights": Table(_WEIGHTS, weights),
    "optimizer_states/laptop": Table(_LAPTOP, codecs),
    "optimizer_states/transformations": Table("optimizer_states/optimizers.json", transformations),
}
PHRASES = (
    Phrases(_LAPTOP, codec_phrases),
    Phrases(_LAW, law_phrases),
    Phrases(_CONTEST, contest_phrases),
    Phrases(_VISION, vision_phrases),
    Phrases(_WEIGHTS, weights_phrases),
)
