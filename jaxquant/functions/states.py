"""`State`: what is found or learned of a weight's products beside their recipe, as ranges and steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.calibration import Range, Step, learned
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations.adapters import Adapted
from jaxquant.operations.delaying import Delaying, with_ranges
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.smoothed import Smoothed
from jaxquant.operations.tapped import Tapped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Arrays that take the place of what a recipe finds anew at each call.

    Where a weight differs from turn to turn of a scan, each has all turns along its first axis.

    Attributes:
        input_range: of the activations: a magnitude, or (low, high); None where it is found.
        input_step: a learned step of the activations, or None.
        step: learned steps of the weight, or None.
        scale: of the channels that are summed over, by which activations are divided and the weight is
            multiplied (`jaxquant.operations.smoothed.Smoothed`); a stored weight is multiplied already.
        lora_a, lora_b, lora_gain: of a low-rank product beside it (`jaxquant.operations.adapters.Adapted`).
        delayed: ranges of the steps before (`jaxquant.operations.delaying.Scales`).
        tap: of what its quantizers do (`jaxquant.operations.tapped.Tapped`).
    """

    input_range: Any = None
    input_step: Any = None
    step: Any = None
    scale: Any = None
    lora_a: Any = None
    lora_b: Any = None
    lora_gain: Any = None
    delayed: Any = None
    tap: Any = None

    def bind(self, recipe: DotGeneral) -> Any:
        """Returns the product by a recipe with all of these."""
        dot: Any = self.of(recipe)
        if self.delayed is not None:
            dot = Delaying(dot.forward, dot.dlhs, dot.drhs, self.delayed)
        if self.tap is not None:  # what is monitored changes nothing
            dot = Tapped(dot.forward, dot.dlhs, dot.drhs, self.tap)
        if self.scale is not None:
            dot = Smoothed(dot, self.scale)
        if self.lora_a is not None:
            dot = Adapted(dot, self.lora_a, self.lora_b, self.lora_gain)
        return dot

    def of(self, recipe: DotGeneral) -> DotGeneral:
        """Returns a recipe with these in it; a step that training carries below zero keeps its size.

        Raises:
            ValueError: activations with learned steps, of which none is there.
        """
        if self.delayed is not None:
            recipe = with_ranges(recipe, self.delayed)
        forward, lhs, rhs = recipe.forward, recipe.forward.lhs, recipe.forward.rhs
        if is_learned(lhs) and self.input_step is None:
            raise ValueError(
                "the activations' learned steps have no start yet; call "
                "jaxquant.nnx.calibrate(model, batches) once before training"
            )
        if lhs is not None and self.input_step is not None:
            lhs = dataclasses.replace(lhs, calibration=Step(jnp.abs(self.input_step)))
        elif lhs is not None and self.input_range is not None:
            lhs = dataclasses.replace(lhs, calibration=Range(self.input_range))
        if rhs is not None and self.step is not None:
            rhs = dataclasses.replace(rhs, calibration=Step(jnp.abs(self.step)))
        return dataclasses.replace(recipe, forward=dataclasses.replace(forward, lhs=lhs, rhs=rhs))

    def axes(self, weight: int) -> "State":
        """Returns the axis along which each array holds the values of one of several matrices."""
        places = {field.name: 0 for field in dataclasses.fields(State)} | {"step": weight}
        held = {name: getattr(self, name) for name in places}
        return State(**{n: None if held[n] is None else places[n] for n in places})

    def first(self, scans: int) -> "State":
        """Returns the state of the first turn of several scans."""
        return jax.tree.map(lambda x: x[(0,) * scans], self)


def is_learned(quantizer: Quantizer | None) -> bool:
    """Returns whether a quantizer's step is a parameter of the model's."""
    return quantizer is not None and quantizer.calibration is learned


def first_step(x: jax.Array, quantizer: Quantizer, axes: Any = None) -> jax.Array:
    """Returns LSQ's initial step: 2 · mean|x| / √Q_P.

    Args:
        x: values.
        quantizer: of them.
        axes: that share a step; all where not given.

    Source: Esser et al. 2020, arXiv 1902.08153, section 2.1.
    """
    mean = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=axes is not None)
    return 2 * jnp.maximum(mean, 1e-12) / jnp.sqrt(1.0 * quantizer.element.max_value)
