"""Subclasses of Flax's layers with methods of their own: whether these multiply by the quantized product.

A class that overrides `__call__` may call `super()`, and then its product is quantized; or it may read the
weight itself, which no rule reaches.  It is tried, in shapes alone, on inputs that the layer itself takes.  A
method that takes other arguments cannot be tried; `coverage` with example inputs lists its products.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.dot import DotGeneral
from jaxquant.nnx.modules import read
from jaxquant.nnx.sites import Site, as_kind, base_of, put
from jaxquant.opaque import DirectRead
from jaxquant.rules import ATTENTION

_METHODS = ("__call__", "attend")


class _Noting:
    """An operation that notes whether it was used."""

    def __init__(self, inner: Any):
        self.inner, self.is_used = inner, False

    @property
    def operation(self) -> Any:
        self.is_used = True
        return self.inner

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.operation(*args, **options)


def check_reached(site: Site) -> None:
    """Raises a ValueError where a method of a user's subclass passes its layer's product by."""
    is_attention = site.kind == ATTENTION
    inner = nnx.dot_product_attention if is_attention else as_kind(site.kind, DotGeneral())
    for method in _overridden(site):
        noting = _Noting(inner)
        if _is_tried(site, method, lambda one, n=noting: put(one, n)) and not noting.is_used:
            raise ValueError(
                f"{site.path or 'the model'} is a {type(site.module).__name__}, whose own {method} does not "
                f"reach the layer's product, so that no rule does; have it call super().{method}, or leave "
                f"the layer in float by a rule ('{site.path}', None) before the others"
            )


def _overridden(site: Site) -> list[str]:
    """The methods of a module's class that are its own and not Flax's."""
    cls, base = type(site.module), base_of(site.module)
    if base is None:
        return []
    named = [name for name in _METHODS if hasattr(base, name)]
    return [name for name in named if _function(cls, name) is not _function(base, name)]


def _function(cls: type, name: str) -> Any:
    # A quantized Embed's own methods stand for Flax's.
    owner = next(
        c for c in cls.__mro__ if name in vars(c) and not c.__module__.startswith("jaxquant.")
    )
    return vars(owner)[name]


def _is_tried(site: Site, method: str, prepare: Callable[[Site], None]) -> bool:
    """Whether a layer's method could be called in shapes alone, once the layer was prepared.

    Raises:
        DirectRead: a stored weight that it uses as an array.
    """
    graphdef, state = nnx.split(site.module)

    def run(state: Any, inputs: Any) -> Any:
        module = nnx.merge(graphdef, state)
        if getattr(module, "decode", False) is None:
            module.decode = False  # which attention must be told
        prepare(Site(site.path, site.kind, module))
        return getattr(module, method)(inputs)

    try:
        one = jax.tree.map(lambda x: _own(site, x), state)
        shapes = list(_inputs(site, method))
    except Exception:  # settings that are not those of Flax's own
        return False
    return any(_runs(run, one, inputs) for inputs in shapes)


def _runs(run: Callable[..., Any], *shapes: Any) -> bool:
    try:
        jax.eval_shape(run, *shapes)
    except DirectRead:
        raise
    except Exception:  # a method that takes something else, of which this says nothing
        return False
    return True


def _own(site: Site, array: Any) -> Any:
    """One layer's part of an array, in shape and type."""
    stacking = None if site.kind == ATTENTION else site.stacking
    shape = array.shape
    if stacking is not None and stacking.axes and len(shape) > max(stacking.axes):
        shape = stacking.own(shape)
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _inputs(site: Site, method: str) -> Iterator[Any]:
    """Shapes of inputs that the layer itself takes."""
    module = site.module
    if site.kind == "embed" and method == "__call__":
        yield from (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (1, 2)))
        return
    if site.kind == ATTENTION:
        shapes = [(1, 2, module.in_features)]
    elif site.kind == "conv":  # on inputs large enough for any dilation
        shapes = [(1, *(64 * n for n in module.kernel_size), module.in_features)]
    elif site.kind == "einsum":
        left, right = module.einsum_str.replace(" ", "").split("->")[0].split(",")
        sizes = dict(zip(right.replace("...", ""), module.kernel_shape, strict=False))
        shapes = [tuple(sizes.get(label, 2) for label in left.replace("...", ""))]
    elif isinstance(module, nnx.LinearGeneral):
        sizes = dict(zip(module.axis, module.in_features, strict=True)) | dict(module.batch_axis)
        rank = max(max(sizes) + 1, -min(sizes), len(sizes) + 1)
        shapes = [
            tuple(sizes.get(a, sizes.get(a - r, 2)) for a in range(r)) for r in (rank, rank + 1)
        ]
    else:
        features = module.features if site.kind == "embed" else module.in_features
        shapes = [(2, features), (1, 2, features), (1, 1, 2, features)]
    dtype = jnp.float32 if site.kind == ATTENTION else read(site.variable).dtype
    for shape in shapes:
        yield jax.ShapeDtypeStruct(shape, dtype)
