"""The variables that quantization puts into a model's modules."""

from typing import Any

from flax import nnx

from jaxquant.numerics.opaque import Opaque


class Stored(nnx.Variable):
    """A weight that is stored as a `QArray`, which no optimizer touches."""

    def __jax_array__(self) -> Any:
        held = read(self)  # where a call is traced, an array of the parameter's shape
        return (
            held.__jax_array__() if isinstance(held, Opaque) else held
        )  # the first says why it is none


class StepSize(nnx.Param):
    """A step size that learns with the weights (LSQ)."""


class InputRange(nnx.Variable):
    """The range of the activations that a weight multiplies, which calibration found."""


class DelayedScales(nnx.Variable):
    """Ranges of a weight's product by the steps before (`jaxquant.operations.delaying.Scales`)."""


class ChannelScale(nnx.Variable):
    """Per-channel factors: the weight is multiplied by them, its activations are divided by them."""


class Adapter(nnx.LoRAParam):
    """A or B of a low-rank product beside a weight's."""


class AdapterGain(nnx.Variable):
    """The factor of a low-rank product."""


def read(variable: nnx.Variable) -> Any:
    """Returns a variable's value, whatever tree it is."""
    # Flax before 0.12.1 has no get_value, and later versions have no value.
    return variable.get_value() if hasattr(type(variable), "get_value") else variable.value


def write(variable: nnx.Variable, value: Any) -> None:
    """Sets a variable's value."""
    if hasattr(type(variable), "set_value"):
        variable.set_value(value)
    else:
        variable.value = value
