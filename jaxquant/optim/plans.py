"""What is known of quantized state before any step: which leaves are coded, where, how, and how wide."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.optim.codecs import Codec, Companded, Logarithmic
from jaxquant.optim.layout import Run, arrange
from jaxquant.optim.leaves import Exact, Leaf, find
from jaxquant.optim.policies import Policy


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
    """

    policy: str
    runs: tuple[Run, ...]
    codecs: tuple[tuple[Codec, ...], ...]
    bits: tuple[tuple[tuple[int, ...], ...], ...]
    exact: tuple[Exact, ...]

    @property
    def coded(self) -> frozenset[int]:
        """Indices of the parameters whose state is coded."""
        return frozenset(p for run in self.runs for p in run.parameters)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The coded leaves, run by run."""
        return tuple(leaf for run in self.runs for slot in run.leaves for leaf in slot)

    def widths(self) -> list[list[np.ndarray]]:
        """Bits of each page to begin with, by run and slot: the most that one of its leaves has."""
        return [
            [run.by_page(bits) for bits in slots]
            for run, slots in zip(self.runs, self.bits, strict=True)
        ]


def default_codec(leaf: Leaf) -> Codec:
    """`Companded` for a state of either sign, `Logarithmic` for one that is never negative."""
    return Companded() if leaf.is_signed else Logarithmic()


def make_plan(
    tx: Any, policy: Policy, codec: Callable[[Leaf], Codec], params: Any, shards: int
) -> Plan:
    """The plan for some parameters.

    Raises:
        ValueError: no leaf that can be coded; a codec that cannot hold what its leaf may be.
    """
    leaves, exact = find(tx, params)
    widths = {leaf: policy.bits(leaf) for leaf in leaves}
    kept = f"the policy keeps it ({policy.name})"
    exact += [_kept(leaf, kept) for leaf, bits in widths.items() if bits is None]
    chosen = {leaf: bits for leaf, bits in widths.items() if bits is not None}
    if not chosen:
        reasons = "; ".join(sorted({e.reason for e in exact})) or "it is empty"
        raise ValueError(f"no leaf of the optimizer's state can be quantized: {reasons}")
    dtypes = [np.dtype(p.dtype) for p in jax.tree.leaves(params)]
    runs = arrange(list(chosen), dtypes, shards)
    return Plan(
        policy.name,
        runs,
        tuple(tuple(_codec(slot, codec) for slot in run.leaves) for run in runs),
        tuple(tuple(tuple(chosen[x] for x in slot) for slot in run.leaves) for run in runs),
        tuple(sorted(exact, key=lambda e: e.index)),
    )


def _kept(leaf: Leaf, reason: str) -> Exact:
    path = f"{leaf.slot}/{leaf.path}"
    return Exact(leaf.index, path, leaf.slot, leaf.shape, leaf.dtype, reason, leaf.parameter)


def _codec(slot: Sequence[Leaf], codec: Callable[[Leaf], Codec]) -> Codec:
    """The one codec of a slot."""
    found = {codec(leaf) for leaf in slot}
    if len(found) != 1:
        raise ValueError(f"the leaves of {slot[0].slot} need one codec; got {found}")
    (chosen,) = found
    if slot[0].is_signed and not chosen.signed:
        raise ValueError(f"{slot[0].slot} may be negative, which {chosen} cannot hold")
    return chosen
