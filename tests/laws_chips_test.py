"""What chips' published peak rates make bits cost."""

import functools
from typing import Any, cast

import numpy as np
import pytest

from experiments.harness.training import chips
from jaxquant import laws

pytestmark = pytest.mark.exhaustive  # our arithmetic alone

# Data sheets, in units of 1e12 operations a second, dense: bf16, s8, f8, f4.
SHEETS = {
    "v5e": (197, 393, None, None),
    "v5p": (459, 918, None, None),
    "v6e": (918, 1836, None, None),
    "tpu7x": (2307, None, 4614, None),
    "A100": (312, 624, None, None),
    "H100": (989, 1979, 1979, None),
    "H200": (989, 1979, 1979, None),
    "B200": (2250, 4500, 4500, 9000),
}

NO_BITS = (0, -4, np.nan, np.inf, "8", None, True, [4, 0], [4, "8"], 1j, {4}, [[4], [8, 16]])


def rate(chip, operands, bits):
    """Written out: the rate at which a chip multiplies operands of so many bits."""
    bf16, s8, f8, f4 = SHEETS[chip]
    if operands == "float" and bits <= 4 and f4:
        return f4
    narrow = s8 if operands == "int" else f8
    return narrow if bits <= 8 and narrow else bf16


@pytest.mark.parametrize("operands", laws.OPERANDS)
@pytest.mark.parametrize("chip", SHEETS)
def test_bits_cost_what_the_narrowest_type_that_holds_them_costs(chip, operands):
    cost = laws.chip_cost(chip.upper(), operands)
    bits = np.arange(1, 17)
    expected = [SHEETS[chip][0] / rate(chip, operands, b) for b in bits]
    np.testing.assert_allclose(cost(bits), expected, rtol=1e-12)
    assert cost(8) == cost(bits)[7]
    between = np.arange(1.5, 16)
    np.testing.assert_array_equal(cost(between), cost(np.ceil(between)))
    assert cost.chip == chip


def test_every_chip_of_which_figures_are_known_has_one_table():
    assert set(SHEETS) == set(laws.PEAKS)
    assert {chip.name for chip in chips.CHIPS.values()} == set(laws.PEAKS)
    for chip in chips.CHIPS.values():
        assert chip.peak is laws.PEAKS[chip.name]


def test_a_cost_says_what_each_width_is_multiplied_as():
    assert str(laws.chip_cost("B200", "float")) == (
        "float on B200, by published dense peaks: 1 to 4 bits as f4 (4.00 × bf16), 5 to 8 bits as f8 "
        "(2.00 × bf16), 9 to 16 bits as bf16 (1.00 × bf16)"
    )
    nothing_narrow = "int on tpu7x, by published dense peaks: 1 to 16 bits as bf16 (1.00 × bf16)"
    assert str(laws.chip_cost("tpu7x", "int")) == nothing_narrow


@pytest.mark.parametrize("cost", [laws.bits_linear, laws.chip_cost("B200", "float")])
def test_a_step_has_one_product_forward_and_two_backward(cost):
    for forward in (4, 6, 16):
        for backward in (4, 8, 16):
            by_product = np.mean([cost(bits) for bits in (forward, backward, backward)])
            assert laws.step_cost(forward, backward, cost) == pytest.approx(by_product)
    assert laws.step_cost(4.0, cost=cost) == pytest.approx((cost(4.0) + 2) / 3)
    both = [laws.step_cost(bits, 8, cost) for bits in (4, 8)]
    np.testing.assert_array_equal(laws.step_cost([4, 8], 8, cost), both)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: laws.chip_cost("h10"), "chip is one of v5e, .*, B200; got 'h10'"),
        (lambda: laws.chip_cost(cast(Any, 3)), "chip is one of v5e, .*; got 3"),
        (lambda: laws.chip_cost("h100", "e4m3"), "operands is one of int, float; got 'e4m3'"),
        (lambda: laws.chip_cost("h100")(32), "of up to 16 bits; got 32"),
        *(
            (
                lambda bits=bits: laws.chip_cost("h100")(cast(Any, bits)),
                "bits must be a number above 0, or",
            )
            for bits in NO_BITS
        ),
        *((lambda bits=bits: laws.step_cost(bits), "forward must be a number") for bits in NO_BITS),
        (lambda: laws.step_cost(4, np.array([8, np.nan])), "backward must be .*; got array"),
        (lambda: laws.step_cost(4, cost=cast(Any, "h100")), "what chip_cost gives; got 'h100'"),
    ],
)
def test_what_is_not_known_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wide_precisions_of_a_plan_are_refused_in_words():
    step = functools.partial(laws.step_cost, cost=laws.chip_cost("v6e"))
    with pytest.raises(ValueError, match=r"step_cost says costs of v6e are of up to 16 bits"):
        laws.plan(laws.KUMAR_2024, flops=1e20, precisions=(4, 32), cost=step)


def test_a_plan_by_a_chip_is_the_best_of_a_grid():
    cost = laws.chip_cost("v5e")
    found = laws.plan(laws.KUMAR_2024, flops=1e20, precisions=(4, 5, 6, 7, 8, 16), cost=cost)
    p, least = laws.KUMAR_2024.params, {}
    n = np.geomspace(1e7, 1e12, 200_001)
    for bits in (4, 5, 6, 7, 8, 16):
        d = 1e20 / (6 * n * (197 / 393 if bits <= 8 else 1.0))
        f = np.prod([1 - np.exp(-bits / p[f"gamma_{x}"] + p[f"n_{x}"]) for x in ("w", "a", "kv")])
        least[bits] = np.min(p["A"] * (n * f) ** -p["alpha"] + p["B"] * d ** -p["beta"] + p["E"])
    for row in found.rows:
        assert row.loss == pytest.approx(least[row.bits], rel=1e-6)
    assert found.best.bits == min(least, key=least.__getitem__) == 8
    assert found.optimum is not None
    assert found.optimum.bits == pytest.approx(8.0)
