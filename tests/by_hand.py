"""Layers of Flax with a recipe in the places that Flax has for products: what the engine is held to."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

import jaxquant as jq
from jaxquant.operations.product import materialized


@dataclasses.dataclass(frozen=True)
class _Einsum:
    dot_general: Any

    def __call__(self, subscripts, lhs, rhs, precision=None, preferred_element_type=None, **_):
        return jq.einsum(subscripts, lhs, rhs, self.dot_general, precision, preferred_element_type)


class _Embed(nnx.Embed):
    recipe: Any

    def __call__(self, tokens):
        table = jq.fake_quant(self.embedding[...], self.recipe.forward.rhs, axis=-1)
        return materialized(jnp.take(table, tokens, axis=0))

    def attend(self, x):
        return self.recipe(x, self.embedding[...], (((x.ndim - 1,), (1,)), ((), ())))


def by_hand(model: nnx.Module, rules: dict[str, str]) -> nnx.Module:
    """A copy of a model with the recipes in the layers whose paths begin with the rules' names; "" is all."""
    model = nnx.clone(model)
    for path, module in list(nnx.iter_graph(model)):
        found = [
            name for start, name in rules.items() if "/".join(map(str, path)).startswith(start)
        ]
        dot = jq.recipe(found[0]) if found else None
        if dot is None:
            continue
        if isinstance(module, nnx.Linear | nnx.LinearGeneral):
            module.dot_general = nnx.static(dot)
        elif isinstance(module, nnx.Einsum):
            module.einsum_op = nnx.static(_Einsum(dot))
        elif isinstance(module, nnx.Conv):
            conv = jq.ConvGeneralDilated(dot.forward, dot.dlhs, dot.drhs)
            module.conv_general_dilated = nnx.static(conv)
        elif isinstance(module, nnx.Embed):
            object.__setattr__(module, "__class__", _Embed)
            module.recipe = nnx.static(dot)
    return model
