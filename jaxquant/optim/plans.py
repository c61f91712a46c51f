"""Plan quantized state before any step: which leaves are coded, where they are stored, and how wide."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxquant.optim.codecs import BLOCK, Codec, Companded, Logarithmic
from jaxquant.optim.layout import PagedGroup, arrange
from jaxquant.optim.leaves import Exact, Leaf, find
from jaxquant.optim.pages import PAGE, PLANES, ROW
from jaxquant.optim.policies import Adaptation, Policy, check_bits
from jaxquant.optim.sharding_axes import Spec, shard_axes_of


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known from shapes and the policy alone.  It is hashable and holds no arrays.

    Attributes:
        policy: the name of the policy.
        groups: the coded leaves, in pages.
        codecs: for each group, the codec of each slot.
        bits: for each group and slot, the initial width of each leaf.
        exact: the unquantized leaves, in the order of the state.
        rows: the number of rows in the pool of each shard.
        adaptation: how widths change; None if they are constant.
        mesh: the mesh whose devices share the shards; None if there is none.
        axis: the mesh axes that share the shards.
        fills: whether rows that are left widen pages initially.
    """

    policy: str
    groups: tuple[PagedGroup, ...]
    codecs: tuple[tuple[Codec, ...], ...]
    bits: tuple[tuple[tuple[int, ...], ...], ...]
    exact: tuple[Exact, ...]
    rows: int = 0
    adaptation: Adaptation | None = None
    # Devices do not change the meaning of a state, so they are not part of the repr.
    mesh: Mesh | None = dataclasses.field(default=None, repr=False)
    axis: tuple[str, ...] = dataclasses.field(default=("data",), repr=False)
    fills: bool = False

    @property
    def shards(self) -> int:
        """The number of parts of the pool, which devices can share."""
        return self.groups[0].shards if self.groups else 1

    @property
    def coded(self) -> frozenset[int]:
        """The indices of the parameters whose state is coded."""
        return frozenset(p for group in self.groups for p in group.parameters)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The coded leaves, group by group."""
        return tuple(leaf for group in self.groups for slot in group.leaves for leaf in slot)

    @property
    def least_bits(self) -> list[list[int]]:
        """The minimum width by group and slot: its codec's, and `SLOW_BITS` for slow signed states."""
        return [
            [
                max(codec.least_bits, SLOW_BITS if any(map(_is_slow, leaves)) else 1)
                for codec, leaves in zip(codecs, group.leaves, strict=True)
            ]
            for codecs, group in zip(self.codecs, self.groups, strict=True)
        ]

    def widths(self) -> list[list[np.ndarray]]:
        """Returns the initial width of each page by group and slot: the maximum over its leaves."""
        found = self._asked()
        if self.fills:
            for shard in range(self.shards):
                self._fill([[widths[shard] for widths in slots] for slots in found])
        return found

    def _asked(self) -> list[list[np.ndarray]]:
        return [
            [group.by_page(bits) for bits in slots]
            for group, slots in zip(self.groups, self.bits, strict=True)
        ]

    def _fill(self, widths: list[list[np.ndarray]]) -> None:
        """Widens the pages of a shard by one bit each while rows are left, signed states first."""
        left = self.rows - sum(int(w.sum()) for slots in widths for w in slots)
        pairs = zip(self.codecs, widths, strict=True)
        order = [pair for codecs, slots in pairs for pair in zip(codecs, slots, strict=True)]
        for _, own in sorted(order, key=lambda pair: not pair[0].signed):
            flat = own.reshape(-1)
            able = np.flatnonzero((flat > 0) & (flat < PLANES))[: max(left, 0)]
            flat[able] += 1
            left -= len(able)


# Momenta of 0.98 and more (Lion, Adan) end far from full precision with 5 bits, and near it with 6.
SLOW_BITS = 6


def _is_slow(leaf: Leaf) -> bool:
    return leaf.is_signed and leaf.is_slow


def default_codec(leaf: Leaf) -> Codec:
    """Returns `Logarithmic` for non-negative states and `Companded` for signed ones, stochastic if slow.

    With rounding to nearest, a value that changes by less than half a level in a step does not change at
    all.
    """
    return Companded(stochastic=leaf.is_slow) if leaf.is_signed else Logarithmic()


def make_plan(
    tx: Any,
    policy: Policy,
    codec: Callable[[Leaf], Codec],
    params: Any,
    shards: Mapping[str, int],
    spec: Spec,
    extra: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan for some parameters, with a number of shards along each mesh axis.

    Raises:
        ValueError: if no leaf can be coded, if a codec cannot hold the values of its leaf, or if the budget
            is below the minimum.
    """
    leaves, exact = find(tx, params, extra)
    named = policy.kept(leaves, exact)
    widths = {leaf: None if leaf in named else policy.init(leaf) for leaf in leaves}
    for leaf, bits in widths.items():
        why = f"keep={named[leaf]!r}" if leaf in named else policy.name
        exact += [_kept(leaf, f"the policy keeps it ({why})")] * (bits is None)
    chosen = {leaf: bits for leaf, bits in widths.items() if bits is not None}
    if policy.budget_bits is None:
        for leaf, bits in chosen.items():
            least = getattr(codec(leaf), "least_bits", 1)
            check_bits(bits, f"the policy's width of {leaf.slot}/{leaf.path}", least)
            _check_slow(leaf, bits)
    if not chosen:
        raise ValueError(f"no leaf of the optimizer's state can be quantized: {_reasons(exact)}")
    dtypes = [np.dtype(p.dtype) for p in jax.tree.leaves(params)]
    axes_of = lambda leaf: shard_axes_of(leaf.shape, spec(leaf.path, leaf.shape), shards)  # noqa: E731
    groups = arrange(list(chosen), dtypes, math.prod(shards.values()), axes_of)
    plan = Plan(
        policy.name,
        groups,
        tuple(tuple(_codec(slot, codec) for slot in group.leaves) for group in groups),
        tuple(tuple(tuple(chosen[x] for x in slot) for slot in group.leaves) for group in groups),
        tuple(sorted(exact, key=lambda e: e.index)),
        adaptation=policy.update,
    )
    if policy.budget_bits is None:
        plan = dataclasses.replace(plan, rows=_rows(plan))
    else:
        plan = _within(plan, policy.budget_bits)
    _warn_of_few_bits(plan)
    return plan


def _check_slow(leaf: Leaf, bits: int) -> None:
    """Raises a ValueError if a slow signed state has fewer bits than it needs to train."""
    if _is_slow(leaf) and bits < SLOW_BITS:
        raise ValueError(
            f"{leaf.slot}/{leaf.path} changes by a few hundredths a step, which {bits} bits do not follow: "
            f"give it {SLOW_BITS} or more, as in fixed({SLOW_BITS}, 4), or leave it unquantized, as in "
            f"keep={leaf.slot!r}"
        )


def _rows(plan: Plan) -> int:
    """Returns the number of rows that the pages of the fullest shard need."""
    return max(
        sum(int(widths[shard].sum()) for slots in plan._asked() for widths in slots)
        for shard in range(plan.shards)
    )


# Momentum of 2 bits stalls or diverges.  Second moments of one bit train, at a higher loss.
_LEAST_SIGNED, _LEAST_OTHERS = 3, 2
# A state with at most so many elements (a few pages) may be left unquantized despite the budget.
_FEW = 2**15


def _within(plan: Plan, budget_bits: float) -> Plan:
    """Returns the plan within a budget.  Groups that leave too few bits for codes are left unquantized."""
    order = sorted(plan.groups, key=_elements)
    found, refusal = [], None
    for count in range(len(order)):
        kept = _without(plan, order[:count], budget_bits)
        try:
            found.append(_fitted(kept, budget_bits))
        except ValueError as error:
            refusal = refusal or error
            continue
        if not _is_starved(found[-1], budget_bits):
            _warn_of_kept(order[:count], budget_bits)
            return found[-1]
    # A budget below these widths is taken as intended.
    if sum(map(_elements, order)) > _FEW or budget_bits < _LEAST_SIGNED:
        if refusal is not None and not found:
            raise refusal
        return found[0]
    _warn_of_kept(order, budget_bits, "; that is more than the budget, which is for larger states")
    return dataclasses.replace(_without(plan, order, budget_bits), adaptation=None)


def _elements(group: PagedGroup) -> int:
    return sum(leaf.size for slot in group.leaves for leaf in slot)


def _is_starved(plan: Plan, budget_bits: float) -> bool:
    """Returns whether codes are too narrow because scales and tables take most of the budget."""
    widths = np.concatenate([w[w > 0] for slots in plan.widths() for w in slots])
    return _narrow(plan) != [] and float(widths.mean()) <= budget_bits / 2


def _narrow(plan: Plan) -> list[tuple[Leaf, int]]:
    """Returns the leaves with a page that starts with fewer bits than codes need, and these bits."""
    found = []
    for group, codecs, slots in zip(plan.groups, plan.codecs, plan.widths(), strict=True):
        for leaves, codec, widths in zip(group.leaves, codecs, slots, strict=True):
            least = int(widths[widths > 0].min())
            if least < (_LEAST_SIGNED if codec.signed else _LEAST_OTHERS):
                found += [(leaf, least) for leaf in leaves]
    return found


def _without(plan: Plan, groups: Sequence[PagedGroup], budget_bits: float) -> Plan:
    """Returns the plan with the leaves of some groups unquantized."""
    coded = [x for x in zip(plan.groups, plan.codecs, plan.bits, strict=True) if x[0] not in groups]
    kept = [
        _kept(leaf, f"pages of {leaf.size} elements leave {budget_bits} bits too little for codes")
        for group in groups
        for slot in group.leaves
        for leaf in slot
    ]
    own = tuple(zip(*coded, strict=True)) or ((), (), ())
    exact = tuple(sorted((*plan.exact, *kept), key=lambda e: e.index))
    return dataclasses.replace(plan, groups=own[0], codecs=own[1], bits=own[2], exact=exact)


def _warn_of_kept(groups: Sequence[PagedGroup], budget_bits: float, more_said: str = "") -> None:
    leaves = [leaf for group in groups for slot in group.leaves for leaf in slot]
    if not leaves:
        return
    names = ", ".join(f"{leaf.slot}/{leaf.path}" for leaf in leaves[:4])
    more = f" and {len(leaves) - 4} others" if len(leaves) > 4 else ""
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    warnings.warn(
        f"{names}{more} stay unquantized, {nbytes:,} bytes: of {budget_bits} bits an element, pages, tables "
        f"and scales would leave fewer to codes than these need{more_said}",
        stacklevel=2,
    )


def _warn_of_few_bits(plan: Plan) -> None:
    if narrow := _narrow(plan):
        leaf, bits = narrow[0]
        more = f" and {len(narrow) - 1} others" if len(narrow) > 1 else ""
        warnings.warn(
            f"codes of {leaf.slot}/{leaf.path}{more} start with as few as {bits} bits: the loss will be "
            f"higher, and training may stall or diverge; momentum needs {_LEAST_SIGNED} or more, others "
            f"{_LEAST_OTHERS}",
            stacklevel=2,
        )


def _fitted(plan: Plan, budget_bits: float) -> Plan:
    """Returns the plan with the rows of a budget, and all pages as wide as these allow."""
    elements = sum(math.prod(leaf.shape) for leaf in (*plan.leaves, *plan.exact))
    shards, spent = plan.shards, _overhead(plan)
    rows = int((budget_bits * elements / 8 - spent) // (ROW * shards))
    alike = [_alike(plan, width) for width in range(1, PLANES + 1)]
    fitting = [p for p in alike if _rows(p) <= rows]
    if not fitting:
        least = 8 * (_rows(alike[0]) * ROW * shards + spent) / elements
        large = [leaf for leaf in plan.exact if math.prod(leaf.shape) >= BLOCK]
        raise ValueError(
            f"budget_bits must be at least {math.ceil(least * 100) / 100:.2f} for this state, of which "
            f"{8 * spent / elements:.2f} are scales, tables and unquantized leaves; got {budget_bits}"
            + (f" (unquantized: {_reasons(large)})" if large else "")
        )
    # Rows beyond 8 bits for all pages would be unused.
    return dataclasses.replace(fitting[-1], rows=min(rows, _rows(alike[-1])), fills=True)


def _alike(plan: Plan, width: int) -> Plan:
    """Returns the plan whose narrowest leaves have one width, and the others the policy's bits more.

    No width is less than `Plan.least_bits`, or more than there are planes.
    """
    bits = tuple(
        tuple(
            tuple(min(max(width + lead, least), PLANES) for lead in leads)
            for least, leads in zip(own, slots, strict=True)
        )
        for own, slots in zip(plan.least_bits, plan.bits, strict=True)
    )
    return dataclasses.replace(plan, bits=bits)


def _overhead(plan: Plan) -> int:
    """Returns the bytes besides codes: scales, tables, unquantized leaves, and the memory of the policy."""
    found = 8 + ROW * plan.shards
    found += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plan.exact)
    for group, codecs in zip(plan.groups, plan.codecs, strict=True):
        count = math.prod(group.grid)
        for codec in codecs:
            scale = math.prod(codec.scale.shape) * codec.scale.dtype.itemsize
            found += count * (PAGE // BLOCK * scale + 4 * PLANES)
    if plan.adaptation is None:
        return found
    score = plan.adaptation.score
    memory = jax.eval_shape(lambda: score.init(plan))
    return found + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))


def _reasons(exact: Sequence[Exact]) -> str:
    """Joins the reasons why leaves are unquantized: each reason once, with its slots."""
    slots: dict[str, list[str]] = {}
    for leaf in exact:
        slots.setdefault(leaf.reason, []).append(leaf.slot)
    found = [f"{why} ({', '.join(dict.fromkeys(own))})" for why, own in slots.items()]
    return "; ".join(sorted(found)) or "it is empty"


def _kept(leaf: Leaf, reason: str) -> Exact:
    path = f"{leaf.slot}/{leaf.path}"
    return Exact(leaf.index, path, leaf.slot, leaf.shape, leaf.dtype, reason, leaf.parameter)


def _codec(slot: Sequence[Leaf], codec: Callable[[Leaf], Codec]) -> Codec:
    """Returns the one codec of a slot."""
    found = {codec(leaf) for leaf in slot}
    if len(found) != 1:
        raise ValueError(f"the leaves of {slot[0].slot} must have one codec; got {found}")
    (chosen,) = found
    if not isinstance(chosen, Codec):
        raise ValueError(
            f"codec must return a jaxquant.optim.Codec, such as Companded(); got {chosen!r}"
        )
    if slot[0].is_signed and not chosen.signed:
        raise ValueError(f"{slot[0].slot} may be negative, which {chosen} cannot hold")
    return chosen
