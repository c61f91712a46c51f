"""Batches that nothing can be calibrated on, in both APIs and by every method: one clear error each."""

import jax
import jax.numpy as jnp
import numpy as np
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
    "nothing": ([None], "batch 0 of the calibration data holds None, no array"),
    "strings": (
        [np.array(["a"])],
        r"batch 0 of the calibration data holds array\(\['a'\].*no array",
    ),
    "text": (["hello"], "batch 0 of the calibration data holds 'hello', no array"),
    "number": (3, "list of arrays; got 3|batches are gone through several times: .*; got int"),
}


def _nnx(batches):
    model = jq.nnx.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "w8a8"})
    jq.nnx.calibrate(model, batches)


def _linen(batches):
    quantized = jq.linen.quantize(nn.Dense(8), {".*": "w8a8"})
    jq.linen.calibrate(quantized, quantized.init(jax.random.key(0), X), batches)


def _search(batches):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    jq.ptq.search(model, ("w4a16", "w8a16"), batches, 9000, progress=False)


def _ptq(method):
    recipe = "w8a8-token" if method == "smoothquant" else "w4a16"

    def run(batches):
        model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        jq.ptq.quantize(model, {".*": recipe}, batches, method, progress=False)

    return run


@pytest.mark.parametrize(("batches", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "run", [_nnx, _linen, _search, _ptq("gptq"), _ptq("awq"), _ptq("smoothquant")],
    ids=["nnx", "linen", "search", "gptq", "awq", "smoothquant"],
)  # fmt: skip
def test_it_is_named(run, batches, message):
    with pytest.raises(ValueError, match=message):
        run(batches)


class Masked(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))

    def __call__(self, batch):
        return self.layer(batch["x"] * batch["mask"].astype(jnp.float32))


class MaskedLinen(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return nn.Dense(8)(batch["x"] * batch["mask"].astype(jnp.float32))


GOOD = {"x": X, "mask": X > 0}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X}, r"batch 0 of the calibration data, float32\[4, 64\], does not fit .* 'mask'"),
        ({**GOOD, "mask": None}, "does not fit the model: AttributeError: 'NoneType'"),
        (3.0, r"float32\[\], does not fit the model"),
        ({"x": None, "mask": None}, "holds {'x': None, 'mask': None}, no array"),
    ],
)
def test_batches_that_a_model_of_ones_own_does_not_take_are_named(batch, message):
    quantized = jq.nnx.quantize(Masked(), {".*": "w8a8"})
    linen = jq.linen.quantize(MaskedLinen(), {".*": "w8a8"})
    variables = linen.init(jax.random.key(0), GOOD)
    for run in (
        lambda batches: jq.nnx.calibrate(quantized, batches),
        lambda batches: jq.linen.calibrate(linen, variables, batches),
        lambda batches: jq.ptq.quantize(Masked(), {".*": "w4a16"}, batches, progress=False),
        lambda batches: jq.ptq.search(Masked(), ("w4a16",), batches, 9000, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            run([batch])


def test_inputs_whose_squares_overflow_are_named():
    with pytest.raises(ValueError, match="sums of their squares are beyond float32"):
        _ptq("gptq")([X * 1e20])


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_weights_without_a_number_are_named(value):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    model.kernel[...] = model.kernel[...].at[3, 5].set(value)
    for method in jq.ptq.METHODS:
        with pytest.raises(ValueError, match="weights of the model hold a NaN or an Inf"):
            jq.ptq.quantize(model, {".*": "w8a8-token"}, [X], method, progress=False)
    with pytest.raises(ValueError, match="kernel holds a NaN or an Inf"):
        jq.nnx.freeze(jq.nnx.quantize(model, {".*": "w8a8"}))
    quantized = jq.linen.quantize(nn.Dense(8), {".*": "w8a8"})
    variables = quantized.init(jax.random.key(0), X)
    variables["params"]["kernel"] = model.kernel[...]
    with pytest.raises(ValueError, match="kernel holds a NaN or an Inf"):
        jq.linen.freeze(quantized, variables, X)


@pytest.mark.parametrize("run", [_nnx, _linen], ids=["nnx", "linen"])
def test_zeros_alone_are_no_range(run):
    run([0 * X, X])
    with pytest.raises(ValueError, match="was given zeros alone"):
        run([0 * X])
