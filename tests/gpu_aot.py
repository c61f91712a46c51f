"""Compiles one program for a GPU that is not there; `gpu_test` runs this, a process a program.

    python -m gpu_aot h100 out.txt linear '{"recipe": "w8a8"}'

with the variables of `targets.environment` writes the compiled text to a file, and what it says as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from experiments.harness.training import hlo, kernels, targets
from jaxquant.operations.delaying import first_scales, is_delayed, with_ranges

MATRIX, LAST = ((((axis,), (0,)), ((), ())) for axis in (1, 2))
ROWS, TERMS, COLUMNS = 512, 256, 384
IMAGES = ("NHWC", "HWIO", "NHWC")
CHANNELS = 64
QUANTIZERS = {"int8": jq.Quantizer(jq.INT8, "channel"), "fp8": jq.Quantizer(jq.E4M3)}
MATRIX_OF_STATE = (1024, 2048)
# Above these the shapes of a decoder's linear: [rows, 2048] × [2048, 4096].
STORED = (2048, 4096)
# And of one in a train step: 16 windows of 1024 tokens.
WINDOWS, TOKENS, WIDTH, HIDDEN = 16, 1024, 768, 2048

Program = tuple[Any, tuple[Any, ...]]  # a function, and its abstract arguments


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def gradients(function: Any, argnums: tuple[int, ...]) -> Any:
    def loss(*operands):
        return jnp.sum(function(*operands).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, argnums)


def linear(recipe: str) -> Program:
    """A product and both its gradients."""
    dot = jq.recipe(recipe)
    if is_delayed(dot):  # by the ranges of the first step
        dot = with_ranges(dot, first_scales(dot))
    function = gradients(lambda x, w: dot(x, w, MATRIX), (0, 1))
    return function, (array(ROWS, TERMS), array(TERMS, COLUMNS))


def layer(recipe: str) -> Program:
    """A decoder's linear in a train step: its weight in float32, and the gradient that comes to it."""
    dot = jq.recipe(recipe)

    def function(x, w, gradient):
        out, back = jax.vjp(lambda x, w: dot(x, w.astype(x.dtype), LAST), x, w)
        return out, back(gradient)

    return function, _layer_shapes()


def _layer_shapes() -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns activations, the weight, and the gradient of their product."""
    x, gradient = (array(WINDOWS, TOKENS, n) for n in (WIDTH, HIDDEN))
    return x, array(WIDTH, HIDDEN, dtype=jnp.float32), gradient


def delayed() -> Program:
    """The same in float8 with ranges that are known before the step, as delayed scaling has them."""

    def function(x, w, gradient, ranges):
        forward, weight, back = (
            jq.Quantizer(format, calibration=jq.calibration.Range(range_))
            for format, range_ in zip((jq.E4M3, jq.E4M3, jq.E5M2), ranges, strict=True)
        )
        backward = jq.Operands(back, None, "native")
        dot = jq.DotGeneral(jq.Operands(forward, weight, "native"), backward, backward)
        out, pullback = jax.vjp(lambda x, w: dot(x, w.astype(x.dtype), LAST), x, w)
        return out, pullback(gradient)

    return function, (*_layer_shapes(), 3 * (array(dtype=jnp.float32),))


def learned(recipe: str) -> Program:
    """The same of a recipe whose steps are parameters."""
    dot = jq.recipe(recipe)
    step = jnp.float32(0.1)

    def given(quantizer):
        calibration = jq.calibration.Step(step)
        return quantizer and jq.Quantizer(quantizer.format, calibration=calibration)

    forward = jq.Operands(given(dot.forward.lhs), given(dot.forward.rhs))
    function = gradients(lambda x, w: jq.DotGeneral(forward)(x, w, MATRIX), (0, 1))
    return function, (array(ROWS, TERMS), array(TERMS, COLUMNS))


def convolution(kind: str, groups: int, strides: int, quantized: bool) -> Program:
    """A 3 × 3 convolution and both its gradients, which are quantized where that is asked for."""
    q = QUANTIZERS[kind]
    back = jq.Operands(q, None, "native") if quantized else None
    conv = jq.ConvGeneralDilated(jq.Operands(q, q, "native"), back, back)

    def function(image, kernel):
        options = {"dimension_numbers": IMAGES, "feature_group_count": groups}
        return conv(image, kernel, (strides, strides), "SAME", **options)

    shapes = array(8, 16, 16, CHANNELS), array(3, 3, CHANNELS // groups, CHANNELS)
    return gradients(function, (0, 1)), shapes


def attention(recipe: str) -> Program:
    vectors = array(2, 128, 4, 64)
    attend = jq.recipe(recipe)
    return lambda q, k, v: attend(q, k, v, is_causal=True), (vectors, vectors, vectors)


def ragged(recipe: str) -> Program:
    """Eight experts' product and both its gradients."""
    dot = jq.recipe(recipe)
    product = jq.RaggedDot(dot.forward, dot.dlhs, dot.drhs)
    shapes = array(ROWS, TERMS), array(8, TERMS, COLUMNS), array(8, dtype=jnp.int32)
    return gradients(product, (0, 1)), shapes


def stored(recipe: str, rows: int, packed: bool) -> Program:
    """A product with a weight that is stored already."""
    dot = jq.recipe(recipe)

    def store(w):
        found = jq.quantize(w, dot.forward.rhs, axis=0)
        return found.pack() if packed else found

    weight = jax.eval_shape(store, array(*STORED))
    return lambda x, w: dot(x, w, MATRIX), (array(rows, STORED[0]), weight)


def optimizer(state: str) -> Program:
    """A step of AdamW over 2^21 parameters; its state in float32, or in pages of (5, 4) bits."""
    tx: Any = optax.adamw(1e-3)
    if state == "pages":
        tx = jq.optim.quantize_state(tx, jq.optim.fixed(5, 4))
    params = {"w": array(*MATRIX_OF_STATE, dtype=jnp.float32)}
    return tx.update, (params, jax.eval_shape(tx.init, params), params)


def division() -> Program:
    """The range of a quantizer divided by its format's largest value."""
    from jaxquant.formats import divide

    return lambda x: divide(x, jnp.float32(127)), (array(4096, dtype=jnp.float32),)


PROGRAMS = {
    f.__name__: f
    for f in (
        linear,
        layer,
        delayed,
        learned,
        convolution,
        attention,
        ragged,
        stored,
        optimizer,
        division,
    )
}


def main(topology: str, output: str, program: str, options: str) -> None:
    mesh = Mesh(np.array(targets.devices(topology)[:1]), ("one",))
    function, shapes = PROGRAMS[program](**json.loads(options))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), shapes
    )
    compiled = targets.lower(jax.jit(function), arguments, topology).compile()
    text = compiled.as_text()
    Path(output).write_text(text)
    parsed = hlo.parse(text)
    launched = kernels.kernels(parsed)
    found = {
        "products": [(x.phase, x.kinds, x.result.kind) for x in parsed.products()],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": sum(x.times for x in launched),
        "kernel_bytes": sum(x.times * x.nbytes for x in launched),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
