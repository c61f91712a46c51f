import io
import json
import zipfile

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jaxquant as jq
from jaxquant import serving
from jaxquant.artifacts.folders import as_stored
from jaxquant.nnx.modules import read


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.down = nnx.Linear(64, 8, rngs=rngs)
        self.norm.var[...] = jnp.linspace(0.5, 2, 64)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x)).mean((1, 2))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.up(self.attention(x))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=2)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = make(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


def normal(*shape) -> jax.Array:
    return jnp.array(np.random.default_rng(0).normal(size=shape), jnp.float32)


X = normal(4, 32)
CASES = {
    "perceptron": (Perceptron, {".*": "w4a8"}, X),
    "weights alone": (Perceptron, {".*": "w4a16"}, X),
    "convolution": (Convolutional, {".*": "w8a8"}, normal(2, 5, 5, 3)),
    "stacked": (Stacked, {".*attention": "a8kv8", ".*": "w8a8"}, normal(2, 3, 32)),
}


def frozen(case: str):
    cls, rules, x = CASES[case]
    quantized = jq.nnx.quantize(cls(nnx.Rngs(0)), rules)
    if case == "perceptron":
        jq.nnx.calibrate(quantized, [x])
    return jq.nnx.freeze(quantized), x


@nnx.jit
def run(model, x):
    return model(x)


@pytest.mark.first(1)
@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_computes_the_same_bits(tmp_path, case):
    model, x = frozen(case)
    data = serving.export(model, x, path=tmp_path / "out" / "model.zip", platforms=("cpu", "tpu"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.zip"]
    expected = run(model, x)
    for source in (data, tmp_path / "out" / "model.zip", str(tmp_path / "out" / "model.zip")):
        program = serving.load(source)
        assert program.platforms == ("cpu", "tpu")
        found = program(x)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_weights_stay_packed():
    layer = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
    model = jq.nnx.freeze(jq.nnx.quantize(layer, {".*": "w4a16"}))
    data, program = serving.export(model, normal(1, 256)), 20_000
    assert read(model.kernel).nbytes == 256 * 128 + 4 * 256
    assert len(data) < read(model.kernel).nbytes + 4 * 256 + program


@pytest.mark.first(1)
@pytest.mark.parametrize("rules", ["w8a8", "w4a16", "mxfp4"])
def test_one_program_serves_any_batch(rules):
    """The same bits, but where up to four rows meet stored weights: those are summed in another order."""
    model = jq.nnx.freeze(jq.nnx.quantize(Perceptron(nnx.Rngs(0)), {".*": rules}))
    program = serving.load(serving.export(model, X, batch="b"))
    x = jnp.concatenate([X, X])
    for size in (1, 3, 4, 6):
        found, expected = program(x[:size]), run(model, x[:size])
        if rules == "w4a16" and size <= 4:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, expected)


def test_a_function_is_exported_with_its_weights():
    layer = jq.quantize(normal(32, 8), jq.Quantizer(jq.INT4, "channel")).pack()
    weights = {
        "layer": layer,
        "bias": normal(8).astype(jnp.bfloat16),
        "shift": jnp.int4(3),
        "key": jax.random.key(3),
    }

    def apply(weights, x):
        noise = jax.random.normal(weights["key"], (8,))
        y = x["a"] @ jq.dequantize(weights["layer"])
        shift = weights["bias"].astype(jnp.float32) + weights["shift"].astype(jnp.float32)
        return {"y": y + (shift + noise)[None]}

    program = serving.load(serving.export(apply, {"a": X}, weights=weights))
    np.testing.assert_array_equal(program({"a": X})["y"], jax.jit(apply)(weights, {"a": X})["y"])
    alone = serving.load(serving.export(lambda x: x + 1, X))
    np.testing.assert_array_equal(alone(X), X + 1)


def test_a_program_needs_jax_alone():
    model, x = frozen("perceptron")
    with zipfile.ZipFile(io.BytesIO(serving.export(model, x))) as archive:
        exported = jax.export.deserialize(bytearray(archive.read("program")))
        stored = safetensors.numpy.load(archive.read("weights.safetensors"))
    weights = [stored[str(i)] for i in range(len(stored))]
    np.testing.assert_array_equal(exported.call(weights, x), run(model, x))


def rezipped(data: bytes, **changed) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.split(".")[0], old.read(name)))
    return buffer.getvalue()


def test_a_file_that_is_not_whole_is_an_error(tmp_path):
    data = serving.export(lambda w, x: x @ w, X, weights=normal(32, 8))
    for length in (0, 1, 40, len(data) // 2, len(data) - 100, len(data) - 1):
        with pytest.raises(ValueError, match="no whole program"):
            serving.load(data[:length])
    for place in (data.index(b"StableHLO"), data.index(normal(32, 8).tobytes()) + 5):
        damaged = bytearray(data)
        damaged[place] ^= 1
        (tmp_path / "model.zip").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.zip is no whole program.*CRC"):
            serving.load(tmp_path / "model.zip")
    manifest = {"kind": "jaxquant program", "version": 2}
    with pytest.raises(ValueError, match="version 2; this is version 1"):
        serving.load(rezipped(data, manifest=json.dumps(manifest)))
    with pytest.raises(ValueError, match="not of a jaxquant program"):
        serving.load(rezipped(data, manifest="{}"))
    with pytest.raises(ValueError, match=f"cannot be read by JAX {jax.__version__}"):
        serving.load(rezipped(data, program=b"other"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: serving.export(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), X, weights=X),
            "has its weights",
        ),
        (
            lambda: serving.export(nnx.eval_shape(lambda: Perceptron(nnx.Rngs(0))), X),
            "load an abstract model's first",
        ),
        (lambda: serving.export(lambda x: x[: int(x.shape[0])], X, batch="b"), "for any batch 'b'"),
        (lambda: serving.export(lambda x: x, X, platforms=("cpu", 3)), "platforms are some of cpu"),
        (lambda: serving.export(lambda x: x, X, platforms=("gpuu",)), r"got \('gpuu',\)"),
        (lambda: serving.export(lambda x: x, X, platforms=()), "platforms are some of cpu"),
        (lambda: serving.export(lambda x: x, X, platforms=3), "platforms are some of cpu"),
        (lambda: serving.export(lambda x: x, X, path=__file__), "serving_test.py exists already"),
        (
            lambda: serving.export(lambda x: x, X, batch="4"),
            "batch is a name, such as 'b'; got '4'",
        ),
        (lambda: serving.load(None), "from a file or its bytes; got NoneType"),
        (lambda: serving.load("no such file"), "no such file cannot be read: No such file"),
        (lambda: serving.export(lambda x: x @ x, X), "cannot be exported: "),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def archive(parts: dict, compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def product() -> bytes:
    weights = {"a": normal(32, 8), "b": normal(8).astype(jnp.bfloat16), "c": jnp.int4(3)}

    def apply(w, x):
        return x @ w["a"] + (w["b"].astype(jnp.float32) + w["c"].astype(jnp.float32))[None]

    return serving.export(apply, X, weights=weights)


def parts_of(data: bytes) -> dict:
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        return {name: old.read(name) for name in old.namelist()}


def test_nothing_in_a_program_is_compressed(product):
    parts = parts_of(product)
    np.testing.assert_array_equal(serving.load(archive(parts))(X), serving.load(product)(X))
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        for changed in ({}, {"program": bytes(10**7)}, {"weights.safetensors": bytes(10**7)}):
            with pytest.raises(ValueError, match=r"no whole program.* is compressed"):
                serving.load(archive(parts | changed, kind))


def test_a_program_has_its_three_parts(product):
    parts = parts_of(product)
    for changed in (parts | {"more": b""}, {k: v for k, v in parts.items() if k != "program"}):
        with pytest.raises(ValueError, match=r"no whole program.*: it holds "):
            serving.load(archive(changed))


def test_every_flip_in_a_zip_directory_is_no_other_program(product):
    """It is a ValueError, or what it concerns is of no account, as the time of day."""
    start = product.index(b"PK\x01\x02")
    expected = serving.load(product)(X)
    harmless = 0
    for place in range(start, len(product)):
        for bit in (0, 3, 7) if place % 3 == 0 else (place % 8,):
            damaged = bytearray(product)
            damaged[place] ^= 1 << bit
            try:
                parts = serving._unzip(bytes(damaged))
            except Exception:
                with pytest.raises(ValueError, match="no whole program"):
                    serving.load(bytes(damaged))
                continue
            harmless += 1
            assert parts == parts_of(product)
    assert harmless < (len(product) - start) * 1.5
    np.testing.assert_array_equal(serving.load(product)(X), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"0": a["0"].T.copy()}, r"0 is float32\[32, 8\].*; got float32\[8, 32\]"),
        (lambda a: a | {"0": a["0"].view(np.int32)}, r"0 is float32.*; got int32"),
        (lambda a: a | {"2": a["2"] + np.uint8(99)}, "2 has bytes that are no int4"),
        (lambda a: a | {"0": a["0"] * np.float32("nan")}, "0 has a NaN or an Inf, and had none"),
        (
            lambda a: a | {"1": a["1"] * np.float32("inf").astype(a["1"].dtype)},
            "1 has a NaN or an Inf",
        ),
        (lambda a: {k: v for k, v in a.items() if k != "1"}, "arrays that are missing: 1"),
        (lambda a: a | {"3": a["0"]}, "arrays without a description: 3"),
        (lambda a: a | {"x": a["0"]}, "arrays without a description: x"),
    ],
)
def test_weights_are_held_to_what_the_program_takes(product, change, message):
    weights = {"0": normal(32, 8), "1": normal(8).astype(jnp.bfloat16), "2": jnp.int4(3)}
    stored = {name: as_stored(x) for name, x in weights.items()}
    parts = parts_of(product) | {"weights.safetensors": safetensors.numpy.save(stored)}
    np.testing.assert_array_equal(serving.load(archive(parts))(X), serving.load(product)(X))
    changed = {"weights.safetensors": safetensors.numpy.save(change(stored))}
    with pytest.raises(ValueError, match=message):
        serving.load(archive(parts | changed))


def test_a_nan_that_was_exported_is_served():
    weights = normal(32, 8).at[0, 0].set(jnp.nan)
    program = serving.load(serving.export(lambda w, x: x @ w, X, weights=weights))
    np.testing.assert_array_equal(program(X), jax.jit(lambda w, x: x @ w)(weights, X))


def test_programs_of_before_nans_were_noted_are_read(product):
    parts = parts_of(product)
    manifest = json.loads(parts["manifest.json"])
    assert manifest.pop("not_finite") == []
    before = archive(parts | {"manifest.json": json.dumps(manifest)})
    np.testing.assert_array_equal(serving.load(before)(X), serving.load(product)(X))
