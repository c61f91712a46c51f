"""The arms: how the products of a model's blocks are computed, forward and in both gradients.

An arm is a published recipe, NVIDIA's recipe without one of its parts, a grid whose bits are data, or full
precision.  Embedding, head, norms and attention are in the model's own type in all of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from experiments.harness.models import lm
from jaxquant import rounding
from jaxquant.formats import Block
from jaxquant.operations import training

FULL = "full"
FULL_BITS = 16  # bits that stand for full precision
FAMILIES = ("int", "float")
# Exponent bits of a float of so many bits: E2M1, E2M2, E2M3, E3M3, E4M3; from 9 bits on five, as in float16.
_EXPONENT_BITS = (0, 0, 0, 0, 2, 2, 2, 3, 4, *[5] * 8)
FEWEST_BITS = {"int": 2, "float": 4}
ROUNDINGS = ("nearest", "stochastic", "eden")
# Bits of the operands of each published recipe: of the forward product, of the gradients' products.
RECIPES = {
    "nvfp4_train": (4, 4),
    "nvfp4_eden_train": (4, 4),
    "nvfp4_eden_train-h16": (4, 4),
    "nvfp4_eden_train-h32": (4, 4),
    "mxfp4_train": (4, 4),
    "mxfp8_train": (8, 8),
    "mxfp8_ocp_train": (8, 8),
    "fp8_train": (8, 8),
    "int8_train": (8, 8),
}
NVFP4 = "nvfp4_train"
# What NVIDIA's recipe is without one part; with the last layer in full precision it is a part that is added.
WITHOUT = {
    "stochastic": training.nvfp4(gradient_rounding=rounding.nearest),
    "hadamard": training.nvfp4(hadamard=None),
    "tiles": training.nvfp4(tiles=False),
}
LAST = "last"
PARTS = (*WITHOUT, LAST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Precision:
    """Bits of the forward product and of the gradients' products; data of a compiled step.

    >>> Precision.of(4, 8).backward
    Array(8., dtype=float32)
    """

    forward: jax.Array
    backward: jax.Array

    @classmethod
    def of(cls, forward: int, backward: int) -> "Precision":
        return cls(jnp.float32(forward), jnp.float32(backward))


@dataclasses.dataclass(frozen=True)
class Arm:
    """How blocks' products are computed, but for the bits of a grid.

    Attributes:
        method: of `RECIPES` or `FAMILIES`, or `FULL`.
        part: of `PARTS`, which NVIDIA's recipe lacks, or has beside the rest if it is `LAST`; "" for none.
        rounding: of `ROUNDINGS`: of both operands of a grid's gradient products; "" elsewhere.
        block: neighbours of a grid that share a scale; 0 elsewhere.
        hadamard: block of the random rotation in a grid's gradient products; 0 for none.
    """

    method: str
    part: str = ""
    rounding: str = ""
    block: int = 0
    hadamard: int = 0

    @property
    def name(self) -> str:
        """In a few letters.

        >>> Arm("int", rounding="eden", block=8, hadamard=8).name, Arm("nvfp4_train", "tiles").name
        ('int, eden, h8', 'nvfp4_train less tiles')
        """
        if self.part:
            return f"{self.method} {'plus' if self.part == LAST else 'less'} {self.part}"
        if self.method not in FAMILIES:
            return self.method
        return (
            f"{self.method}, {self.rounding}, {f'h{self.hadamard}' if self.hadamard else 'plain'}"
        )

    def product(self, precision: Precision) -> jq.DotGeneral | None:
        """Returns the product that takes the place of the linears'; None for full precision."""
        if self.method == FULL:
            return None
        if self.method not in FAMILIES:
            return WITHOUT.get(self.part) or jq.recipe(self.method)
        forward = jq.Quantizer(self._format(precision.forward))
        each = jq.Quantizer(self._format(precision.backward), rounding=self._rounding())
        # Of the forward's quantized operand, so that full backward bits are the gradient of that forward.
        backward = jq.BackwardOperands(each, each, hadamard=self.hadamard or None, kept="forward")
        return jq.DotGeneral(jq.Operands(forward, forward), backward, backward)

    def _format(self, bits: jax.Array) -> Block:
        """Blocks with E4M3 scales below one for the tensor, rounded up, so that nothing is clipped."""
        return Block(_element(self.method, bits), self.block, jq.E4M3, 2, "up")

    def _rounding(self) -> Any:
        named = {"nearest": rounding.nearest, "stochastic": rounding.stochastic}
        return named.get(self.rounding) or rounding.Eden(self.hadamard)

    def rules(self, config: lm.LMConfig, precision: Precision, exact_backward: bool = False) -> Any:
        """Returns the rules of a model.

        Args:
            config: the model's shape.
            precision: of a grid.
            exact_backward: gradients in the model's own type, of the same forward pass.
        """
        dot = self.product(precision)
        if dot is None:
            return []
        if exact_backward:
            dot = dataclasses.replace(dot, dlhs=None, drhs=None)
        last = [(jq.last_layers(config.layers, 1), None)] if self.part == LAST else []
        return [*last, ("blocks/.*", dot)]

    def check(self, config: lm.LMConfig, name: str, sequence: int) -> None:
        """Raises a ValueError, which names the size, where blocks do not divide what products sum over.

        And where the last of layers that are stacked, and so share their rules, were to have its own.
        """
        if self.part == LAST and config.scan:
            raise ValueError(
                f"config.parts {LAST!r} needs layers with rules of their own; got config.scan {config.scan}"
            )
        for block, what in self._blocks():
            for length, of in (
                (config.width, "width"),
                (config.hidden, "hidden width"),
                (sequence, "sequence"),
            ):
                if length % block:
                    raise ValueError(
                        f"{self.name} has {what} of {block}, which do not divide the {of} {length} of size "
                        f"{name}; choose another size or other blocks"
                    )

    def _blocks(self) -> list[tuple[int, str]]:
        if self.method in FAMILIES:
            rotation = [(self.hadamard, "rotations")] if self.hadamard else []
            return [(self.block, "blocks"), *rotation]
        if self.method.startswith("nvfp4_eden"):
            _, _, own = self.method.partition("-h")
            return [(int(own or 128), "rotations")]
        size = 16 if self.method == NVFP4 else 32 if self.method.startswith("mx") else 1
        return [(size, "blocks")]


def _element(family: str, bits: jax.Array) -> jq.Format:
    if family == "int":
        return jq.Int(bits)
    exponent = jnp.array(_EXPONENT_BITS, jnp.float32)[bits.astype(jnp.int32)]
    return jq.Float(exponent, jnp.minimum(bits - 1 - exponent, 10), "finite")
