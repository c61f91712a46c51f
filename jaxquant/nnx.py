"""Rules applied to a Flax NNX model, its code unchanged."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.dot import DotGeneral
from jaxquant.qarray import fake_quant
from jaxquant.quantizer import Quantizer
from jaxquant.rules import Rules, assign

Model = TypeVar("Model", bound=nnx.Module)

_WITH_DOT_GENERAL = (nnx.Linear, nnx.LinearGeneral)
_NOT_YET = (nnx.Conv, nnx.ConvTranspose, nnx.Einsum)


@dataclasses.dataclass(frozen=True)
class QuantizeTable:
    """An embedding table's hook: its values are quantized wherever the layer reads it.

    `nnx.Embed` passes its table, last of its operands, through `promote_dtype` before it looks rows
    up in it or multiplies by it.  Rows are summed over their features, so those share a scale.
    """

    quantizer: Quantizer
    promote_dtype: Any

    def __call__(self, operands: Any, /, **options) -> Any:
        *others, table = operands
        table = fake_quant(jnp.asarray(table), self.quantizer, axis=-1)
        return self.promote_dtype((*others, table), **options)


def quantize(model: Model, rules: Rules) -> Model:
    """The same model with quantized matrix products; parameters are shared, not copied.

    Every `nnx.Linear` and `nnx.LinearGeneral` that a rule matches gets the rule's `DotGeneral`; an
    `nnx.Embed` gets its table quantized by the recipe's weight quantizer.  The given model is not
    changed; one that is quantized already gets the new recipes in place of the old.  Formats may be traced
    when this is called within the jitted function that uses the model.  Products of two activations, as
    inside attention, are no layer's own and stay in floating point.

    Args:
        model: an NNX model.
        rules: as in `jaxquant.rules`: from regular expressions on module paths to recipes; the first
            that matches counts, and None leaves a module as it is.

    Returns:
        A new module tree with variables of its own over the same arrays.

    Raises:
        ValueError: a rule that nothing takes; a rule that matches a module which cannot be quantized
            yet (Conv, ConvTranspose, Einsum) or that has a dot_general of the user's own; an Embed whose
            recipe has no weight quantizer; a model without a matrix product.

    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> quantize(model, {".*": "w8a8"})(jnp.ones((2, 64))).shape
    (2, 8)
    """
    graphdef, state = nnx.split(model)
    # The map makes variables of the new model's own, over the same arrays.
    model = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))
    modules = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, (*_WITH_DOT_GENERAL, *_NOT_YET, nnx.Embed))
    }
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no Linear, LinearGeneral or Embed to quantize"
        )
    for path, dot_general in assign(modules, rules).items():
        if dot_general is not None:
            _install(modules[path], path, dot_general)
    return model


def _install(module: nnx.Module, path: str, dot_general: DotGeneral) -> None:
    if isinstance(module, _WITH_DOT_GENERAL):
        is_plain = module.dot_general in (None, jax.lax.dot_general)
        if not is_plain and not isinstance(module.dot_general, DotGeneral):
            raise ValueError(
                f"{path} has a dot_general of its own, {module.dot_general!r}, which a rule would replace; "
                f"a rule ('{path}', None) before the others keeps it"
            )
        # A recipe with traced widths is a pytree with arrays, which the module is told to hold as such.
        has_arrays = bool(jax.tree.leaves(dot_general))
        module.dot_general = nnx.data(dot_general) if has_arrays else dot_general
    elif isinstance(module, nnx.Embed):
        if dot_general.forward.rhs is None:
            raise ValueError(
                f"{path} is an Embed, and the recipe that it got leaves weights in float"
            )
        inner = module.promote_dtype
        if isinstance(inner, QuantizeTable):  # quantized before: the new recipe takes its place
            inner = inner.promote_dtype
        module.promote_dtype = QuantizeTable(dot_general.forward.rhs, inner)
    else:
        raise ValueError(
            f"{path} is a {type(module).__name__}, which cannot be quantized yet; "
            f"a rule ('{path}', None) before the others leaves it in float"
        )
