"""`BackwardOperands`: a gradient's product, both of whose operands are quantized when it is computed."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant.numerics.calibration import absmax
from jaxquant.numerics.hadamard import check_block, hadamard
from jaxquant.numerics.qarray import QArray, dequantize, fake_quant
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.rounding import key_of
from jaxquant.operations.operands import Operands

# What one product draws at random: each has a key of its own, made of one word.
_ROTATION, _GRADIENT, _KEPT = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackwardOperands(Operands):
    """Operands of a gradient's product that are both quantized when the product is computed.

    With H the Hadamard matrix of blocks along what the product sums over, and D random signs,

        ∂lhs = Q_l(g D H) · Q_r(rhs D H)ᵀ,    ∂rhs = Q_r(H D lhs)ᵀ · Q_l(H D g),

    which without quantization is the product itself, since H Hᵀ = D D = 1.  Values are quantized and
    multiplied in rotated coordinates, in their own type.  The signs, and what either operand draws to be
    rounded, go by one key made of the gradient's largest magnitudes: no key is passed, no state is kept,
    and the same step repeats exactly.

    Args:
        lhs: quantizer of the incoming gradient; None leaves it as it is.
        rhs: quantizer of the forward operand that it is multiplied with; None leaves it as it is.
        hadamard: None, or the block of the rotation along the last axis that is summed over.
        kept: whether `rhs` quantizes the ``"original"`` operand, or the ``"forward"`` one, as the forward
            product quantized it.  In the second case forward operands that are both rotated alike stay in
            rotated coordinates.

    Raises:
        ValueError: as `Operands`; native arithmetic; quantizers with a rotation of their own; an unknown
            `kept`; at the call, a block that does not divide the axis.

    Source: NVIDIA 2025, arXiv 2509.25149, for ``"original"``; Castro et al. 2025, arXiv 2505.14669, and
    Panferov et al. 2026, arXiv 2601.22813, for ``"forward"``.

    >>> from jaxquant.formats import NVFP4
    >>> from jaxquant.numerics.rounding import stochastic
    >>> gradient = Quantizer(NVFP4, rounding=stochastic)
    >>> BackwardOperands(gradient, Quantizer(NVFP4), hadamard=16).kept
    'original'
    """

    hadamard: int | None = dataclasses.field(default=None, metadata={"static": True})
    kept: Literal["original", "forward"] = dataclasses.field(
        default="original", metadata={"static": True}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.arithmetic != "simulated":
            raise ValueError(f"backward operands are simulated; got arithmetic {self.arithmetic!r}")
        if self.kept not in ("original", "forward"):
            raise ValueError(f"kept is 'original' or 'forward'; got {self.kept!r}")
        for name in ("lhs", "rhs"):
            quantizer = getattr(self, name)
            if isinstance(quantizer, Quantizer) and quantizer.hadamard is not None:
                raise ValueError(
                    f"backward operands are rotated together; {name} has hadamard {quantizer.hadamard} of "
                    "its own. Give hadamard to the BackwardOperands"
                )
        if self.hadamard is not None:
            object.__setattr__(self, "hadamard", check_block(self.hadamard))


def keeps_rotated(gradients: tuple[Any, Any], forward: Operands) -> bool:
    """Returns whether forward operands stay in the coordinates in which both are quantized."""
    keep = any(isinstance(g, BackwardOperands) and g.kept == "forward" for g in gradients)
    pair = (forward.lhs, forward.rhs)
    if not keep or any(q is None or q.hadamard is None for q in pair):
        return False
    lhs, rhs = pair
    return lhs.hadamard == rhs.hadamard  # pyright: ignore[reportOptionalMemberAccess]


def rotated_forward(
    x: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]
) -> tuple[jax.Array, Quantizer]:
    """Returns an operand in its quantizer's rotated coordinates, in float32, and what quantizes it there."""
    turned = hadamard(x.astype(jnp.float32), quantizer.hadamard or 1, axes[-1])
    return turned, dataclasses.replace(quantizer, hadamard=None)


def kept_operand(operands: BackwardOperands, original: Any, quantized: Any) -> Any:
    """Returns what a gradient's product keeps of the forward operand."""
    if operands.kept == "forward" or operands.rhs is None:
        return quantized
    return dequantize(original) if isinstance(original, QArray) else original


def gradient_key(gradient: jax.Array, axes: tuple[int, ...], side: int, role: int) -> jax.Array:
    """Returns the key of one draw: of the gradient's largest magnitudes along what is not summed over."""
    word = key_of(absmax(jax.lax.stop_gradient(gradient), axes))[1]
    return jnp.stack([jnp.uint32(2 * role + side), word])


def rotated_gradient(
    operands: BackwardOperands, gradient: jax.Array, axes: tuple[int, ...], side: int
) -> tuple[jax.Array, Any]:
    """Returns the gradient in the coordinates in which it is quantized, and what makes its draw's key."""
    keys = functools.partial(gradient_key, gradient, axes, side)
    return _rotated(operands, gradient, axes, keys(_ROTATION)), lambda _: keys(_GRADIENT)


def multiplied(
    operands: BackwardOperands, gradient: jax.Array, kept: Any, numbers: Any, side: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient and the kept operand as they are multiplied, in the gradient's type.

    Args:
        operands: of the gradient's product.
        gradient: the incoming one.
        kept: what `kept_operand` gave.
        numbers: the product's dimension numbers.
        side: 0 for ∂lhs, where the gradient comes first; 1 for ∂rhs.
    """
    axes, kept_axes = numbers[0][side], numbers[0][1 - side]
    if isinstance(kept, QArray):  # rotations of the forward's sum are no part of this one
        kept = dequantize(dataclasses.replace(kept, hadamard=None))
    keys = functools.partial(gradient_key, gradient, axes, side)
    turned, key = rotated_gradient(operands, gradient, axes, side)
    other = _rotated(operands, kept, kept_axes, keys(_ROTATION))
    values = _quantized(turned, operands.lhs, axes, key)
    other = _quantized(other, operands.rhs, kept_axes, lambda _: keys(_KEPT))
    return values.astype(gradient.dtype), other.astype(gradient.dtype)


def _rotated(operands: BackwardOperands, x: jax.Array, axes: tuple[int, ...], key: Any) -> Any:
    if operands.hadamard is None:
        return x
    return hadamard(x.astype(jnp.float32), operands.hadamard, axes[-1], key)


def _quantized(x: jax.Array, quantizer: Quantizer | None, axes: Any, key: Any) -> jax.Array:
    return x if quantizer is None else fake_quant(x, quantizer, axes, key)
