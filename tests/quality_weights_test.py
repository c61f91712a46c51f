"""Stored weights beside those that they stand for: gains, errors, and a gate that sees one wrong scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxquant as jq
from jaxquant import quality


class MLP(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = (nnx.Linear(64, 64, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def x():
    return jax.random.normal(jax.random.key(1), (8000, 64))


def frozen(rules):
    return jq.nnx.freeze(jq.nnx.quantize(MLP(), rules))


def scaled(model, factor):
    stored = jq.nnx.read(model.up.kernel)
    jq.nnx.write(model.up.kernel, dataclasses.replace(stored, scale=stored.scale * factor))
    return model


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w3a16", "w4a4-quest"])
def test_rounding_has_no_gain_and_a_known_error(recipe):
    model = frozen({".*": recipe})
    report = quality.compare_weights(MLP(), model)
    assert [row.path for row in report.rows] == ["down", "up"]
    assert abs(report.worst.gain - 1) < 0.02
    row = {row.path: row for row in report.rows}["up"]
    w, stored = MLP().up.kernel[...], jq.dequantize(jq.nnx.read(model.up.kernel))
    np.testing.assert_allclose(
        row.error, jnp.linalg.norm(stored - w) / jnp.linalg.norm(w), rtol=1e-4
    )
    assert row.elements == 64 * 64


@pytest.mark.first(1)
@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "hadamard"])
def test_scales_of_channels_and_rotations_are_taken_off(method):
    recipe = "w8a8-token" if method in ("smoothquant", "hadamard") else "w4a16"
    batches = [x()[:256] * jnp.linspace(0.1, 10, 64)[None]]
    model = jq.ptq.quantize(MLP(), {".*": recipe}, batches, method, progress=False)
    report = quality.compare_weights(MLP(), model)
    assert abs(report.worst.gain - 1) < 0.03
    assert max(row.error for row in report.rows) < 0.2


def test_the_gate_fails_one_layers_scale_that_is_off_by_a_tenth():
    logits = MLP()(x())
    report = quality.compare(logits, logits, logits.argmax(-1))  # outputs that show nothing

    def verdict(model):
        return quality.gate(report, "99.9", weights=quality.compare_weights(MLP(), model))

    assert verdict(frozen({".*": "w8a8"})).status == "pass"
    found = verdict(scaled(frozen({".*": "w8a8"}), 1.1))
    assert found.status == "fail"
    assert found.reasons[0].startswith("The stored weights of up are 1.1000 times the model's")
    assert [check.status for check in found.checks].count("fail") == 1
    assert verdict(scaled(frozen({".*": "w8a8"}), jnp.nan)).status == "fail"


def test_stacked_layers_are_judged_one_by_one():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(64, 64, rngs=nnx.Rngs(params=key))

    layers = make(jax.random.split(jax.random.key(0), 3))
    model = jq.nnx.freeze(jq.nnx.quantize(layers, {".*": "w8a8"}))
    stored = jq.nnx.read(model.kernel)  # by its layers in turn
    jq.nnx.write(model.kernel, dataclasses.replace(stored, scale=stored.scale.at[1].multiply(1.1)))
    report = quality.compare_weights(layers, model)
    assert [row.path for row in report.rows] == ["[0]", "[1]", "[2]"]
    assert report.worst.path == "[1]"
    assert "[1]  1.10" in str(report)
    assert report.to_dict()["rows"][0]["elements"] == 64 * 64


def test_linen_variables_are_compared_too():
    module, inputs = nn.Dense(8, name="head"), jnp.ones((2, 64))
    quantized = jq.linen.quantize(module, {".*": "w4a16"})
    variables = quantized.init(jax.random.key(0), inputs)
    stored = jq.linen.freeze(quantized, variables, inputs)
    report = quality.compare_weights(variables, stored)
    assert [row.path for row in report.rows] == ["(the model)"]
    assert abs(report.worst.gain - 1) < 0.02


def test_layers_that_linen_stacks_are_judged_one_by_one():
    layers = nn.vmap(nn.Dense, {"params": 0}, {"params": True}, in_axes=None, axis_size=3)(8)
    inputs = jnp.ones((2, 64))
    quantized = jq.linen.quantize(layers, {".*": "w8a8"})
    variables = quantized.init(jax.random.key(0), inputs)
    stored = jq.linen.freeze(quantized, variables, inputs)
    kernel = stored["params"]["kernel"]
    scale = kernel.scale.at[2].multiply(1.1)
    stored["params"]["kernel"] = dataclasses.replace(kernel, scale=scale)
    worst = quality.compare_weights(variables, stored).worst
    assert worst.path.endswith("[2]")
    assert abs(worst.gain - 1.1) < 0.01


def test_linen_weights_in_other_types_are_compared_and_masked_ones_refused():
    dense, x = nn.Dense(8, dtype=jnp.bfloat16, use_bias=False), jnp.ones((2, 64))
    variables = dense.init(jax.random.key(0), x)
    stored = jq.linen.freeze(jq.linen.quantize(dense, {".*": "w8a16"}), variables, x)
    (row,) = quality.compare_weights(variables, stored).rows
    assert row.gain == pytest.approx(1, abs=1e-3)
    assert 0.003 < row.error < 0.012  # of 8 bits
    conv = nn.Conv(8, (3,), mask=jnp.ones((3, 8, 8)).at[0].set(0), use_bias=False)
    image = jnp.ones((1, 6, 8))
    variables = conv.init(jax.random.key(0), image)
    stored = jq.linen.freeze(jq.linen.quantize(conv, {".*": "w8a16"}), variables, image)
    with pytest.raises(ValueError, match="not how the reference holds it"):
        quality.compare_weights(variables, stored)


def test_misuse_is_named():
    model = frozen({".*": "w8a8"})
    for call, message in (
        (lambda: quality.compare_weights(MLP(), MLP()), "no weights are stored"),
        (lambda: quality.compare_weights(MLP(), {}), "takes two NNX models"),
        (lambda: quality.compare_weights(3, 4), "takes NNX models, or the variables"),
        (
            lambda: quality.compare_weights(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), model),
            "no such weight",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    report = quality.compare(jnp.eye(3), jnp.eye(3), jnp.arange(3))
    with pytest.raises(ValueError, match="weights is a WeightReport"):
        quality.gate(report, weights=model)
