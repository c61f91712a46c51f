"""Numbers beside NumPy's in float64, bit for bit, and beside the CPU's where a reference is long."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from experiments.device_check.recording import Asker, compare
from experiments.device_check.settings import Config
from jaxquant.formats import divide
from jaxquant.numerics import rounding
from jaxquant.numerics.hadamard import hadamard

MATRIX = (((1,), (0,)), ((), ()))
_SHAPES = {"square": (256, 256, 256), "odd": (30, 50, 70), "one row": (1, 512, 256)}
_FORMATS = {"int8": jq.INT8, "int4": jq.INT4, "e4m3": jq.E4M3, "e5m2": jq.E5M2}
_FORWARD = ("w8a8", "w8a8-token", "int8_train", "fp8_train", "w4a16")
_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "e4m3": jnp.float8_e4m3fn}
_CHANNEL = jq.Quantizer(jq.INT8, "channel")

Found = dict[str, Any]


def ask(config: Config, asker: Asker) -> None:
    """Asks for divisions, scales and codes, products, and whole operations."""
    questions = {**_divisions(config.values)}
    for name, form in _FORMATS.items():
        questions[f"{name} scales"] = functools.partial(_scales, form)
        questions[f"{name} codes"] = functools.partial(_codes, form)
    for name, shape in _SHAPES.items():
        questions[f"int8 sums, {name}"] = functools.partial(_sums, *shape)
    for name, dtype in _TYPES.items():
        for level in ("default", "highest"):
            questions[f"{name} products, {level}"] = functools.partial(_product, dtype, level)
    for name in _FORWARD:
        questions[f"{name} forward"] = functools.partial(_forward, jq.recipe(name))
    for name, answer in questions.items():
        asker(f"{name} beside float64", "measured", answer)
    for name, (function, *args) in _operations().items():
        answer = functools.partial(_beside_cpu, function, *args)
        asker(f"{name} beside the CPU", "measured", answer)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ---- arithmetic, scales and codes


def _divisions(values: int) -> dict[str, Callable[[], Found]]:
    a = _normal(values)
    b = np.abs(_normal(values, seed=1)) + np.float32(1e-3)
    over, under = a.astype(np.float64), b.astype(np.float64)
    return {
        "a / b": lambda: compare(jax.jit(jnp.divide)(a, b), over / under),
        "1 / b": lambda: compare(jax.jit(lambda b: 1 / b)(b), 1 / under),
        "a / 127": lambda: compare(jax.jit(lambda a: divide(a, 127))(a), over / 127),
        "square root": lambda: compare(jax.jit(jnp.sqrt)(b), np.sqrt(under)),
    }


def _quantized(form: Any) -> tuple[np.ndarray, jq.QArray]:
    """Quantizes rows whose magnitudes are 2^−30 to 2^30."""
    exponents = np.random.default_rng(1).integers(-30, 31, (256, 1))
    x = np.ldexp(_normal(256, 64), exponents).astype(np.float32)
    return x, jax.jit(lambda x: jq.quantize(x, jq.Quantizer(form, "channel"), axis=1))(x)


def _scales(form: Any) -> Found:
    x, found = _quantized(form)
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    return compare(found.scale, largest / float(form.max_value))


def _codes(form: Any) -> Found:
    """Codes that the device's own scales should give."""
    x, found = _quantized(form)
    top = float(form.max_value)
    grid = (x / np.asarray(found.scale, np.float64)).clip(-top, top)
    return compare(found.qvalue, np.rint(grid) if isinstance(form, jq.Int) else grid)


# ---- products


def _sums(m: int, k: int, n: int) -> Found:
    """Two layouts of a product of integers."""
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.integers(-127, 128, s, dtype=np.int8) for s in ((m, k), (k, n)))
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.int32)
    plain = jax.jit(lambda x, w: dot(x, w, MATRIX))(lhs, rhs)
    turned = jax.jit(lambda x, w: dot(x, w, (((0,), (1,)), ((), ()))))(lhs.T, rhs.T)
    return compare(np.stack([plain, turned]), np.stack(2 * [lhs.astype(np.int64) @ rhs]))


def _product(dtype: Any, level: str) -> Found:
    """Sums of 4096 terms in float32; their error tells TF32 and short accumulators."""
    lhs, rhs = (_normal(*s).astype(dtype) for s in ((64, 4096), (4096, 64)))
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    found = jax.jit(lambda x, w: dot(x, w, MATRIX, precision=level))(lhs, rhs)
    return compare(found, lhs.astype(np.float64) @ rhs.astype(np.float64))


def _forward(dot: jq.DotGeneral) -> Found:
    """A recipe's product beside that of the operands as the device itself stores them."""
    x, w = _normal(128, 256), _normal(256, 192, seed=1)

    def stored(x: np.ndarray, quantizer: jq.Quantizer | None, axis: int) -> np.ndarray:
        if quantizer is None:
            return x.astype(np.float64)
        found = jax.jit(lambda x: jq.quantize(x, quantizer, axis=axis))(x)
        return np.asarray(found.qvalue).astype(np.float64) * np.asarray(found.scale, np.float64)

    exact = stored(x, dot.forward.lhs, 1) @ stored(w, dot.forward.rhs, 0)
    return compare(jax.jit(lambda x, w: dot(x, w, MATRIX))(x, w), exact)


# ---- operations, whose every number the CPU has too


def _beside_cpu(function: Callable[..., Any], *args: Any) -> Found:
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        results = jax.tree.leaves(jax.jit(function)(*jax.device_put(args, device)))
        found.append(np.concatenate([np.ravel(x) for x in results]))
    return compare(*found)


def _operations() -> dict[str, tuple[Any, ...]]:
    """Returns functions and their arguments by name."""
    x, w = _normal(128, 256), _normal(256, 192, seed=1)
    image, window = _normal(4, 8, 8, 32), _normal(3, 3, 32, 32, seed=1)
    heads = [_normal(2, 32, 4, 16, seed=i) for i in range(3)]
    ragged = jq.RaggedDot(jq.recipe("int8_train").forward)
    trained = ("int8_train", "fp8_train", "mxfp8_train")
    blocks = {"mxfp8": jq.MXFP8, "mxfp4": jq.MXFP4, "nvfp4": jq.NVFP4}
    return {
        **{f"{n}, product and gradients": (_gradients(_dot(n)), x, w) for n in trained},
        **{f"{n}, quantized": (_fake(form), x) for n, form in blocks.items()},
        "int8 convolution and gradients": (_gradients(_convolution(1)), image, window),
        "int8 convolution, depthwise": (_convolution(32), image, window[:, :, :1]),
        "int8 ragged product": (
            ragged,
            x,
            _normal(4, 256, 48),
            np.array([50, 10, 4, 64], np.int32),
        ),
        **{f"attention {n}": (_attention(n), *heads) for n in ("a8", "kv8")},
        "stochastic rounding": (lambda x: rounding.stochastic(x, jax.random.key(3)), 10 * x),
        "rotation": (lambda x: hadamard(x, 32, -1), x),
        "optimizer in 5 bits": (_updated, w),
    }


def _fake(form: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jq.fake_quant(x, jq.Quantizer(form), axis=1)


def _dot(name: str) -> Callable[..., jax.Array]:
    dot = jq.recipe(name)
    return lambda x, w: dot(x, w, MATRIX)


def _convolution(groups: int) -> Callable[..., jax.Array]:
    back = jq.Operands(_CHANNEL, None, "native") if groups == 1 else None
    conv = jq.ConvGeneralDilated(jq.Operands(_CHANNEL, _CHANNEL, "native"), back, back)
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    return lambda x, w: conv(x, w, (1, 1), "SAME", **layout)


def _attention(name: str) -> Callable[..., jax.Array]:
    return functools.partial(jq.recipe(name), is_causal=True)


def _gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def found(x: jax.Array, w: jax.Array) -> Any:
        out, back = jax.vjp(function, x, w)
        return out, back(jnp.cos(out))

    return found


def _updated(w: jax.Array) -> jax.Array:
    """Returns a parameter after three steps, the later ones from state that was encoded."""
    tx = jq.optim.quantize_state(optax.adamw(1e-3), jq.optim.fixed(5, 4))

    def step(carry: Any, place: jax.Array) -> Any:
        w, state = carry
        updates, state = tx.update(jnp.sin(w * place), state, w)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (w, tx.init(w)), jnp.arange(1.0, 4.0))[0][0]
