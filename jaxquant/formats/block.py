"""`Block`: an element format, a block size and a format for the scales, composed."""

import dataclasses
import functools
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant.checks import check_whole
from jaxquant.formats.base import Format, divide, exp2, exponent_of, is_format, known_name
from jaxquant.formats.floating import Float

Conversion = Literal["nearest", "up", "down", "ocp", "quartet"]
CONVERSIONS = MappingProxyType(
    {
        "nearest": jnp.round,
        "up": jnp.ceil,
        "down": jnp.floor,
        "ocp": jnp.floor,
        "quartet": jnp.floor,
    }
)


@functools.partial(jax.tree_util.register_pytree_node_class)
@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of `size` neighbours along the contracting axis, each with a scale that is itself quantized.

    The scale of a block with largest magnitude a, for an element format whose largest value is M, is
    s = round(a / M); with levels 2 it is s = t · round(a / (M · t)) below t = a_tensor / (M · largest scale)
    in float32 for the whole array: NVFP4's.  `conversion` says how a scale is rounded:

    * ``"nearest"``, the default of scales with a mantissa: a block's largest value may be clipped, by up
      to half a step of the scale.
    * ``"up"``, the default of powers of two (E8M0): s = 2^⌈log2(a / M)⌉ there.  Nothing is clipped.
      Mishra et al. 2025, arXiv 2506.08027, for MXFP8; with it stochastic rounding is unbiased.
    * ``"down"``: s = 2^⌊log2(a / M)⌋ for powers of two.
    * ``"ocp"``, for powers of two: s = 2^(⌊log2 a⌋ − ⌊log2 M⌋), OCP's section 6.3, which clips a block's
      largest values by up to 2 − 2^⌊log2 M⌋·2/M of themselves.
    * ``"quartet"``, for powers of two: OCP's divided by 3/4, so that no element is beyond
      1.5 · 2^⌊log2 M⌋, and none of E2M1 (M = 6) is clipped.  The 4/3 is the whole array's scale.
      Castro et al. 2025, arXiv 2505.14669.

    A tile (m, n) as `size` is m neighbours along the contracting axis by n along the last other one.  Square
    tiles are one grid for a weight and for its transpose, forward and in the product for ∂lhs.

    A block of zeros has the scale 0; in E8M0, which has no zero, 2^−127, which is taken for it.

    Args:
        element: the grid of the elements.
        size: how many neighbours share a scale, at least 1; or a tile (m, n).
        scale: the grid of the scales; static.
        levels: 1, or 2 with a float32 scale for the whole array above the blocks'.
        conversion: how scales are rounded, as above; None for the default.

    Raises:
        ValueError: an element or scale that is no format, a size below 1, levels other than 1 and 2, an
            unknown conversion, or one that is not for such scales or elements.

    Source: OCP Microscaling Formats v1.0; NVIDIA 2025, arXiv 2509.25149, for NVFP4.

    >>> str(Block(Float(2, 1, "finite"), 64, Float(8, 0, "fnu")))
    'block(e2m1finite,64,e8m0fnu,1)'
    >>> str(Block(Float(2, 1, "finite"), (16, 16), Float(4, 3, "fn"), 2))
    'block(e2m1finite,16x16,e4m3fn,2)'
    """

    element: Format
    size: int | tuple[int, int]
    scale: Float
    levels: int = 1
    conversion: Conversion | None = None

    def __post_init__(self):
        for name in ("element", "scale"):
            value = getattr(self, name)
            if isinstance(value, Block) or not is_format(value):
                raise ValueError(
                    f"Block takes {name} as a grid such as Float(2, 1, 'finite'); got {value!r}"
                )
        object.__setattr__(self, "size", _checked_size(self.size))
        if self.levels not in (1, 2):
            raise ValueError(f"Block takes levels 1 or 2; got {self.levels!r}")
        if not isinstance(self.scale, Float) or self.scale.convention == "finite":
            raise ValueError(
                "Block takes a scale that can be NaN, as a block that holds a NaN needs: a Float of another "
                f"convention than 'finite'; got {self.scale!r}"
            )
        _ = self.scale.dtype  # traced ones, which cannot be stored, are refused here
        object.__setattr__(self, "conversion", self._checked_conversion())

    def _checked_conversion(self) -> str:
        default = "up" if self._has_powers_of_two else "nearest"
        if self.conversion is None:
            return default
        if self.conversion not in CONVERSIONS:
            names = ", ".join(map(repr, CONVERSIONS))
            raise ValueError(f"Block takes conversion {names} or None; got {self.conversion!r}")
        if self.conversion in ("ocp", "quartet"):
            # Of a float's largest value a / M · M is in a's binade, whatever a is.
            if not (self._has_powers_of_two and isinstance(self.element, Float)):
                raise ValueError(
                    f"conversion {self.conversion!r} is for Floats with E8M0 scales; got {self.element} with "
                    f"{self.scale}"
                )
            if self.levels != 1:
                raise ValueError(
                    f"conversion {self.conversion!r} takes levels 1; got {self.levels}"
                )
        if self.conversion == "nearest" and self._has_powers_of_two:
            raise ValueError("powers of two are rounded 'up', 'down', or as 'ocp' or 'quartet' do")
        return self.conversion

    @property
    def _has_powers_of_two(self) -> bool:
        return self.scale.convention == "fnu"

    @property
    def has_tensor_scale(self) -> bool:
        """Whether there is a float32 scale for the whole array above the blocks'."""
        return self.levels == 2 or self.conversion == "quartet"

    def scales(
        self, needed: jax.Array, empty: jax.Array | bool = False, top: float | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Quantizes scales: from what each block needs to (block scales, the array's scale or None).

        A block that is empty, of zeros alone, gets the scale 0.  So does one that needs less than the
        smallest scale: it rounds to zero.  One of Floats gets 1, which keeps what the elements can hold by
        themselves.  NaN stays.

        Args:
            needed: a / M of each block, float32.
            empty: which blocks are.
            top: the largest scale below a tensor's; the format's own where not given.
        """
        least = int(isinstance(self.element, Float))
        tiny, tensor = jnp.finfo(jnp.float32).tiny, None
        ratio = needed
        if self.levels == 2:
            # A block without a range must not take the others' scale away with it.
            largest = jnp.max(jnp.where(jnp.isnan(needed), 0, needed), keepdims=True, initial=0)
            tensor = divide(largest, self.scale.max_value if top is None else top)
            tensor = jnp.where(tensor < tiny, 1, tensor)
            ratio = divide(needed, tensor)
        if self.conversion in ("ocp", "quartet"):
            # ⌊log2 a⌋ − ⌊log2 M⌋ from a / M.
            largest = jnp.asarray(self.element.max_value, jnp.float32)
            binade = exp2(exponent_of(largest))
            ratio = ratio * (largest / binade)
        if self.conversion == "quartet":
            tensor = jnp.full((1,) * needed.ndim, 4 / 3, jnp.float32)
        ratio = jnp.where(ratio < tiny, least or tiny, ratio)
        scale = self.scale.round(ratio, CONVERSIONS[self.conversion])  # pyright: ignore
        return jnp.where(empty, 0, jnp.where(scale <= 0, least, scale)), tensor

    def __str__(self):
        if known := known_name(self):
            return known
        size = "x".join(map(str, self.size)) if isinstance(self.size, tuple) else self.size
        default = "up" if self._has_powers_of_two else "nearest"
        suffix = "" if self.conversion == default else f",{self.conversion}"
        return f"block({self.element},{size},{self.scale},{self.levels}{suffix})"

    def tree_flatten(self):
        return (self.element, self.scale), (self.size, self.levels, self.conversion)

    @classmethod
    def tree_unflatten(cls, static, formats) -> Any:
        instance = object.__new__(cls)
        fields = ("element", "scale", "size", "levels", "conversion")
        for name, value in zip(fields, (*formats, *static), strict=True):
            object.__setattr__(instance, name, value)
        return instance


def _checked_size(size: Any) -> int | tuple[int, int]:
    if isinstance(size, tuple):
        if len(size) != 2:
            raise ValueError(f"size of a Block is a whole number or a tile (m, n); got {size!r}")
        for n in size:
            check_whole("size of a Block's tile", n, 1)
        return int(size[0]), int(size[1])
    check_whole("size of a Block", size, 1)
    return int(size)
