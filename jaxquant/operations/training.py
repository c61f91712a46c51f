"""Published recipes that train in 4 and 8 bits, forward and backward, made of this library's parts.

Those in blocks are simulated: their operands have the values that the hardware multiplies, and the products
are computed in the operands' own type.
"""

from typing import Any

from jaxquant.formats import E2M1, E4M3, E5M2, E8M0, MXFP8, NVFP4, Block
from jaxquant.numerics import calibration, estimators, rounding
from jaxquant.numerics.delayed import delayed_absmax
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations.backward import BackwardOperands
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.operands import Operands

# One grid for a weight and its transpose.
NVFP4_TILES = Block(E2M1, (16, 16), E4M3, levels=2)
MXFP8_OCP = Block(E4M3, 32, E8M0, conversion="ocp")
# Quartet's: forward a scale of 3/4 of the root mean square, rounded down; backward one that clips nothing.
MXFP4_DOWN = Block(E2M1, 32, E8M0, conversion="down")
MXFP4_QUARTET = Block(E2M1, 32, E8M0, conversion="quartet")
# By how much Quartet II shrinks the range before the scales are corrected (its code's 17/16 · 0.93).
EDEN_SHARE = 17 / 16 * 0.93


def nvfp4(
    gradient_rounding: Any = rounding.stochastic,
    hadamard: int | None = 16,
    tiles: bool = True,
    conversion: Any = "nearest",
) -> DotGeneral:
    """Returns NVIDIA's recipe for NVFP4, and what is left of it without one of its parts.

    Forward: activations in blocks of 16, weights in tiles of 16 × 16, to nearest.  ∂lhs: gradients in blocks
    of 16, stochastic, by the same tiles.  ∂rhs: gradients likewise, and the activations anew along the
    tokens, to nearest, both in random Hadamard coordinates of 16.

    With the scales' own rounding to nearest, a block's largest value is at times beyond the grid and clipped,
    so that stochastic rounding is not quite unbiased; with conversion "up" it is.

    Args:
        gradient_rounding: of the gradients.
        hadamard: block of the rotation in ∂rhs; None for none.
        tiles: whether weights have tiles; otherwise blocks, forward and again, anew, in ∂lhs.
        conversion: of the gradients' scales, "nearest" or "up".

    Source: NVIDIA 2025, arXiv 2509.25149, section 4.
    """
    blocks = Quantizer(NVFP4)
    weights = Quantizer(NVFP4_TILES) if tiles else blocks
    gradient = Quantizer(
        Block(E2M1, 16, E4M3, levels=2, conversion=conversion), rounding=gradient_rounding
    )
    return DotGeneral(
        Operands(blocks, weights),
        BackwardOperands(gradient) if tiles else BackwardOperands(gradient, blocks),
        BackwardOperands(gradient, blocks, hadamard=hadamard),
    )


def mxfp4_quartet() -> DotGeneral:
    """Returns Quartet: MXFP4 in all three products, forward as QuEST, backward unbiased.

    Forward: both operands in Hadamard coordinates of 32, with a scale of 3/4 of a block's root mean square
    rounded down to a power of two, to nearest; what is clipped gets no gradient.  Backward: the gradient, and
    the forward's quantized operand, in random Hadamard coordinates of 32, by 3/4 of OCP's range, stochastic.

    Source: Castro et al. 2025, arXiv 2505.14669, Algorithm 1, and its authors' code, whose standard deviation
    is a root mean square here.
    """
    forward = Quantizer(
        MXFP4_DOWN,
        calibration=calibration.scaled_rms(0.75),
        estimator=estimators.clipped,
        hadamard=32,
    )
    each = Quantizer(MXFP4_QUARTET, rounding=rounding.stochastic)
    backward = BackwardOperands(each, each, hadamard=32, kept="forward")
    return DotGeneral(Operands(forward, forward), backward, backward)


def nvfp4_eden(hadamard: int = 128) -> DotGeneral:
    """Returns Quartet II: NVFP4 in all three products, backward with MS-EDEN.

    Forward: both operands in blocks of 16, to nearest.  Backward: the gradient, and the forward's quantized
    operand, in random Hadamard coordinates, to nearest, with corrected scales.  The paper's choice between
    two scales forward ("four over six") is not made, and a correction is ⟨x, x⟩ / ⟨x, x̂⟩ of the values
    themselves, where the authors' code sums them in units of each block's scale.

    Args:
        hadamard: block of the rotation, a multiple of 16 that divides what each gradient's product sums over.

    Source: Panferov et al. 2026, arXiv 2601.22813.
    """
    forward = Quantizer(NVFP4)
    each = Quantizer(
        NVFP4,
        calibration=calibration.scaled_absmax(EDEN_SHARE),
        rounding=rounding.Eden(hadamard),
    )
    backward = BackwardOperands(each, each, hadamard=hadamard, kept="forward")
    return DotGeneral(Operands(forward, forward), backward, backward)


def mxfp8(block: Block = MXFP8) -> DotGeneral:
    """Returns E4M3 blocks of 32 in all three products, each operand anew along what its product sums over.

    Args:
        block: with scales rounded up, as Mishra et al. 2025, arXiv 2506.08027, find that training needs; or
            `MXFP8_OCP`, with OCP's own (Rouhani et al. 2023, arXiv 2310.10537).
    """
    each = Quantizer(block)
    backward = Operands(each, each)
    return DotGeneral(Operands(each, each), backward, backward)


def fp8_delayed(history: int = 1024, margin: int = 0, by: Any = "max") -> DotGeneral:
    """Returns E4M3 forward and E5M2 gradients with a range for each tensor by the steps before.

    Ranges are state: `jaxquant.nnx.quantize` and `jaxquant.functions.delayed` take this recipe.

    Args:
        history, margin, by: as of `jaxquant.numerics.delayed.delayed`; the defaults are TransformerEngine's.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, and TransformerEngine's DelayedScaling.
    """
    calibration = delayed_absmax(history, margin, by)
    each, gradient = (Quantizer(x, calibration=calibration) for x in (E4M3, E5M2))
    backward = Operands(gradient, None, "native")
    return DotGeneral(Operands(each, each, "native"), backward, backward)
