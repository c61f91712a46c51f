"""Every transformation of optax and optax.contrib: none is left out, and records are what the code does."""

import json

import jax
import pytest

from experiments.optimizer_states import optimizers, transformations
from experiments.optimizer_states.optimizers import WIDTHS
from experiments.optimizer_states.transformations import OPTIMIZERS, PARTS, WRAPPERS

CASES = transformations.cases()
ROWS = json.loads(optimizers.RECORDS.read_text())


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_whatever_optax_offers_is_known():
    """A new transformation of a newer optax is to be classified."""
    assert not set(transformations.public()) - {*OPTIMIZERS, *PARTS, *WRAPPERS}


@pytest.mark.exhaustive  # what a slot is may differ in another version of optax
@pytest.mark.parametrize("name", CASES)
def test_the_records_say_what_becomes_of_a_state(name):
    kind = optimizers.kind_of(CASES[name])
    assert (kind.name, kind.slots) == (ROWS[name]["kind"], ROWS[name]["slots"])


@pytest.mark.parametrize("name", [name for name in ROWS if "8 bits" in ROWS[name]])
def test_what_was_run_ended_as_in_full_precision(name):
    assert optimizers.within(ROWS[name])


ONCE = ("adam", "prodigy", "mechanize(adam)", "schedule_free_adamw", "sm3", "MultiSteps")


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONCE else pytest.mark.release)
        for name in CASES
        if name not in PARTS
    ],
)
def test_300_steps_at_8_bits_end_where_full_precision_does(name):
    if optimizers.kind_of(CASES[name]).refusal:
        with pytest.raises(ValueError, match=r"quantized|traced|updates"):
            optimizers.trained(CASES[name](WIDTHS["8 bits"]), 1)
        return
    first, plain = optimizers.trained(CASES[name](None))
    _, found = optimizers.trained(CASES[name](WIDTHS["8 bits"]))
    assert plain < 0.7 * first
    assert optimizers.within({"first": first, "plain": plain, "8 bits": found})
