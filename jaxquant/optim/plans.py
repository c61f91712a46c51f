"""What is known of quantized state before any step: which leaves are coded, where, how, and how wide."""

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
    """What is known from shapes and the policy alone; hashable, and without arrays.

    Attributes:
        policy: its name.
        runs: the coded leaves, in pages.
        codecs: for each run, one for each slot.
        bits: for each run and slot, of each leaf to begin with.
        exact: the leaves that stay as they are, in the state's order.
        rows: of each shard's pool.
        adaptation: how widths move, where they do.
        mesh: whose devices share the shards, or None for no layout of ours.
        axis: of the mesh, over which they do; or several.
        fills: whether rows beyond those bits widen pages to begin with.
    """

    policy: str
    groups: tuple[PagedGroup, ...]
    codecs: tuple[tuple[Codec, ...], ...]
    bits: tuple[tuple[tuple[int, ...], ...], ...]
    exact: tuple[Exact, ...]
    rows: int = 0
    adaptation: Adaptation | None = None
    # Where devices lie is no part of what a state means: `exchange` compares what plans print.
    mesh: Mesh | None = dataclasses.field(default=None, repr=False)
    axis: tuple[str, ...] = dataclasses.field(default=("data",), repr=False)
    fills: bool = False

    @property
    def shards(self) -> int:
        """Parts of the pool, which devices can share among them."""
        return self.groups[0].shards if self.groups else 1

    @property
    def coded(self) -> frozenset[int]:
        """Indices of the parameters whose state is coded."""
        return frozenset(p for group in self.groups for p in group.parameters)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The coded leaves, run by run."""
        return tuple(leaf for group in self.groups for slot in group.leaves for leaf in slot)

    def widths(self) -> list[list[np.ndarray]]:
        """Bits of each page to begin with, by run and slot: the most that one of its leaves has."""
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
        """Widens a shard's pages by a bit each while rows are left, those of signed states first."""
        left = self.rows - sum(int(w.sum()) for slots in widths for w in slots)
        pairs = zip(self.codecs, widths, strict=True)
        order = [pair for codecs, slots in pairs for pair in zip(codecs, slots, strict=True)]
        for _, own in sorted(order, key=lambda pair: not pair[0].signed):
            flat = own.reshape(-1)
            able = np.flatnonzero((flat > 0) & (flat < PLANES))[: max(left, 0)]
            flat[able] += 1
            left -= len(able)


SLOW_BITS = (
    6  # Lion's and Adan's momenta of 0.98 and more: 5 bits end far from full precision, 6 near it
)


def default_codec(leaf: Leaf) -> Codec:
    """`Companded` for a state of either sign, stochastic where it moves slowly; `Logarithmic` for the others.

    Rounded to nearest, what moves by less than half a level in a step stands still.
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
    """The plan for some parameters, in so many shards along each axis, and cut as they are.

    Raises:
        ValueError: no leaf that can be coded; a codec that cannot hold what its leaf may be; a budget below
            the least possible.
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
            check_bits(bits, f"the policy's width of {leaf.slot}/{leaf.path}")
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
    """Raises a ValueError where a slow state of either sign has fewer bits than it was seen to train with."""
    if leaf.is_signed and leaf.is_slow and bits < SLOW_BITS:
        raise ValueError(
            f"{leaf.slot}/{leaf.path} changes by a few hundredths a step, which {bits} bits do not follow: "
            f"give it {SLOW_BITS} or more, as in fixed({SLOW_BITS}, 4), or keep it exact, as in "
            f"keep={leaf.slot!r}"
        )


def _rows(plan: Plan) -> int:
    """Rows that the fullest shard's pages take."""
    return max(
        sum(int(widths[shard].sum()) for slots in plan._asked() for widths in slots)
        for shard in range(plan.shards)
    )


# Codes of a bit less lose, whatever is trained: momentum of 2 bits stands still or diverges.
_LEAST_SIGNED, _LEAST_OTHERS = 3, 2
# Elements of a state that may stay exact as a whole, whatever the budget: a few pages.
_FEW = 2**15


def _within(plan: Plan, budget_bits: float) -> Plan:
    """The plan within a budget; runs of which pages and scales leave too little for codes stay exact."""
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
    # Whoever asks for less than such codes take has them.
    if sum(map(_elements, order)) > _FEW or budget_bits < _LEAST_SIGNED:
        if refusal is not None and not found:
            raise refusal
        return found[0]
    _warn_of_kept(order, budget_bits, "; that is more than the budget, which is for larger states")
    return dataclasses.replace(_without(plan, order, budget_bits), adaptation=None)


def _elements(group: PagedGroup) -> int:
    return sum(leaf.size for slot in group.leaves for leaf in slot)


def _is_starved(plan: Plan, budget_bits: float) -> bool:
    """Whether codes are too narrow, since most of the budget goes to what lies beside them."""
    widths = np.concatenate([w[w > 0] for slots in plan.widths() for w in slots])
    return _narrow(plan) != [] and float(widths.mean()) <= budget_bits / 2


def _narrow(plan: Plan) -> list[tuple[Leaf, int]]:
    """The leaves of which a page has fewer bits to begin with than codes need, and how many."""
    found = []
    for group, codecs, slots in zip(plan.groups, plan.codecs, plan.widths(), strict=True):
        for leaves, codec, widths in zip(group.leaves, codecs, slots, strict=True):
            least = int(widths[widths > 0].min())
            if least < (_LEAST_SIGNED if codec.signed else _LEAST_OTHERS):
                found += [(leaf, least) for leaf in leaves]
    return found


def _without(plan: Plan, groups: Sequence[PagedGroup], budget_bits: float) -> Plan:
    """The plan whose leaves of some runs stay exact."""
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
        f"{names}{more} stay exact, {nbytes:,} bytes: of {budget_bits} bits an element, pages, tables and "
        f"scales would leave fewer to codes than these need{more_said}",
        stacklevel=2,
    )


def _warn_of_few_bits(plan: Plan) -> None:
    if narrow := _narrow(plan):
        leaf, bits = narrow[0]
        more = f" and {len(narrow) - 1} others" if len(narrow) > 1 else ""
        warnings.warn(
            f"codes of {leaf.slot}/{leaf.path}{more} have as few as {bits} bits to begin with, and training "
            f"stands still or diverges; momentum needs {_LEAST_SIGNED} or more, others {_LEAST_OTHERS}",
            stacklevel=2,
        )


def _fitted(plan: Plan, budget_bits: float) -> Plan:
    """The plan with the rows of a budget, and all pages as wide as these allow."""
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
            + (f" (exact: {_reasons(large)})" if large else "")
        )
    # More rows than pages of 8 bits take would only lie idle.
    return dataclasses.replace(fitting[-1], rows=min(rows, _rows(alike[-1])), fills=True)


def _alike(plan: Plan, width: int) -> Plan:
    """The plan with one width for all, but no less than codecs need."""
    bits = tuple(
        tuple((max(width, codec.least_bits),) * len(group.parameters) for codec in codecs)
        for group, codecs in zip(plan.groups, plan.codecs, strict=True)
    )
    return dataclasses.replace(plan, bits=bits)


def _overhead(plan: Plan) -> int:
    """Bytes of all but the codes: scales, tables, exact leaves, what the policy remembers, and the like."""
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
    """Why leaves are exact: each reason once, with the slots that it is of."""
    slots: dict[str, list[str]] = {}
    for leaf in exact:
        slots.setdefault(leaf.reason, []).append(leaf.slot)
    found = [f"{why} ({', '.join(dict.fromkeys(own))})" for why, own in slots.items()]
    return "; ".join(sorted(found)) or "it is empty"


def _kept(leaf: Leaf, reason: str) -> Exact:
    path = f"{leaf.slot}/{leaf.path}"
    return Exact(leaf.index, path, leaf.slot, leaf.shape, leaf.dtype, reason, leaf.parameter)


def _codec(slot: Sequence[Leaf], codec: Callable[[Leaf], Codec]) -> Codec:
    """The one codec of a slot."""
    found = {codec(leaf) for leaf in slot}
    if len(found) != 1:
        raise ValueError(f"the leaves of {slot[0].slot} must have one codec; got {found}")
    (chosen,) = found
    if slot[0].is_signed and not chosen.signed:
        raise ValueError(f"{slot[0].slot} may be negative, which {chosen} cannot hold")
    return chosen
