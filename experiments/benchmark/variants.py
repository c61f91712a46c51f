"""The variants of the step: who computes the linears' products, and how.

Every quantized variant quantizes the same products: those of every linear layer in the blocks and of the
head.  Attention's own two products and the embedding stay in floating point for everybody.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxquant as jq
from experiments.benchmark.lm import LinenLM, NnxLM, Shape

APIS = ("linen", "nnx")
BASELINE = "float32"
# Peers' distributions by the package that they install.
PEERS = {"qwix": "qwix", "aqt": "aqtp"}
# Which of jaxquant's variants is held against which peer's: those that quantize the same products.
RIVALS = (
    ("jaxquant int8_train", "Qwix int8"),
    ("jaxquant int8_train", "AQT int8"),
    ("jaxquant w8a8", "Qwix QAT"),
    ("jaxquant w8a8, simulated", "Qwix QAT"),
)
LINEARS = "query|key|value|out|up|down|head"  # the last part of their paths

Apply = Callable[[Any, jax.Array], jax.Array]  # (params, tokens) -> logits


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the linears' products.

    Attributes:
        name: as reports call it.
        library: whose it is.
        int8_products: how many of a linear's three products (forward and both gradients) multiply
            8-bit integers.
        is_simulated: whether it rounds the forward product's operands and multiplies in floating point.
        scales: what shares a scale in the forward product, activations / weights.
        models: for each API that it exists in, from a shape and a seed to (params, apply).
    """

    name: str
    library: str
    int8_products: int
    is_simulated: bool
    scales: str
    models: dict[str, Callable[[Shape, int], tuple[Any, Apply]]]


def check_peers() -> None:
    """Raises a ValueError that says what to install unless all peers are there."""
    missing = [name for package, name in PEERS.items() if not importlib.util.find_spec(package)]
    if missing:
        raise ValueError(
            f'{" and ".join(missing)} not installed: pip install "jaxquant[benchmark]", or leave the '
            "peers out with --config.peers=False"
        )


def make_variants(peers: bool) -> list[Variant]:
    """All variants, the baseline first."""
    w8a8 = jq.recipe("w8a8")
    simulated = jq.DotGeneral(dataclasses.replace(w8a8.forward, arithmetic="simulated"))
    ours = [
        _floating(BASELINE, "float32"),
        _floating("bfloat16", "bfloat16"),
        _jaxquant("jaxquant w8a8, simulated", simulated, int8_products=0),
        _jaxquant("jaxquant w8a8", w8a8, int8_products=1),
        _jaxquant("jaxquant int8_train", jq.recipe("int8_train"), int8_products=3),
    ]
    if not peers:
        return ours
    return [*ours, _qwix("Qwix QAT", 1), _qwix("Qwix int8", 3), _aqt("AQT int8")]


def _floating(name: str, dtype: Any) -> Variant:
    def linen(shape: Shape, seed: int):
        return _linen(LinenLM(dataclasses.replace(shape, dtype=dtype)), seed)

    def in_nnx(shape: Shape, seed: int):
        return _nnx(NnxLM(dataclasses.replace(shape, dtype=dtype), nnx.Rngs(seed)))

    return Variant(name, "jax", 0, False, "—", {"linen": linen, "nnx": in_nnx})


def _jaxquant(name: str, dot_general: jq.DotGeneral, int8_products: int) -> Variant:
    def linen(shape: Shape, seed: int):
        return _linen(LinenLM(shape, dot_general), seed)

    def in_nnx(shape: Shape, seed: int):
        rules = {f"(.*/)?({LINEARS})": dot_general}
        return _nnx(jq.nnx.quantize(NnxLM(shape, nnx.Rngs(seed)), rules))

    models = {"linen": linen, "nnx": in_nnx}
    scales = operand_scales(dot_general.forward)
    return Variant(name, "jaxquant", int8_products, int8_products == 0, scales, models)


def operand_scales(operands: jq.Operands) -> str:
    """Granularities as activations / weights; what an activation's row sums over is a token's."""
    lhs, rhs = (str(q.granularity) if q else "none" for q in (operands.lhs, operands.rhs))
    return f"{lhs.replace('channel', 'token')} / {rhs}"


def _qwix(name: str, int8_products: int) -> Variant:
    """Qwix's quantized training; the gradients' products are int8 too where all three are."""

    def provider() -> Any:
        qwix = import_peer("qwix")
        rule = qwix.QtRule(
            module_path=f"(.*/)?({LINEARS})",
            weight_qtype=jnp.int8,
            act_qtype=jnp.int8,
            bwd_qtype=jnp.int8 if int8_products == 3 else None,
        )
        return qwix.QtProvider([rule])

    def linen(shape: Shape, seed: int):
        return _linen(import_peer("qwix").quantize_model(LinenLM(shape), provider()), seed)

    def in_nnx(shape: Shape, seed: int):
        model = NnxLM(shape, nnx.Rngs(seed))
        # It runs the model once, on tokens whose values and number do not matter.
        tokens = jnp.zeros((1, 2), jnp.int32)
        return _nnx(import_peer("qwix").quantize_model(model, provider(), tokens))

    models = {"linen": linen, "nnx": in_nnx}
    return Variant(name, "qwix", int8_products, False, "token / channel", models)


def _aqt(name: str) -> Variant:
    """AQT's fully quantized training, rounding to nearest as the others do; for Linen alone."""

    def linen(shape: Shape, seed: int):
        config = import_peer("aqt.jax.v2.config").fully_quantized(use_stochastic_rounding=False)
        return _linen(LinenLM(shape, config), seed)

    return Variant(name, "aqt", 3, False, "token / channel", {"linen": linen})


def import_peer(module: str) -> Any:
    """A peer's module, imported without the deprecations that are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(module)


def _linen(module: LinenLM, seed: int) -> tuple[Any, Apply]:
    """Parameters are the plain model's: the same for all variants, whatever wraps them."""
    init = _plain_init(dataclasses.replace(module.shape, dtype="float32"))
    params = init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]

    def apply(params: Any, tokens_BxT: jax.Array) -> Any:
        return module.apply({"params": params}, tokens_BxT)

    return params, apply


@functools.lru_cache
def _plain_init(shape: Shape) -> Callable[..., Any]:
    """One compilation for all variants; each call makes arrays that a step may consume."""
    return jax.jit(LinenLM(shape).init)


def _nnx(model: nnx.Module) -> tuple[Any, Apply]:
    graphdef, params = nnx.split(model, nnx.Param)
    return params, lambda params, tokens: nnx.merge(graphdef, params)(tokens)


def versions(peers: bool) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ["jax", "jaxlib", "flax", "optax", *(PEERS.values() if peers else ())]
    return {"jaxquant": jq.__version__} | {name: importlib.metadata.version(name) for name in names}
