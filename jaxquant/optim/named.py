"""Keep the plain state's containers and field names within quantized state, without the coded leaves."""

from collections.abc import Callable, Sequence, Set
from typing import Any

import jax

from jaxquant.optim.leaves import path_of
from jaxquant.optim.plans import Plan


@jax.tree_util.register_pytree_with_keys_class
class Coded:
    """A part of the plain state, such as all first moments, some leaves of which are coded.

    Its pytree leaves are the unquantized ones.  Arithmetic on a `Coded` raises an error that says where the
    numbers are.

    Attributes:
        exact: the unquantized leaves, in order.
        slot: the place in the state, as in ``0/mu``.
        structure: the structure of the complete part in the plain state.
        first: the index of its first leaf among all leaves of the state.
    """

    def __init__(self, exact: Sequence[Any], slot: str, structure: Any, first: int):
        self.exact, self.slot, self.structure, self.first = tuple(exact), slot, structure, first

    def __repr__(self) -> str:
        return f"Coded({self.slot!r}, exact={self.exact!r})"

    def tree_flatten_with_keys(self):
        keys = map(jax.tree_util.SequenceKey, range(len(self.exact)))
        return tuple(zip(keys, self.exact, strict=True)), (self.slot, self.structure, self.first)

    def tree_flatten(self):
        return self.exact, (self.slot, self.structure, self.first)

    @classmethod
    def tree_unflatten(cls, aux: Any, exact: Any) -> "Coded":
        return cls(exact, *aux)

    def filled(self, coded: Callable[[int], Any], indices: Set[int]) -> Any:
        """Returns the complete part, with `coded(i)` for each coded index i."""
        exact = iter(self.exact)
        places = range(self.first, self.first + self.structure.num_leaves)
        return self.structure.unflatten(coded(i) if i in indices else next(exact) for i in places)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise in_codes(self.slot)

    __array__ = __jax_array__ = __getitem__ = __iter__ = __len__ = __float__ = __neg__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = _refuse


def in_codes(name: str) -> ValueError:
    """Returns the error for access to the numbers of a coded part."""
    return ValueError(
        f"{name} is of a part of the state that is held in codes: jaxquant.optim.to_optax(tx, state, params) "
        "has its numbers, and from_optax takes others"
    )


def bare(path: str) -> str:
    """Removes the step from an NNX variable to its array, which only some calls have."""
    return path.removesuffix("/value")


def is_coded(node: Any) -> bool:
    return isinstance(node, Coded)


def without_codes(plan: Plan, plain: Any) -> Any:
    """Returns a plain state with `Coded` in place of each part that has coded leaves.

    The remaining leaves are the unquantized ones, in the order of the plan.
    """
    slots, indices = {leaf.slot for leaf in plan.leaves}, {leaf.index for leaf in plan.leaves}
    count = 0

    def walked(node: Any, keys: tuple) -> Any:
        nonlocal count
        first, slot = count, path_of(keys)
        if slot in slots:
            leaves, structure = jax.tree.flatten(node)
            count += len(leaves)
            exact = [x for i, x in enumerate(leaves, first) if i not in indices]
            return Coded(exact, slot, structure, first)
        children, structure = _children(node)
        if not any(key for key, _ in children):
            count += len(children)
            return node
        return structure.unflatten([walked(child, (*keys, *key)) for key, child in children])

    return walked(plain, ())


def _children(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns ([(path of one key, child)], structure) of a node; an array is its own child."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


class OwnNames(tuple):
    """The field names of quantized state, as optax's `tree_get` and `tree_set` see them.

    Both functions ask each named tuple whether it has a field, and search its values if not.  They look for
    names of the plain state, so no field of quantized state is reported.  A name under which all leaves are
    coded raises an error, because there are no numbers to get or set.
    """

    _exact: Any

    def __new__(cls, names: Sequence[str], exact: Any):
        found = super().__new__(cls, names)
        found._exact = exact
        return found

    def __contains__(self, name: object) -> bool:
        if name in _hidden(self._exact):
            raise in_codes(str(name))
        return False


def _hidden(exact: Any) -> set[Any]:
    """Returns the names of coded parts, and names that occur only within them."""
    seen, parts, within = set(), set(), set()
    for keys, node in jax.tree_util.tree_leaves_with_path(exact, is_leaf=is_coded):
        names = [_name(key) for key in keys]
        if not is_coded(node):
            seen.update(names)
            continue
        seen.update(names[:-1])
        parts.update(names[-1:])
        whole = node.structure.unflatten(range(node.structure.num_leaves))
        for path, _ in jax.tree_util.tree_leaves_with_path(whole):
            within.update(map(_name, path))
    return {name for name in parts | (within - seen) if isinstance(name, str)}


def _name(key: Any) -> Any:
    return getattr(key, "name", getattr(key, "key", None))


def fields_of(exact: Any) -> tuple[str, ...]:
    """Returns the fields of the plain state's outermost container; none if it is a plain tuple."""
    return tuple(getattr(exact, "_fields", getattr(exact, "__dataclass_fields__", ())))
