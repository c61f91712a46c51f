"""The plain state's own names within quantized state: its containers, without the leaves that are coded."""

from collections.abc import Callable, Sequence, Set
from typing import Any

import jax

from jaxquant.optim.leaves import path_of
from jaxquant.optim.plans import Plan


@jax.tree_util.register_pytree_with_keys_class
class Coded:
    """A part of the plain state, such as all first moments, of which some leaves lie in codes.

    Its own leaves are those that stay exact.  There are no numbers for the others here, so whoever computes
    with it is told where they are.

    Attributes:
        exact: the leaves that stay as they are, in order.
        slot: where in the state it lies, as in ``0/mu``.
        structure: of the whole part, as the plain state has it.
        first: index of its first leaf among all of the state's.
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
        """The whole part, with `coded` of each index that is coded."""
        exact = iter(self.exact)
        places = range(self.first, self.first + self.structure.num_leaves)
        return self.structure.unflatten(coded(i) if i in indices else next(exact) for i in places)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise in_codes(self.slot)

    __array__ = __jax_array__ = __getitem__ = __iter__ = __len__ = __float__ = __neg__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = _refuse


def in_codes(name: str) -> ValueError:
    """The error of whoever asks for the numbers of a part that is coded."""
    return ValueError(
        f"{name} is of a part of the state that is held in codes: jaxquant.optim.to_optax(tx, state, params) "
        "has its numbers, and from_optax takes others"
    )


def bare(path: str) -> str:
    """A path without the step from an NNX variable to its array, which some calls have and others not."""
    return path.removesuffix("/value")


def is_coded(node: Any) -> bool:
    return isinstance(node, Coded)


def without_codes(plan: Plan, plain: Any) -> Any:
    """A plain state with `Coded` in the place of each part that has coded leaves.

    Its leaves are the exact ones, in the plan's order.
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
    """([(path of one key, child)], structure) of a node; of an array, itself with an empty path."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


class OwnNames(tuple):
    """The fields of quantized state, as those see them who look for a name in it.

    optax's `tree_get` and `tree_set` ask each named tuple whether a name is among its fields, and else look
    at what the fields hold.  What they look for are names of the plain state, not these: so none is among
    them.  A name under which there are only codes has no numbers to be found, and none that could be set.
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
    """Names of parts that are coded, and names within them that are nowhere else."""
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
    """The fields of the plain state's outermost container; none where it is a tuple of several."""
    return tuple(getattr(exact, "_fields", getattr(exact, "__dataclass_fields__", ())))
