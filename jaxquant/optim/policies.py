"""How many bits the pages of each leaf have: a pair of pure functions, as in optax.

`init` says how wide each leaf is to begin with.  `update`, where there is one, scores the pages every so many
steps from what is known of them (`Signals`), and `jaxquant.optim.budget` turns scores into whole bits.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxquant.optim.deprecated import accept_old_fields
from jaxquant.optim.leaves import ROLES, Exact, Leaf
from jaxquant.optim.pages import PLANES


@dataclasses.dataclass(frozen=True)
class Policy:
    """How wide the codes of each leaf are.

    Attributes:
        name: in a word or two, as reports show it.
        init: bits of a leaf to begin with; None keeps it in full precision.  Where there is a budget, it
            decides the widths instead.
        budget_bits: for each element of the state, with everything counted.
        update: how widths move, where they do.
        keep: regular expressions; the slots (as ``0/nu``) and leaves (as ``0/nu/up/kernel``) that one of them
            matches in full stay in full precision.
    """

    name: str
    init: Callable[[Leaf], int | None]
    budget_bits: float | None = None
    update: "Adaptation | None" = None
    keep: tuple[str, ...] = ()

    def kept(self, leaves: Sequence[Leaf], exact: Iterable[Exact]) -> dict[Leaf, str]:
        """The leaves that `keep` names, with the expression that does.

        Raises:
            ValueError: an expression that matches no slot and no leaf.
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
    """How widths move under a budget.

    Attributes:
        interval: steps from one decision to the next.
        score: what pages are worth in bits, as `jaxquant.optim.scoring` has them.
        stay: hysteresis, in bits.
    """

    interval: int
    score: Any
    hysteresis: float


Keep = str | Sequence[str]


def check_keep(keep: Keep) -> tuple[str, ...]:
    """The regular expressions, where they are some.

    Raises:
        ValueError: no regular expression.
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
    """As wide as a budget allows, everywhere nearly alike and always: what adaptive widths are to beat.

    Rows that are left go to pages of signed states, in their order, then to the others.  Of so few elements
    that pages and scales take more than half of the budget, and codes would have less than 3 bits of signed
    states and 2 of others, the state stays exact, with a warning: within the budget where there is more than
    that, beyond it where a whole state of at most 32,768 elements is so.

    Args:
        budget_bits: for each element of the state, with everything counted: codes, scales, tables, empty
            rows and the leaves that stay exact.
        keep: the slots and leaves that stay in full precision, as regular expressions (`Policy`).

    Raises:
        ValueError: no positive number; at `init`, less than the least possible, or a `keep` of nothing.

    >>> uniform(4.5).name
    'uniform, 4.5 bits'
    """
    budget_bits = check_budget(budget_bits)
    name = f"uniform, {budget_bits} bits"
    return Policy(name, lambda leaf: 0, budget_bits, keep=check_keep(keep))


def check_budget(budget_bits: Any) -> float:
    """The budget, where it is one.

    Raises:
        ValueError: not a positive number.
    """
    is_number = isinstance(budget_bits, int | float) and not isinstance(budget_bits, bool)
    if not is_number or not 0 < budget_bits < float("inf"):
        raise ValueError(f"budget_bits must be a finite number above 0; got {budget_bits!r}")
    return float(budget_bits)


def check_bits(bits: Any, where: str) -> int:
    """The bits, where they are some.

    Raises:
        ValueError: not a whole number from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= PLANES:
        raise ValueError(f"{where} must be an integer from 2 to {PLANES}; got {bits!r}")
    return bits


def fixed(bits: int, second: int | None = None, *, keep: Keep = ()) -> Policy:
    """The same width everywhere and always.

    Args:
        bits: of states of either sign, such as momentum; and of all others, where `second` is not given.
        second: of states that are never negative, such as second moments.
        keep: the slots and leaves that stay in full precision, as regular expressions (`Policy`).

    Raises:
        ValueError: a width that is not 2 to 8; at `init`, a `keep` of nothing.

    >>> fixed(5, 4).name, fixed(5, keep=".*/nu").keep
    ('fixed 5 + 4 bits', ('.*/nu',))
    """
    first, second = check_bits(bits, "bits"), second
    second = first if second is None else check_bits(second, "second")
    name = f"fixed {first} bits" if first == second else f"fixed {first} + {second} bits"
    return Policy(name, lambda leaf: first if leaf.is_signed else second, keep=check_keep(keep))


def by_role(widths: Mapping[str, int | tuple[int, int] | None], *, keep: Keep = ()) -> Policy:
    """A width for each role of a parameter: ``"embedding"``, ``"head"``, ``"matrix"``, ``"vector"``.

    Args:
        widths: from role to bits, to a pair (signed, non-negative) of them, or to None for full
            precision; every role is named.
        keep: the slots and leaves that stay in full precision, as regular expressions (`Policy`).

    Raises:
        ValueError: unknown or missing roles, or a width that is not 2 to 8; at `init`, a `keep` of nothing.

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
    """Bits of the role's signed states and of its others."""
    if bits is None:
        return None
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    if len(pair) != 2:
        raise ValueError(
            f"the width of {role} must be an integer or a pair of integers; got {bits!r}"
        )
    where = f"the width of {role}"
    return check_bits(pair[0], where), check_bits(pair[1], where)
