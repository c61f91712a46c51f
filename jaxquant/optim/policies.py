"""Choose how many bits the pages of each leaf have: a pair of pure functions, as in optax.

`init` returns the initial width of each leaf.  `update`, if there is one, scores the pages every few steps,
and `jaxquant.optim.budget` turns scores into integer widths.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxquant.checks import check_positive, check_whole
from jaxquant.optim.deprecated import accept_old_fields
from jaxquant.optim.leaves import ROLES, Exact, Leaf
from jaxquant.optim.pages import PLANES


@dataclasses.dataclass(frozen=True)
class Policy:
    """The widths of the codes of each leaf.

    Attributes:
        name: a short name, as reports show it.
        init: returns the initial bits of a leaf; None keeps it in full precision.  If there is a budget,
            they are how many bits the leaf has more than the narrowest, and the budget decides the rest.
        budget_bits: bits for each element of the state, with everything counted.
        update: how widths change; None if they are constant.
        keep: regular expressions.  Slots (such as ``0/nu``) and leaves (such as ``0/nu/up/kernel``) that one
            of them matches in full stay in full precision.
    """

    name: str
    init: Callable[[Leaf], int | None]
    budget_bits: float | None = None
    update: "Adaptation | None" = None
    keep: tuple[str, ...] = ()

    def kept(self, leaves: Sequence[Leaf], exact: Iterable[Exact]) -> dict[Leaf, str]:
        """Returns the leaves that `keep` matches, with the expression that matches them.

        Raises:
            ValueError: if an expression matches no slot and no leaf.
        """
        names = {f"{leaf.slot}/{leaf.path}": leaf.slot for leaf in leaves}
        names |= {leaf.path: leaf.slot for leaf in exact}
        every = [*dict.fromkeys(names.values()), *names]
        for pattern in self.keep:
            if not any(re.fullmatch(pattern, name) for name in every):
                near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.0)
                raise ValueError(
                    f"keep={pattern!r} matches no slot and no leaf of the state; the nearest are "
                    f"{', '.join(near)}"
                )
        found = {}
        for leaf in leaves:
            own = leaf.slot, f"{leaf.slot}/{leaf.path}"
            for pattern in self.keep:
                if any(re.fullmatch(pattern, name) for name in own):
                    found.setdefault(leaf, pattern)
        return found


@accept_old_fields(stay="hysteresis")
@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How widths change under a budget.

    Attributes:
        interval: steps between decisions.
        score: the score of pages in bits, such as those of `jaxquant.optim.scoring`.
        hysteresis: a page keeps its width unless the target differs by more than 0.5 + hysteresis bits.
        until: the step from which widths stay; None if they always move.
    """

    interval: int
    score: Any
    hysteresis: float
    until: int | None = None


Keep = str | Sequence[str]


def check_keep(keep: Keep) -> tuple[str, ...]:
    """Returns the regular expressions as a tuple.

    Raises:
        ValueError: if one is not a regular expression.
    """
    patterns = (keep,) if isinstance(keep, str) else keep
    if not isinstance(patterns, Sequence) or not all(isinstance(x, str) for x in patterns):
        raise ValueError(f"keep must be a regular expression or several; got {keep!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"keep={pattern!r} is not a regular expression: {error}") from None
    return tuple(patterns)


def uniform(budget_bits: float, *, keep: Keep = ()) -> Policy:
    """Returns a policy with constant and nearly equal widths, as large as a budget allows.

    It is the baseline for adaptive widths.  Rows that are left widen pages of signed states first, then the
    others.  If a group is so small that pages and scales take more than half of the budget, and codes would
    have less than 3 bits (signed states) or 2 bits (others), it is left unquantized, with a warning.  The
    budget still holds, except for states of at most 32,768 elements that are left unquantized completely.

    Args:
        budget_bits: bits for each element of the state.  Everything is counted: codes, scales, tables, empty
            rows and unquantized leaves.
        keep: regular expressions of slots and leaves to keep in full precision (`Policy`).

    Raises:
        ValueError: if the budget is not a positive number; at `init`, if it is below the minimum, or if
            `keep` matches nothing.

    >>> uniform(4.5).name
    'uniform, 4.5 bits'
    """
    budget_bits = check_budget(budget_bits)
    name = f"uniform, {budget_bits} bits"
    return Policy(name, lambda leaf: 0, budget_bits, keep=check_keep(keep))


def check_budget(budget_bits: Any) -> float:
    """Returns the budget as a float.

    Raises:
        ValueError: if it is not a positive number.
    """
    return check_positive("budget_bits", budget_bits)


def split(
    budget_bits: float,
    signed: int = 1,
    *,
    roles: Mapping[str, int] | None = None,
    keep: Keep = (),
) -> Policy:
    """Returns a policy with constant widths that differ by given bits, as large as a budget allows.

    Momentum needs more bits than a second moment, whose codes are logarithmic and may have one bit.  Rows
    that are left widen pages of signed states first, as under `uniform`, which is `split` with signed = 0.

    Args:
        budget_bits: bits for each element of the state, with everything counted, as in `uniform`.
        signed: bits that signed states, such as momentum, have more than others; 0 to 7.
        roles: bits that the states of a role (``"embedding"``, ``"head"``, ``"matrix"``, ``"vector"``) have
            more than those of the other roles; 0 to 7.
        keep: regular expressions of slots and leaves to keep in full precision (`Policy`).

    Raises:
        ValueError: if the budget is not a positive number, a role is unknown, or bits are out of range; at
            `init`, if the budget is below the minimum, or if `keep` matches nothing.

    >>> split(2.6, 2).name, split(4.0, 1, roles={"head": 1}).name
    ('split, 2.6 bits, signed + 2', 'split, 4.0 bits, signed + 1, head + 1')
    """
    budget_bits = check_budget(budget_bits)
    most = PLANES - 1
    check_whole("signed", signed, 0, most)
    if not isinstance(roles, Mapping | None):
        raise ValueError(f"roles must be a mapping from role to bits; got {roles!r}")
    roles = {} if roles is None else dict(roles)
    if unknown := set(roles) - set(ROLES):
        raise ValueError(f"roles must be among {', '.join(ROLES)}; got {sorted(unknown)}")
    more = {role: check_whole(f"roles[{role!r}]", bits, 0, most) for role, bits in roles.items()}

    def lead(leaf: Leaf) -> int:
        return more.get(leaf.role, 0) + (signed if leaf.is_signed else 0)

    said = [f"split, {budget_bits} bits", f"signed + {signed}"]
    said += [f"{role} + {bits}" for role, bits in more.items()]
    return Policy(", ".join(said), lead, budget_bits, keep=check_keep(keep))


def check_bits(bits: Any, where: str, least: int = 2) -> int:
    """Returns the bits.

    Raises:
        ValueError: if they are not an integer from `least` to 8.
    """
    return check_whole(where, bits, least, PLANES)


def fixed(bits: int, second: int | None = None, *, keep: Keep = ()) -> Policy:
    """Returns a policy with constant widths.

    Args:
        bits: bits of signed states, such as momentum; and of all others if `second` is not given.
        second: bits of non-negative states, such as second moments.  Their codes are logarithmic and may
            have one bit.
        keep: regular expressions of slots and leaves to keep in full precision (`Policy`).

    Raises:
        ValueError: if `bits` is not from 2 to 8, or `second` from 1 to 8; at `init`, if a codec needs more,
            or if `keep` matches nothing.

    >>> fixed(5, 4).name, fixed(5, keep=".*/nu").keep
    ('fixed 5 + 4 bits', ('.*/nu',))
    """
    first, second = check_bits(bits, "bits"), second
    second = first if second is None else check_bits(second, "second", 1)
    name = f"fixed {first} bits" if first == second else f"fixed {first} + {second} bits"
    return Policy(name, lambda leaf: first if leaf.is_signed else second, keep=check_keep(keep))


def by_role(widths: Mapping[str, int | tuple[int, int] | None], *, keep: Keep = ()) -> Policy:
    """Returns a policy with a width for each role: ``"embedding"``, ``"head"``, ``"matrix"``, ``"vector"``.

    Args:
        widths: a mapping from each role to bits, to a pair (signed, non-negative), or to None for full
            precision.  Every role must be present.
        keep: regular expressions of slots and leaves to keep in full precision (`Policy`).

    Raises:
        ValueError: if a role is unknown or missing, or a width is not from 2 to 8 (of non-negative states
            from 1); at `init`, if a codec needs more, or if `keep` matches nothing.

    >>> by_role({"embedding": 8, "head": 8, "matrix": (5, 3), "vector": None}).name
    'by role'
    """
    if not isinstance(widths, Mapping):
        raise ValueError(f"widths must be a mapping from roles to bits; got {widths!r}")
    unknown, missing = set(widths) - set(ROLES), set(ROLES) - set(widths)
    if unknown or missing:
        what = f"unknown: {sorted(unknown)}" if unknown else f"missing: {sorted(missing)}"
        raise ValueError(f"roles must be {', '.join(ROLES)}, each once; {what}")
    chosen = {role: _pair(role, bits) for role, bits in widths.items()}

    def width(leaf: Leaf) -> int | None:
        pair = chosen[leaf.role]
        return None if pair is None else pair[0 if leaf.is_signed else 1]

    return Policy("by role", width, keep=check_keep(keep))


def _pair(role: str, bits: Any) -> tuple[int, int] | None:
    """Returns the bits of a role's signed states and of its others."""
    if bits is None:
        return None
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    if len(pair) != 2:
        raise ValueError(
            f"the width of {role} must be an integer or a pair of integers; got {bits!r}"
        )
    where = f"the width of {role}"
    return check_bits(pair[0], where), check_bits(
        pair[1], where, 1 if isinstance(bits, tuple) else 2
    )
