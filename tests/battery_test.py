"""Everything with everything: each case has a right answer, or a ValueError that a rule below foresees.

500 cases run with the long tests.  20,000, as a study of their own (half an hour on two cores):

    JAXQUANT_BATTERY=1 JAX_PLATFORMS=cpu python -m pytest -m long tests/battery_test.py
"""

import dataclasses
import functools
import math
import os
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import calibration, formats, rounding
from jaxquant.numerics.groups import scale_shape

pytestmark = [pytest.mark.exhaustive, pytest.mark.long]

_COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("suite", max_examples=500, **_COMMON)
hypothesis.settings.register_profile("battery", max_examples=20_000, **_COMMON)
PROFILE = "battery" if os.environ.get("JAXQUANT_BATTERY") == "1" else "suite"

TINY, TOP = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)

# Few shapes, since every operation is compiled for each.
SHAPES = [(), (8,), (3, 0), (4, 32), (4, 32), (2, 3, 8)]
GRIDS = [
    *(jq.Int(2), jq.Int(4), jq.Int(8), jq.Int(13), jq.Int(3, "full"), jq.Int(8, "full")),
    *(jq.Int(1, "unsigned"), jq.Int(4, "unsigned"), jq.Int(8, "unsigned")),
    *(jq.BINARY, jq.Int(3, "midrise"), jq.Int(8, "midrise")),
    *(jq.E2M1, jq.E2M3, jq.E3M2, jq.E4M3, formats.E4M3FNUZ, jq.E5M2, jq.E5M6, jq.FP16, jq.BF16),
    *(jq.NF4, jq.DYNAMIC8, formats.UDYNAMIC8, jq.Codebook((-2.0, -0.5, 1.0))),
]
BLOCKS = [
    *(jq.MXFP8, jq.MXFP4, jq.MXINT8, jq.NVFP4),
    jq.Block(jq.INT4, 8, jq.FP16),
    jq.Block(jq.NF4, 8, jq.E5M2, levels=2),
    jq.Block(jq.Int(4, "midrise"), 4, jq.BF16),
    jq.Block(jq.Int(3, "unsigned"), 8, jq.E8M0, levels=2),
]
CALIBRATIONS = {
    "absmax": calibration.absmax,
    "minmax": calibration.minmax,
    "gaussian": calibration.gaussian,
    "percentile": calibration.percentile(99),
    "mse": calibration.mse(4),
    "range": calibration.Range(jnp.float32(0.7)),
}
VALUES = [
    "normal",
    "zero",
    "constant",
    "denormal",
    "tiny",
    "huge",
    "top",
    "nan",
    "inf",
    "mixed",
    "heavy",
]


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    axis: int
    dtype: Any
    format: Any
    granularity: Any
    calibration: str
    rounding: Any
    hadamard: int | None
    values: str
    seed: int

    @property
    def quantizer(self) -> jq.Quantizer:
        return jq.Quantizer(
            self.format,
            self.granularity,
            calibration=CALIBRATIONS[self.calibration],
            rounding=self.rounding,
            hadamard=self.hadamard,
        )

    @property
    def x(self) -> jax.Array:
        return jnp.array(self.array, self.dtype)

    @property
    def array(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        x = rng.normal(size=self.shape).astype(np.float64)
        kind = self.values
        if kind == "zero":
            x = x * 0
        elif kind == "constant":
            x = np.full(self.shape, rng.choice([-3.0, 0.1, 7.0, 1e-3]))
        elif kind == "denormal":
            x = x * 1e-41
        elif kind == "tiny":
            x = x * 2.0 ** rng.integers(-126, -110)
        elif kind == "huge":
            x = np.clip(x * 2.0 ** rng.integers(100, 128), -TOP, TOP)
        elif kind == "top":
            x = np.where(x > 0, TOP, -TOP)
        elif kind == "heavy":
            x = rng.standard_t(1, size=self.shape) * 2.0 ** rng.integers(-30, 30)
        elif kind == "mixed":
            x = x * np.exp2(rng.uniform(-140, 120, self.shape))
            x = np.where(rng.random(self.shape) < 0.2, 0, x)
        largest = float(jnp.finfo(self.dtype).max)
        x = np.clip(np.asarray(x), -largest, largest)
        if kind in ("nan", "inf") and x.size:
            bad = rng.choice(x.size, size=max(1, x.size // 40), replace=False)
            x.reshape(-1)[bad] = (
                np.nan if kind == "nan" else rng.choice([-np.inf, np.inf], len(bad))
            )
        return x.astype(np.float32)

    @property
    def foreseen(self) -> str | None:
        """Why this case is refused, if it is, as the documentation has it."""
        ndim, block = len(self.shape), self.granularity
        if isinstance(self.format, jq.Block):
            block = self.format.size
        if self.hadamard is not None:
            if ndim == 0:
                return "axis"
            if self.shape[self.axis] % self.hadamard:
                return "does not divide"
        if isinstance(block, int | tuple):
            if ndim == 0:
                return "axis"
            if isinstance(block, int):
                if self.shape[self.axis] % block:
                    return "does not divide"
            elif ndim < 2:
                return "not summed over"
            elif self.shape[self.axis] % block[0] or self.shape[other(self)] % block[1]:
                return "does not divide"
        grid = self.format
        if self.calibration == "minmax" and not (
            isinstance(grid, jq.Int) and grid.levels != "midrise"
        ):
            return "asymmetric|zero point"
        return None


def other(case: Case) -> int:
    """The last axis that is not the contracting one."""
    return [a for a in range(len(case.shape)) if a != case.axis % len(case.shape)][-1]


@st.composite
def cases(draw) -> Case:
    shape = draw(st.sampled_from(SHAPES))
    fmt = draw(st.sampled_from([*GRIDS, *BLOCKS]))
    is_block = isinstance(fmt, jq.Block)
    granularity = None if is_block else draw(st.sampled_from(["tensor", "channel", 8, (8, 1), 5]))
    calibrations = list(CALIBRATIONS) if draw(st.booleans()) else ["absmax"]
    return Case(
        shape=shape,
        axis=draw(st.sampled_from([-1, -1, 0])),
        dtype=draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])),
        format=fmt,
        granularity=granularity,
        calibration=draw(st.sampled_from(calibrations)),
        rounding=draw(
            st.sampled_from(
                [rounding.nearest, rounding.nearest, rounding.stochastic, rounding.dithered]
            )
        ),
        hadamard=draw(st.sampled_from([None, None, None, 4])),
        values=draw(st.sampled_from(VALUES)),
        seed=draw(st.integers(0, 3)),
    )


@functools.cache
def grid_of(element) -> np.ndarray:
    codes = jnp.minimum(jnp.arange(2**16), 2**element.bits - 1).astype(
        formats.code_dtype(element.bits)
    )
    values = np.unique(np.asarray(element.decode(codes), np.float64))
    low, high = float(element.min_value), float(element.max_value)
    return values[np.isfinite(values) & (values >= low) & (values <= high)]


def spread(groups: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One value per group, repeated over its elements."""
    for axis, (n, g) in enumerate(zip(shape, groups.shape, strict=True)):
        groups = np.repeat(groups, n // g if g else 1, axis)
    return groups.reshape(shape)


def by_group(flags: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """Whether any element of each group is flagged, at every element."""
    view = flags.reshape(
        [d for n, g in zip(flags.shape, groups, strict=True) for d in (g, n // max(g, 1))]
    )
    return spread(view.any(axis=tuple(range(1, view.ndim, 2))), flags.shape)


def same(a, b) -> None:
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def check_types(case: Case, q: jq.QArray, x: jax.Array) -> None:
    assert (q.shape, q.dtype, q.ndim) == (case.shape, x.dtype, len(case.shape))
    assert q.qvalue.dtype == q.element.dtype
    groups = scale_shape(case.shape, case.quantizer.granularity, case.axis)
    assert q.scale.shape == groups
    scale_bytes = 4
    if isinstance(case.format, jq.Block):
        assert q.scale.dtype == case.format.scale.dtype
        scale_bytes = case.format.scale.dtype.itemsize
        assert (q.tensor_scale is not None) == (case.format.levels == 2)
    expected = math.prod(case.shape) * q.element.dtype.itemsize + math.prod(groups) * scale_bytes
    if q.zero_point is not None:
        assert q.zero_point.dtype == q.element.dtype
        expected += math.prod(groups) * q.element.dtype.itemsize
    if q.tensor_scale is not None:
        expected += 4
    if isinstance(q.element, jq.Codebook):
        expected += 4 * len(q.element.values)
    assert q.nbytes == expected


def check_packing(case: Case, q: jq.QArray, poisoned: np.ndarray) -> None:
    if not case.shape:
        with pytest.raises(ValueError, match="scalar"):
            q.pack()
        return
    packed = q.pack()
    assert packed.shape == q.shape
    rows, n = math.prod(case.shape[:-1]), case.shape[-1]
    assert packed.qvalue.nbytes == rows * q.element.bits * -(-n // 8)
    back = packed.unpack()
    assert back.qvalue.dtype == q.qvalue.dtype
    there, again = (np.asarray(q.element.load(v.qvalue)) for v in (q, back))
    same(again[~poisoned], there[~poisoned])
    same(jq.dequantize(packed), jq.dequantize(q))


def check_values(case: Case, q: jq.QArray, x: jax.Array, poisoned: np.ndarray) -> None:
    """Codes within a step of x / s, and values s · q, both computed anew in NumPy."""
    x = np.asarray(x.astype(jnp.float32))
    if case.hadamard is not None:
        x = np.asarray(jq.hadamard(jnp.array(x), case.hadamard, case.axis))
    grid, codes = grid_of(q.element), np.asarray(q.element.load(q.qvalue), np.float64)
    scale = spread(np.asarray(q.float_scale(), np.float32), case.shape).astype(np.float64)
    zero = 0.0
    if q.zero_point is not None:
        zero = spread(np.asarray(q.element.load(q.zero_point)), case.shape).astype(np.float64)
    alive = ~poisoned & (scale >= TINY)
    assert (scale[~poisoned] >= 0).all()
    ratio = np.where(alive, x, 0) / np.where(alive, scale, 1) + zero
    inside = np.clip(ratio, grid[0], grid[-1])
    place = np.clip(np.searchsorted(grid, inside, side="right"), 1, len(grid) - 1)
    gap = grid[place] - grid[place - 1]
    error = np.abs(codes - inside)
    # x / s and its roundings are float32's; a subnormal x may be taken for zero. A rotation sums h of
    # them and divides by the root of h, so that it may lose root-h times as much.
    lost = TINY * (1 + math.sqrt(case.hadamard or 0))
    slack = 2.0**-21 * (np.abs(ratio) + np.abs(zero) + 1) + lost / np.where(alive, scale, 1)
    share = 0.5 if case.rounding is rounding.nearest else 1.0
    wrong = alive & (error > share * gap + slack)
    assert not wrong.any(), (x[wrong][:3], scale[wrong][:3], codes[wrong][:3], ratio[wrong][:3])
    if case.calibration in ("absmax", "minmax") and not isinstance(case.format, jq.Block):
        low = float(grid[0]) if not isinstance(case.format, jq.Codebook) else -np.inf
        wide = (np.abs(ratio) <= np.abs(grid).max() * (1 + 1e-6) + 1) | (ratio < low)
        assert wide[alive].all(), "absmax clipped"
    if case.hadamard is None:
        top = float(jnp.finfo(case.dtype).max)
        expected = np.clip((codes - zero) * scale, -top, top)
        found = np.asarray(jq.dequantize(q).astype(jnp.float32), np.float64)
        step = float(jnp.finfo(case.dtype).eps)
        smallest = max(TINY, float(jnp.finfo(case.dtype).tiny) * step)
        close = np.abs(found - expected) <= step * np.abs(expected) + 2 * smallest
        assert close[~poisoned].all()


# What the 20,000 found: a range wider than any float32, and a rotation of subnormals.
WIDEST = Case(
    (8,),
    -1,
    jnp.float32,
    jq.Int(1, "unsigned"),
    "tensor",
    "minmax",
    rounding.nearest,
    None,
    "top",
    0,
)
TINIEST = Case(
    (4, 32),
    -1,
    jnp.float32,
    jq.Int(2, "symmetric"),
    "tensor",
    "absmax",
    rounding.nearest,
    4,
    "tiny",
    1,
)


@hypothesis.settings(hypothesis.settings.get_profile(PROFILE))
@hypothesis.given(cases())
@hypothesis.example(WIDEST)
@hypothesis.example(TINIEST)
def test_every_case_has_a_right_answer_or_a_clear_refusal(case: Case):
    x, key = case.x, jax.random.key(case.seed)
    quantizer = case.quantizer
    if (reason := case.foreseen) is not None:
        for verb in (jq.quantize, jq.fake_quant):
            with pytest.raises(ValueError, match=reason):
                verb(x, quantizer, axis=case.axis, key=key)
        return
    q = jq.quantize(x, quantizer, axis=case.axis, key=key)
    check_types(case, q, x)
    bad = ~np.isfinite(case.array)
    if case.hadamard is not None:  # a rotation spreads them over its block first
        blocks = scale_shape(case.shape, case.hadamard, case.axis)
        bad = by_group(bad, blocks)
    poisoned = by_group(bad, q.scale.shape)
    values = jq.dequantize(q)
    assert (values.shape, values.dtype) == (case.shape, x.dtype)
    same(jq.fake_quant(x, quantizer, axis=case.axis, key=key), values)
    # Turning back spreads over the rotation's blocks once more.
    reach = poisoned if case.hadamard is None else by_group(poisoned, blocks)
    found = np.asarray(values, np.float32)
    overflows = case.hadamard is not None and case.values in ("huge", "top", "mixed")
    if not overflows:  # a rotated vector may be longer than any float32
        np.testing.assert_array_equal(np.isnan(found), reach)
        assert not np.isinf(found).any()
        if case.seed == 0:  # a third of the compilations
            check_packing(case, q, poisoned)
        check_values(case, q, x, poisoned)


@hypothesis.settings(
    hypothesis.settings.get_profile(PROFILE), max_examples=60 if PROFILE == "suite" else 1000
)
@hypothesis.given(cases())
def test_traced_precision_gives_what_static_precision_gives(case: Case):
    fmt = case.format
    if case.foreseen is not None or not isinstance(fmt, jq.Int | jq.Float):
        return
    if isinstance(fmt, jq.Int):
        traced: Any = jq.Int(jnp.int32(fmt.bits), fmt.levels)
    else:
        traced = jq.Float(
            jnp.int32(fmt.exponent_bits), jnp.int32(fmt.mantissa_bits), fmt.convention
        )
        if case.calibration == "gaussian":
            return
    quantizer = case.quantizer
    x, key = case.x, jax.random.key(case.seed)
    found = jq.fake_quant(x, dataclasses.replace(quantizer, format=traced), axis=case.axis, key=key)
    expected = jq.fake_quant(x, quantizer, axis=case.axis, key=key)
    if case.calibration == "gaussian":  # read from a table of all widths
        np.testing.assert_allclose(
            *(np.asarray(v, np.float32) for v in (found, expected)), rtol=1e-2
        )
    else:
        same(found, expected)
