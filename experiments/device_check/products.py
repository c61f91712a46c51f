"""Matrix products by operand type and layout, with quantizing and with stored weights, beside bfloat16's."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from experiments.device_check.recording import Asker, race
from experiments.device_check.settings import Config
from experiments.harness.training import chips, hlo

MATRIX = (((1,), (0,)), ((), ()))
_E4M3, _E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
_TYPES = {
    "bf16": (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    "s8": (jnp.int8, jnp.int8, jnp.int32),
    "e4m3": (_E4M3, _E4M3, jnp.float32),
    "e5m2 × e4m3": (_E5M2, _E4M3, jnp.float32),
}
# Contracting axes: of the forward product, ∂lhs and ∂rhs.
_LAYOUTS = {"forward": (1, 0), "dlhs": (1, 1), "drhs": (0, 0)}
_QUANTIZING = ("w8a8", "w8a8-token", "int8_train", "fp8_train")
_COPIES = 4  # weights in turn, so that no cache holds them


@dataclasses.dataclass
class Calls:
    """A compiled product, which a run calls several times before it waits.

    Attributes:
        operations: multiplications and additions of one call.
    """

    operations: int
    compiled: Any
    _arguments: Iterator[tuple[Any, ...]]
    _count: int

    def __call__(self) -> None:
        jax.block_until_ready([self.compiled(*next(self._arguments)) for _ in range(self._count)])

    def race(self, base: "Calls", rounds: int) -> dict[str, Any]:
        """Returns the time as a ratio to another product's, and the rate."""
        found = race(self, base, "bf16", rounds)
        rate = self.operations * self._count / min(found["seconds_each"])
        chip = chips.CHIPS.get(jax.devices()[0].device_kind)
        share = {} if chip is None else {"of_bf16_peak": rate / chip.peak["bf16"]}
        return found | {"calls": self._count, "operations_per_second": rate, **share}


def read(compiled: Any) -> dict[str, Any]:
    """Returns what a compiled program multiplies, by phase, and what it holds meanwhile."""
    found, memory = Counter[str](), compiled.memory_analysis()
    for x in hlo.parse(compiled.as_text()).products():
        found[f"{x.phase}: {' × '.join(x.kinds)}"] += x.times
    return {"operands": found, "temporaries": getattr(memory, "temp_size_in_bytes", None)}


def ask(config: Config, asker: Asker) -> None:
    """Asks for products alone, with quantizing, and with stored weights."""
    for layout in _LAYOUTS:
        makers = {kind: functools.partial(_plain, config, kind, layout) for kind in _TYPES}
        _ask(config, asker, layout, makers)
    plain = functools.partial(_plain, config, "bf16", "forward")
    makers = {name: functools.partial(_quantizing, config, name) for name in _QUANTIZING}
    _ask(config, asker, "with quantizing", {"bf16 alone": plain, **makers})
    for rows in (1, 16):
        makers = {n: functools.partial(_stored, config, n, rows) for n in ("", "w8a16", "w4a16")}
        _ask(config, asker, f"stored weight, {rows} rows", {"bf16": makers.pop(""), **makers})


def _ask(config: Config, asker: Asker, what: str, makers: dict[str, Callable[[], Calls]]) -> None:
    """Asks for each product and its ratio to the first."""
    made = functools.cache(lambda name: makers[name]())
    base = next(iter(makers))
    for name in makers:
        asker(f"{name}, {what}: operands", "compiled", lambda name=name: read(made(name).compiled))
        asker(
            f"{name}, {what}: time",
            "measured",
            lambda name=name: made(name).race(made(base), config.rounds),
        )


def _calls(config: Config, operations: int, function: Any, *arguments: tuple[Any, ...]) -> Calls:
    compiled = jax.jit(function).lower(*arguments[0]).compile()
    return Calls(operations, compiled, itertools.cycle(arguments), config.calls)


def _values(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    x = 20 * jax.random.normal(jax.random.key(seed), shape)
    return jnp.clip(jnp.round(x), -127, 127).astype(dtype)


def _plain(config: Config, kind: str, layout: str) -> Calls:
    left, right, result = _TYPES[kind]
    (i, j), m, k = _LAYOUTS[layout], config.rows, config.width
    operands = _values(0, (m, k) if i == 1 else (k, m), left), _values(1, (k, k), right)

    def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        dims = (((i,), (j,)), ((), ()))
        return jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=result)

    return _calls(config, 2 * m * k * k, product, operands)


def _quantizing(config: Config, recipe: str) -> Calls:
    dot, m, k = jq.recipe(recipe), config.rows, config.width
    operands = _values(0, (m, k), jnp.bfloat16), _values(1, (k, k), jnp.bfloat16)
    return _calls(config, 2 * m * k * k, lambda x, w: dot(x, w, MATRIX), operands)


def _stored(config: Config, recipe: str, rows: int) -> Calls:
    """A few rows times a weight that is stored in few bits, or in bfloat16."""
    size = config.stored
    dot: Any = jq.recipe(recipe) if recipe else jax.lax.dot_general
    x = _values(9, (rows, size), jnp.bfloat16)

    def store(seed: jax.Array) -> Any:
        w = 20 * jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16)
        return jq.quantize(w, dot.forward.rhs, axis=0) if recipe else w

    weights = map(jax.jit(store), range(_COPIES))
    arguments = [(x, w) for w in weights]
    return _calls(config, 2 * rows * size * size, lambda x, w: dot(x, w, MATRIX), *arguments)
