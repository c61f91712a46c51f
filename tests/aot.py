"""Compiles one program for a TPU that is not there; `platforms_test` runs this, a process a program.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/aot.py v5e:2x2 program.txt stored '{"width": 512}'

writes the compiled text to a file, and prints as JSON what the compiler says of its memory and traffic.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from experiments.harness.models import lm
from jaxquant.operations.delaying import first_scales, is_delayed, with_ranges

# Sizes that tell the blocks' weights, the head's and the activations' shapes apart.
VOCABULARY, BATCH, TOKENS = 640, 64, 48
LINEARS = 7  # in a block: query, key, value, out, gate, up, down
MATRIX = (((1,), (0,)), ((), ()))

Program = tuple[Callable[..., Any], tuple[Any, ...]]  # to jit, and its abstract arguments


def train_step(recipe: str | None, layers: int, width: int, mesh: Mesh) -> Program:
    """A whole training step of a language model, fully sharded: parameters, optimizer and batch.

    Args:
        recipe: of the linear layers of the blocks; None leaves them in bfloat16.
        layers: blocks.
        width: of the model; its SwiGLU has twice that, its heads have 128.
        mesh: with the axis fsdp.
    """
    heads = width // 128
    config = lm.LMConfig(
        layers, width, heads, heads, 2 * width, vocab_size=VOCABULARY, dtype="bfloat16"
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: lm.LM(config, nnx.Rngs(0))))
    optimizer, rows = optax.adamw(1e-3), NamedSharding(mesh, P("fsdp"))

    def by_rows(x):
        return jax.lax.with_sharding_constraint(x, rows)

    def loss(params, tokens_BxT1):
        model = nnx.merge(graphdef, params)
        if recipe is not None:
            model = jq.nnx.quantize(model, {"blocks/.*": recipe})
        x_BxTxD = by_rows(model.embed(tokens_BxT1[:, :-1]))
        for block in model.blocks:
            x_BxTxD = by_rows(block(x_BxTxD))
        logits = model.head(model.norm(x_BxTxD)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT1[:, 1:]).mean()

    def step(params, opt_state, tokens_BxT1):
        value, gradients = jax.value_and_grad(loss)(params, tokens_BxT1)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def abstract(x):
        """Sharded by its largest axis that the mesh divides, as the harness does it."""
        axes = [axis for axis, n in enumerate(x.shape) if n % mesh.size == 0]
        spec = P(*[None] * max(axes, key=x.shape.__getitem__), "fsdp") if axes else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(abstract, (params, jax.eval_shape(optimizer.init, params)))
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS + 1), jnp.int32, sharding=rows)
    return jax.jit(step, donate_argnums=(0, 1)), (*state, tokens)


def linear_gradients(recipe: str, width: int, mesh: Mesh | None = None) -> Program:
    """One product [BATCH · TOKENS, width] × [width, 2 · width] and both its gradients."""
    dot = jq.recipe(recipe)
    if is_delayed(dot):  # by the ranges of the first step
        dot = with_ranges(dot, first_scales(dot))

    def loss(x_BxD, w_DxF):
        return jnp.sum(dot(x_BxD, w_DxF, MATRIX).astype(jnp.float32) ** 2)

    arguments = tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=mesh and NamedSharding(mesh, P("fsdp")))
        for shape in ((BATCH * TOKENS, width), (width, 2 * width))
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), arguments


def stored_product(width: int, mesh: Mesh | None = None) -> Program:
    """``w4a16`` with a weight [width, 2 · width] that is stored already, whole on every device."""
    quantizer = jq.Quantizer(jq.INT4, "channel")
    weight = jax.ShapeDtypeStruct((width, 2 * width), jnp.bfloat16)
    stored = jax.eval_shape(lambda w: jq.quantize(w, quantizer, axis=0), weight)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=mesh and NamedSharding(mesh, P())
        ),
        (jax.ShapeDtypeStruct((BATCH, width), jnp.bfloat16), stored),
    )
    return jax.jit(lambda x, w: jq.recipe("w4a16")(x, w, MATRIX)), arguments


def optimizer_update(
    optimizer: str, kernel: str | None, shapes: list[list[int]], mesh: Mesh
) -> Program:
    """An update by an optimizer on one device: its state in 5 (6) and 4 bits, or exact without a kernel."""
    # Some operations of a kernel are lowered for the kind of device of the mesh at hand.
    mesh = Mesh(mesh.devices[:1], mesh.axis_names)
    jax.set_mesh(mesh)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    tx: Any = {
        "adamw": lambda: optax.adamw(1e-2, mask=matrices),
        "lion": lambda: optax.lion(1e-3, weight_decay=1e-2),
        "momentum": lambda: optax.sgd(3e-2, momentum=0.9),
    }[optimizer]()
    if kernel is not None:
        bits = 6 if optimizer == "lion" else 5  # a momentum of 0.99 wants one more
        tx = jq.optim.quantize_state(tx, jq.optim.fixed(bits, 4), kernel=kernel)
    params = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for shape in shapes]
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
        (params, jax.eval_shape(tx.init, params), params),
    )
    return jax.jit(tx.update, donate_argnums=1), arguments


PROGRAMS = {
    "optimizer": optimizer_update,
    "step": train_step,
    "linear": linear_gradients,
    "stored": stored_product,
}


def main(topology: str, output: str, program: str, options: str) -> None:
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices).ravel(), ("fsdp",))
    function, arguments = PROGRAMS[program](mesh=mesh, **json.loads(options))
    compiled = function.lower(*arguments).compile()
    Path(output).write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    found = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "moved_bytes": compiled.cost_analysis()["bytes accessed"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
