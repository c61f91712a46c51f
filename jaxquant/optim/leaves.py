"""Which leaves of an optimizer's state are like which parameters, and what each is for.

Found once, from shapes: `find` asks the transformation for its state and matches the state's leaves with the
parameters'.  Nothing here touches values.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.optim.codecs import BLOCK

ROLES = ("embedding", "head", "matrix", "vector")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the state that is to be held in codes.

    Attributes:
        index: among the state's leaves.
        parameter: index among the parameters' leaves.
        path: of the parameter, as in ``blocks/0/up/kernel``.
        slot: where in the state it lies, without the parameter's path, as in ``0/mu``.
        shape: of both.
        dtype: of the state.
        role: one of `ROLES`.
        is_signed: whether it may hold negative numbers.
    """

    index: int
    parameter: int
    path: str
    slot: str
    shape: tuple[int, ...]
    dtype: np.dtype
    role: str
    is_signed: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Exact:
    """A leaf of the state that stays as it is.

    Attributes:
        index: among the state's leaves.
        path: in the state.
        slot: where in the state it lies, without the parameter's path.
        shape: its shape.
        dtype: its type.
        reason: why it is not coded.
        parameter: index of the parameter that it belongs to, or None.
    """

    index: int
    path: str
    slot: str
    shape: tuple[int, ...]
    dtype: np.dtype
    reason: str
    parameter: int | None = None


def path_of(keys: Any) -> str:
    """A path of keys with slashes, as in ``blocks/0/up/kernel``."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def role_of(path: str, shape: tuple[int, ...]) -> str:
    """What a parameter is for, from its name and rank.

    >>> role_of("embed/embedding", (256, 64)), role_of("blocks/0/up/kernel", (64, 192))
    ('embedding', 'matrix')
    """
    if len(shape) < 2:
        return "vector"
    if re.search(r"unembed|lm_head|(^|[/_])(head|logits)([/_]|$)", path):
        return "head"
    return "embedding" if re.search("embed|wte|wpe", path) else "matrix"


# Fields of optax's states that hold sums of squares.  In all others a sign is taken to be possible.
_NON_NEGATIVE = frozenset(("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "v"))


def find(tx: optax.GradientTransformation, params: Any) -> tuple[list[Leaf], list[Exact]]:
    """The leaves of `tx`'s state that can be coded, and those that cannot, with the reason.

    Args:
        tx: any optax transformation.
        params: parameters or their shapes.

    >>> params = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
    >>> leaves, exact = find(optax.adam(1e-3), params)
    >>> [(leaf.slot, leaf.path, leaf.is_signed) for leaf in leaves]
    [('0/mu', 'kernel', True), ('0/nu', 'kernel', False)]
    >>> [(leaf.path, leaf.reason) for leaf in exact][:2]
    [('0/count', 'it is not of a parameter'), ('0/mu/bias', '64 elements are fewer than a block of 128')]
    """
    specs = jax.eval_shape(lambda p: p, params)
    flat = jax.tree.leaves_with_path(specs)
    state = jax.eval_shape(tx.init, specs)
    marks = optax.tree.map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    leaves, exact = [], []
    marked = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(marks), strict=True)
    for index, ((keys, leaf), is_of_parameter) in enumerate(marked):
        path, dtype = path_of(keys), np.dtype(leaf.dtype)
        owner = _owner(keys, [k for k, _ in flat]) if is_of_parameter else None
        parameter = None if owner is None else flat[owner]
        name = "" if parameter is None else path_of(parameter[0])
        slot = path.removesuffix(name).rstrip("/")
        reason = _reason(leaf, None if parameter is None else parameter[1])
        if reason is not None or owner is None:
            exact.append(Exact(index, path, slot, leaf.shape, dtype, reason or "", owner))
            continue
        is_signed = slot.rpartition("/")[2] not in _NON_NEGATIVE
        role = role_of(name, leaf.shape)
        leaves.append(Leaf(index, owner, name, slot, leaf.shape, dtype, role, is_signed))
    return leaves, exact


def _owner(keys: Sequence[Any], parameters: Sequence[Sequence[Any]]) -> int | None:
    """The parameter whose path a path in the state ends with; the longest where several do."""
    ends = [
        i for i, own in enumerate(parameters) if tuple(keys[len(keys) - len(own) :]) == tuple(own)
    ]
    return max(ends, key=lambda i: len(parameters[i]), default=None)


def _reason(leaf: Any, parameter: Any) -> str | None:
    """Why a leaf of the state is not coded; None where it can be."""
    if parameter is None:
        return "it is not of a parameter"
    if leaf.shape != parameter.shape:
        return f"its shape is {leaf.shape}, and its parameter's {parameter.shape}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its type is {leaf.dtype}"
    size = math.prod(leaf.shape)
    if size < BLOCK:
        return f"{size} elements are fewer than a block of {BLOCK}"
    return None
