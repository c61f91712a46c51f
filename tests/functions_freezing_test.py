"""Frozen functions: what products multiply is stored, whatever was done to the parameter before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.numerics.stored import Stored

pytestmark = pytest.mark.usefixtures("as_users_compute")

RECIPES = ["w8a8", "w4a16", "w4a16g16", "int8_train", "fp8_train", "nf4"]
D, F, LAYERS, ROWS = 64, 128, 3, 4


def array(key, *shape):
    return 0.12 * jax.random.normal(jax.random.key(key), shape)


X = array(100, ROWS, D)
TOKENS = jnp.array([[1, 5, 19], [0, 5, 2]])


def plain(w, x):
    return jnp.tanh(x @ w["up"]) @ w["down"]


def transposed(w, x):
    return jnp.einsum("fd,bd->bf", w["rows"], x) @ w["down"].astype(jnp.bfloat16)


def left(w, x):
    return jnp.einsum("dhk,bd->bhk", w["heads"], x).sum(1)


def in_three(w, x):
    q, k, v = jnp.split(x @ w["out"], 3, axis=1)
    a, b, c = jnp.split(w["qkv"], 3, axis=1)
    return (q[:, :1] + x @ a) * (x @ b) + x @ c + k[:, :1] + v[:, :1]


def masked(w, x):
    return x @ (w["up"] * (jnp.arange(F) % 2))


def tied(w, tokens):
    return jnp.tanh(w["table"][tokens]) @ w["table"].T


def tied_and_cast(w, tokens):
    h = jnp.take(w["table"].astype(jnp.bfloat16), tokens, axis=0)
    return h @ w["table"].astype(jnp.bfloat16).T


def scanned(axis):
    def model(w, x):
        layers = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), w["layers"])
        step = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None))
        return jax.lax.scan(step, x, layers)[0]

    return model


def within_scans(w, x):
    def outer(h, w1):
        def inner(h, both):
            w2, w3 = both
            return jnp.tanh(h @ w1 @ w2 + h @ w3), None

        return jax.lax.scan(inner, h, (w["twice"][0], w["shared"]))[0] @ w["fixed"], None

    return jax.lax.scan(outer, x, w["layers"]["square"])[0]


def chosen(w, x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ w["a"], lambda x: x @ w["b"], x)


def convolved(w, x):
    image = x.reshape(1, ROWS, D, 1)
    y = jax.lax.conv_general_dilated(
        image, w["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    turned = jnp.flip(w["kernel2"], (0, 1)).swapaxes(2, 3)
    return jax.lax.conv_general_dilated(
        y, turned, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def stacked(axis, *shape):
    return jnp.moveaxis(array(7, LAYERS, *shape), 0, axis)


def layers(axis):
    return {"layers": {"up": stacked(axis, D, F), "down": stacked(axis, F, D)}}


NESTED = {
    "layers": {"square": array(1, LAYERS, D, D)},
    "twice": array(2, 1, 2, D, D),
    "shared": array(3, 2, D, D),
    "fixed": array(4, D, D),
}
MODELS = {
    "plain": (plain, {"up": array(0, D, F), "down": array(1, F, D)}, X),
    "transposed": (transposed, {"rows": array(0, F, D), "down": array(1, F, D)}, X),
    "left": (left, {"heads": array(0, D, 4, 32)}, X),
    "in_three": (in_three, {"qkv": array(0, D, 3 * F), "out": array(1, D, 3)}, X),
    "masked": (masked, {"up": array(0, D, F)}, X),
    "tied": (tied, {"table": array(0, 20, D)}, TOKENS),
    "tied_and_cast": (tied_and_cast, {"table": array(0, 20, D)}, TOKENS),
    **{f"scan_{axis}": (scanned(axis), layers(axis), X) for axis in (0, 1, 2)},
    "within_scans": (within_scans, NESTED, X),
    "cond": (chosen, {"a": array(0, D, F), "b": array(1, D, F)}, X),
}


@pytest.mark.first(1)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_frozen_equals_quantized_bit_for_bit_and_holds_no_float_weights(name, recipe):
    model, w, x = MODELS[name]
    low = jax.jit(jq.functions.quantize(model, {".*": recipe}))
    frozen = jq.functions.freeze(model, {".*": recipe}, w, x)
    is_stored = lambda leaf: isinstance(leaf, Stored)  # noqa: E731
    assert all(map(is_stored, jax.tree.leaves(frozen, is_leaf=is_stored)))
    exact = low(w, x)
    assert (np.asarray(low(frozen, x)) == np.asarray(exact)).all()
    assert (np.asarray(jq.functions.quantize(model, {".*": recipe})(frozen, x)) == exact).all()
    # Beside float, so that two of ours that are wrong together show.
    reference = np.asarray(model(w, x), np.float64)
    distance = np.linalg.norm(np.asarray(exact, np.float64) - reference)
    products = sum(p.times for p in jq.functions.products(model, w, x))
    each = {"w8a8": 0.02, "int8_train": 0.02, "fp8_train": 0.06}.get(recipe, 0.15)
    assert distance <= each * products**0.5 * np.linalg.norm(reference)


@pytest.mark.first(1)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "int8_train"])
def test_convolutions_freeze_with_kernels_turned_about(recipe):
    w = {"kernel": array(0, 3, 3, 1, 8), "kernel2": array(1, 3, 3, 4, 8)}
    low = jax.jit(jq.functions.quantize(convolved, {".*": recipe}))
    frozen = jq.functions.freeze(convolved, {".*": recipe}, w, X)
    assert (low(frozen, X) == low(w, X)).all()


def test_a_tied_table_is_stored_once_in_the_layout_of_its_parameter():
    model, w, x = MODELS["tied"]
    frozen = jq.functions.freeze(model, {".*": "w4a16"}, w, x)
    assert list(frozen["table"].operands) == ["table"]
    assert frozen["table"].operands["table"].shape == w["table"].shape
    assert frozen["table"].nbytes == 20 * D // 2 + 20 * 4
    assert frozen["table"].bits_per_element == 4 + 32 / D


def test_places_outside_of_a_stored_table_are_nan_as_jax_has_them():
    take = lambda w, tokens: jnp.take(w["table"], tokens, axis=0)  # noqa: E731
    w, places = {"table": array(0, 20, D)}, jnp.array([0, 20, -1, -21])
    low = jq.functions.quantize(take, {".*": "w8a16"})
    frozen = jq.functions.freeze(take, {".*": "w8a16"}, w, places)
    exact = np.isnan(np.asarray(take(w, places)))
    assert (np.isnan(np.asarray(low(w, places))) == exact).all()
    assert (np.isnan(np.asarray(low(frozen, places))) == exact).all()
    assert exact.any()


def test_another_call_of_a_frozen_function_that_reads_a_parameter_otherwise_is_named():
    frozen = jq.functions.freeze(plain, {".*": "w8a8"}, MODELS["plain"][1], X)
    for other in (
        lambda w, x: plain(w, x) + (w["up"] ** 2).sum(),
        lambda w, x: (plain(w, x), w["up"]),
        lambda w, x: (
            plain({"up": jnp.where(x[:, :1].T > 0, w["up"][:4].T, 0).T, **w}, x) + w["up"][0, 0]
        ),
    ):
        with pytest.raises(ValueError, match="up is stored in few bits, and the function reads it"):
            jq.functions.quantize(other, {".*": "w8a8"})(frozen, X)
    scaled = lambda w, x: plain({"up": 2 * w["up"], "down": w["down"]}, x)  # noqa: E731
    with pytest.raises(ValueError, match=r"up .*is stored as up, and this product multiplies mul"):
        jq.functions.quantize(scaled, {".*": "w8a8"})(frozen, X)
    with pytest.raises(ValueError, match="multiplies it in float"):
        jq.functions.quantize(plain, {"up": None, ".*": "w8a8"})(frozen, X)


def test_weights_made_alike_with_other_numbers_are_told_apart():
    """The numbers lie within a jitted function, or are many, which a trace's own text leaves out."""
    masks = [jnp.arange(D * F).reshape(D, F) % n == 0 for n in (2, 3)]
    made = [jax.jit(lambda w, mask=mask: jnp.where(mask, w, 0.0)) for mask in masks]
    both = lambda w, x: x @ made[0](w["up"]) + 2 * (x @ made[1](w["up"]))  # noqa: E731
    one, other = (lambda w, x, i=i: x @ made[i](w["up"]) for i in (0, 1))
    w = {"up": array(0, D, F)}
    for model in (both, one, other):
        low = jax.jit(jq.functions.quantize(model, {".*": "w8a16"}))
        frozen = jq.functions.freeze(model, {".*": "w8a16"}, w, X)
        assert (low(frozen, X) == low(w, X)).all()
        assert float(jnp.abs(low(w, X) - model(w, X)).max()) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"up": w["up"].at[1, 2].set(jnp.nan)}, "up holds a NaN or an Inf"),
        (lambda w: jq.functions.freeze(plain, {".*": "w8a8"}, w, X), "up is frozen already"),
    ],
)
def test_parameters_that_cannot_be_stored_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jq.functions.freeze(plain, {".*": "w8a8"}, change(MODELS["plain"][1]), X)


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (plain, {".*": None}, "nothing to freeze"),
        (lambda w, x: plain(w, x) + w["up"].sum(), {".*": "w8a8"}, "reads it by something else"),
        (
            lambda w, x: plain(w, x @ w["up"] @ w["up"].T),
            {".*": "w8a8"},
            "in another way than w8a8",
        ),
        (lambda w, x: x @ (w["up"] @ w["down"]), {".*": "w8a8"}, "result of another product"),
    ],
)
def test_what_cannot_be_frozen_is_named(model, rules, message):
    with pytest.raises(ValueError, match=message):
        jq.functions.freeze(model, rules, MODELS["plain"][1], X)
