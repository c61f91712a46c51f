"""Find which leaves of an optimizer's state have the shape of which parameters, and the role of each.

This is done once, from shapes.  `find` asks the transformation for its state, matches the leaves of the
state with the parameters, and derives the effect of rounding from the traced update
(`jaxquant.optim.traits`).  No values are needed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.traits import Trait, traits_of

ROLES = ("embedding", "head", "matrix", "vector")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the state that is to be coded.

    Attributes:
        index: its index among the leaves of the state.
        parameter: the index of its parameter.
        path: the path of the parameter, as in ``blocks/0/up/kernel``.
        slot: its place in the state, without the path of the parameter, as in ``0/mu``.
        shape: the shape of leaf and parameter.
        dtype: the type of the leaf.
        role: one of `ROLES`.
        is_signed: whether it may hold negative numbers.
        is_slow: whether a step changes it by a few percent at most, which rounding to nearest would lose.
        decay: the largest factor with which a step carries its old value over; 0 if there is none.
    """

    index: int
    parameter: int
    path: str
    slot: str
    shape: tuple[int, ...]
    dtype: np.dtype
    role: str
    is_signed: bool
    is_slow: bool = False
    decay: float = dataclasses.field(default=0.0, repr=False)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Exact:
    """An unquantized leaf of the state.

    Attributes:
        index: its index among the leaves of the state.
        path: its path in the state.
        slot: its place in the state, without the path of the parameter.
        shape: its shape.
        dtype: its type.
        reason: why it is not coded.
        parameter: the index of the parameter that it belongs to, or None.
    """

    index: int
    path: str
    slot: str
    shape: tuple[int, ...]
    dtype: np.dtype
    reason: str
    parameter: int | None = None


def path_of(keys: Any) -> str:
    """Returns a path of keys with slashes, as in ``blocks/0/up/kernel``."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def role_of(path: str, shape: tuple[int, ...]) -> str:
    """Returns the role of a parameter, given its name and rank.

    >>> role_of("embed/embedding", (256, 64)), role_of("blocks/0/up/kernel", (64, 192))
    ('embedding', 'matrix')
    """
    if len(shape) < 2:
        return "vector"
    if re.search(r"unembed|lm_head|(^|[/_])(head|logits)([/_]|$)", path):
        return "head"
    return "embedding" if re.search("embed|wte|wpe", path) else "matrix"


def find(
    tx: optax.GradientTransformation, params: Any, extra: Mapping[str, Any] | None = None
) -> tuple[list[Leaf], list[Exact]]:
    """Returns the leaves of `tx`'s state that can be coded, and those that cannot, with the reason.

    Args:
        tx: any optax transformation.
        params: parameters or their shapes.
        extra: further arguments of the update by name, or their shapes, except those of optax's own.

    Raises:
        ValueError: if the update cannot be traced from shapes.

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
    marks = _marks(tx, state)
    leaves, exact = [], []
    traits = _traits(tx, specs, state, dict(extra or {}))
    marked = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(marks), traits, strict=True)
    for index, ((keys, leaf), is_of_parameter, trait) in enumerate(marked):
        path, dtype = path_of(keys), _dtype(leaf)
        owner = _owner(keys, [k for k, _ in flat]) if is_of_parameter else None
        parameter = None if owner is None else flat[owner]
        name = "" if parameter is None else path_of(parameter[0])
        slot = path.removesuffix(name).rstrip("/")
        reason = _reason(leaf, None if parameter is None else parameter[1]) or _kept(trait)
        if reason is not None or owner is None:
            exact.append(Exact(index, path, slot, leaf.shape, dtype, reason or "", owner))
            continue
        role = role_of(name, leaf.shape)
        kind = role, trait.is_signed, trait.slow, trait.held
        leaves.append(Leaf(index, owner, name, slot, leaf.shape, dtype, *kind))
    return leaves, exact


def _dtype(leaf: Any) -> Any:
    """Returns the type of a leaf: NumPy's, or JAX's for random keys."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return leaf.dtype if is_key else np.dtype(leaf.dtype)


def _marks(tx: Any, state: Any) -> Any:
    """Returns whether each leaf of a state belongs to a tree like the parameters'."""
    try:
        return optax.tree.map_params(
            tx, lambda _: True, state, transform_non_params=lambda _: False
        )
    except Exception:  # optax uses placeholders, which L-BFGS cannot be initialized with
        return jax.tree.map(lambda _: True, state)


def _traits(tx: Any, params: Any, state: Any, extra: dict[str, Any]) -> list[Trait]:
    """Returns the traits of the leaves, with stand-ins for the named arguments that optax's own updates take.

    Raises:
        ValueError: if the update needs other arguments.
    """
    tx, raised = optax.with_extra_args_support(tx), None
    value = {"value": jax.ShapeDtypeStruct((), jnp.float32)}
    search = {**value, "grad": params, "value_fn": _some_loss}
    second = {**value, "obj_fn": _some_loss}
    gradient = {"grad_fn": lambda params, step: jax.grad(_some_loss)(params)}
    for given in ({}, value, search, second, gradient):
        try:
            return traits_of(tx, params, state, {**given, **extra})
        except Exception as error:  # any error that a missing argument causes
            raised = raised or error
    first = next(iter(str(raised).splitlines()), "")
    raise ValueError(
        "the update cannot be traced for updates like the parameters; what it is given by name is given to "
        "quantize_state as extra={'name': value}; what takes other updates goes around quantize_state "
        f"({type(raised).__name__}: {first})"
    ) from raised


def _some_loss(params: Any) -> jax.Array:
    """A loss about which nothing is known: neither it nor its derivatives have a definite sign."""
    return sum((jnp.sum(x * jnp.sin(x)) for x in jax.tree.leaves(params)), jnp.zeros(()))


def _kept(trait: Trait) -> str | None:
    """Returns why a leaf that could be coded is not; None if it is."""
    if trait.of_parameters:
        return trait.of_parameters
    if trait.is_signed and not trait.fades:
        return "it fades slowly or not at all, so that what is rounded away would add up"
    if trait.grows:
        return "what is rounded away would grow: it is multiplied by more than 1"
    if trait.is_signed and trait.divides:
        return "something is divided by it, and it may be negative"
    if trait.cancels:
        return "a root is taken of a difference with it, which rounding could make negative"
    return None


def _owner(keys: Sequence[Any], parameters: Sequence[Sequence[Any]]) -> int | None:
    """Returns the parameter whose path is a suffix of a path in the state; the longest if several are."""
    ends = [
        i for i, own in enumerate(parameters) if tuple(keys[len(keys) - len(own) :]) == tuple(own)
    ]
    return max(ends, key=lambda i: len(parameters[i]), default=None)


def _reason(leaf: Any, parameter: Any) -> str | None:
    """Returns why a leaf of the state cannot be coded; None if it can be."""
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
