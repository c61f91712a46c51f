"""Report the bytes and bits of quantized state, leaf by leaf, and why a leaf is unquantized."""

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
    """A leaf of the plain state.

    Attributes:
        path: the path of its parameter; of the leaf itself if it belongs to none.
        slot: its place in the state.
        role: the role of the parameter; empty if there is none.
        shape: the shape of the leaf.
        held: its codec, or the type of an unquantized leaf.
        bits: bits of a code, averaged over its pages; bits of an element of an unquantized leaf.
        nbytes: bytes of codes and scales; bytes of an unquantized leaf.
        reason: why it is not coded; empty if it is.
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
    """The leaves and bytes of a state; `print` shows them as a table.

    Attributes:
        policy: the name of the policy.
        rows: a row for each leaf of the plain state.
        nbytes: bytes of all arrays.
        exact_nbytes: bytes of the same state without codes, in the leaves' own types.
    """

    policy: str
    rows: tuple[Row, ...]
    nbytes: int
    exact_nbytes: int

    @property
    def shared_nbytes(self) -> float:
        """Bytes that belong to no single leaf: tables, padding, empty rows, counters, the policy's memory."""
        return self.nbytes - sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "slot", "role", "shape", "held as", "bits", "bytes", "why unquantized")
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
    """Returns the bytes of all arrays of any state: codes, scales, tables, empty rows, unquantized leaves.

    Shapes are sufficient, such as `jax.eval_shape(tx.init, params)`.

    Raises:
        ValueError: if a leaf is no array and no shape.

    >>> import jax.numpy as jnp, optax
    >>> state_bytes(optax.adam(1e-3).init(jnp.zeros(1000)))
    8004
    """
    leaves = jax.tree.leaves(state)
    for leaf in leaves:
        if not (hasattr(leaf, "size") and hasattr(leaf, "dtype")):
            raise ValueError(f"state must hold arrays or their shapes; got the leaf {leaf!r}")
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def find_states(state: Any) -> list[QuantizedState]:
    """Returns the quantized states within a state, such as that of a chain or of `TrainState`."""
    is_quantized = lambda x: isinstance(x, QuantizedState)  # noqa: E731
    found = jax.tree.leaves(state, is_leaf=is_quantized)
    return [_unwrapped(x) for x in found if is_quantized(x)]


def _unwrapped(state: QuantizedState) -> QuantizedState:
    """Returns the state with arrays in place of the variables of `nnx.Optimizer`."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda x: read(x) if is_variable(x) else x, state, is_leaf=is_variable)


def report(state: Any) -> Report:
    """Returns the role, the codec, the bits and the bytes of every leaf of the plain state.

    Args:
        state: the state of a `quantize_state`, or one that contains exactly one such state.

    Raises:
        ValueError: if there is no quantized state, or several.

    >>> import jax.numpy as jnp, optax
    >>> from jaxquant.optim import fixed, quantize_state
    >>> params = {"up": jnp.zeros((128, 128)), "bias": jnp.zeros(32)}
    >>> print(report(quantize_state(optax.adam(1e-3), fixed(5, 4)).init(params)))
    parameter  slot     role    shape    held as      bits   bytes   why unquantized
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
    """Returns the number of elements of a leaf in each of its pages."""
    first = start // pages.PAGE
    edges = np.arange(first, -(-(start + size) // pages.PAGE) + 1) * pages.PAGE
    return np.diff(np.clip(edges, start, start + size))
