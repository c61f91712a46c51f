"""What quantized state costs and holds, leaf by leaf: true bytes, and the reason of whatever stays exact."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxquant.nnx.modules import read
from jaxquant.optim import pages
from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.state import QuantizedState, unquantized


@dataclasses.dataclass(frozen=True)
class Row:
    """A leaf of the inner state.

    Attributes:
        path: of its parameter; of the leaf itself where it belongs to none.
        slot: where in the state it lies.
        role: of the parameter; empty where there is none.
        shape: of the leaf.
        held: its codec, or the type of an exact leaf.
        bits: of a code, over its pages on average; of an element of an exact leaf.
        nbytes: of its codes and scales; of an exact leaf.
        reason: why it is not coded; empty where it is.
    """

    path: str
    slot: str
    role: str
    shape: tuple[int, ...]
    held: str
    bits: float
    nbytes: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """A state's leaves and bytes; printing shows them as a table.

    Attributes:
        policy: its name.
        rows: a row for each leaf of the inner state.
        nbytes: of all arrays.
        exact_nbytes: of the same state without codes, in the leaves' own types.
    """

    policy: str
    rows: tuple[Row, ...]
    nbytes: int
    exact_nbytes: int

    @property
    def shared_nbytes(self) -> float:
        """Bytes of no single leaf: tables, padding, rows that are empty, counters, the policy's memory."""
        return self.nbytes - sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "slot", "role", "shape", "held as", "bits", "bytes", "why exact")
        rows = [
            (
                row.path,
                row.slot,
                row.role,
                "x".join(map(str, row.shape)),
                row.held,
                f"{row.bits:.2f}",
                f"{row.nbytes:,.0f}",
                row.reason,
            )
            for row in self.rows
        ]
        shared = ("(shared)", "", "", "", "", "", f"{self.shared_nbytes:,.0f}", "")
        table = [head, *rows, shared]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in table]
        share = self.nbytes / max(self.exact_nbytes, 1)
        total = f"{self.policy}: {self.nbytes:,} bytes, {share:.1%} of {self.exact_nbytes:,}"
        if self.shared_nbytes > 0:
            total += "\n(shared): tables, padding, empty rows, counters, what the policy remembers"
        return "\n".join([*(line.rstrip() for line in lines), total])


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a state, whichever: codes, scales, tables, empty rows and what stays exact.

    Shapes will do, as of `jax.eval_shape(tx.init, params)`.

    >>> import jax.numpy as jnp, optax
    >>> state_bytes(optax.adam(1e-3).init(jnp.zeros(1000)))
    8004
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def find_states(state: Any) -> list[QuantizedState]:
    """The quantized states within a state, as of a chain or of `TrainState`."""
    is_quantized = lambda x: isinstance(x, QuantizedState)  # noqa: E731
    found = jax.tree.leaves(state, is_leaf=is_quantized)
    return [_unwrapped(x) for x in found if is_quantized(x)]


def _unwrapped(state: QuantizedState) -> QuantizedState:
    """The state with arrays where `nnx.Optimizer` holds variables."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda x: read(x) if is_variable(x) else x, state, is_leaf=is_variable)


def report(state: Any) -> Report:
    """Every leaf of the inner state: what it is for, how it is held, its bits, its bytes.

    Args:
        state: of a `quantize_state`, or one that has exactly one such within.

    Raises:
        ValueError: no quantized state, or several.

    >>> import jax.numpy as jnp, optax
    >>> from jaxquant.optim import fixed, quantize_state
    >>> params = {"up": jnp.zeros((128, 128)), "bias": jnp.zeros(32)}
    >>> print(report(quantize_state(optax.adam(1e-3), fixed(5, 4)).init(params)))
    parameter  slot     role    shape    held as      bits   bytes   why exact
    0/count    0/count                   int32        32.00  4       it is not of a parameter
    0/mu/bias  0/mu             32       float32      32.00  128     32 elements are fewer than a block of 128
    up         0/mu     matrix  128x128  Companded    5.00   10,496
    0/nu/bias  0/nu             32       float32      32.00  128     32 elements are fewer than a block of 128
    up         0/nu     matrix  128x128  Logarithmic  4.00   8,448
    (shared)                                                 1,156
    fixed 5 + 4 bits: 20,360 bytes, 15.5% of 131,332
    (shared): tables, padding, empty rows, counters, what the policy remembers
    """
    states = find_states(state)
    if len(states) != 1:
        raise ValueError(f"the state must contain exactly one quantized state; got {len(states)}")
    (state,) = states
    exact = list(zip(state.plan.exact, unquantized(state), strict=True))
    rows = {
        leaf.index: Row(
            leaf.path,
            leaf.slot,
            "",
            leaf.shape,
            str(x.dtype),
            8.0 * x.dtype.itemsize,
            x.nbytes,
            leaf.reason,
        )
        for leaf, x in exact
    }
    rows |= dict(_coded(state))
    full = sum(leaf.size * leaf.dtype.itemsize for leaf in state.plan.leaves)
    full += sum(x.nbytes for _, x in exact)
    ordered = tuple(rows[i] for i in sorted(rows))
    return Report(state.plan.policy, ordered, state_bytes(state), full)


def _coded(state: QuantizedState) -> Iterator[tuple[int, Row]]:
    for number, (group, codecs) in enumerate(
        zip(state.plan.groups, state.plan.codecs, strict=True)
    ):
        for i, (slot, codec) in enumerate(zip(group.leaves, codecs, strict=True)):
            widths = group.lined(np.asarray(pages.widths(state.tables[number][i])))
            scale = state.scales[number][i]
            per_block = scale.nbytes * BLOCK // (widths.size * pages.PAGE)
            for place, leaf in enumerate(slot):
                own, size = group.pages_of(place), group.sizes[place]
                held = _elements_by_page(group.starts[place], size)
                bits = float((widths[:, own] * held).sum() / leaf.size)
                blocks = -(-size // BLOCK) * group.lines
                nbytes = bits * leaf.size / 8 + per_block * blocks
                kind = type(codec).__name__
                row = Row(leaf.path, leaf.slot, leaf.role, leaf.shape, kind, bits, nbytes, "")
                yield leaf.index, row


def _elements_by_page(start: int, size: int) -> np.ndarray:
    """Elements of a leaf in each of its pages."""
    first = start // pages.PAGE
    edges = np.arange(first, -(-(start + size) // pages.PAGE) + 1) * pages.PAGE
    return np.diff(np.clip(edges, start, start + size))
