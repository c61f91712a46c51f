"""One optimizer step on a matrix, on a model's parameters, and within a train step; and the state's bytes.

The real torchao and bitsandbytes run where they are asked for and installed (the extra `peers`); their codecs
in JAX, written after theirs, run always, and are named apart.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxquant as jq
from experiments.benchmark.lm import NnxLM, Shape
from experiments.harness.peers import optimizers

EXACT = "optax, float32"
OURS = "jaxquant, 5 + 4 bits"
MATRIX, TREE, STEP = COMPARISONS = ("matrix", "tree", "train step")
TORCH_PEERS = ("torch", "torchao", "bitsandbytes")
_TORCH = {
    "torch, float32": ("torch.optim", "AdamW", {"fused": True}),
    "torchao, 8 bits": ("torchao.optim", "AdamW8bit", {}),
    "torchao, 4 bits": ("torchao.optim", "AdamW4bit", {}),
    "bitsandbytes, 8 bits": ("bitsandbytes.optim", "AdamW8bit", {}),
}
_RATE = 1e-3


def _ours(policy: Any) -> optax.GradientTransformation:
    return jq.optim.quantize_state(optax.adamw(_RATE), policy)


def jax_optimizers() -> dict[str, optax.GradientTransformation]:
    """The contestants in JAX by name, the baseline first."""
    return {
        EXACT: optax.adamw(_RATE),
        OURS: _ours(jq.optim.fixed(5, 4)),
        "jaxquant, 8 bits": _ours(jq.optim.fixed(8)),
        "jaxquant, adaptive 5.0 bits": _ours(jq.optim.adaptive(5.0, interval=100)),
        "torchao's codec in JAX, 8 bits": optimizers.torchao_adamw(_RATE, 8),
        "torchao's codec in JAX, 4 bits": optimizers.torchao_adamw(_RATE, 4),
        "bitsandbytes' codec in JAX, 8 bits": optimizers.bitsandbytes_adamw(_RATE),
    }


def check_torch() -> None:
    """Raises a ValueError where the packages of the extra `peers` are wanted and not installed."""
    missing = [name for name in TORCH_PEERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"config.torch_peers needs {', '.join(missing)}: pip install '.[peers]' in an environment of its "
            "own, or --config.torch_peers=False"
        )


def torch_versions() -> dict[str, str]:
    """Of the packages of the extra `peers`."""
    return {name: importlib.metadata.version(name) for name in TORCH_PEERS}


@dataclasses.dataclass
class Runner:
    """An optimizer under way, which each run takes one step further.

    Attributes:
        name: as reports call it.
        nbytes: of its state: all arrays.
        elements: of the parameters.
    """

    name: str
    nbytes: int
    elements: int
    _advance: Callable[[], None]

    def __call__(self) -> None:
        self._advance()


def make_runners(
    comparison: str, shape: Shape, matrix: tuple[int, int], torch: bool
) -> list[Runner]:
    """The contestants of one comparison, the baseline first.

    Args:
        comparison: of `COMPARISONS`.
        shape: of the model.
        matrix: of the one parameter of `MATRIX`.
        torch: whether torch's own run too, where they have a comparison: not in JAX's train step.
    """
    if comparison == STEP:
        made = {k: v for k, v in jax_optimizers().items() if k == EXACT or k.startswith("jaxquant")}
        return [_train_step(name, tx, shape) for name, tx in made.items()]
    params = _params(comparison, shape, matrix)
    found = [alone(name, tx, params) for name, tx in jax_optimizers().items()]
    shapes = [x.shape for x in jax.tree.leaves(params)]
    return found + ([_of_torch(name, shapes) for name in _TORCH] if torch else [])


def _params(comparison: str, shape: Shape, matrix: tuple[int, int]) -> Any:
    if comparison == MATRIX:
        return {"w": jax.random.normal(jax.random.key(0), matrix)}
    return nnx.to_pure_dict(nnx.state(NnxLM(shape, nnx.Rngs(0)), nnx.Param))


def _runner(name: str, step: Callable[..., Any], state: Any, params: Any, *rest: Any) -> Runner:
    """A runner whose step takes (state, params, *rest), of which the first two are donated."""
    size = sum(x.size for x in jax.tree.leaves(params))
    nbytes, compiled = jq.optim.state_bytes(state), jax.jit(step, donate_argnums=(0, 1))
    held = [state, jax.tree.map(jnp.copy, params)]

    def advance() -> None:
        held[:] = jax.block_until_ready(compiled(*held, *rest))

    return Runner(name, nbytes, size, advance)


def alone(name: str, tx: Any, params: Any) -> Runner:
    """Returns the update of the parameters by the same gradients again and again."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    gradients = structure.unflatten([jax.random.normal(k, x.shape) for k, x in pairs])

    def step(state: Any, params: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return state, optax.apply_updates(params, updates)

    return _runner(name, step, tx.init(params), params, gradients)


def _train_step(name: str, tx: Any, shape: Shape) -> Runner:
    """Forward, backward and update of the model on 16 sequences of 128 tokens."""
    graphdef, params = nnx.split(NnxLM(shape, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(2), (16, 129), 0, 256)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: Any, params: Any, tokens: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return state, optax.apply_updates(params, updates)

    return _runner(name, step, tx.init(params), params, tokens)


def _of_torch(name: str, shapes: list[tuple[int, ...]]) -> Runner:
    """A peer's own optimizer on tensors of the same shapes."""
    torch = importlib.import_module("torch")
    module, kind, options = _TORCH[name]
    params = [torch.randn(*shape).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = getattr(importlib.import_module(module), kind)(params, lr=_RATE, **options)
    optimizer.step()
    held = [x for state in optimizer.state.values() for x in state.values()]
    nbytes = sum(map(_torch_bytes, held))
    return Runner(name, nbytes, sum(p.numel() for p in params), functools.partial(_step, optimizer))


def _step(optimizer: Any) -> None:
    optimizer.step()


def _torch_bytes(value: Any) -> int:
    """Bytes of a tensor of state: of the parts, where it is a subclass that keeps codes and scales."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_torch_bytes(getattr(value, name)) for name in names)
    return value.numel() * value.element_size() if hasattr(value, "numel") else 0
