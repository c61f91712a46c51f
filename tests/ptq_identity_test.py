import functools
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from jaxquant.ptq.identity import identity

pytestmark = pytest.mark.exhaustive  # minutes, once in CI


def known(value) -> str:
    return identity("loss", value)


def power(n):
    return lambda model, x: (model(x) ** n).mean()


def weighted(x, weights):
    return x * weights


class Scorer:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return x * self.scale


class Doubled(nnx.Module):
    def __init__(self, seed=0, width=4, epsilon=1e-6):
        self.linear = nnx.Linear(4, width, rngs=nnx.Rngs(seed))
        self.norm = nnx.BatchNorm(width, epsilon=epsilon, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return 2 * self.norm(self.linear(x))


def moved():
    model = Doubled()
    model.norm.mean[...] = model.norm.mean[...] + 1
    return model


def renamed(model):
    """Of the same class by name, with another call."""

    class Doubled(nnx.Module):
        def __init__(self):
            self.linear, self.norm = model.linear, model.norm

        def __call__(self, x):
            return 3 * self.norm(self.linear(x))

    Doubled.__qualname__ = "Doubled"
    return Doubled()


def of_one_scope(flag):
    return (lambda x: x + 1) if flag else (lambda x: x - 1)


def with_global(value):
    """A function of a module in which LIMIT is a value."""
    space = {"__name__": "somewhere", "jnp": jnp, "LIMIT": value}
    exec("def loss(x):\n    return jnp.minimum(x, LIMIT)\n", space)
    return space["loss"]


def with_default(value):
    return lambda x, n=value: x * n


def by_key(n):
    return lambda x, *, n=n: x * n


A = {
    "lambdas of one scope": lambda i: of_one_scope(i == 0),
    "a number closed over": power,
    "an array closed over": lambda i: (lambda a: lambda x: x * a)(jnp.full(3, i)),
    "a shape": lambda i: (lambda a: lambda x: x * a)(np.zeros([(2, 3), (3, 2)][i])),
    "a type": lambda i: (lambda a: lambda x: x * a)(np.zeros(2, [np.int32, np.float32][i])),
    "a function closed over": lambda i: jax.jit(power(i)),
    "within jax.vmap": lambda i: jax.vmap(with_default(i)),
    "a default": with_default,
    "a keyword's default": by_key,
    "a global": with_global,
    "a partial's array": lambda i: functools.partial(weighted, weights=jnp.arange(3) + i),
    "a partial's function": lambda i: functools.partial([weighted, np.subtract][i]),
    "a callable object": Scorer,
    "a bound method": lambda i: Scorer(i).__call__,
    "a builtin": lambda i: [max, min][i],
    "an activation": lambda i: [jax.nn.relu, jax.nn.gelu][i],
    "an initializer": lambda i: jax.nn.initializers.normal(1.0 + i),
    "a key": lambda i: jax.random.key(i),
    "a model's weights": Doubled,
    "a model's width": lambda i: Doubled(0, 4 + i),
    "a model's constants": lambda i: Doubled(0, 4, [1e-6, 1e-2][i]),
    "a model's statistics": lambda i: [Doubled, moved][i](),
    "a model's code": lambda i: [lambda m: m, renamed][i](Doubled()),
    "a model closed over": lambda i: (lambda m: lambda x: m(x))(Doubled(i)),
    "a dictionary": lambda i: {"a": [1, (2, {3 + i})]},
    "a name given": lambda i: named(threading.Lock(), f"version {i}"),
}


class named:
    def __init__(self, lock, fingerprint):
        self.lock, self.fingerprint = lock, fingerprint


@pytest.mark.parametrize("what", A)
def test_what_is_made_again_is_the_same_and_what_differs_is_not(what):
    assert known(A[what](0)) == known(A[what](0))
    assert known(A[what](0)) != known(A[what](1))


@pytest.mark.long
def test_another_process_comes_to_the_same():
    code = "import ptq_identity_test as t; print([t.known(make(0)) for make in t.A.values()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": "7", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([known(make(0)) for make in A.values()])


@pytest.mark.parametrize("value", [threading.Lock(), iter([1]), memoryview(b"x")])
@pytest.mark.parametrize("hide", [lambda v: v, lambda v: lambda: v, Scorer, lambda v: {"a": [v]}])
def test_what_cannot_be_told_is_refused_by_name(value, hide):
    with pytest.raises(ValueError, match=r"loss holds .* cannot be told.*attribute `fingerprint`"):
        known(hide(value))


def test_what_holds_itself_is_known():
    def made(n):
        def count(x):
            return x if x == n else count(x + 1)

        return count

    assert known(made(3)) == known(made(3)) != known(made(4))


def test_tied_weights_are_another_model():
    one, two = Doubled(), Doubled()
    assert known([one, two]) != known([one, one])
