"""The mixed-precision search on whole models: sensitivities measured once, and a budget spent by them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read

CHOICES = ("w2a16", "w3a16", "w4a16", "w8a16")


class Uneven(nnx.Module):
    """Three layers of one size, the last of which decides nearly everything."""

    def __init__(self, rngs):
        self.quiet = nnx.Linear(32, 32, rngs=rngs)
        self.silent = nnx.Linear(32, 32, rngs=rngs)
        self.loud = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        return 0.01 * self.quiet(x) + 0.001 * self.silent(x) + 5 * self.loud(x)


@pytest.fixture(scope="module")
def model():
    return Uneven(nnx.Rngs(0))


@pytest.fixture(scope="module")
def data():
    return [jax.random.normal(jax.random.key(i), (64, 32)) for i in range(2)]


def uniform_bytes(model, recipe) -> int:
    found = jq.ptq.search(model, (recipe,), [jnp.ones((1, 32))], 10**6, progress=False)
    return found.allocation.bytes


def divergence(model, reference, data) -> float:
    def one(x):
        p, q = (jax.nn.log_softmax(m(x)) for m in (reference, model))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    return float(np.mean([one(x) for x in data]))


def search(model, data, budget, **options):
    return jq.ptq.search(model, CHOICES, data, budget, progress=False, **options)


def test_it_beats_one_precision_of_the_same_bytes(model, data):
    budget = uniform_bytes(model, "w3a16")
    found = search(model, data, budget)
    assert found.allocation.bytes <= budget
    rules = dict(found.rules)
    assert jq.recipe(rules["loud"]).forward.rhs.format.bits > 3
    mixed, uniform = (
        jq.ptq.quantize(model, r, data, "rtn", progress=False)
        for r in (found.rules, {".*": "w3a16"})
    )
    assert divergence(mixed, model, data) < 0.5 * divergence(uniform, model, data)


def test_bytes_are_those_of_the_frozen_model(model, data):
    found = search(model, data, 3000)
    frozen = jq.nnx.freeze(jq.nnx.quantize(model, found.rules))
    held = sum(read(getattr(frozen, n).kernel).nbytes for n in ("quiet", "silent", "loud"))
    assert held == found.allocation.bytes <= 3000


def test_each_loss_is_the_divergence_with_that_layer_alone(model, data):
    found = search(model, data, 3000)
    for row, group in enumerate(found.groups):
        for column, choice in enumerate(CHOICES):
            rules = [(group, choice), (".*", None)]
            alone = jq.ptq.quantize(model, rules, data, "rtn", progress=False)
            expected = divergence(alone, model, data)
            assert found.losses[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_group_gets_one_recipe(model, data):
    budget = uniform_bytes(model, "w4a16")
    found = search(model, data, budget, group=lambda path: "rest" if path != "loud" else path)
    rules = dict(found.rules)
    assert found.groups["rest"] == ("quiet", "silent")
    assert rules["quiet"] == rules["silent"] != rules["loud"]


def test_any_loss_can_be_the_measure(model, data):
    def quiet_alone(model, x):
        return jnp.mean(model.quiet(x) ** 2)

    found = search(model, data, 10**6, loss=quiet_alone)
    for name, losses in zip(found.groups, found.losses, strict=True):
        assert ((losses != 0) == (name == "quiet")).all()


def test_stopped_it_goes_on_and_measures_nothing_twice(model, data, tmp_path):
    undisturbed = search(model, data, 3000)
    calls = []

    def stopping():
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return iter(data)

    with pytest.raises(KeyboardInterrupt):
        search(model, stopping, 3000, workdir=tmp_path)
    known = json.loads((tmp_path / "sensitivity.json").read_text())["losses"]
    assert 0 < len(known) < undisturbed.losses.size
    calls[:] = range(100)
    found = search(model, stopping, 3000, workdir=tmp_path)
    # Once for the fingerprint, once for the reference, once for what was not known.
    assert len(calls) - 100 == 2 + undisturbed.losses.size - len(known)
    np.testing.assert_array_equal(found.losses, undisturbed.losses)
    assert found.rules == undisturbed.rules


def test_measurements_of_another_run_are_refused(model, data, tmp_path):
    search(model, data, 3000, workdir=tmp_path)
    others = [
        ("model", Uneven(nnx.Rngs(1)), data, None),
        ("data", model, data[:1], None),
        ("loss", model, data, lambda model, x: jnp.mean(model(x) ** 2)),
    ]
    for what, other, batches, loss in others:
        with pytest.raises(ValueError, match=f"measurements of another {what}, or of another ver"):
            search(other, batches, 3000, loss=loss, workdir=tmp_path)
    (tmp_path / "sensitivity.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        search(model, data, 3000, workdir=tmp_path)


def test_another_loss_is_measured_anew(model, data, tmp_path):
    def power(n):
        return lambda model, x: jnp.mean(jnp.abs(model(x)) ** n)

    found = search(model, data, 3000, loss=power(2), workdir=tmp_path)
    again = search(model, data, 3000, loss=power(2), workdir=tmp_path)
    np.testing.assert_array_equal(found.losses, again.losses)
    with pytest.raises(ValueError, match="of another loss"):
        search(model, data, 3000, loss=power(4), workdir=tmp_path)
    numbers = iter([1.0])
    with pytest.raises(ValueError, match=r"loss holds .*attribute `fingerprint`"):
        search(model, data, 3000, loss=lambda m, x: m(x).sum() * next(numbers), workdir=tmp_path)


def test_it_prints_what_was_measured(model, data, capsys):
    found = jq.ptq.search(model, CHOICES, data, 3000)
    assert "measuring sensitivity: 100%" in capsys.readouterr().err
    assert f"{found.allocation.bytes:,} bytes" in str(found)
    assert "loud: w" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 10}, r"budget of 10 bytes is less than the smallest of these, \d+"),
        ({"group": 3}, "group is a function; got 3"),
        ({"group": lambda path: None}, "gives a layer's group by name; for '.*' it gave None"),
        ({"loss": 3}, "loss is a function; got 3"),
        ({"loss": lambda model, x: model(x)}, "loss gives a scalar; it gave shape"),
        ({"choices": 3}, "choices are recipes, each once; got 3"),
        ({"budget": "4 bits"}, "budget must be a number of bytes that is finite; got '4 bits'"),
        ({"choices": ()}, "choices are recipes, each once"),
        ({"choices": ("w2a16", "w2a16")}, "choices are recipes, each once"),
        ({"choices": ("w99a16",)}, "w99a16"),
        ({"modules": "lowd"}, "loud"),
        ({"batches": []}, "at least one batch"),
        ({"batches": [jnp.full((1, 32), jnp.nan)]}, "NaN or an Inf"),
    ],
)
def test_misuse_is_named(model, data, change, message):
    arguments = {"choices": CHOICES, "batches": data, "budget": 3000, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        jq.ptq.search(model, **arguments)
