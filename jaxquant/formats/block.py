"""`Block`: an element format, a block size and a format for the scales, composed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.checks import check_whole
from jaxquant.formats.base import Format, divide, is_format, known_name
from jaxquant.formats.floating import Float


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of `size` neighbours along the contracting axis, each with a scale that is itself quantized.

    The scale of a block with largest magnitude a, for an element format whose largest value is M:

    * levels 1, a scale format of powers of two (E8M0): s = 2^⌈log2(a / M)⌉, so that nothing is
      clipped.  (OCP's section 6.3 rounds down, 2^(⌊log2 a⌋ − ⌊log2 M⌋), and clips the block's largest
      values by up to 2 − 2^⌊log2 M⌋·2/M of themselves.)
    * levels 1, another: s = round(a / M).
    * levels 2: t = a_tensor / (M · largest scale) in float32 for the whole array, and
      s = t · round(a / (M · t)): NVFP4's.

    A block of zeros has the scale 0; in E8M0, which has no zero, 2^−127, which is taken for it.

    Args:
        element: the grid of the elements.
        size: how many neighbours share a scale, at least 1.
        scale: the grid of the scales; static.
        levels: 1, or 2 with a float32 scale for the whole array above the blocks'.

    Raises:
        ValueError: an element or scale that is no format, a size below 1, levels other than 1 and 2.

    Source: OCP Microscaling Formats v1.0; NVIDIA 2025, arXiv 2509.25149, for NVFP4.

    >>> str(Block(Float(2, 1, "finite"), 64, Float(8, 0, "fnu")))
    'block(e2m1finite,64,e8m0fnu,1)'
    """

    element: Format
    size: int
    scale: Float
    levels: int = 1

    def __post_init__(self):
        for name in ("element", "scale"):
            value = getattr(self, name)
            if isinstance(value, Block) or not is_format(value):
                raise ValueError(
                    f"Block takes {name} as a grid such as Float(2, 1, 'finite'); got {value!r}"
                )
        check_whole("size of a Block", self.size, 1)
        object.__setattr__(self, "size", int(self.size))
        if self.levels not in (1, 2):
            raise ValueError(f"Block takes levels 1 or 2; got {self.levels!r}")
        if not isinstance(self.scale, Float) or self.scale.convention == "finite":
            raise ValueError(
                "Block takes a scale that can be NaN, as a block that holds a NaN needs: a Float of another "
                f"convention than 'finite'; got {self.scale!r}"
            )
        _ = self.scale.dtype  # traced ones, which cannot be stored, are refused here

    def scales(
        self, needed: jax.Array, empty: jax.Array | bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Quantizes scales: from what each block needs to (block scales, the array's scale or None).

        A block that is empty, of zeros alone, gets the scale 0.  So does one that needs less than the
        smallest scale: it rounds to zero.  One of Floats gets 1, which keeps what the elements can hold by
        themselves.  NaN stays.

        Args:
            needed: a / M of each block, float32.
            empty: which blocks are.
        """
        least = int(isinstance(self.element, Float))
        tiny, tensor = jnp.finfo(jnp.float32).tiny, None
        ratio = needed
        if self.levels == 2:
            # A block without a range must not take the others' scale away with it.
            largest = jnp.max(jnp.where(jnp.isnan(needed), 0, needed), keepdims=True, initial=0)
            tensor = divide(largest, self.scale.max_value)
            tensor = jnp.where(tensor < tiny, 1, tensor)
            ratio = divide(needed, tensor)
        ratio = jnp.where(ratio < tiny, least or tiny, ratio)
        is_power_of_two = self.scale.convention == "fnu"
        scale = self.scale.round(ratio, jnp.ceil if is_power_of_two else jnp.round)
        return jnp.where(empty, 0, jnp.where(scale <= 0, least, scale)), tensor

    def __str__(self):
        return known_name(self) or f"block({self.element},{self.size},{self.scale},{self.levels})"

    def tree_flatten(self):
        return (self.element, self.scale), (self.size, self.levels)

    @classmethod
    def tree_unflatten(cls, static, formats) -> Any:
        instance = object.__new__(cls)
        fields = ("element", "scale", "size", "levels")
        for name, value in zip(fields, (*formats, *static), strict=True):
            object.__setattr__(instance, name, value)
        return instance
