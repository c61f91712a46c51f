"""The mathematics of post-training quantization of one layer, as pure functions on arrays.

A layer computes y = Wᵀx for a weight W of shape (n, m), inputs by outputs.  What a quantized weight Ŵ
loses on the inputs seen is

    E ‖(W − Ŵ)ᵀ x‖² = tr((W − Ŵ)ᵀ H (W − Ŵ)),    H = E[x xᵀ]

(`objective`), so that a layer's inputs are summed up in n² numbers (`InputStatistics`).  `rtn` ignores them;
`gptq` rounds one input channel after the other and lets those that follow make up for the error;
`awq_clip` finds ranges.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.checks import check_whole
from jaxquant.formats import Block
from jaxquant.numerics.calibration import Range, Step
from jaxquant.numerics.groups import scale_shape
from jaxquant.numerics.hadamard import hadamard
from jaxquant.numerics.qarray import QArray, calibrate, dequantize, fake_quant, quantize
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.ptq.statistics import matmul


def objective(
    weight: jt.Float[jax.Array, "n m"],
    values: jt.Float[jax.Array, "n m"] | QArray,
    hessian: jt.Float[jax.Array, "n n"],
) -> jt.Float[jax.Array, ""]:
    """Computes a layer's mean squared output error for each token: tr((W − Ŵ)ᵀ H (W − Ŵ)).

    Args:
        weight: W.
        values: Ŵ, or what is stored of it.
        hessian: H, of `InputStatistics`.

    >>> objective(jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [1.5]]), 4 * jnp.eye(2))
    Array(1., dtype=float32)
    """
    found = dequantize(values) if isinstance(values, QArray) else values
    return jnp.sum(_energy(weight.astype(jnp.float32) - found.astype(jnp.float32), hessian))


def _energy(error: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns each element's share of tr(ΔᵀHΔ)."""
    return error * matmul(hessian.astype(jnp.float32), error)


def rtn(weight: jt.Float[jax.Array, "n m"], quantizer: Quantizer) -> QArray:
    """Returns round to nearest: the weight quantized along its inputs, whatever these are.

    Raises:
        ValueError: as `jaxquant.quantize`; a weight that has not two axes.

    >>> from jaxquant.formats import Int
    >>> rtn(jnp.array([[0.4], [-7.0]]), Quantizer(Int(4))).qvalue
    Array([[0],
           [-7]], dtype=int4)
    """
    check_layer(weight, None, quantizer)
    return quantize(weight, quantizer, axis=0)


def gptq(
    weight: jt.Float[jax.Array, "n m"],
    hessian: jt.Float[jax.Array, "n n"],
    quantizer: Quantizer,
    *,
    damping: float = 0.01,
    order: bool = True,
    block: int = 128,
) -> QArray:
    """Rounds one input channel after the other, each making up for the errors of those before it.

    With H + λI = R Rᵀ, R upper triangular, the objective is Σ_i ‖R_ii Δ_i + Σ_{j<i} R_ji Δ_j‖² over the
    rows Δ_i = W_i − Ŵ_i, and the row i is what nearest rounding makes of

        W_i + Σ_{j<i} (R_ji / R_ii) Δ_j.

    These are the same roundings as with updates by the Cholesky factor of H⁻¹, without an inverse.  Scales
    and zero points are static: those that `jaxquant.quantize` gives the whole weight, found before the sweep,
    so that a group's neighbours share a scale whatever the order, and the result has `quantize`'s own form.
    With a rotation in the quantizer, all of it happens in the rotated coordinates.

    Args:
        weight: W, inputs by outputs.
        hessian: H, symmetric and positive semidefinite.  A channel without inputs (H_jj = 0) is rounded to
            nearest.  One that is not finite, or not positive definite where `damping` is too small, gives
            scales of NaN, so that the whole weight decodes to NaN.
        quantizer: how the weight is quantized along axis 0; its format is static.
        damping: λ as a share of the mean of H's diagonal.
        order: whether channels go by falling H_jj, so that those that matter most are rounded first, while
            all others can still make up for it; or as they come.
        block: how many channels' errors are gathered before they are passed on in one matrix product;
            a matter of speed alone.

    Raises:
        ValueError: as `jaxquant.quantize`; a rounding that needs a key; shapes that do not fit; a
            negative damping; a block below 1.

    Source: Frantar et al. 2022, arXiv 2210.17323, section 3; as a sweep over nearest planes, Chen et al.
    2025, arXiv 2507.18553.

    >>> from jaxquant.formats import Int
    >>> weight, hessian = jnp.array([[0.4], [0.4], [7.0]]), jnp.eye(3) + 9
    >>> stored = gptq(weight, hessian, Quantizer(Int(4)), order=False)
    >>> stored.qvalue.ravel(), rtn(weight, Quantizer(Int(4))).qvalue.ravel()
    (Array([0, 1, 7], dtype=int4), Array([0, 0, 7], dtype=int4))
    """
    check_layer(weight, hessian, quantizer)
    if not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise ValueError(f"damping is a share of H's mean diagonal, at least 0; got {damping!r}")
    check_whole("block", block, 1, unit="channels")
    return _gptq(weight, hessian, quantizer, float(damping), bool(order), block)


@functools.partial(jax.jit, static_argnames="block")
def _gptq(
    weight: jax.Array,
    hessian: jax.Array,
    quantizer: Quantizer,
    damping: Any,
    order: Any,
    block: int,
) -> QArray:
    stored = quantize(weight, quantizer, axis=0)
    weight, hessian = _rotate(weight, hessian, quantizer)
    n, m = weight.shape
    # Sorting is stable, so that equal channels go as they come.
    place = jnp.where(order, jnp.argsort(-jnp.diagonal(hessian)), jnp.arange(n))
    feedback = _feedback(_damp(hessian, damping)[place][:, place])
    grid = _sweep(weight[place], feedback, _RowGrid.of(stored, quantizer), place, block)
    grid = jnp.zeros((n, m), jnp.float32).at[place].set(grid)
    solved = dataclasses.replace(stored, qvalue=quantizer.element.store(grid))
    return _none_unless(jnp.all(jnp.isfinite(feedback)), solved)


def _damp(hessian: jax.Array, damping: Any) -> jax.Array:
    """Returns H + λI, with the mean in place of a zero on the diagonal: of a channel that had no inputs."""
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    unit = jnp.where(mean > 0, mean, 1)
    return hessian + jnp.diag(damping * mean + jnp.where(diagonal == 0, unit, 0))


def _feedback(hessian: jax.Array) -> jax.Array:
    """Returns the lower triangular F with F_ij = R_ji / R_ii, where H = R Rᵀ and R is upper triangular.

    The ones on its diagonal meet the error of a row that is not rounded yet, which is zero.
    """
    # The lower factor of the reversed matrix, reversed back.
    upper = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return (upper / jnp.diagonal(upper)[None, :]).T


@dataclasses.dataclass(frozen=True)
class _RowGrid:
    """Rounds rows of a weight to the grid that its stored scales span.

    Attributes:
        scale: one row of scales for each group of rows.
        zero: None, or the zero points in the same shape.
        size: rows in a group.
    """

    scale: jax.Array
    zero: jax.Array | None
    quantizer: Quantizer
    size: int

    @staticmethod
    def of(stored: QArray, quantizer: Quantizer) -> "_RowGrid":
        n, m = stored.shape
        scale = stored.float_scale()
        zero = stored.zero_point
        zero = None if zero is None else stored.element.load(zero)
        across = max(1, m // scale.shape[1])
        scale, zero = jax.tree.map(lambda v: jnp.repeat(v, across, axis=1), (scale, zero))
        return _RowGrid(scale, zero, quantizer, max(1, n // scale.shape[0]))

    def __call__(self, row: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the grid's values nearest to the row that stands at `place`, and what they stand for."""
        scale = self.scale[place // self.size]
        zero = None if self.zero is None else self.zero[place // self.size]

        def rounding(values: jax.Array) -> jax.Array:
            rounded = self.quantizer.rounding(values, None)
            return rounded if zero is None else rounded + zero

        # By the reciprocal, as `quantize` divides, so that equal rows get equal values.
        divisor = jnp.where(scale == 0, 1, scale)
        grid = self.quantizer.element.round(row * (1 / divisor), rounding)
        return grid, scale * (grid if zero is None else grid - zero)


def _sweep(
    weight: jax.Array, feedback: jax.Array, to_grid: _RowGrid, place: jax.Array, block: int
) -> jax.Array:
    """Returns the grid values of all rows, in order of `place`, each with the errors of those before it."""
    n, m = weight.shape
    block = min(block, n)
    rows = -(-n // block) * block
    weight = jnp.pad(weight, ((0, rows - n), (0, 0)))
    feedback = jnp.pad(feedback, ((0, rows - n), (0, rows - n)))
    place = jnp.pad(place, (0, rows - n))

    def over_blocks(b, carry):
        start = b * block
        original = jax.lax.dynamic_slice_in_dim(weight, start, block)
        passed = jax.lax.dynamic_slice_in_dim(feedback, start, block)
        target = original + matmul(passed, carry[1])
        within = jax.lax.dynamic_slice_in_dim(passed, start, block, axis=1)
        places = jax.lax.dynamic_slice_in_dim(place, start, block)

        def over_rows(i, carry):
            grid, error = carry
            values, stands_for = to_grid(target[i] + matmul(within[i], error), places[i])
            left = original[i] - stands_for
            # A group without a scale is lost as a whole, and takes no other with it.
            left = jnp.where(jnp.isfinite(left), left, 0)
            return grid.at[i].set(values), error.at[i].set(left)

        empty = jnp.zeros((block, m), jnp.float32)
        part = jax.lax.fori_loop(0, block, over_rows, (empty, empty))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0)
            for whole, new in zip(carry, part, strict=True)
        )

    empty = jnp.zeros((rows, m), jnp.float32)
    return jax.lax.fori_loop(0, rows // block, over_blocks, (empty, empty))[0][:n]


def _none_unless(is_solved: jax.Array, stored: QArray) -> QArray:
    """Returns the same array, or one that decodes to NaN where the solution is none."""
    nothing = jnp.full(stored.scale.shape, jnp.nan, jnp.float32)
    if isinstance(stored.format, Block):
        nothing = stored.format.scale.store(nothing)
    return dataclasses.replace(stored, scale=jnp.where(is_solved, stored.scale, nothing))


def _rotate(
    weight: jax.Array, hessian: jax.Array, quantizer: Quantizer
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight and the inputs' products, float32, in the coordinates of quantization."""
    weight, hessian = weight.astype(jnp.float32), hessian.astype(jnp.float32)
    size = quantizer.hadamard
    if size is None:
        return weight, hessian
    return hadamard(weight, size, 0), hadamard(hadamard(hessian, size, 0), size, 1)


def least_of(losses: jax.Array) -> jax.Array:
    """Returns the index of the first smallest loss; NaN never counts."""
    return jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses), axis=0)


def awq_clip(
    weight: jt.Float[jax.Array, "n m"],
    hessian: jt.Float[jax.Array, "n n"],
    quantizer: Quantizer,
    *,
    grid: int = 20,
    least: float = 0.5,
) -> Range:
    """Returns ranges that clip: each group's own is shrunk to where the group's outputs lose least.

    r_g = c·r, c among grid + 1 even steps from 1 to `least`, with the least Σ Δ_gᵀ H_gg Δ_g over the
    group's outputs, where r is the range of the quantizer's calibration and H_gg are the products of the
    group's own inputs.  What groups do to one another is left out of this, so the shrunken ranges are
    taken only where they lower the objective as a whole.

    Args:
        weight: W, inputs by outputs.
        hessian: H, of the inputs.
        quantizer: how W is quantized along axis 0; its calibration finds r.
        grid: steps of the search.
        least: the smallest share, over 0 and at most 1.

    Returns:
        A calibration for the same quantizer:
        ``dataclasses.replace(quantizer, calibration=awq_clip(...))``.

    Raises:
        ValueError: shapes that do not fit; a calibration that gives steps instead of ranges; a grid
            below 1; `least` out of range.

    Source: Lin et al. 2023, arXiv 2306.00978, section 5.1.

    >>> from jaxquant.formats import Int
    >>> weight = jnp.array([[1.0]] * 15 + [[1.4]])
    >>> awq_clip(weight, jnp.eye(16), Quantizer(Int(2), "channel"), grid=10).value
    Array([[1.05]], dtype=float32)
    """
    check_layer(weight, hessian, quantizer)
    check_grid(grid)
    if not isinstance(least, int | float) or not 0 < least <= 1:
        raise ValueError(f"least is a share of the range, over 0 and at most 1; got {least!r}")
    if isinstance(quantizer.calibration, Step):
        raise ValueError(
            "awq_clip shrinks ranges, and a Step has none; give a quantizer that calibrates by "
            f"absmax or another range, not {quantizer.calibration!r}"
        )
    return _awq_clip(weight, hessian, quantizer, grid, float(least))


@functools.partial(jax.jit, static_argnames="grid")
def _awq_clip(
    weight: jax.Array, hessian: jax.Array, quantizer: Quantizer, grid: int, least: Any
) -> Range:
    weight, hessian = _rotate(weight, hessian, quantizer)
    quantizer = dataclasses.replace(quantizer, hadamard=None)
    whole = calibrate(weight, quantizer, 0)
    groups = scale_shape(weight.shape, quantizer.granularity, 0)  # pyright: ignore[reportArgumentType]

    def with_share(share: jax.Array) -> tuple[Range, jax.Array]:
        found = Range(jax.tree.map(lambda range_: share * range_, whole))
        return found, fake_quant(weight, dataclasses.replace(quantizer, calibration=found), 0)

    def loss(share: jax.Array) -> jax.Array:
        return _group_losses(weight - with_share(share)[1], hessian, groups)

    shares = jnp.linspace(1, least, grid + 1)
    clipped, values = with_share(shares[least_of(jax.lax.map(loss, shares))])
    nearest = objective(weight, with_share(jnp.ones(groups))[1], hessian)
    is_better = objective(weight, values, hessian) < nearest
    return jax.tree.map(lambda new, old: jnp.where(is_better, new, old), clipped, Range(whole))


def _group_losses(error: jax.Array, hessian: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Returns Σ Δ_gᵀ H_gg Δ_g of each group."""
    (n, m), (down, across) = error.shape, groups
    by_rows = error.reshape(down, n // down, m)
    own = jnp.arange(down)
    inputs = hessian.reshape(down, n // down, down, n // down)[own, :, own, :]
    return _energy(by_rows, inputs).reshape(down, n // down, across, m // across).sum((1, 3))


def check_layer(weight: Any, hessian: Any, quantizer: Quantizer | None) -> None:
    """Raises a ValueError where a weight is none, or the others do not fit it."""
    if getattr(weight, "ndim", None) != 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        got = getattr(weight, "shape", weight)
        raise ValueError(f"a weight is a floating-point array (inputs, outputs); got {got}")
    if quantizer is not None and not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer is a Quantizer, as in Quantizer(Int(4)); got {quantizer!r}")
    n = weight.shape[0]
    if hessian is not None and getattr(hessian, "shape", None) != (n, n):
        raise ValueError(
            f"the Hessian of a weight with {n} inputs has shape {(n, n)}; "
            f"got {getattr(hessian, 'shape', hessian)}"
        )


def check_grid(grid: Any) -> None:
    """Raises a ValueError where a search has no steps."""
    check_whole("grid", grid, 1, unit="steps")
