"""Kernels for TPUs: interpreted they give XLA's bits, for TPUs they compile, and their bytes are counted."""

import re
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import platforms_test
import pytest
from platforms_test import needs_tpu_compiler

from experiments.harness.training import hlo
from jaxquant.optim import by_role, bytes_moved, fixed, quantize_state

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

Shapes = dict[str, tuple[int, ...]]

OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    "lion": optax.lion(1e-3, weight_decay=1e-2),
    "momentum": optax.sgd(3e-2, momentum=0.9),
}
# The first is updated where it lies, in two steps of the grid; two are put together, with a page of both.
SHAPES = {"a": (56, 3072), "embed": (96, 200), "last": (70, 100)}
# One that is a stack of matrices, and a vector, which is a run of its own.
MORE = {"a": (2, 8, 1024), "b": (3000,), "embed": (96, 200), "head": (70, 100)}
LARGE = (16384, 4096)  # more than the compiler could keep in the core's own memory
TPUS = ("v5e:2x2", "v6e:2x2")
ADAMW = 28  # bytes an element in float32: gradient, parameter and moments read, update and moments written

compiled = platforms_test.compiled  # a fixture


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def tree(shapes: Shapes, seed: int) -> dict[str, jax.Array]:
    """Numbers over several decades."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape) * np.exp(rng.normal(size=shape))  # noqa: E731
    return {name: jnp.array(draw(shape), jnp.float32) for name, shape in shapes.items()}


def three_steps(tx: Any, shapes: Shapes) -> tuple[Any, Any, Any]:
    """All updates, and parameters and state after them."""
    params, updates = tree(shapes, 0), []
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        found, state = update(tree(shapes, step + 1), state, params)
        params = optax.apply_updates(params, found)
        updates.append(found)
    return updates, params, state


def by_both(tx: Any, policy: Any, shapes: Shapes) -> list[Any]:
    return [
        three_steps(quantize_state(tx, policy, kernel=kernel), shapes)
        for kernel in ("xla", "pallas")
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "bits"), [("adamw", (5, 4)), ("lion", (8, 8)), ("momentum", (5, 4))]
)
def test_interpreted_they_give_the_bits_of_xla(name, bits):
    chex.assert_trees_all_equal(*by_both(OPTIMIZERS[name], fixed(*bits), SHAPES))


@pytest.mark.long
@pytest.mark.parametrize("name", ["momentum"])
def test_interpreted_they_give_the_bits_of_xla_where_widths_differ(name):
    widths = {"embedding": (6, 3), "head": 8, "matrix": (5, 4), "vector": (8, 7)}
    chex.assert_trees_all_equal(*by_both(OPTIMIZERS[name], by_role(widths), MORE))


@pytest.mark.long
def test_parameters_that_differ_in_their_update_share_a_kernel():
    tx = optax.adamw(1e-2, mask={"a": True, "embed": True, "last": False})
    (by_xla, _, state), (by_kernel, _, other) = by_both(tx, fixed(4), SHAPES)
    chex.assert_trees_all_equal(state, other)
    for a, b in zip(by_xla, by_kernel, strict=True):
        for name in ("embed", "last"):
            np.testing.assert_array_equal(a[name], b[name])
        # XLA computes both updates for the whole run, and what it then makes of a quotient differs.
        np.testing.assert_allclose(a["a"], b["a"], rtol=1e-5)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            optax.contrib.muon(1e-2),
            r"cannot update a page by page: 'scan' is looked at in more than",
        ),
        (
            optax.chain(optax.trace(0.9), optax.stateless(lambda u, _: jax.tree.map(jnp.cbrt, u))),
            "cannot update a: TPU kernels have no cbrt",
        ),
    ],
)
def test_what_no_kernel_can_take_is_named(tx, message):
    tx = quantize_state(tx, fixed(4), kernel="pallas")
    params = {"a": jnp.ones((16, 64))}
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params)


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="kernel must be one of xla, pallas; got 'triton'"):
        quantize_state(optax.adam(1e-2), fixed(4), kernel=cast(Any, "triton"))


# ---- bytes


def moved(name: str, shape: tuple[int, ...]) -> dict[str, float]:
    params, tx = {"w": jnp.zeros(shape)}, OPTIMIZERS[name]
    state: Any = quantize_state(tx, fixed(5, 4), kernel="pallas").init(params)
    return bytes_moved(tx, state, params)


def test_the_derived_bytes_of_adamw_are_half_of_those_in_full_precision():
    found = moved("adamw", (1024, 2048))
    assert found == {
        "codes": 2 * (5 + 4) / 8,
        "tables": 2 * 2 * 8 * 4 / 8192,  # of two slots, for this step and the next
        "scales": 2 * (2 + 2) / 128,
        "programs": 0,
        "operands": 4 + 4,
        "results": 4,
        "copies": 0,
    }
    assert sum(found.values()) < 0.65 * ADAMW


def test_what_is_put_together_is_copied():
    """Rows of 1000 numbers fill no tiles."""
    assert moved("momentum", (1024, 1000))["copies"] == pytest.approx(2 * (4 + 4), rel=0.1)


# ---- compiled for TPU


def update(compiled, topology: str, name: str, kernel: str | None, shapes: Any) -> Any:
    return compiled(topology, "optimizer", optimizer=name, kernel=kernel, shapes=shapes)


@needs_tpu_compiler
@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_for_tpu_nothing_but_the_kernel_touches_large_arrays(compiled, topology, name):
    program, elements = update(compiled, topology, name, "pallas", [LARGE]), LARGE[0] * LARGE[1]
    assert program.text.count('custom_call_target="tpu_custom_call"') == 1
    main = program.text[program.text.index("\nENTRY ") :]
    instruction = re.compile(r"^\s+(?:ROOT )?%[\w.-]+ = (.*?) ([a-z][\w-]*)\(", re.MULTILINE)
    found = [
        opcode
        for types, opcode in instruction.findall(main)
        # The pool has more than half a byte for each element.
        if any(np.prod(x.shape) > elements / 2 for x in hlo.arrays(types))
    ]
    assert found.count("custom-call") == 1
    assert set(found) <= {"parameter", "bitcast", "custom-call", "get-tuple-element", "tuple"}
    assert program.temp_bytes < 0.01 * elements


@needs_tpu_compiler
@pytest.mark.parametrize("topology", TPUS)
def test_compiled_for_tpu_parameters_are_put_together(compiled, topology):
    program = update(compiled, topology, "adamw", "pallas", list(MORE.values()))
    assert program.text.count('custom_call_target="tpu_custom_call"') == 3


@needs_tpu_compiler
def test_adamw_moves_at_most_0_65_of_the_bytes_in_full_precision(compiled):
    """The kernel's derived bytes, and what the compiler counts around it: there, the pool once more."""
    exact, around = (
        update(compiled, TPUS[0], "adamw", kernel, [LARGE]).moved_bytes / (LARGE[0] * LARGE[1])
        for kernel in (None, "pallas")
    )
    assert exact == pytest.approx(ADAMW, rel=1e-3)
    assert sum(moved("adamw", (1024, 2048)).values()) + around < 0.65 * exact


def test_other_platforms_than_tpus_and_cpus_are_refused_by_name(monkeypatch):
    tx, params = (
        quantize_state(optax.adamw(1e-3), fixed(5, 4), kernel="pallas"),
        {"w": jnp.ones((64, 128))},
    )
    state = tx.init(params)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=r"kernels for TPUs.*got 'gpu', where kernel='xla'"):
        tx.update(params, state, params)
