import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from linen_models import (
    CNN,
    KEY,
    MLP,
    MODELS,
    TOKENS,
    Block,
    Contraction,
    Scanned,
    Transformer,
    normal,
)

import jaxquant as jq
from jaxquant import linen

# More are trained in linen_saving_test.  Convolutions take no rotation, and a head of 8 no block of 32.
PAIRS = [
    ("w4a16", "einsum"),
    ("w4a16", "transformer"),
    ("w4a16", "remat"),
    ("w4a8", "cnn"),
    ("w4a8", "vmap"),
    ("w4a4-quest", "einsum"),
    ("w4a4-quest", "vmap"),
]


def leaves(params):
    is_stored = lambda x: isinstance(x, jq.QArray)  # noqa: E731
    return {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_stored)
    }


def weights(params):
    return {k: v for k, v in leaves(params).items() if k.endswith(("kernel", "embedding"))}


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize(("recipe", "name"), PAIRS)
def test_models_train_quantized_and_serve_frozen_with_the_same_bits(recipe, name):
    module, x = MODELS[name]
    quantized = linen.quantize(module, {".*": recipe})
    variables = jax.jit(quantized.init)(KEY, x)
    mutable = [c for c in variables if c != "params"]
    flags = {"train": True} if name == "resnet" else {}
    tx = optax.sgd(0.005)

    @jax.jit
    def step(variables):
        def loss(params):
            y, state = quantized.apply({**variables, "params": params}, x, mutable=mutable, **flags)
            return jnp.mean((y - 1) ** 2), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, _ = tx.update(gradients, tx.init(gradients))
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **state, "params": params}, value, gradients

    losses = []
    for _ in range(3):
        variables, value, gradients = step(variables)
        losses.append(float(value))
    assert losses[2] < losses[0]
    assert all(np.any(g) for g in weights(gradients).values())

    frozen = linen.freeze(quantized, variables, x)
    assert all(isinstance(w, jq.QArray) for w in weights(frozen["params"]).values())
    serve = jax.jit(quantized.apply)
    expected = serve(variables, x)
    np.testing.assert_array_equal(serve(frozen, x), expected)
    assert not np.array_equal(jax.jit(module.apply)(variables, x), expected)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_module(name):
    module, x = MODELS[name]
    quantized = linen.quantize(module, {".*": "w8a8"})
    found, expected = (leaves(jax.eval_shape(m.init, KEY, x)) for m in (quantized, module))
    assert found == expected


@pytest.mark.first(1)
@pytest.mark.parametrize("name", MODELS)
def test_coverage_lists_every_product(name):
    module, x = MODELS[name]
    table = linen.coverage(module, [(".*", "w8a8")], x)
    variables = module.init(KEY, x)
    params = variables["params"]
    rows = {row.path: row for row in table if "attention" not in row.path.split("/")[-1]}
    assert rows.keys() == weights(params).keys()
    for path, row in rows.items():
        turns = 3 if path.startswith("layers") else 1  # of a scan
        sizes = [turns * np.prod(shape) for shape in row.shapes]
        assert weights(params)[path].size in sizes, path
    assert all(row.recipe == "w8a8" for row in rows.values())
    others = {row.path for row in table} - set(rows)
    assert others <= {"blocks_0/attention", "blocks_1/attention", "layers/block/attention"}
    frozen = linen.freeze(linen.quantize(module, {".*": "w8a8"}), variables, x)
    assert table.bytes_after == sum(w.nbytes for w in weights(frozen["params"]).values())


def test_coverage_counts_by_hand():
    rules = {"embed": "w8a8", ".*/attention": "a8kv8", ".*": "w4a16"}
    table = linen.coverage(Transformer(), rules, TOKENS)
    lookup, *_, head = (row for row in table if row.path == "embed/embedding")
    assert (lookup.kind, lookup.macs) == ("lookup", 0)
    assert head.macs == 12 * 32 * 16
    assert lookup.bytes_after == 16 * 32 + 16 * 4
    attention = [row for row in table if row.path == "blocks_0/attention"]
    assert [row.macs for row in attention] == 2 * [2 * 4 * 6 * 6 * 8]
    assert {row.recipe for row in attention} == {"a8kv8"}
    assert table["blocks_1/attention/query"].macs == 12 * 32 * 32
    assert table.quantized == 1
    assert linen.coverage(Scanned(), {".*": "w8a8"}, normal(2, 6, 32))["layers/block/up"].macs == (
        3 * 12 * 32 * 64
    )


def test_coverage_of_frozen_variables_and_of_products_of_ones_own():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x) @ self.param("out", nn.initializers.normal(), (8, 2))

    x = normal(3, 32)
    quantized = linen.quantize(Own(), {"Dense_0": "w4a16"})
    frozen = linen.freeze(quantized, quantized.init(KEY, x), x)
    table = linen.coverage(Own(), {"Dense_0": "w4a16"}, x, variables=frozen)
    assert table["Dense_0"].bytes_before == table["Dense_0"].bytes_after == 32 * 4 + 8 * 4
    assert (table["out"].shapes, table["out"].macs) == (((3, 8), (8, 2)), 48)
    assert table["out"].reason == "no rule takes them"
    everything = linen.quantize(Own(), {".*": "w8a8"})
    frozen = linen.freeze(everything, quantized.init(KEY, x), x)
    assert isinstance(frozen["params"]["out"], jq.QArray)


@pytest.mark.long
def test_layers_compute_with_the_quantized_weights():
    """Against the float module with weights that were quantized beforehand."""
    quantizer = jq.Quantizer(jq.INT4, "channel")
    for module, x, axes in (
        (MLP(), normal(5, 32), {"up/kernel": 0, "heads/kernel": 0, "down/kernel": (0, 1)}),
        (Contraction(), normal(2, 3, 32), {"split/kernel": 0, "join/kernel": (0, 1)}),
        (CNN(), normal(2, 8, 8, 32), {"first/kernel": (0, 1, 2), "second/kernel": (0, 1, 2)}),
    ):
        variables = module.init(KEY, x)
        names = "|".join(path.split("/")[0] for path in axes)
        found = linen.quantize(module, {names: "w4a16"}).apply(variables, x)
        rounded = flax.traverse_util.flatten_dict(variables, sep="/")
        for path, axis in axes.items():
            path = f"params/{path}"
            rounded[path] = jq.fake_quant(rounded[path], quantizer, axis)
        expected = module.apply(flax.traverse_util.unflatten_dict(rounded, sep="/"), x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bits_are_equal_without_jit_and_in_bfloat16():
    module, x = MLP(dtype=jnp.bfloat16), normal(5, 32)
    quantized = linen.quantize(module, {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    frozen = linen.freeze(quantized, variables, x, donate=False)
    assert frozen["params"]["up"]["kernel"].operand.dtype == jnp.bfloat16  # as it is multiplied
    np.testing.assert_array_equal(quantized.apply(frozen, x), quantized.apply(variables, x))


def test_init_gives_the_quantized_output_and_apply_takes_all_of_linens_arguments():
    quantized = linen.quantize(Transformer(), {".*": "w4a16"})
    y, variables = quantized.init_with_output(KEY, TOKENS)
    np.testing.assert_array_equal(quantized.apply(variables, TOKENS), y)
    encoded = quantized.apply(variables, TOKENS, method="encode")
    np.testing.assert_array_equal(
        quantized.apply(variables, TOKENS, method=Transformer.encode), encoded
    )
    _, state = quantized.apply(variables, TOKENS, capture_intermediates=True, mutable=True)
    assert encoded.shape == (2, 6, 32)
    assert "intermediates" in state
    assert "embed" in quantized.tabulate(KEY, TOKENS)
    assert hash(quantized) == hash(linen.quantize(Transformer(), {".*": "w4a16"}))


@pytest.mark.long
def test_attention_is_quantized_in_full_and_step_by_step():
    x = normal(2, 6, 32)
    rules = {"attention": "kv4", ".*": "w8a16"}
    quantized = linen.quantize(Block(decode=True), rules)
    variables = quantized.init(KEY, x)
    params = {"params": variables["params"]}
    mask = nn.make_causal_mask(jnp.ones((2, 6)))
    expected = linen.quantize(Block(), rules).apply(params, x, mask)
    without = linen.quantize(Block(), {"attention": None, ".*": "w8a16"}).apply(params, x, mask)
    assert not np.allclose(expected, without, atol=1e-3)
    frozen = linen.freeze(linen.quantize(Block(), rules), params, x, mask)
    cache = variables["cache"]
    for t in range(6):
        y, state = quantized.apply({**frozen, "cache": cache}, x[:, t : t + 1], mutable=["cache"])
        cache = state["cache"]
        np.testing.assert_allclose(y[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)


def test_ranges_are_held_among_the_variables():
    x = normal(5, 32)
    quantized = linen.quantize(MLP(), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    calibrated = linen.calibrate(quantized, variables, [x, 2 * x, x])
    ranges = calibrated["quantization"]
    assert ranges.keys() == {"up", "heads", "down"}
    assert ranges["up"]["kernel_input_range"] == jnp.max(jnp.abs(2 * x))
    apply = jax.jit(quantized.apply)
    np.testing.assert_array_equal(apply(calibrated, 2 * x), apply(variables, 2 * x))
    # What lies beyond the ranges is clipped, and ranges that are found anew do not clip.
    assert not np.allclose(apply(calibrated, 8 * x), apply(variables, 8 * x), rtol=1e-2)
    frozen = linen.freeze(quantized, calibrated, x)
    np.testing.assert_array_equal(apply(frozen, x), apply(calibrated, x))
    restored = flax.serialization.from_bytes(calibrated, flax.serialization.to_bytes(calibrated))
    np.testing.assert_array_equal(apply(restored, x), apply(calibrated, x))


@pytest.mark.long
def test_asymmetric_ranges_and_those_of_stacked_layers():
    low_high = jq.Quantizer(jq.Int(8, "unsigned"), "tensor", jq.calibration.minmax)
    dot = jq.DotGeneral(jq.Operands(low_high, jq.Quantizer(jq.INT8, "channel")))
    x = normal(2, 6, 32)
    for remat in (False, True):
        quantized = linen.quantize(Scanned(remat=remat), {".*up": dot, ".*": "w8a16"})
        variables = quantized.init(KEY, x)
        calibrated = linen.calibrate(quantized, variables, [x])
        ends = calibrated["quantization"]["layers"]["block"]["up"]["kernel_input_range"]
        assert ends["0"].shape == ends["1"].shape == (3,)  # a range for each layer
        assert (ends["0"] < 0).all()
        assert (ends["1"] > 0).all()
        assert len(set(map(float, ends["1"]))) == 3
        y = jax.jit(quantized.apply)(calibrated, x)
        np.testing.assert_allclose(y, quantized.apply(variables, x), atol=0.2)


@pytest.mark.long
def test_an_ensemble_is_quantized_member_by_member():
    module, x = MODELS["vmap"]
    variables = module.init(KEY, x)
    expected = linen.quantize(module, {".*": "w4a8"}).apply(variables, x)
    one = linen.quantize(MLP(), {".*": "w4a8"})
    members = [
        one.apply({"params": jax.tree.map(lambda p, i=i: p[i], variables["params"]["members"])}, x)
        for i in range(3)
    ]
    np.testing.assert_allclose(sum(members) / 3, expected, rtol=1e-5, atol=1e-5)


def test_nn_jit_does_not_keep_the_float_program():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(MLP)(name="mlp")(x)

    x = normal(5, 32)
    variables = Jitted().init(KEY, x)
    expected = Jitted().apply(variables, x)
    quantized = linen.quantize(Jitted(), {".*": "w2a16"})
    assert not np.allclose(quantized.apply(variables, x), expected, atol=1e-2)
    np.testing.assert_array_equal(Jitted().apply(variables, x), expected)
    frozen = linen.freeze(quantized, variables, x)
    np.testing.assert_allclose(quantized.apply(frozen, x), quantized.apply(variables, x))


def test_transformed_layers_are_quantized_once():
    class Rematerialized(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(8, name="dense")(x)

    x = normal(5, 32)
    variables = Rematerialized().init(KEY, x)
    expected = linen.quantize(nn.Dense(8), {".*": "w4a16"}).apply(
        {"params": variables["params"]["dense"]}, x
    )
    found = linen.quantize(Rematerialized(), {"dense": "w4a16"}).apply(variables, x)
    np.testing.assert_array_equal(found, expected)


def test_boxed_parameters_train_and_freeze():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(8, kernel_init=init)(x)

    x = normal(5, 32)
    quantized = linen.quantize(Boxed(), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    assert isinstance(variables["params"]["Dense_0"]["kernel"], nn.Partitioned)
    frozen = linen.freeze(quantized, variables, x)
    np.testing.assert_array_equal(quantized.apply(frozen, x), quantized.apply(variables, x))


def test_masks_and_frozen_dicts_are_kept():
    mask = (normal(3, 3, 32, 8) > 0).astype(jnp.float32)
    module, x = nn.Conv(8, (3, 3), mask=mask), normal(2, 6, 6, 32)
    quantized = linen.quantize(module, {".*": "w4a8"})
    variables = flax.core.freeze(quantized.init(KEY, x))
    frozen = linen.freeze(quantized, variables, x)
    assert isinstance(frozen, flax.core.FrozenDict)
    assert not np.any(jq.dequantize(frozen["params"]["kernel"].operand)[mask == 0])
    apply = jax.jit(quantized.apply)
    np.testing.assert_array_equal(apply(frozen, x), apply(variables, x))


def test_rows_that_a_table_does_not_have_are_nan():
    quantized = linen.quantize(nn.Embed(4, 32), {".*": "w4a16"})
    places = jnp.array([0, 3, -1, -4, 4, -5])
    variables = quantized.init(KEY, places)
    frozen = linen.freeze(quantized, variables, places)
    found = quantized.apply(variables, places)
    assert np.isnan(found).all(1).tolist() == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(quantized.apply(frozen, places), found)


def test_traced_formats_train_in_one_program():
    module, x = MODELS["mlp"]
    variables = module.init(KEY, x)

    @jax.jit
    def apply(bits):
        dot = jq.DotGeneral(jq.Operands(rhs=jq.Quantizer(jq.Int(bits), "channel")))
        return linen.quantize(module, {".*": dot}).apply(variables, x)

    found = [apply(jnp.float32(bits)) for bits in (4, 8)]
    for y, recipe in zip(found, ("w4a16", "w8a16"), strict=True):
        expected = linen.quantize(module, {".*": recipe}).apply(variables, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_unused_rules_are_named():
    x = normal(5, 32)
    quantized = linen.quantize(MLP(), {"upp": "w8a8", ".*": "w8a8"})
    with pytest.raises(ValueError, match=r"'upp' is unused.*up/kernel"):
        quantized.init(KEY, x)
    with pytest.raises(ValueError, match=r"'upp' is unused.*up/kernel"):
        quantized.apply(MLP().init(KEY, x), x)
    with pytest.raises(ValueError, match="'upp' is unused"):
        linen.coverage(MLP(), {"upp": "w8a8", ".*": "w8a8"}, x)
    with pytest.raises(ValueError, match="is for attention"):
        linen.quantize(MLP(), {"up": "kv8"}).init(KEY, x)
    # A rule for what this call does not reach is no mistake.
    both = linen.quantize(Transformer(), {"blocks.*": "w8a8", "embed": "w8a8"})
    variables = Transformer().init(KEY, TOKENS)
    both.apply(variables, TOKENS, method=lambda module, tokens: module.embed(tokens))


def test_misuse_is_named():
    x, image = normal(5, 32), normal(2, 8, 8, 32)

    def init(module, recipe="w8a8", x=x):
        return linen.quantize(nn.Sequential([module]), {".*": recipe}).init(KEY, x)

    with pytest.raises(ValueError, match=r"layers_0/kernel.* cannot take w4a4-quest.*hadamard"):
        init(nn.Conv(4, (3, 3)), "w4a4-quest", image)
    with pytest.raises(ValueError, match=r"layers_0/kernel.* cannot take w4a16g24"):
        init(nn.Dense(4), "w4a16g24")
    with pytest.raises(ValueError, match="leaves weights in float"):
        init(nn.Embed(4, 8), "w16a8", TOKENS)
    with pytest.raises(ValueError, match=r"w4a4-lsq.*parameters of an NNX model"):
        linen.quantize(MLP(), {".*": "w4a4-lsq"})
    with pytest.raises(ValueError, match="module must be a flax"):
        linen.quantize(MLP, {".*": "w8a8"})  # pyright: ignore


def test_freezing_and_calibrating_refuse_what_they_cannot_do():
    x = normal(5, 32)
    quantized = linen.quantize(MLP(), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    frozen = linen.freeze(quantized, variables, x)
    with pytest.raises(ValueError, match="up/kernel is frozen already"):
        linen.freeze(quantized, frozen, x)
    with pytest.raises(ValueError, match=r"up/kernel.* is stored as .*multiplies it in float"):
        linen.quantize(MLP(), {"up": None, ".*": "w8a8"}).apply(frozen, x)
    with pytest.raises(ValueError, match="nothing to freeze"):
        linen.freeze(linen.quantize(MLP(), {".*": "w16a8"}), variables, x)
    with pytest.raises(ValueError, match="at least one batch"):
        linen.calibrate(quantized, variables, [])
    with pytest.raises(ValueError, match="NaN"):
        linen.calibrate(quantized, variables, [x.at[0].set(jnp.nan)])
    with pytest.raises(ValueError, match="no activations have a range"):
        linen.calibrate(linen.quantize(MLP(), {".*": "w8a16"}), variables, [x])


@pytest.mark.first(1)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16g16"])
@pytest.mark.parametrize("axis", [1, 2])
def test_layers_stacked_along_any_axis_are_quantized_each_by_itself(axis, recipe):
    """Against each layer by itself; all axes are alike, so that no shape says which one is the stack's."""
    layers = nn.vmap(
        nn.Dense,
        {"params": axis},
        {"params": True},
        in_axes=None,
        axis_size=32,
        metadata_params={},
    )(32, use_bias=False)
    x = normal(5, 32)
    kernel = normal(32, 32, 32, seed=2) * jnp.exp(normal(32, 1, 1, seed=3))
    variables = {"params": {"kernel": jnp.moveaxis(kernel, 0, axis)}}
    quantized = linen.quantize(layers, {".*": recipe})
    found = quantized.apply(variables, x)
    alone = jax.jit(linen.quantize(nn.Dense(32, use_bias=False), {".*": recipe}).apply)
    expected = jnp.stack([alone({"params": {"kernel": kernel[i]}}, x) for i in range(32)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    frozen = linen.freeze(quantized, variables, x)
    np.testing.assert_array_equal(quantized.apply(frozen, x), found)


@pytest.mark.long
def test_what_interception_could_not_reach_is_quantized():
    """A ConvTranspose, an attention of one's own, and a subclass of Embed with its own call."""

    class Scaled(nn.Embed):
        def __call__(self, tokens):
            return super().__call__(tokens) * 32**0.5

    class Own(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = Scaled(16, 32, name="embed")(tokens)
            w = self.param("qkv", nn.initializers.lecun_normal(), (3, 32, 32))
            q, k, v = jnp.einsum("btd,sdh->sbth", x, w)
            p = jax.nn.softmax(jnp.einsum("bth,bsh->bts", q, k) * 32**-0.5)
            x = jnp.einsum("bts,bsh->bth", p, v)
            return nn.ConvTranspose(8, (3,), name="up")(x)

    variables = Own().init(KEY, TOKENS)
    for recipe in ("w8a8", "int8_train", "w4a16"):
        quantized = linen.quantize(Own(), {".*": recipe})
        table = linen.coverage(Own(), {".*": recipe}, TOKENS)
        left = {row.path: row.reason for row in table if not row.is_quantized}
        assert set(left.values()) <= {"products of two activations, which no rule takes"}
        assert all("qkv" in path or path == "" for path in left)  # attention, which takes an a8
        y, z = Own().apply(variables, TOKENS), quantized.apply(variables, TOKENS)
        assert (
            0 < jnp.linalg.norm(y - z) / jnp.linalg.norm(y) < (0.25 if recipe == "w4a16" else 0.03)
        )
        frozen = linen.freeze(quantized, variables, TOKENS)
        np.testing.assert_array_equal(quantized.apply(frozen, TOKENS), z)


def test_donated_weights_are_freed():
    x = normal(5, 32)
    quantized = linen.quantize(MLP(), {".*": "w8a8"})
    variables = quantized.init(KEY, x)
    expected = quantized.apply(variables, x)
    frozen = linen.freeze(quantized, variables, x, donate=True)
    assert variables["params"]["up"]["kernel"].is_deleted()
    np.testing.assert_array_equal(quantized.apply(frozen, x), expected)


@pytest.mark.parametrize(
    ("variables", "inputs"),
    [
        (3, (jnp.ones((2, 64)),)),
        ({}, (jnp.ones((2, 64)),)),
        ({"params": {}}, (jnp.ones((2, 64)),)),
        (None, (jnp.ones((2, 3)),)),
        (None, ()),
        (None, (None,)),
    ],
)
def test_variables_and_inputs_that_do_not_fit_are_named(variables, inputs):
    quantized = jq.linen.quantize(nn.Dense(8), {".*": "w8a8"})
    if variables is None:
        variables = quantized.init(jax.random.key(0), jnp.ones((2, 64)))
    with pytest.raises(ValueError, match=r"do not fit the module|variables are what"):
        jq.linen.freeze(quantized, variables, *inputs)
