"""Post-training quantization of whole NNX models: layer by layer, streamed, and going on where it stopped."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read, write
from jaxquant.ptq import solvers, statistics

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

WIDTH = 32


def bent(x):
    """An odd function: a rotation would gather a mean, such as ReLU's, in one coordinate."""
    return jnp.arcsinh(x)


class MLP(nnx.Module):
    """Three layers of one shape, which compile once, and one that is not called."""

    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.middle = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.unused = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(bent(self.middle(bent(self.up(x)))))


class Stack(nnx.Module):
    """The same layer twice, their parameters stacked."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return bent(layer(x))

        return run(self.layers, x)


def batches(n: int = 3, outlier: float = 1.0) -> list[jax.Array]:
    """Correlated inputs, the first channel `outlier` times as large."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(WIDTH, WIDTH)) / 4
    mix[:, 0] *= outlier
    return [jnp.array(rng.normal(size=(64, WIDTH)) @ mix, jnp.float32) for _ in range(n)]


RULES = [("unused", None), (".*", "w3a16")]


def mlp() -> MLP:
    return MLP(nnx.Rngs(0))


def quantized(model, rules, data, method="gptq", **options):
    return jq.ptq.quantize(model, rules, data, method, progress=False, **options)


def weights(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def assert_same(a, b) -> None:
    for left, right in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(left, right)


def error(model, reference, data) -> float:
    """Mean squared error of the outputs."""
    return float(np.mean([jnp.mean((model(x) - reference(x)) ** 2) for x in data]))


def test_a_layer_gets_what_its_solver_gives():
    layer, data = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), batches()
    state = statistics.statistics(WIDTH)
    for x in data:
        state = statistics.update(state, x)
    forward = jq.recipe("w3a16").forward.rhs
    expected = solvers.gptq(read(layer.kernel), state.hessian, forward)
    found = read(quantized(layer, {".*": "w3a16"}, data).kernel).unpack()
    np.testing.assert_array_equal(found.qvalue, expected.qvalue)
    np.testing.assert_array_equal(found.scale, expected.scale)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("recipe", "method", "outlier"),
    [
        ("w3a16", "gptq", 1),
        ("w3a16", "awq", 10),
        ("w3a16", "awq+gptq", 10),
        ("w8a8", "smoothquant", 100),
    ],
)
def test_every_method_loses_less_than_rounding_to_nearest(recipe, method, outlier):
    model, data, held_out = mlp(), batches(6, outlier)[:4], batches(6, outlier)[4:]
    rules = [("unused", None), (".*", recipe)]
    loss = error(quantized(model, rules, data, method), model, held_out)
    assert loss < 0.9 * error(quantized(model, rules, data, "rtn"), model, held_out)


def test_a_rotation_spreads_a_large_channel():
    layer, data = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), batches(6, outlier=30)
    rounded, rotated, solved = (
        error(quantized(layer, {".*": "w4a4-token"}, data[:4], method), layer, data[4:])
        for method in ("rtn", "hadamard", "hadamard+gptq")
    )
    assert solved < 0.6 * rotated < 0.3 * rounded


def test_a_layer_sees_its_inputs_as_the_layers_before_it_leave_them():
    model, data = mlp(), batches()
    rest = [("head|unused", None)]
    # With room for one layer's statistics at a time, as a second call on a model half quantized.
    whole = quantized(model, [*rest, (".*", "w2a16")], data, memory=1)
    first = quantized(model, [("middle", None), *rest, ("up", "w2a16")], data)
    middle = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    middle.kernel, middle.bias = model.middle.kernel, model.middle.bias
    seen = [bent(first.up(x)) for x in data]
    expected = read(quantized(middle, {".*": "w2a16"}, seen).kernel)
    unaware = read(quantized(middle, {".*": "w2a16"}, [bent(model.up(x)) for x in data]).kernel)
    np.testing.assert_array_equal(read(whole.middle.kernel).qvalue, expected.qvalue)
    assert (np.asarray(unaware.qvalue) != np.asarray(expected.qvalue)).any()


@pytest.mark.parametrize("memory", [2**24, 1])
def test_shared_statistics_change_nothing_and_spare_a_pass(memory):
    model, passes = mlp(), []

    def data():
        passes.append(1)
        return iter(batches())

    shared = jq.ptq.SharedStatistics(model, data)
    for recipe, method in (("w2a16", "gptq"), ("w4a16g16", "hadamard+gptq"), ("w4a4", "gptq")):
        rules, begun = [("unused", None), (".*", recipe)], len(passes)
        found = quantized(model, rules, data, method, memory=memory, shared=shared)
        spared, begun = len(passes) - begun, len(passes)
        assert_same(found, quantized(model, rules, data, method, memory=memory))
        is_first = recipe == "w2a16"
        assert spared == len(passes) - begun - (not is_first)


def test_statistics_of_another_model_are_refused():
    model, data = mlp(), batches()
    shared = jq.ptq.SharedStatistics(model, data)
    with pytest.raises(ValueError, match="of another model"):
        quantized(mlp(), RULES, data, shared=shared)
    with pytest.raises(ValueError, match="of another batches"):
        quantized(model, RULES, batches(), shared=shared)


@pytest.mark.long
def test_stacked_layers_are_solved_as_if_alone():
    model, data = Stack(nnx.Rngs(0)), batches()
    found = read(quantized(model, {".*": "w3a16"}, data).layers.kernel)
    seen = data
    for i in range(2):
        layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        write(layer.kernel, read(model.layers.kernel)[i])  # biases are zero
        alone = read(quantized(layer, {".*": "w3a16"}, seen).kernel)
        np.testing.assert_array_equal(found.qvalue[i], alone.qvalue)
        seen = [bent(layer(x)) for x in seen]


def test_the_model_given_stays_as_it_is():
    model = mlp()
    before, slot = weights(model), model.up.dot_general
    quantized(model, RULES, batches(), "awq+gptq")
    for left, right in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(left, right)
    assert model.up.dot_general is slot


@pytest.mark.long
def test_activations_do_not_pile_up():
    """What is alive when a batch is asked for does not grow with the batches before it."""
    model = mlp()

    def most(count: int) -> int:
        alive = []

        def start():
            for x in batches(1) * count:
                gc.collect()
                alive.append(sum(a.nbytes for a in jax.live_arrays()))
                yield x + 1

        quantized(model, RULES, start)
        return max(alive)

    few = most(2)
    assert most(12) <= few + batches(1)[0].nbytes


def test_progress_is_shown_where_it_is_wanted(capsys):
    jq.ptq.quantize(mlp(), RULES, batches(1))
    assert "quantizing by gptq: 100%" in capsys.readouterr().err
    quantized(mlp(), RULES, batches(1))
    assert capsys.readouterr().err == ""


def test_stopped_anywhere_it_goes_on_and_ends_in_the_same_bits(tmp_path):
    model, data = mlp(), batches(2)
    undisturbed = quantized(model, RULES, data, "awq+gptq", memory=1)
    starts, ends = [], []

    def until(limit):
        def start():
            starts.append(1)
            if len(starts) > limit:
                raise KeyboardInterrupt
            yield from data

        return start

    for limit in range(2, 12):
        starts.clear()
        try:
            found = quantized(
                model, RULES, until(limit), "awq+gptq", memory=1, workdir=tmp_path / "work"
            )
        except KeyboardInterrupt:
            continue
        finally:
            ends.append(len(list((tmp_path / "work").glob("*.npz"))))
        assert_same(found, undisturbed)
        break
    assert ends[-1] == 3, "a file for each of the three layers"
    assert ends == sorted(ends)
    assert len(set(ends)) > 2, "it was stopped between layers"
    # All of them known, it starts the batches to see what they are, and no more.
    starts.clear()
    assert_same(
        quantized(model, RULES, until(2), "awq+gptq", memory=1, workdir=tmp_path / "work"), found
    )


def test_a_folder_of_another_run_is_refused(tmp_path):
    model, data = mlp(), batches(1)
    quantized(model, RULES, data, workdir=tmp_path)
    others = [
        ("model", MLP(nnx.Rngs(1)), RULES, data, "gptq"),
        ("data", model, RULES, batches(2), "gptq"),
        ("method", model, RULES, data, "awq"),
        ("rules", model, [("unused", None), (".*", "w4a16")], data, "gptq"),
    ]
    for what, *arguments in others:
        with pytest.raises(ValueError, match=f"of another {what}, or of another version"):
            quantized(*arguments, workdir=tmp_path)
    (stage,) = tmp_path.glob("*.npz")
    whole = stage.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:100], whole[:-200], bytes(flipped)):
        stage.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged.*delete it"):
            quantized(model, RULES, data, workdir=tmp_path)
    stage.unlink()
    assert_same(quantized(model, RULES, data, workdir=tmp_path), quantized(model, RULES, data))


def test_calls_of_one_scope_are_two(tmp_path):
    model, data = mlp(), batches(1)

    def scaled(n):
        return lambda model, x: model(x * n)

    whole = quantized(model, RULES, data, call=scaled(2.0), workdir=tmp_path)
    assert_same(quantized(model, RULES, data, call=scaled(2.0), workdir=tmp_path), whole)
    for other in (scaled(3.0), lambda model, x: model(-x), None):
        with pytest.raises(ValueError, match="of another call"):
            quantized(model, RULES, data, call=other, workdir=tmp_path)


def test_layers_staged_otherwise_are_quantized_anew(tmp_path):
    """The last layer alone is a stage both times, but it saw others before it."""
    model, data = mlp(), batches(2)
    layer = 4 * WIDTH * (WIDTH + 2)
    for memory in (layer, 2 * layer, 3 * layer):
        found = quantized(model, RULES, data, memory=memory, workdir=tmp_path)
        assert_same(found, quantized(model, RULES, data, memory=memory))


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (RULES, {"method": "magic"}, "method is one of rtn, gptq.*got 'magic'"),
        (RULES, {"method": None}, "method is one of"),
        (RULES, {"method": "gptq+gptq"}, "each part once; got 'gptq\\+gptq'"),
        (RULES, {"method": "rtn+gptq"}, "rtn and gptq both round"),
        (RULES, {"method": "awq+smoothquant"}, "both scale channels"),
        (RULES, {"memory": 0}, "memory must be an integer number of bytes of at least 1; got 0"),
        ({".*": "w3a16"}, {}, "unused is not called on the calibration data"),
        ({".*": None}, {}, "quantize no weights"),
        ({"haed": "w3a16"}, {}, "head"),
        ({"(": "w3a16"}, {}, "regular expression"),
        ({"up": "w4a4-lsq"}, {}, "learned steps"),
        ({"up": jq.recipe("w4a16g16"), "head": "w4a8g128"}, {}, "head"),
    ],
)
def test_misuse_is_named(rules, options, message):
    with pytest.raises(ValueError, match=message):
        quantized(mlp(), rules, batches(1), **options)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "hadamard+gptq"])
@pytest.mark.parametrize(
    ("make", "shape", "found"),
    [
        (
            lambda: nnx.Conv(8, 8, (3,), feature_group_count=4, rngs=nnx.Rngs(0)),
            (4, 16, 8),
            r"feature_group_count 4 \(a grouped convolution\)",
        ),
        (
            lambda: nnx.Conv(
                8, 8, (3,), mask=jnp.ones((3, 8, 8)).at[0, 1].set(0), rngs=nnx.Rngs(0)
            ),
            (4, 16, 8),
            "a mask",
        ),
    ],
    ids=["groups", "mask"],
)
def test_layers_for_rtn_alone_say_so(make, shape, found, method):
    recipe = "w8a8-token" if method == "smoothquant" else "w8a16"
    layer, data = make(), [jnp.ones(shape)]
    with pytest.raises(
        ValueError, match=rf"{found}, which method '{re.escape(method)}' .*; method 'rtn' does"
    ):
        quantized(layer, {".*": recipe}, data, method=method)
    assert quantized(layer, {".*": "w8a16"}, data, method="rtn")(data[0]).shape


def test_a_mask_that_hides_nothing_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (4, 16, 8))
    layers = [nnx.Conv(8, 8, (3,), mask=m, rngs=nnx.Rngs(0)) for m in (None, jnp.ones((3, 8, 8)))]
    plain, masked = (quantized(layer, {".*": "w3a16"}, [x])(x) for layer in layers)
    np.testing.assert_allclose(masked, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_batch_axes_are_matrices_of_their_own(method):
    layer = nnx.LinearGeneral(WIDTH, 8, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    data = [jnp.stack([x, 3 * x[:, ::-1], x**2]) for x in batches(2)]
    whole = quantized(layer, {".*": "w3a16"}, data, method)
    for i in range(3):
        alone = nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0))
        write(alone.kernel, read(layer.kernel)[i])
        expected = quantized(alone, {".*": "w3a16"}, [x[i] for x in data], method)(data[0][i])
        np.testing.assert_allclose(whole(data[0])[i], expected, rtol=1e-3, atol=1e-3)


def test_batches_that_start_once_are_refused():
    with pytest.raises(ValueError, match=r"gone through several times.*got generator"):
        quantized(mlp(), RULES, (x for x in batches()))
