"""Batches that nothing can be calibrated on, in both APIs and by every method: one clear error each."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxquant as jq

X = jnp.ones((4, 64))
BAD = {
    "none": ([], "calibration needs at least one batch; got none"),
    "shape": (
        [X[:, :63]],
        r"batch 0 of the calibration data, float32\[4, 63\], does not fit the model",
    ),
    "second shape": ([X, X[:, :63]], "batch 1 of the calibration data"),
    "NaN": ([X, X.at[0, 0].set(jnp.nan)], "batch 1 of the calibration data holds a NaN or an Inf"),
    "Inf": ([(X.at[0, 0].set(jnp.inf),)], "batch 0 of the calibration data holds a NaN or an Inf"),
    "empty": ([X, X[:0]], r"batch 1 of the calibration data is empty: float32\[0, 64\]"),
    "one array": (X, "one array of shape|batches are gone through several times"),
    "text": (["hello"], "batch 0 of the calibration data holds 'hello', no array"),
    "number": (3, "list of arrays; got 3|batches are gone through several times: .*; got int"),
}


def _nnx(batches):
    model = jq.nnx.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "w8a8"})
    jq.nnx.calibrate(model, batches)


def _linen(batches):
    quantized = jq.linen.quantize(nn.Dense(8), {".*": "w8a8"})
    jq.linen.calibrate(quantized, quantized.init(jax.random.key(0), X), batches)


def _ptq(method):
    recipe = "w8a8-token" if method == "smoothquant" else "w4a16"

    def run(batches):
        model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        jq.ptq.quantize(model, {".*": recipe}, batches, method, progress=False)

    return run


@pytest.mark.parametrize(("batches", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "run", [_nnx, _linen, _ptq("gptq"), _ptq("awq"), _ptq("smoothquant")],
    ids=["nnx", "linen", "gptq", "awq", "smoothquant"],
)  # fmt: skip
def test_it_is_named(run, batches, message):
    with pytest.raises(ValueError, match=message):
        run(batches)


@pytest.mark.parametrize("run", [_nnx, _linen], ids=["nnx", "linen"])
def test_zeros_alone_are_no_range(run):
    run([0 * X, X])
    with pytest.raises(ValueError, match="was given zeros alone"):
        run([0 * X])
