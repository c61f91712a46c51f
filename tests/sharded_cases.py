"""Programs on eight devices under a mesh of Explicit or Auto axes, each beside itself on one device.

    python sharded_cases.py Explicit recipes

Prints what was compared; run by `sharding_test.py`.
"""

import functools
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq

KIND = getattr(AxisType, sys.argv[1])
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KIND, KIND))
MATMUL = (((1,), (0,)), ((), ()))
INT8 = jq.Quantizer(jq.INT8, "channel")
NATIVE = jq.Operands(INT8, INT8, "native")
# Shardings of lhs, rhs and, where lax cannot know it, of the result: as under data parallelism, FSDP, and
# tensor parallelism by columns, by rows, by both, and where the result alone is split.
LAYOUTS = {
    "data": (P("data"), P(), None),
    "fsdp": (P("data"), P("data"), None),
    "column": (P("data"), P(None, "model"), None),
    "row": (P("data", "model"), P("model"), P("data")),
    "both": (P("data", "model"), P("model", "data"), P("data")),
    "out": (P(), P(), P("data", "model")),
}
# fmt: off
RECIPES = (
    "w8a8", "w4a8", "w8a8-token", "w4a16", "w4a16g64", "w4a8g64", "int8_train", "fp8_train", "mxfp8", "mxfp6",
    "mxfp4", "nvfp4", "mxfp8_train", "nf4", "w4a4-quest", "quest4",
)
# fmt: on
_RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return _RNG.normal(size=shape).astype(np.float32)


def put(x, spec):
    return jax.device_put(x, NamedSharding(MESH, spec))


def with_gradients(function):
    def run(*operands):
        result, pull = jax.vjp(function, *operands)
        return result, *pull(jnp.cos(result))

    return run


def compare(
    name, function, operands, specs, exact=True, gradients=True, eager=False, out=None, alone=None
):
    """The function of sharded operands beside that of unsharded ones; results split as types promise."""
    run = with_gradients(function) if gradients else function
    wanted = jax.jit(run if alone is None else with_gradients(alone))(*operands)
    with jax.set_mesh(MESH):
        sharded = [put(x, spec) for x, spec in zip(operands, specs, strict=True)]
        found = (run if eager else jax.jit(run))(*sharded)
    if AxisType.Explicit == KIND:
        if gradients:
            for x, gradient in zip(sharded, found[1:], strict=True):
                assert jax.typeof(gradient).sharding.spec == jax.typeof(x).sharding.spec, name
        if out is not None:
            first = jax.typeof(jax.tree.leaves(found)[0]).sharding
            assert first.is_equivalent_to(NamedSharding(first.mesh, out), wanted[0].ndim), name
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for x, y in pairs:
        x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
        assert exact is not True or (x == y).all(), (name, np.abs(x - y).max())
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max(), err_msg=name)
    print("compared", name, flush=True)


def product(dot, out):
    out = out if AxisType.Explicit == KIND else None
    return lambda x, w: dot(x, w, MATMUL, out_sharding=out)


def recipes():
    """Every recipe under one layout, and int8_train, whose sums are exact, under all of them."""
    x, w = normal(64, 128), normal(128, 64)
    names = list(LAYOUTS)
    cases = {(recipe, names[i % len(names)]) for i, recipe in enumerate(RECIPES)}
    for recipe, name in sorted(cases | {("int8_train", name) for name in names}):
        lhs, rhs, out = LAYOUTS[name]
        exact = recipe == "int8_train"
        dot, alone = (product(jq.recipe(recipe), o) for o in (out, None))
        compare(f"{recipe} {name}", dot, (x, w), (lhs, rhs), exact, out=out, alone=alone)


def smallest():
    """What failed first: a gradient, packing, and an optimizer's state."""
    x, w = normal(64, 128), normal(128, 64)
    for recipe in ("w8a8", "nf4"):
        dot = product(jq.recipe(recipe), None)
        compare(recipe, dot, (x, w), (P("data"), P("data")), exact=False)
    pack = lambda x: jq.quantize(x, jq.Quantizer(jq.INT4, "channel")).pack()  # noqa: E731
    compare("pack", pack, (x,), (P("data", "model"),), gradients=False)


def verbs():
    x = normal(64, 128)
    split = P("data", "model")
    for quantizer in (
        jq.Quantizer(jq.INT8),
        jq.Quantizer(jq.Int(4), 32, calibration=jq.calibration.minmax),
        jq.Quantizer(jq.NVFP4),
        jq.Quantizer(jq.Int(3), (16, 8)),
    ):
        name = str(quantizer.format)
        stored = lambda x, q=quantizer: jq.quantize(x, q).pack()  # noqa: E731
        values = lambda x, q=quantizer: jq.dequantize(jq.quantize(x, q).pack())  # noqa: E731
        rows = lambda x, i, q=quantizer: jq.dequantize(jq.quantize(x, q, 1)[i])  # noqa: E731
        compare(f"{name} stored", stored, (x,), (split,), gradients=False)
        compare(f"{name} values", values, (x,), (split,), gradients=False)
        compare(f"{name} simulated", lambda x, q=quantizer: jq.fake_quant(x, q), (x,), (split,))
        indices = np.array([1, 63, 0, 17, 1, 2, 3, 60])
        specs = (split, P("data"))
        compare(f"{name} rows", rows, (x, indices), specs, gradients=False)
    compare("rotated", lambda x: jq.hadamard(x, 32), (x,), (P(None, "model"),))
    eager = lambda x: jq.fake_quant(x, jq.Quantizer(jq.MXFP4))  # noqa: E731
    compare("eager", eager, (x,), (split,), eager=True)

    def learned(x, step):
        calibration = jq.calibration.Step(step)
        estimator = jq.estimators.lsq
        return jq.fake_quant(x, jq.Quantizer(jq.INT4, "channel", calibration, estimator=estimator))

    steps = np.full((64, 1), 0.1, np.float32)
    compare("lsq", learned, (x, steps), (split, P("data")), exact=False)


def operations():
    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        dot = jq.ConvGeneralDilated(NATIVE, NATIVE, NATIVE)
        return dot(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    def ragged(x, w):
        return jq.RaggedDot(NATIVE, NATIVE, NATIVE)(x, w, jnp.array([8, 8, 4, 8]))

    images, kernel = normal(8, 8, 8, 4), normal(3, 3, 4, 8)
    compare("conv", conv, (images, kernel), (P("data", "model"), P()))
    rows, experts = normal(32, 8), normal(4, 8, 16)
    compare("experts", ragged, (rows, experts), (P("data"), P("model")))
    compare("experts' columns", ragged, (rows, experts), (P("data"), P(None, None, "model")))
    q, k = normal(8, 16, 4, 8), normal(8, 16, 2, 8)
    for name in ("a8", "kv8"):
        attention = jq.recipe(name)
        specs = (P("data", None, "model"),) * 3
        run = lambda q, k, v, a=attention: a(q, k, v, is_causal=True)  # noqa: E731
        compare(name, run, (q, k, k), specs, exact=False)
    int8 = jq.recipe("int8_train")
    out = P("data", "model") if AxisType.Explicit == KIND else None

    def heads(x, w):
        sharding = None if out is None else NamedSharding(MESH, out)
        return jq.einsum("btd,dhk->bhtk", x, w, int8, out_sharding=sharding)

    x, w = normal(8, 16, 128), normal(128, 4, 32)
    compare("einsum", heads, (x, w), (P("data", None, "model"), P("model")), out=out)
    layers = normal(3, 32, 32)

    def scanned(x, layers):
        step = jax.checkpoint(lambda x, w: (int8(x, w, MATMUL), None))
        return jax.lax.scan(step, x, layers)[0]

    compare("scan", scanned, (normal(16, 32), layers), (P("data"), P(None, "data")))
    each = jax.vmap(lambda x, w: int8(x, w, MATMUL))
    specs = (P("data"), P("data", None, "model"))
    compare("vmap", each, (normal(8, 16, 32), normal(8, 32, 64)), specs)


def optimizer():
    params = {"w": normal(64, 256), "v": normal(256, 64), "b": normal(64)}
    gradients = {name: normal(*x.shape) for name, x in params.items()}
    specs = {"w": P("data", "model"), "v": P("model", "data"), "b": P()}
    own = lambda path, shape: specs[path]  # noqa: E731
    both = {"mesh": MESH, "axis": ("data", "model"), "spec": own}
    for name, options in {"without a mesh": {}, "with one": both}.items():
        tx = jq.optim.quantize_state(optax.adamw(1e-2), jq.optim.fixed(5, 4), **options)
        rest = {k: v for k, v in options.items() if k != "mesh"} | (
            {"shards": (4, 2)} if options else {}
        )
        plain = jq.optim.quantize_state(optax.adamw(1e-2), jq.optim.fixed(5, 4), **rest)

        def steps(gradients, state, params, tx=tx):
            step = lambda state, _: tx.update(gradients, state, params)[::-1]  # noqa: E731
            return jax.lax.scan(step, state, None, length=2)

        alone = jax.jit(functools.partial(steps, tx=plain))
        wanted = alone(gradients, plain.init(params), params)
        with jax.set_mesh(MESH):
            p, g = ({k: put(x, specs[k]) for k, x in tree.items()} for tree in (params, gradients))
            found = jax.jit(steps)(g, tx.init(p), p)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(x, y)
        print("compared", name, flush=True)


def applying():
    """Draws are of an element's place in the whole parameter."""
    p, u = jnp.asarray(normal(64, 48), jnp.bfloat16), jnp.asarray(1e-3 * normal(64, 48))
    apply = lambda p, u: jq.optim.stochastic_apply({"w": p}, {"w": u}, 7)  # noqa: E731
    for spec in (P("data"), P(None, "model"), P("data", "model"), P(("data", "model")), P()):
        compare(f"applied {spec}", apply, (p, u), (spec, spec), gradients=False)


if __name__ == "__main__":
    parts = smallest, recipes, verbs, operations, optimizer, applying
    {f.__name__: f for f in parts}[sys.argv[2]]()
