"""Explicit and Auto meshes: what is computed on eight devices is what one device computes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxquant.numerics.sharding import call_with_auto_axes, drop_repeated

CASES = Path(__file__).parent / "sharded_cases.py"
COUNTS = {"recipes": 21, "verbs": 19, "operations": 8, "optimizer": 2}


def compared(kind: str, part: str) -> int:
    done = subprocess.run(
        [sys.executable, str(CASES), kind, part],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.count("compared")


@pytest.mark.long
def test_gradients_and_packed_codes_under_explicit_axes():
    assert compared("Explicit", "smallest") == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_updates_are_rounded_alike_on_every_mesh(kind):
    assert compared(kind, "applying") == 5


@pytest.mark.release
@pytest.mark.parametrize("part", COUNTS)
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_on_a_mesh_everything_is_as_on_one_device(kind, part):
    assert compared(kind, part) == COUNTS[part]


def test_without_explicit_axes_a_call_is_a_call():
    function = lambda x: x.reshape(2, 3)  # noqa: E731
    x = jax.numpy.zeros(6)
    plain = jax.make_jaxpr(function)(x)
    through = jax.make_jaxpr(lambda x: call_with_auto_axes(function, (x,), lambda: None))(x)
    assert str(plain) == str(through)


def test_an_axis_of_the_mesh_splits_one_axis_of_an_array():
    spec = drop_repeated(("data", ("model", "data"), "model"))
    assert tuple(spec) == ("data", None, "model")
