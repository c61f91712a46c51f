"""Quantized state leaves and comes back: to plain optax state, to disk, to other layouts; diagnoses tell."""

import functools
import json
import os
import subprocess
import sys
import textwrap
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import jaxquant as jq
from jaxquant.artifacts import folders
from jaxquant.artifacts.checksums import digests, with_checksum
from jaxquant.optim import (
    adaptive,
    diagnose,
    fixed,
    from_optax,
    load,
    quantize_state,
    save,
    to_optax,
)

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others
ADAM = optax.adam(1e-2)


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def trained(tx: Any, steps=3) -> Any:
    params = {"w": jnp.ones((128, 100)), "b": jnp.zeros(5)}
    state: Any = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(steps):
        key = jax.random.fold_in(jax.random.key(0), i)
        gradients = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        _, state = update(gradients, state, params)
    return params, state


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_plain_state_is_what_the_codes_stand_for():
    params, state = trained(quantize_state(ADAM, fixed(8)))
    _, exact = trained(ADAM)
    plain = to_optax(ADAM, state, params)
    assert jax.tree.structure(plain) == jax.tree.structure(exact)
    for found, wanted in zip(jax.tree.leaves(plain), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.05 * float(jnp.max(jnp.abs(wanted))))
    assert equal(plain[0].mu["b"], exact[0].mu["b"])


def test_plain_state_comes_in_rounded_once():
    params, exact = trained(ADAM)
    tx: Any = quantize_state(ADAM, fixed(8))
    state = jax.jit(from_optax)(tx.init(params), exact)
    plain = to_optax(ADAM, state, params)
    assert equal(plain[0].count, exact[0].count)
    error = jnp.abs(plain[0].mu["w"] - exact[0].mu["w"]).max() / jnp.abs(exact[0].mu["w"]).max()
    assert 0 < error < 0.01
    # Values that are levels stay: what came out goes in again without a change.
    again = to_optax(ADAM, from_optax(tx.init(params), plain), params)
    np.testing.assert_allclose(again[0].mu["w"], plain[0].mu["w"], rtol=1e-2, atol=1e-8)


def test_what_is_saved_is_loaded_bit_for_bit_and_goes_on_alike(tmp_path):
    tx: Any = quantize_state(ADAM, adaptive(6.0, interval=2))
    params, state = trained(tx)
    save(tmp_path / "state", state)
    found = load(tmp_path / "state", cast(Any, tx.init(params)))
    assert equal(found, state)
    gradients = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    assert equal(update(gradients, found, params), update(gradients, state, params))


def test_a_flipped_byte_another_version_or_other_shapes_are_refused(tmp_path):
    tx = quantize_state(ADAM, fixed(5, 4))
    params, state = trained(tx)
    save(tmp_path / "state", state)
    like: Any = tx.init(params)
    with pytest.raises(ValueError, match="exists already"):
        save(tmp_path / "state", state)
    other: Any = quantize_state(ADAM, fixed(5, 4)).init(
        {"w": jnp.ones((256, 100)), "b": jnp.zeros(5)}
    )
    with pytest.raises(ValueError, match="holds pool as uint8"):
        load(tmp_path / "state", other)
    sgd: Any = quantize_state(optax.adam(1e-2), fixed(4, 5)).init(params)
    with pytest.raises(ValueError, match="another transformation, policy or set of parameters"):
        load(tmp_path / "state", sgd)
    arrays = tmp_path / "state" / "arrays.safetensors"
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    with pytest.raises(ValueError, match=r"arrays\.safetensors is damaged"):
        load(tmp_path / "state", like)
    arrays.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"bytes; .* were written"):
        load(tmp_path / "state", like)
    head = tmp_path / "state" / "state.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"version": 1}))
    with pytest.raises(ValueError, match="of version 1; this is version 4"):
        load(tmp_path / "state", like)
    with pytest.raises(ValueError, match="is missing"):
        load(tmp_path / "nothing", like)
    with pytest.raises(ValueError, match="state must be that of a quantize_state"):
        save(tmp_path / "plain", cast(Any, ADAM.init(params)))


def rewritten(folder, change):
    """The state's arrays changed, and digests that are right for them."""
    path, head = folder / "arrays.safetensors", folder / "state.json"
    stored = change(folders.read_safetensors(path))
    path.unlink()
    folders.write_safetensors(path, stored)
    content = json.loads(head.read_text())
    kind, version = content.pop("kind"), content.pop("version")
    del content["sha256"]
    head.unlink()
    head.write_text(with_checksum(kind, version, content | {"files": digests(folder)}))


def changed(ending, function):
    """Of the first array whose name ends so."""

    def change(arrays):
        name = next(name for name in sorted(arrays) if name.endswith(ending))
        return arrays | {name: function(arrays[name])}

    return change


@functools.cache
def saved_and_like() -> Any:
    tx: Any = quantize_state(ADAM, fixed(5, 4))
    params, state = trained(tx, steps=1)
    return state, tx.init(params)


def twice(table):
    """A row of one page given to another."""
    table = table.copy()
    rows = table.reshape(-1, table.shape[-1])
    rows[-1, 0] = rows[0, 0]
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("pool", lambda x: x[:, :-1]), r"pool is uint8.*; got uint8"),
        (changed("pool", lambda x: x.view(np.int8)), r"pool is uint8.*; got int8"),
        (changed("step", lambda x: x.astype(np.float32)), r"step is int32.*; got float32"),
        (changed("scales[0][0]", lambda x: x.swapaxes(1, 2)[..., :0]), r"scales.*; got bfloat16"),
        (
            changed("scales[0][0]", lambda x: x * x.dtype.type("nan")),
            "scales.* has a NaN or an Inf",
        ),
        (changed("exact[1]", lambda x: x * np.float32("nan")), "exact.* has a NaN or an Inf"),
        (changed("tables[0][0]", lambda x: x + np.int32(10_000)), "its tables name rows"),
        (changed("tables[0][0]", lambda x: -x), "its tables name rows"),
        (changed("tables[0][0]", twice), "its tables give a row to two pages"),
        (
            lambda a: {k: v for k, v in a.items() if k != "pool"},
            r"arrays that are missing: pool",
        ),
        (lambda a: a | {"more": a["pool"]}, r"arrays without a description: more"),
    ],
)
def test_arrays_are_held_to_what_was_written(tmp_path, change, message):
    state, like = saved_and_like()
    save(tmp_path / "state", state)
    rewritten(tmp_path / "state", lambda arrays: arrays)
    assert equal(load(tmp_path / "state", like), state)
    rewritten(tmp_path / "state", change)
    with pytest.raises(ValueError, match=rf"arrays\.safetensors holds no such state: .*{message}"):
        load(tmp_path / "state", like)


def test_a_run_that_came_to_nan_is_saved_and_loaded(tmp_path):
    tx: Any = quantize_state(ADAM, fixed(5, 4))
    params, state = trained(tx)
    gradients = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, state = jax.jit(tx.update)(gradients, state, params)
    save(tmp_path / "state", state)
    found = load(tmp_path / "state", cast(Any, tx.init(params)))
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(found)] == [
        np.asarray(x).tobytes() for x in jax.tree.leaves(state)
    ]


def test_state_of_another_transformation_is_refused():
    params, state = trained(quantize_state(ADAM, fixed(8)))
    with pytest.raises(ValueError, match="leaves; got"):
        to_optax(optax.sgd(1e-2, momentum=0.9), state, params)
    with pytest.raises(ValueError, match="leaves; got"):
        from_optax(state, optax.sgd(1e-2, momentum=0.9).init(params))
    with pytest.raises(ValueError, match=r"leaf 1 of .* must be float32\[5\]; got float32\[6\]"):
        from_optax(state, ADAM.init({"w": jnp.ones((128, 100)), "b": jnp.zeros(6)}))


LAYOUTS = """
    import os, sys
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[1]}"
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import Mesh
    from jaxquant.optim import adaptive, fixed, load, quantize_state, save

    count, folder = int(sys.argv[1]), sys.argv[2]
    # Gradients are given: what computes them may round otherwise on other meshes, and is not ours.
    rng = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    policy = {"fixed": fixed(5, 4), "adaptive": adaptive(5.0, interval=4)}[sys.argv[4]]
    tx = quantize_state(optax.adamw(1e-2), policy, shards=8, mesh=mesh)
    params = {"w": jax.random.normal(jax.random.key(0), (300, 1024)), "e": jnp.ones((64, 200))}
    gradients = jax.tree.map(lambda p: rng.normal(size=(25, *p.shape)).astype(np.float32), params)
    state = tx.init(params)

    @jax.jit
    def run(params, state):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    params, state = run(params, state)
    assert len(state.pool.sharding.device_set) == count
    if folder:
        save(f"{folder}/state", state)
    if sys.argv[3]:
        state = load(f"{sys.argv[3]}/state", state)
        assert len(state.pool.sharding.device_set) == count
    params, state = run(params, state)
    for leaf in jax.tree.leaves((params, state)):
        print(np.asarray(leaf).tobytes().hex()[:64], hash(np.asarray(leaf).tobytes()))
"""


@pytest.mark.long
@pytest.mark.parametrize("policy", ["fixed", "adaptive"])
def test_one_two_and_eight_devices_give_the_same_bits_and_resume_each_other(tmp_path, policy):
    def run(devices, save_to="", load_from=""):
        code = textwrap.dedent(LAYOUTS)
        command = [sys.executable, "-c", code, str(devices), str(save_to), str(load_from), policy]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    eight = run(8, save_to=tmp_path)
    assert run(1) == eight
    assert run(2, load_from=tmp_path) == eight


@pytest.mark.long
def test_diagnoses_tell_a_stall_a_bias_and_an_error():
    params, state = trained(quantize_state(ADAM, fixed(3, 3)))
    # One element of each block is held up, the others decay by a tenth or a thousandth.
    held = jnp.where(jnp.arange(12_800) % 128 == 0, 4.0, 0.0).reshape(128, 100)
    gradients = {"w": held, "b": jnp.zeros(5)}
    found = jax.jit(lambda s: diagnose(ADAM, s, gradients, params))(state)
    assert set(found) == {"0/mu/w", "0/nu/w"}
    momentum, second = found["0/mu/w"], found["0/nu/w"]
    assert bool(jnp.isnan(momentum.preconditioner_error).all())
    assert abs(second.radial_bias) < 0.2
    assert bool((jnp.diff(second.preconditioner_error) >= 0).all())
    fine = trained(quantize_state(ADAM, fixed(8)))[1]
    better = jax.jit(lambda s: diagnose(ADAM, s, gradients, params))(fine)
    # At 3 bits nearest rounding leaves many where they were.
    assert momentum.stalled > 0.2 > 0.1 > better["0/mu/w"].stalled
    assert better["0/mu/w"].relative_error < momentum.relative_error / 8
    assert abs(better["0/mu/w"].radial_bias) < 0.01


def test_flax_saves_it_as_bytes_and_refuses_other_parameters():
    tx = optax.MultiSteps(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), 2)
    quantized = jq.optim.quantize_state(tx, jq.optim.fixed(5, 4))
    params = {"emb": jnp.ones((64, 64)), "head": jnp.ones((64, 64)), "small": jnp.ones(3)}
    state = quantized.init(params)
    for i in range(2):
        gradients = jax.tree.map(lambda x, i=i: x * (i + 1), params)
        _, state = quantized.update(gradients, state, params)
    saved = serialization.to_bytes(state)
    loaded = serialization.from_bytes(quantized.init(params), saved)
    chex.assert_trees_all_equal(loaded, state)
    plain = jq.optim.quantize_state(optax.adam(1e-3), jq.optim.fixed(5, 4))
    saved = serialization.to_bytes(plain.init({"emb": params["emb"], "head": params["head"]}))
    other = {"a_head": params["head"], "z_emb": params["emb"]}
    with pytest.raises(ValueError, match="other names or shapes"):
        serialization.from_bytes(plain.init(other), saved)


def test_items_set_within_nested_wrappers_persist():
    tx = optax.MultiSteps(optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3, momentum=0.9), 1)
    quantized = jq.optim.quantize_state(tx, jq.optim.fixed(5))
    params = {"w": jnp.ones((64, 64))}
    state = quantized.init(params)
    state.inner_opt_state.hyperparams["learning_rate"] = jnp.float32(0.5)
    updates, _ = quantized.update(params, state, params)
    np.testing.assert_allclose(updates["w"], -0.5, rtol=1e-3)
