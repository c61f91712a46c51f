"""The weights of a Linen model: where they lie in its variables, and as what they are multiplied."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.linen.sites import Use
from jaxquant.nnx.freezing import quantize_stacked
from jaxquant.opaque import Owner
from jaxquant.qarray import QArray
from jaxquant.quantizer import Quantizer
from jaxquant.stacking import Stacking


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight as one layer's product multiplies it.

    Attributes:
        path: of its module, with slashes.
        name: of the parameter.
        shape: without the axes along which layers are stacked.
        axes: what the product sums over.
        dtype: the type that the layer multiplies it in.
        mask: what it is multiplied by before; None for nothing.
        quantizer: of the product's right operand.
        is_stored: whether it is frozen already.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: np.dtype
    mask: Any
    quantizer: Quantizer
    is_stored: bool

    @property
    def is_traced(self) -> bool:
        """Whether its precision is known when the program runs alone."""
        return bool(jax.tree.leaves(self.quantizer.format))

    def stacking(self, array: Any) -> Stacking:
        """The axes of the whole weight along which layers are stacked: leading ones.

        Raises:
            ValueError: they are stacked otherwise.
        """
        extra = array.ndim - len(self.shape)
        if extra < 0 or tuple(array.shape[extra:]) != self.shape:
            raise ValueError(
                f"{self.path} has weights {tuple(array.shape)}, and one layer's is {self.shape}; layers that "
                "nn.scan or nn.vmap stacks along leading axes can be frozen, others cannot"
            )
        return Stacking.along(range(extra), array.shape)

    def stored(self, array: Any) -> QArray:
        """The whole weight in packed integers.

        Raises:
            ValueError: layers that are not stacked along leading axes; a precision that is traced.
        """
        stacking = self.stacking(array)
        try:
            stored = quantize_stacked(
                self.axes, stacking, self.dtype, array, self.mask, self.quantizer
            )
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be frozen: {error}") from None
        return dataclasses.replace(stored, owner=Owner(f"{self.path}/{self.name}".lstrip("/")))


def weight_of(use: Use) -> Weight | None:
    """The weight of a product; None where it is not quantized."""
    site, rhs, quantizer = use.site, use.rhs, use.operation.forward.rhs
    if quantizer is None and not isinstance(rhs, QArray):
        return None
    mask = getattr(site.module, "mask", None)
    return Weight(
        site.path,
        site.weight,
        tuple(rhs.shape),
        use.axes[1],
        np.dtype(rhs.dtype),
        mask,
        quantizer,  # pyright: ignore
        isinstance(rhs, QArray),
    )


def at(tree: Any, path: str) -> Any:
    """What lies at a path of nested mappings; None where nothing does."""
    for name in path.split("/") if path else ():
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and what puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def merge(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return structure.unflatten(filled)

    return [leaves[place] for place in places], merge


def abstractly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The shapes of what a function returns; what are no arrays among its arguments stay as they are."""
    arrays, merge = split((args, options))

    def run(arrays: list[Any]) -> Any:
        args, options = merge(arrays)
        return function(*args, **options)

    return jax.eval_shape(run, arrays)
