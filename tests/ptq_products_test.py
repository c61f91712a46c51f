"""Post-training quantization of what people write themselves: each matrix by what it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.nnx.modules import read
from jaxquant.numerics.stored import Stored
from jaxquant.ptq import smooth, solvers, statistics

pytestmark = [
    pytest.mark.usefixtures("as_users_compute"),
    pytest.mark.exhaustive,
]  # looks at our arithmetic, not at versions of others

N, M, COUNT = 32, 16, 3
RUN = nnx.jit(lambda model, *inputs: model(*inputs))


def param(key, *shape):
    return nnx.Param(0.3 * jax.random.normal(jax.random.key(key), shape))


def correlated(key, *shape):
    """Inputs whose channels go together, so that rounding that makes up for errors is another one."""
    mix = jax.random.normal(jax.random.key(9), (shape[-1], shape[-1])) / 4
    return jax.random.normal(jax.random.key(key), shape) @ mix


def solved(method, weight, seen, recipe="w3a16"):
    """What comes back of one matrix [n, m], by the rows [..., n] that it multiplies, summed by NumPy."""
    quantizer = jq.recipe(recipe).forward.rhs
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in seen])
    sums = rows.T @ rows, np.abs(rows).max(0), np.abs(rows).sum(0)
    count = jnp.int32(len(rows)), jnp.int32(0)
    state = statistics.InputStatistics(*(jnp.asarray(x, jnp.float32) for x in sums), *count)
    if method == "gptq":
        return jq.dequantize(solvers.gptq(weight, state.hessian, quantizer))
    scale = smooth.awq_scale(weight, state, quantizer)[:, None]
    return jq.dequantize(solvers.rtn(weight * scale, quantizer)) / scale


def quantized(model, batches, method="gptq", rules=None, **options):
    rules = {".*": "w3a16"} if rules is None else rules
    return jq.ptq.quantize(model, rules, batches, method, progress=False, **options)


class Raw(nnx.Module):
    """Raw products: the weight on either side, side by side in any order, in parts, by groups, in loops."""

    def __init__(self, how):
        self.how = nnx.static(how)
        shapes = {
            "left": (M, N),
            "heads": (COUNT, N, M),
            "heads behind": (N, COUNT, M),
            "two orders": (2, COUNT, N, M),
            "ragged": (COUNT, N, M),
            "parts": (N, 3 * M),
            "twice": (N, M),
            "recurrent": (N, N),
            "stacked": (N, COUNT, N),
            "cond": (COUNT, N, M),
        }
        self.weight = param(0, *shapes[how])

    def __call__(self, x):
        w = self.weight[...]
        return getattr(self, f"_{self.how.replace(' ', '_')}")(w, x)

    def _left(self, w, x):
        return jnp.einsum("mn,btn->btm", w, x)

    def _heads(self, w, x):
        return jnp.einsum("gtn,gnm->gtm", x, w)

    def _heads_behind(self, w, x):
        return jnp.einsum("tgn,ngm->tgm", x, w)

    def _two_orders(self, w, x):
        return jax.lax.dot_general(x, w, (((3,), (2,)), ((0, 1), (1, 0))))

    def _ragged(self, w, x):
        return jax.lax.ragged_dot(x, w, jnp.array([4, 0, 6], jnp.int32).at[1].add(5))

    def _parts(self, w, x):
        a, b, c = jnp.split(w, 3, axis=1)
        return (x @ a) * jnp.tanh(x @ b) + (2 * x) @ c

    def _twice(self, w, x):
        return (x @ w) + (3 * x[:, ::-1]) @ w

    def _recurrent(self, w, x):
        def turn(h, x):
            h = jnp.tanh(h @ w + x)
            return h, h

        return jax.lax.scan(turn, jnp.zeros(x.shape[1:]), x)[1]

    def _stacked(self, w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(w, 1, 0))[0]

    def _cond(self, w, x):
        index = (x.sum() > 0).astype(jnp.int32)
        return jax.lax.switch(index, [lambda x: x @ w[0], lambda x: (2 * x) @ w[1]], x)


def inputs(how):
    shapes = {
        "heads": (COUNT, 20, N),
        "heads behind": (20, COUNT, N),
        "two orders": (COUNT, 2, 20, N),
        "ragged": (15, N),
        "recurrent": (7, 6, N),
    }
    shape = shapes.get(how, (4, 10, N))
    found = [correlated(i, *shape) for i in (1, 2)]
    return [jnp.abs(found[0]), -jnp.abs(found[1])] if how == "cond" else found


def matrices(how, w, xs):
    """Of each matrix: where it lies in the weight, and what it is multiplied with."""
    if how == "left":
        return [(lambda w: w.T, xs)]
    if how == "heads":
        return [(lambda w, i=i: w[i], [x[i] for x in xs]) for i in range(COUNT)]
    if how == "heads behind":
        return [(lambda w, i=i: w[:, i], [x[:, i] for x in xs]) for i in range(COUNT)]
    if how == "two orders":
        places = [(i, j) for i in range(2) for j in range(COUNT)]
        return [(lambda w, i=i, j=j: w[i, j], [x[j, i] for x in xs]) for i, j in places]
    if how == "ragged":
        ends = [(0, 4), (4, 9), (9, 15)]
        return [(lambda w, i=i: w[i], [x[a:b] for x in xs]) for i, (a, b) in enumerate(ends)]
    if how == "parts":
        factors = (1, 1, 2)
        return [
            (lambda w, i=i: w[:, i * M : (i + 1) * M], [f * x for x in xs])
            for i, f in enumerate(factors)
        ]
    if how == "twice":
        return [(lambda w: w, [y for x in xs for y in (x, 3 * x)])]
    if how == "recurrent":
        hidden = []
        for x in xs:
            h = jnp.zeros(x.shape[1:])
            for one in x:
                hidden.append(h)
                h = jnp.tanh(h @ w + one)
        return [(lambda w: w, hidden)]
    if how == "cond":
        return [(lambda w: w[1], [2 * xs[0]]), (lambda w: w[0], [xs[1]])]
    found = []
    for i in range(COUNT):
        found.append((lambda w, i=i: w[:, i], xs))
        xs = [jnp.tanh(x @ w[:, i]) for x in xs]
    return found


def part_by_part(how, held, scale):
    """What comes back of each matrix, in the order of `matrices`, of what is stored."""
    (first, *others) = list(held.operands.values()) if isinstance(held, Stored) else [held]
    found = jq.dequantize(first)
    if how == "parts":
        return [jq.dequantize(x) for x in (first, *others)]
    if how == "cond":
        return [jq.dequantize(x) for x in (others[0], first)]
    if how in ("left", "twice", "recurrent"):
        found = found.T if how == "left" else found
        return [found if scale is None else found / scale[:, None]]
    if how == "two orders":
        scale = scale if scale is None else jnp.swapaxes(scale, 0, 1).reshape(-1, N)
        found = list(found.reshape(-1, N, M))
    elif how == "heads behind":
        found = list(jnp.moveaxis(found, 1, 0))
    return [x if scale is None else x / scale[i][:, None] for i, x in enumerate(found)]


HOWS = ["left", "heads", "heads behind", "two orders"]
HOWS += ["parts", "twice", "recurrent", "stacked", "cond", "ragged"]


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("how", "method"),
    [(how, "gptq") for how in HOWS]
    + [(how, "awq") for how in ("left", "heads", "two orders", "stacked", "recurrent")],
)
def test_each_matrix_is_rounded_by_what_it_is_given(how, method):
    """Compared with the solver on sums that NumPy makes of the rows that the matrix is multiplied with."""
    model, xs = Raw(how), inputs(how)
    w = model.weight[...]
    frozen = quantized(model, xs, method)
    scale = getattr(frozen, "weight_scale", None)
    assert (scale is not None) == (method == "awq")
    found = part_by_part(how, read(frozen.weight), None if scale is None else read(scale))
    wanted = matrices(how, w, xs)
    assert len(found) == len(wanted)
    whole, differs = w, []
    for mine, (place, seen) in zip(found, wanted, strict=True):
        expected = solved(method, place(w), seen)
        # A sum in another order may put a number on the other side of a boundary.
        assert np.mean(np.isclose(mine, expected, rtol=1e-4, atol=1e-6)) > 0.97
        plain = jq.fake_quant(place(w), jq.recipe("w3a16").forward.rhs, axis=0)
        differs.append(np.mean(np.isclose(mine, plain, rtol=1e-4, atol=1e-6)) < 0.97)
        _, back = jax.vjp(place, whole)
        whole = jnp.where(back(jnp.ones_like(mine))[0] > 0, back(mine)[0], whole)
    # It is no rounding to nearest; AWQ is where its search finds that no scales help.
    assert all(differs) if method == "gptq" else any(differs)
    exact = Raw(how)
    exact.weight[...] = whole
    for x in xs:
        np.testing.assert_allclose(RUN(frozen, x), RUN(exact, x), rtol=1e-3, atol=1e-3)


def test_what_the_batches_do_not_reach_is_named():
    model, xs = Raw("cond"), inputs("cond")
    with pytest.raises(ValueError, match=r"the model is not called.*\('weight', None\)"):
        quantized(model, xs[:1])


class Scaled(nnx.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens) * 8.0


class Tied(nnx.Module):
    def __init__(self):
        self.embed = Scaled(40, N, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(N, N, rngs=nnx.Rngs(1))

    def __call__(self, tokens):
        return jnp.tanh(self.up(self.embed(tokens))) @ self.embed.embedding[...].T


@pytest.mark.long
def test_an_embed_of_ones_own_and_a_raw_head_share_a_table():
    model, tokens = Tied(), [jnp.arange(12).reshape(2, 6) + i for i in range(2)]
    for method in ("rtn", "gptq", "awq+gptq", "hadamard"):
        frozen = quantized(model, tokens, method, {".*": "w4a16"})
        table = jq.quantize(read(model.embed.embedding), jq.recipe("w4a16").forward.rhs, axis=1)
        stored = read(frozen.embed.embedding)
        np.testing.assert_array_equal(jq.dequantize(stored), jq.dequantize(table))
        exact = RUN(model, tokens[0])
        assert jnp.linalg.norm(RUN(frozen, tokens[0]) - exact) < 0.2 * jnp.linalg.norm(exact)


@pytest.mark.long
def test_memory_counts_every_matrix():
    """With room for one matrix of each of two stacks, a stack is a stage, and the other sees it rounded."""

    class Two(nnx.Module):
        def __init__(self):
            self.one, self.two = Raw("stacked"), Raw("stacked")

        def __call__(self, x):
            return self.two(self.one(x))

    model, xs = Two(), inputs("stacked")
    by_stages = quantized(model, xs, memory=COUNT * 4 * N * (N + 2))
    first = quantized(model, xs, rules=[("two", None), (".*", "w3a16")])
    second = quantized(model.two, [RUN(first.one, x) for x in xs])
    for mine, alone in zip(
        jax.tree.leaves(read(by_stages.two.weight)),
        jax.tree.leaves(read(second.weight)),
        strict=True,
    ):
        assert np.mean(np.asarray(mine) == np.asarray(alone)) > 0.99
    at_once = quantized(model, xs)
    pairs = zip(*(jax.tree.leaves(read(m.two.weight)) for m in (by_stages, at_once)), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


@pytest.mark.first(1)
@pytest.mark.parametrize("how", ["parts", "heads", "left", "stacked"])
def test_what_is_rounded_is_saved_and_goes_on(how, tmp_path):
    model, xs = Raw(how), inputs(how)
    method = "gptq" if how == "parts" else "awq+gptq"
    frozen = quantized(model, xs, method, workdir=tmp_path / "work")
    again = quantized(model, xs, method, workdir=tmp_path / "work")
    jq.nnx.save(tmp_path / "model", frozen)
    loaded = jq.nnx.load(tmp_path / "model", Raw(how))
    for other in (again, loaded):
        np.testing.assert_array_equal(RUN(other, xs[0]), RUN(frozen, xs[0]))


@pytest.mark.long
def test_a_rotation_of_heads_is_each_ones_own():
    model, xs = Raw("heads"), inputs("heads")
    errors = {}
    for method in ("hadamard", "hadamard+gptq"):
        frozen = quantized(model, xs, method, {".*": "w4a4-token"})
        assert read(frozen.weight).hadamard is not None
        exact = RUN(model, xs[0])
        errors[method] = float(jnp.linalg.norm(RUN(frozen, xs[0]) - exact) / jnp.linalg.norm(exact))
    assert errors["hadamard+gptq"] < errors["hadamard"] < 0.3


@pytest.mark.parametrize(
    ("how", "method", "message"),
    [
        (
            "parts",
            "awq",
            "the model has several weights, which would share one scale.*method 'rtn' does",
        ),
        ("heads", "smoothquant", None),
    ],
)
def test_what_a_method_does_not_take_is_named(how, method, message):
    if message is None:
        assert quantized(Raw(how), inputs(how), method, {".*": "w8a8"}).weight_scale.shape
        return
    with pytest.raises(ValueError, match=message):
        quantized(Raw(how), inputs(how), method)


def test_a_weight_in_a_list_is_named_before_anything_is_rounded():
    class Listed(nnx.Module):
        def __init__(self):
            self.weights = nnx.data([param(0, N, M)])

        def __call__(self, x):
            return x @ self.weights[0][...]

    with pytest.raises(ValueError, match=r"weights/0 cannot be stored.*a list or dict.*None"):
        quantized(Listed(), inputs("twice"))


@pytest.mark.long
def test_a_search_reaches_raw_weights():
    class Mixed(nnx.Module):
        def __init__(self):
            self.heads, self.stacked = Raw("heads"), Raw("stacked")

        def __call__(self, x):
            return 5 * self.heads(x) + 0.001 * self.stacked(x)[..., :M]

    model, xs = Mixed(), inputs("heads")
    found = jq.ptq.search(model, ("w2a16", "w8a16"), xs, 4000, progress=False)
    assert set(found.groups) == {"heads", "stacked"}
    assert dict(found.rules)["heads"] == "w8a16"
    log = jax.nn.log_softmax
    for i, name in enumerate(found.groups):
        for j, choice in enumerate(found.choices):
            low = jq.nnx.quantize(model, [(name, choice), (".*", None)])
            p, q = [log(jnp.stack([RUN(m, x) for x in xs])) for m in (model, low)]
            expected = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))
            assert found.losses[i, j] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_statistics_of_any_kind_are_observed():
    """As NumPy finds them, of a weight that turns of a scan take apart."""
    model, xs = Raw("stacked"), inputs("stacked")
    largest = jq.nnx.Statistic(jnp.zeros(N), lambda rows, _: jnp.abs(rows).max(0), jnp.maximum)
    found = jq.nnx.observe(model, xs, lambda product: largest)
    ((name, seen),) = found.items()
    assert "turn(" in name
    for i, (_, rows) in enumerate(matrices("stacked", model.weight[...], xs)):
        expected = np.max([np.abs(x).max((0, 1)) for x in rows], 0)
        np.testing.assert_allclose(seen[i], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="no weight's activations are to be observed"):
        jq.nnx.observe(model, xs, lambda product: None)
