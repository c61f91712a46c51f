import dataclasses
import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax

import jaxquant as jq
from jaxquant import calibration, storage
from jaxquant.numerics import packing

X = jnp.array(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
QUANTIZERS = {
    "int5": jq.Quantizer(jq.Int(5), "channel"),
    "uint8 asymmetric": jq.Quantizer(jq.Int(8, "unsigned"), calibration=calibration.minmax),
    "midrise": jq.Quantizer(jq.Int(3, "midrise"), 16),
    "nf4": jq.Quantizer(jq.NF4, 64),
    "e2m1": jq.Quantizer(jq.E2M1, "channel"),
    "e4m3": jq.Quantizer(jq.E4M3),
    "bf16": jq.Quantizer(jq.BF16),
    "mxfp4": jq.Quantizer(jq.MXFP4),
    "mxint8": jq.Quantizer(jq.MXINT8),
    "nvfp4": jq.Quantizer(jq.NVFP4),
    "rotated": jq.Quantizer(jq.INT4, "channel", hadamard=32),
}


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
mesh = jax.make_mesh((8,), ("rows",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
x = jnp.array(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
for name in ("int5", "nf4", "mxfp4", "e4m3fn"):
    quantizer = jq.Quantizer(jq.parse(name), None if name == "mxfp4" else "channel")
    whole = jq.quantize(x, quantizer).pack()
    parts = jax.device_put(whole, rows)
    assert parts.qvalue.addressable_shards[0].data.nbytes * 8 == whole.qvalue.nbytes
    found = jax.jit(jq.dequantize, out_shardings=rows)(parts)
    np.testing.assert_array_equal(found, jq.dequantize(whole))
    made = jax.jit(lambda x: jq.quantize(x, quantizer).pack())(jax.device_put(x, rows))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(whole)))
print("same")
"""


@pytest.mark.long
def test_packed_arrays_are_sharded_by_rows():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", _SHARDED],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def quantized(name: str) -> jq.QArray:
    return jq.quantize(X, QUANTIZERS[name])


@pytest.mark.first(3)
@pytest.mark.exhaustive
@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(8,), (3, 13), (2, 0), (0, 5), (2, 1, 16)])
def test_packing_is_exact_and_takes_the_bits_that_it_says(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape)
    codes = jnp.array(codes, jnp.uint8 if bits <= 8 else jnp.uint16)
    packed = packing.pack_bits(codes, bits)
    assert packed.nbytes == np.prod(shape[:-1], dtype=int) * bits * -(-shape[-1] // 8)
    np.testing.assert_array_equal(packing.unpack_bits(packed, bits, shape[-1]), codes)


@pytest.mark.first(2)
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_packed_array_is_the_same_array_in_fewer_bytes(name):
    q = quantized(name)
    packed = q.pack()
    assert (packed.shape, packed.dtype, packed.pack()) == (q.shape, q.dtype, packed)
    chex.assert_trees_all_equal(packed.unpack(), q)
    np.testing.assert_array_equal(jq.dequantize(packed), jq.dequantize(q))
    assert packed.qvalue.nbytes * 8 == q.element.bits * X.size
    assert packed.nbytes == sum(a.nbytes for a in jax.tree.leaves(packed)) + 64 * (name == "nf4")


@pytest.mark.long
def test_bytes_are_those_of_the_buffers_with_scales_and_tables():
    assert quantized("int5").pack().bits_per_element == 5 + 32 / 64
    assert quantized("mxfp4").pack().bits_per_element == 4 + 8 / 32
    assert quantized("nvfp4").pack().bits_per_element == 4 + 8 / 16 + 32 / X.size
    assert quantized("nf4").pack().nbytes == X.size // 2 + 4 * 8 + 4 * 16


def test_packed_arrays_pass_through_transformations():
    q = quantized("int5").pack()
    chex.assert_trees_all_equal(jax.jit(lambda q: q)(q), q)
    rows = jax.vmap(lambda x: jq.quantize(x, QUANTIZERS["int5"]).pack())(X)
    np.testing.assert_array_equal(rows.qvalue, q.qvalue)
    np.testing.assert_array_equal(jax.vmap(jq.dequantize)(rows), jq.dequantize(q))
    _, scanned = jax.lax.scan(lambda c, row: (c, jq.dequantize(row)), 0, rows)
    np.testing.assert_array_equal(scanned, jq.dequantize(q))


@pytest.mark.first(3)
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("packed", [False, True])
def test_arrays_and_back(name, packed):
    q = quantized(name)
    tree = {"layer": {"kernel": q.pack() if packed else q, "bias": X[0]}, "step": jnp.int32(3)}
    back = storage.from_arrays(*storage.to_arrays(tree))
    chex.assert_trees_all_equal(back, tree)
    assert back["layer"]["kernel"].format == q.format


def test_a_models_pure_dictionary_comes_back_with_its_integer_keys():
    tree = {"layers": {0: {"kernel": quantized("nf4")}, 2: {}}, "count": jnp.int32(1)}
    back = storage.from_arrays(*storage.to_arrays(tree))
    chex.assert_trees_all_equal(back, tree)
    assert list(back["layers"]) == [0, 2]


def test_scalars_are_stored_too():
    q = jq.quantize(jnp.float32(0.3), jq.Quantizer(jq.INT8))
    chex.assert_trees_all_equal(storage.from_arrays(*storage.to_arrays({"a": q}))["a"], q)


def test_safetensors_and_back(tmp_path):
    tree = {name.replace(" ", "_"): quantized(name).pack() for name in QUANTIZERS}
    arrays, descriptions = storage.to_arrays(tree)
    safetensors.flax.save_file(arrays, tmp_path / "model.safetensors", metadata=descriptions)
    with safetensors.safe_open(tmp_path / "model.safetensors", "flax") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        back = storage.from_arrays(read, file.metadata())
    chex.assert_trees_all_equal(back, tree)


@pytest.mark.long
def test_orbax_and_back(tmp_path):
    tree = {name.replace(" ", "_"): quantized(name) for name in QUANTIZERS}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)  # as they stand, a pytree of arrays
        arrays, descriptions = storage.to_arrays(tree)
        checkpointer.save(tmp_path / "arrays", arrays)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        chex.assert_trees_all_equal(checkpointer.restore(tmp_path / "tree", like), tree)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        read = checkpointer.restore(tmp_path / "arrays", like)
    chex.assert_trees_all_equal(storage.from_arrays(read, descriptions), tree)


def edited(**changes):
    arrays, descriptions = storage.to_arrays({"w": quantized("int5")})
    description = json.loads(descriptions["w"])
    return arrays, {"w": json.dumps({**description, **changes})}


def without(name):
    arrays, descriptions = storage.to_arrays({"w": quantized("int5")})
    return {k: v for k, v in arrays.items() if k != name}, descriptions


def replaced(name, change):
    arrays, descriptions = storage.to_arrays({"w": quantized("int5")})
    return {**arrays, name: change(arrays[name])}, descriptions


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (lambda: edited(version=2), "version 2"),
        (lambda: edited(kind="tensor"), "known kind"),
        (lambda: edited(format="int99"), "bits"),
        (lambda: edited(shape=[8, 65]), "65 codes"),
        (lambda: edited(format="int6"), "bytes of uint8|values are stored"),
        (lambda: edited(format="mxfp4"), "scales of mxfp4 are uint8"),
        (lambda: edited(dtype="float7"), "a float type"),
        (lambda: edited(dtype=None), "a float type"),
        (lambda: edited(packed="no"), "true or false"),
        (lambda: edited(version=True), "version True"),
        (lambda: edited(shape=[8, 60.5]), "list of sizes"),
        (lambda: edited(hadamard=[32, 5]), "block, axis"),
        (lambda: edited(arrays={"qvalue": "x"}), "type and shape"),
        (lambda: stripped("nvfp4", "tensor_scale"), "has parts"),
        (lambda: stripped("int5", "scale"), "has parts"),
        (lambda: ({"a": X}, ["a"]), "texts by path"),
        (lambda: nested(), "holds a/b"),
        (lambda: (storage.to_arrays({"w": X})[0], {"w": "{}"}), "not one of"),
        (lambda: without("w/scale"), "w/scale is described"),
        (lambda: replaced("w/scale", lambda a: a.astype(jnp.bfloat16)), "got bfloat16"),
        (lambda: replaced("w/qvalue", lambda a: a[:4]), r"got uint8\[4"),
        (lambda: extra(), "without a description: b"),
    ],
)
def test_what_is_not_as_it_was_written_is_an_error(stored, message):
    with pytest.raises(ValueError, match=message):
        storage.from_arrays(*stored())


def stripped(name, part):
    """An array without a part, and a description that says so."""
    arrays, descriptions = storage.to_arrays({"w": quantized(name)})
    description = json.loads(descriptions["w"])
    del arrays[f"w/{part}"], description["arrays"][part]
    return arrays, {"w": json.dumps(description)}


def nested():
    arrays, descriptions = storage.to_arrays({"a": X})
    more, below = storage.to_arrays({"a": {"b": X}})
    return {**arrays, **more}, {**descriptions, **below}


def extra():
    arrays, descriptions = storage.to_arrays({"w": X})
    return {**arrays, "b": X}, descriptions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: storage.to_arrays({"a/b": X}), "without a slash"),
        (lambda: storage.to_arrays({"a": [X]}), "got list at a"),
        (lambda: storage.to_arrays({"[0]": X}), "no integer in brackets"),
        (lambda: storage.to_arrays({"a": np.zeros(3)}), "float64"),
        (lambda: storage.to_arrays({"a": jax.random.key(0)}), "key_data"),
        (lambda: packing.pack_bits(jnp.zeros((4,), jnp.uint8), 0), "from 1 to 32"),
        (lambda: packing.pack_bits(jnp.uint8(1), 2), "at least one axis"),
        (lambda: packing.unpack_bits(jnp.zeros((4,), jnp.uint8), 2, 4), "2 bytes"),
        (lambda: jq.quantize(jnp.float32(1), jq.Quantizer(jq.INT4)).pack(), "scalar"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_format_that_could_not_be_read_again_is_refused():
    @jax.tree_util.register_static
    @dataclasses.dataclass(frozen=True)
    class Own(jq.Int):
        def __str__(self):
            return "own"

    x = jq.quantize(jnp.ones((2, 8)), jq.Quantizer(jq.Int(4)))
    assert storage.to_arrays({"w": x})
    with pytest.raises(ValueError, match="the library's own"):
        storage.to_arrays({"w": dataclasses.replace(x, format=Own(4))})
