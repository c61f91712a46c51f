"""Serving: forward passes of frozen models, compiled once, with their weights as arguments.

Every variant serves the parameters of one model with float32 parameters, made from one seed: in float32, in
bfloat16 with bfloat16 parameters, or with what a library stores of them.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from experiments.benchmark.lm import NnxLM, Shape
from experiments.benchmark.step import count_products
from experiments.benchmark.variants import (
    BASELINE,
    LINEARS,
    PEERS,
    Apply,
    import_peer,
    operand_scales,
)

FORWARD, DECODE = "forward", "decode"
BFLOAT16 = "bfloat16"
# What serving is measured for: whose time is held against whose.
PAIRS = (
    (FORWARD, "jaxquant w8a8", BFLOAT16),
    (FORWARD, "jaxquant w8a8", "Qwix PTQ int8"),
    (FORWARD, "jaxquant w8a8-token", "Qwix PTQ int8"),  # scales of the same groups
    (DECODE, "jaxquant w8a16", BASELINE),
    (DECODE, "jaxquant w4a16", BASELINE),
)


@dataclasses.dataclass(frozen=True)
class Server:
    """One way to serve the model.

    Attributes:
        name: as reports call it.
        library: whose it is.
        is_integer: whether the linears multiply 8-bit integers.
        scales: what shares a scale, activations / weights.
        model: from a shape and a seed to (parameters, apply).
    """

    name: str
    library: str
    is_integer: bool
    scales: str
    model: Callable[[Shape, int], tuple[Any, Apply]]


def make_servers(part: str, peers: bool) -> list[Server]:
    """The variants of one part, the baseline first."""
    floating = [Server(BASELINE, "jax", False, "—", _float32)]
    floating.append(Server(BFLOAT16, "jax", False, "—", _bfloat16))
    if part == DECODE:
        return [*floating, _frozen("w8a16"), _frozen("w4a16")]
    theirs = [Server("Qwix PTQ int8", "qwix", True, "token / channel", _qwix)] if peers else []
    ours = [_frozen(recipe) for recipe in ("w8a8", "w8a8-token", "w4a8")]
    return [*floating, *ours, *theirs]


def _split(model: nnx.Module) -> tuple[Any, Apply]:
    graphdef, state = nnx.split(model)
    return state, lambda state, tokens: nnx.merge(graphdef, state)(tokens)


def _float32(shape: Shape, seed: int) -> tuple[Any, Apply]:
    return _split(NnxLM(shape, nnx.Rngs(seed)))


def _bfloat16(shape: Shape, seed: int) -> tuple[Any, Apply]:
    """Its parameters are bfloat16 too: nothing is converted at every call."""
    params, _ = _float32(shape, seed)
    halved = dataclasses.replace(shape, dtype=BFLOAT16)
    _, apply = _split(nnx.eval_shape(lambda: NnxLM(halved, nnx.Rngs(seed))))
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), apply


def _frozen(recipe: str) -> Server:
    operands = jq.recipe(recipe).forward

    def model(shape: Shape, seed: int) -> tuple[Any, Apply]:
        rules = {f"(.*/)?({LINEARS})": recipe}
        quantized = jq.nnx.quantize(NnxLM(shape, nnx.Rngs(seed)), rules)
        return _split(jq.nnx.freeze(quantized, donate=True))

    is_integer = operands.lhs is not None
    return Server(f"jaxquant {recipe}", "jaxquant", is_integer, operand_scales(operands), model)


def _qwix(shape: Shape, seed: int) -> tuple[Any, Apply]:
    """Qwix's post-training quantization: weights stored as int8, activations' scales found at each call."""
    qwix = import_peer("qwix")
    rule = qwix.QuantizationRule(
        module_path=f"(.*/)?({LINEARS})", weight_qtype=jnp.int8, act_qtype=jnp.int8
    )
    # It runs the model once, on tokens whose values and number do not matter, and stores the weights.
    tokens = jnp.zeros((1, 2), jnp.int32)
    return _split(
        qwix.quantize_model(NnxLM(shape, nnx.Rngs(seed)), qwix.PtqProvider([rule]), tokens)
    )


@dataclasses.dataclass
class Service:
    """A compiled forward pass and its arguments.

    Attributes:
        server: what it computes.
        products: of 8-bit integers, as `count_products` found them.
        temporaries: bytes that it holds beside its arguments and results; None where the backend does not
            say.
        arguments: bytes of its arguments, parameters before all.
    """

    server: Server
    products: dict[str, int]
    temporaries: int | None
    arguments: int | None
    _compiled: Any
    _params: Any
    _tokens: jax.Array

    def __call__(self) -> None:
        self.logits()

    def logits(self) -> jax.Array:
        return jax.block_until_ready(self._compiled(self._params, self._tokens))


def open_service(server: Server, shape: Shape, tokens_BxT: jax.Array, seed: int) -> Service:
    """Builds and compiles a variant's forward pass.

    Raises:
        RuntimeError: a peer that does not work here, with both sides' versions.
    """
    try:
        return _open(server, shape, tokens_BxT, seed)
    except Exception as error:
        if server.library not in PEERS:
            raise
        peer = PEERS[server.library]
        words = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"{server.name} fails ({peer} {importlib.metadata.version(peer)}, jax {jax.__version__}): "
            f"{type(error).__name__}: {words}. --config.peers=False leaves peers out"
        ) from error


def _open(server: Server, shape: Shape, tokens_BxT: jax.Array, seed: int) -> Service:
    params, apply = server.model(shape, seed)
    traced = jax.jit(apply).trace(params, tokens_BxT)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    return Service(
        server,
        count_products(traced.jaxpr.jaxpr),
        getattr(memory, "temp_size_in_bytes", None),
        getattr(memory, "argument_size_in_bytes", None),
        compiled,
        params,
        tokens_BxT,
    )


def service_deviation(service: Service, shape: Shape, tokens: int) -> str:
    """How what it multiplies differs from what its kind should; empty where it does not."""
    found, linears = service.products, len(shape.linears) * service.server.is_integer
    if found["int8"] != linears:
        return f"{found['int8']} int8 products where the linears have {linears}"
    multiply_adds = tokens * sum(a * b for a, b in shape.linears)
    if linears and found["int8_multiply_adds"] != multiply_adds:
        share = found["int8_multiply_adds"] / multiply_adds
        return f"its int8 products are not the linears': {share:.0%} of their multiply-adds"
    return ""


def logit_error(logits: jax.Array, reference: jax.Array) -> float:
    """‖y − r‖ / ‖r‖, of all logits together.

    >>> logit_error(jnp.array([3.0, 4.5]), jnp.array([3.0, 4.0]))
    0.1
    """
    y, r = (np.asarray(x, np.float64) for x in (logits, reference))
    return float(np.linalg.norm(y - r) / np.linalg.norm(r))
