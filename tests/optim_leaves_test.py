"""What a leaf of the state is, is found in the traced update: parameters, sums, signs; no names of fields."""

import collections
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxquant.optim import adaptive, by_role, fixed, quantize_state, report, split, uniform
from jaxquant.optim.bounds import NON_NEGATIVE, bounds_of
from jaxquant.optim.leaves import find
from jaxquant.optim.tracing import Program

pytestmark = pytest.mark.exhaustive  # minutes, once in CI

PARAMS = {"w": jnp.linspace(-1, 1, 16 * 16).reshape(16, 16)}
KEY = jax.random.key(0)
ROLES = {"embedding": 8, "head": 8, "matrix": (5, 3), "vector": None}


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def made(step, first=jnp.zeros_like, names=("s",)):
    """A transformation whose states have these names; step(g, p, count, *states) gives (update, *states)."""
    fields = (*names, "count")
    kind = collections.namedtuple("Made", fields)

    def init(params):
        return kind(*[jax.tree.map(first, params) for _ in names], jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        found = jax.tree.map(
            lambda g, p, *s: step(g, p, state.count, *s), updates, params, *state[:-1]
        )
        is_own = lambda x: isinstance(x, tuple)  # noqa: E731
        parts = [
            jax.tree.map(lambda x, i=i: x[i], found, is_leaf=is_own) for i in range(len(fields))
        ]
        return parts[0], kind(*parts[1:], state.count + 1)

    return optax.GradientTransformation(init, update)


def slots(tx, extra=None):
    """(signs of the coded slots, reasons of the exact ones)."""
    leaves, exact = find(tx, PARAMS, extra)
    kept = {x.slot: x.reason for x in exact if x.parameter is not None}
    return {x.slot: x.is_signed for x in leaves}, kept


# ---------------------------------------------------------------------------------------------------
# Signs


def adam_step(g, p, count, m, v):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + (1 - 0.999) * g * g
    t = count + 1
    return -1e-2 * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v


@pytest.mark.parametrize(
    "names", [("m", "v"), ("exp_avg", "exp_avg_sq"), ("mu", "nu"), ("nu", "mu"), ("v", "m")]
)
def test_signs_of_a_hand_written_adam_go_by_what_it_computes(names):
    coded, kept = slots(made(adam_step, names=names))
    assert coded == dict(zip(names, (True, False), strict=True))
    assert not kept


SQUARES = {
    "a product": lambda v, g: 0.9 * v + (1 - 0.9) * g * g,
    "a power": lambda v, g: 0.9 * v + 0.1 * g**2,
    "a step towards": lambda v, g: v + 0.1 * (g * g - v),
    "a step from": lambda v, g: v - 0.1 * (v - g**2),
    "a maximum": lambda v, g: jnp.maximum(0.9 * v, jnp.abs(g) + 1e-8),
    "a sum": lambda v, g: v + jnp.square(g),
    "a root": lambda v, g: jnp.sqrt(0.9 * v**2 + 0.1 * g**2),
    "a norm": lambda v, g: 0.9 * v + 0.1 * jnp.mean(g**2, keepdims=True),
    "clipped": lambda v, g: jnp.clip(v + g, 0.0, 1.0),
    "a factor": lambda v, g: v * jnp.where(g > 0, 0.9, 0.5) + 1e-3,
}
SIGNED = {
    "a gradient": lambda v, g: 0.9 * v + 0.1 * g,
    "a step too far": lambda v, g: v + 1.5 * (g * g - v),
    "less than a square": lambda v, g: 0.9 * v + 0.1 * (g * g - 1.0),
    "a product of two": lambda v, g: 0.9 * v + 0.1 * g * jnp.sign(g - 1.0),
    "a cube": lambda v, g: 0.9 * v + 0.1 * g**3,
    "a negative square": lambda v, g: 0.9 * v - 0.1 * g * g,
}


@pytest.mark.parametrize("name", SQUARES)
def test_what_cannot_be_negative_is_seen(name):
    coded, _ = slots(made(lambda g, p, c, v: (g, SQUARES[name](v, g)), names=("momentum",)))
    assert coded == {"momentum": False}


@pytest.mark.parametrize("name", SIGNED)
def test_what_may_be_negative_is_signed_in_a_field_called_nu(name):
    coded, _ = slots(made(lambda g, p, c, v: (g, SIGNED[name](v, g)), names=("nu",)))
    assert coded == {"nu": True}


def test_a_state_that_begins_below_zero_is_signed():
    tx = made(lambda g, p, c, v: (g, 0.9 * v + 0.1 * g * g), lambda p: jnp.full_like(p, -1.0))
    assert slots(tx)[0] == {"s": True}


def test_what_is_divided_by_and_may_be_negative_stays_exact():
    step = lambda g, p, c, v: (g / (jnp.sqrt(0.9 * v + g) + 1e-8), 0.9 * v + g)  # noqa: E731
    assert slots(made(step))[1] == {"s": "something is divided by it, and it may be negative"}
    # A momentum that a square divides is none such, nor one that a norm of its own does.
    for bottom in (lambda m, g: jnp.abs(g) + 1, lambda m, g: jnp.linalg.norm(m)):
        step = lambda g, p, c, m, b=bottom: (m / b(m, g), 0.9 * m + g)  # noqa: E731
        assert slots(made(step))[0] == {"s": True}


def centered_step(g, p, count, m, v):
    m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g * g
    return -1e-2 * g * jax.lax.rsqrt(v - jnp.square(m) + 1e-8), m, v


def logarithm_step(g, p, count, m, v):
    m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g * g
    return -1e-2 * g * jnp.log(1 + v - m * m), m, v


CENTERED = {
    "rmsprop": (optax.rmsprop(1e-2, centered=True), ("0/mu", "0/nu"), set()),
    "with momentum": (
        optax.rmsprop(1e-2, centered=True, momentum=0.9),
        ("0/mu", "0/nu"),
        {"2/trace"},
    ),
    "by stddev": (
        optax.chain(optax.scale_by_stddev(), optax.scale(-1e-3)),
        ("0/mu", "0/nu"),
        set(),
    ),
    "by hand": (made(centered_step, names=("m", "v")), ("m", "v"), set()),
    "a logarithm": (made(logarithm_step, names=("m", "v")), ("m", "v"), set()),
}


@pytest.mark.parametrize("name", CENTERED)
def test_variances_that_rounding_could_make_negative_stay_exact(name):
    tx, exact, rest = CENTERED[name]
    coded, kept = slots(tx)
    assert set(coded) == rest
    assert all("a root is taken of a difference" in kept[slot] for slot in exact)


def test_a_centered_rmsprop_in_few_bits_ends_where_optax_does():
    """Beside optax itself: with its variance in few bits all of it became NaN."""
    target = jax.random.normal(KEY, (64, 64))
    tx = optax.rmsprop(1e-2, centered=True, momentum=0.9)

    def run(tx):
        def step(carry, key):
            w, state = carry
            g = w - target + 0.5 * jax.random.normal(key, w.shape)
            updates, state = tx.update(g, state, w)
            return (w + updates, state), None

        start = jnp.zeros((64, 64))
        (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(KEY, 150))
        return float(jnp.mean((w - target) ** 2))

    plain, found = run(tx), run(quantize_state(tx, fixed(5, 4)))
    assert plain < 0.1
    assert found < 1.25 * plain + 0.002
    with pytest.raises(ValueError, match="a root is taken of a difference"):
        quantize_state(optax.rmsprop(1e-2, centered=True), fixed(8)).init(target)


def test_injected_hyperparameters_are_known():
    coded, _ = slots(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2))
    assert coded == {"inner_state/0/mu": True, "inner_state/0/nu": False}
    schedule = optax.linear_schedule(0.9, 0.99, 100)
    coded, _ = slots(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, b2=schedule))
    assert coded == {"inner_state/0/mu": True, "inner_state/0/nu": False}


FIRST = (
    "adabelief adadelta adagrad adam adamax adan amsgrad lion nadam novograd radam rmsprop "
    "rprop sm3 yogi acprop ademamix adopt cocob dadapt_adamw madgrad prodigy"
)


@pytest.mark.first(2)
@pytest.mark.parametrize("name", FIRST.split())
def test_no_state_that_is_taken_for_not_negative_ever_is(name):
    """Beside optax itself: 30 steps of heavy-tailed gradients, with some that are zero."""
    make = getattr(optax, name, None) or getattr(contrib, name, None)
    if make is None:
        pytest.skip("not in this version of optax")
    tx = optax.with_extra_args_support(make(1e-2))
    own = {x.index for x in find(tx, PARAMS)[0] if not x.is_signed}
    gradients = jax.random.t(KEY, 1.5, (30, 16, 16)) * (jax.random.uniform(KEY, (30, 1, 1)) < 0.8)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"w": g}, state, params)
        lows = [jnp.min(x) for i, x in enumerate(jax.tree.leaves(state)) if i in own]
        return (optax.apply_updates(params, updates), state), jnp.array([0.0, *lows])

    _, lows = jax.jit(lambda c: jax.lax.scan(step, c, gradients))((PARAMS, tx.init(PARAMS)))
    assert not bool((lows < 0).any())


# ---------------------------------------------------------------------------------------------------
# Parameters, and what adds up


@pytest.mark.parametrize(
    "first",
    [lambda p: p, jnp.copy, lambda p: p.astype(jnp.bfloat16), lambda p: jnp.array(p) + 0],
)
def test_what_starts_as_the_parameter_is_kept(first):
    tx = made(lambda g, p, c, s: (g, (0.9 * s + 0.1 * g).astype(s.dtype)), first, ("trace",))
    (reason,) = slots(tx)[1].values()
    assert reason.startswith("it starts")


def test_averages_of_parameters_are_kept_and_momenta_that_decay_weights_are_not():
    average = made(lambda g, p, c, s: (g, 0.9 * s + 0.1 * (p + g * 0)), names=("ema",))
    assert slots(made(lambda g, p, c, s: (g, 0.9 * s + 0.1 * p)))[1] == {
        "s": "it follows the parameters"
    }
    assert slots(average)[0] == {"ema": True}  # computed from gradients too
    decayed = optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9))
    assert slots(decayed)[0] == {"1/trace": True}


SUMS = {
    "a sum": lambda s, g, c: s + g,
    "a mean": lambda s, g, c: s + (g - s) / (c + 1),
    "a sum that begins anew": lambda s, g, c: jnp.where(c % 4 == 3, 0.0, s) + g,
    "a sum that is emptied": lambda s, g, c: (1 - (c % 4 == 3)) * (s + g),
    "a slow average": lambda s, g, c: 0.9999 * s + 0.0001 * g,
    "a branch": lambda s, g, c: jax.lax.cond(c % 4 == 3, lambda: 0.5 * s, lambda: s - g),
}


def test_what_is_multiplied_by_more_than_one_is_kept():
    step = lambda g, p, c, s: (g, jnp.clip(s * jnp.where(g > 0, 1.2, 0.5), 1e-6, 50.0))  # noqa: E731
    (reason,) = slots(made(step, lambda p: jnp.full_like(p, 0.1)))[1].values()
    assert "would grow" in reason
    assert slots(optax.rprop(1e-3))[0] == {"0/prev_updates": True}


FADING = {
    "a momentum": lambda s, g, c: 0.9 * s + g,
    "a step towards": lambda s, g, c: s + 0.1 * (g - s),
    "held between": lambda s, g, c: jnp.where(c % 4 == 3, 0.9 * s + g, s),
    "the last gradient": lambda s, g, c: g,
    "a first step": lambda s, g, c: jnp.where(c == 0, s + g, 0.9 * s + 0.1 * g),
    "clipped by its norm": lambda s, g, c: (
        0.9 * s * jnp.minimum(1.0, 1 / (jnp.linalg.norm(s) + 1e-6)) + g
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_what_adds_up_is_kept(name):
    coded, kept = slots(made(lambda g, p, c, s: (g, SUMS[name](s, g, c)), names=("mu",)))
    assert not coded
    assert kept["mu"].startswith("it fades slowly or not at all")


@pytest.mark.parametrize("name", FADING)
def test_what_fades_is_coded(name):
    coded, _ = slots(made(lambda g, p, c, s: (g, FADING[name](s, g, c)), names=("sums",)))
    assert coded == {"sums": True}


# Slots of optax's own that are to stay unquantized, with a word of the reason.
KEPT = {
    "prodigy": (contrib.prodigy(), {"params0": "starts", "grad_sum": "fades"}),
    "mechanize": (contrib.mechanize(optax.sgd(1.0, 0.9)), {"x0": "starts"}),
    "cocob": (contrib.cocob(), {"2/init_particles": "starts", "2/cumulative_gradients": "fades"}),
    "schedule_free": (contrib.schedule_free_adamw(1e-2), {"z": "starts"}),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(1e-2), 4).gradient_transformation(),
        {"acc_grads": "fades"},
    ),
    "apply_every": (optax.chain(optax.trace(0.9), optax.apply_every(4)), {"1/grad_acc": "fades"}),
}


@pytest.mark.first(2)
@pytest.mark.parametrize("name", KEPT)
def test_optax_own_parameters_and_sums_stay_exact_and_are_reported(name):
    tx, wanted = KEPT[name]
    coded, kept = slots(tx)
    assert set(kept) == set(wanted)
    assert all(word in kept[slot] for slot, word in wanted.items())
    assert coded
    rows = {row.slot: row.reason for row in report(quantize_state(tx, fixed(8)).init(PARAMS)).rows}
    assert {slot: rows[f"{slot}/w" if f"{slot}/w" in rows else slot] for slot in wanted} == kept


def test_where_nothing_can_be_coded_the_slots_are_named_with_the_reason():
    tx = quantize_state(contrib.schedule_free_sgd(1e-2), fixed(8))
    with pytest.raises(ValueError, match=r"it starts as the parameter \(z\)"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    "tx", [optax.lion(1e-3), optax.ema(0.98), contrib.simplified_ademamix(1e-3), optax.adan(1e-3)]
)
def test_slow_states_of_too_few_bits_are_refused_by_name(tx):
    for policy in (fixed(5, 4), by_role({**ROLES, "matrix": (5, 4)})):
        with pytest.raises(
            ValueError, match=r"ema|mu|0/m.*give it 6 or more.* or leave it unquantized"
        ):
            quantize_state(tx, policy).init(PARAMS)
    assert report(quantize_state(tx, fixed(6, 4)).init(PARAMS))


LARGE = {"w": jnp.zeros((256, 256))}


@pytest.mark.parametrize("make", [uniform, adaptive, lambda bits: split(bits, 1)])
@pytest.mark.parametrize(
    "tx", [optax.lion(1e-3), optax.sgd(1e-3, momentum=0.99)], ids=["lion", "sgd"]
)
def test_a_budget_gives_slow_states_no_fewer_bits_either(tx, make):
    with pytest.raises(ValueError, match=r"budget_bits must be at least 6\.\d+ for this state"):
        quantize_state(tx, make(5.0)).init(LARGE)
    state = quantize_state(tx, make(7.0)).init(LARGE)
    assert min(w[w > 0].min() for slots in state.plan.widths() for w in slots) >= 6


@pytest.mark.parametrize("make", [uniform, adaptive])
def test_a_budget_takes_bits_from_what_is_not_slow(make):
    state = quantize_state(optax.adamw(1e-3, b1=0.99), make(5.0)).init(LARGE)
    slow, other = (w[w > 0].min() for slots in state.plan.widths() for w in slots)
    assert slow >= 6 > other


def test_a_slow_average_in_few_bits_follows_gradients_that_turn():
    """Nearest rounding would leave it where it was: a step is less than half a level."""
    plain: Any = optax.ema(0.99, debias=False)
    tx: Any = quantize_state(plain, fixed(6))
    gradients = jax.random.uniform(KEY, (200, 64, 64), minval=0.5)
    gradients *= jnp.where(jnp.arange(200) < 100, 1.0, -1.0)[:, None, None]

    def step(states, g):
        both = zip((tx, plain), states, strict=True)
        found = [t.update({"w": g}, s) for t, s in both]
        return [s for _, s in found], [jnp.mean(u["w"]) for u, _ in found]

    params = {"w": gradients[0]}
    states = [tx.init(params), plain.init(params)]
    _, (found, exact) = jax.jit(lambda s: jax.lax.scan(step, s, gradients))(states)
    np.testing.assert_allclose(found[-50:], exact[-50:], atol=0.02)
    coded = [x for slot in (optax.adam, optax.lion) for x in find(slot(1e-3), PARAMS)[0]]
    assert [x.is_slow for x in coded if x.is_signed] == [False, True]


# ---------------------------------------------------------------------------------------------------
# What an update is given by name


def needs_loss():
    def update(updates, state, params=None, *, loss):
        return updates, {"m": jax.tree.map(lambda m, g: 0.9 * m + loss * g, state["m"], updates)}

    return optax.GradientTransformationExtraArgs(
        lambda params: {"m": jax.tree.map(jnp.zeros_like, params)}, cast(Any, update)
    )


def test_what_an_update_is_given_by_name_is_asked_for():
    with pytest.raises(ValueError, match=r"extra=\{'name': value\}.*\(TypeError: .*loss"):
        quantize_state(needs_loss(), fixed(8)).init(PARAMS)
    tx = quantize_state(needs_loss(), fixed(8), extra={"loss": 0.0})
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS, loss=2.0)
    with pytest.raises(ValueError, match="extra must be a mapping"):
        quantize_state(needs_loss(), fixed(8), extra=cast(Any, "loss"))


@pytest.mark.parametrize(
    "tx",
    [
        optax.lbfgs(),
        contrib.momo(),
        contrib.sophia(1e-2),
        contrib.sam(optax.adam(1e-2), optax.sgd(1e-2), opaque_mode=True),
    ],
)
def test_optax_own_arguments_need_no_name(tx):
    leaves, exact = find(tx, PARAMS)
    assert len(leaves) + len(exact) == len(jax.tree.leaves(tx.init(PARAMS)))


# ---------------------------------------------------------------------------------------------------
# Wrappers


@pytest.mark.long
def test_sm3_is_updated():
    params = {"w": jnp.ones((128, 128)), "b": jnp.zeros(256)}
    plain: Any = optax.sm3(1e-2)
    tx: Any = quantize_state(plain, fixed(8))
    state, exact = tx.init(params), plain.init(params)
    for i in range(2):
        gradients = jax.tree.map(
            lambda p, i=i: jax.random.normal(jax.random.key(i), p.shape), params
        )
        updates, state = jax.jit(tx.update)(gradients, state, params)
        expected, exact = plain.update(gradients, exact, params)
        for name in params:
            largest = float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(updates[name], expected[name], atol=0.02 * largest)


def test_a_multi_steps_object_is_taken_as_its_transformation():
    steps = optax.MultiSteps(optax.adam(1e-2), 4)
    found = report(quantize_state(steps, fixed(8)).init(PARAMS))
    assert found == report(quantize_state(steps.gradient_transformation(), fixed(8)).init(PARAMS))


def test_a_budget_that_sums_of_gradients_exceed_says_so():
    tx = quantize_state(optax.MultiSteps(optax.adam(1e-2), 4), adaptive(5.0))
    with pytest.raises(
        ValueError, match=r"at least \d+.*unquantized: .*fades slowly.*\(acc_grads\)"
    ):
        tx.init({"w": jnp.zeros((256, 256))})


# ---------------------------------------------------------------------------------------------------
# Exempt by name

POLICIES = {
    "fixed": lambda keep: fixed(5, 4, keep=keep),
    "by_role": lambda keep: by_role(ROLES, keep=keep),
    "uniform": lambda keep: uniform(40.0, keep=keep),
    "adaptive": lambda keep: adaptive(40.0, keep=keep),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("keep", "kept"),
    [("0/nu", {"nu/a", "nu/b"}), (["0/mu", ".*/b"], {"mu/a", "mu/b", "nu/b"}), ((), set())],
)
def test_every_policy_exempts_slots_and_leaves_by_name(policy, keep, kept):
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    found = report(quantize_state(optax.adam(1e-2), POLICIES[policy](keep)).init(params))
    reasons = {row.path.removeprefix("0/"): row.reason for row in found.rows if row.reason}
    assert {k for k, v in reasons.items() if "keep=" in v} == kept


@pytest.mark.parametrize("policy", POLICIES)
def test_a_name_of_nothing_is_refused_with_the_nearest(policy):
    tx = quantize_state(optax.adam(1e-2), POLICIES[policy]("0/nuu"))
    with pytest.raises(ValueError, match=r"keep='0/nuu' matches no slot.* nearest are 0/nu"):
        tx.init(PARAMS)
    for bad, words in (("(", "not a regular expression"), (3, "a regular expression or several")):
        with pytest.raises(ValueError, match=words):
            POLICIES[policy](bad)


# ---------------------------------------------------------------------------------------------------
# Bounds


FUNCTIONS = {
    "polynomial": lambda x, y: x * x * y - 3 * x + y**3,
    "quotient": lambda x, y: (x - y) / (1 + jnp.exp(x)) + jnp.tanh(y),
    "choice": lambda x, y: jnp.where(x > y, jnp.sqrt(x + 2), jnp.maximum(x, y) - jnp.abs(y)),
    "powers": lambda x, y: jnp.power(x + 1.5, y) + jnp.log1p(x + 1.5) - 1 / (x + 3),
    "whole numbers": lambda x, y: jnp.floor(x * 4).astype(jnp.int32) % 3 + jnp.sign(y),
    "sums": lambda x, y: jnp.sum(x * x) - jnp.max(y) + jnp.clip(x, -0.5, y),
}


@pytest.mark.first(4)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_lie_within_their_bounds(name):
    """Every value of the program, beside NumPy's of random arguments."""
    x, y = jax.random.uniform(KEY, (2, 64), minval=-1)
    y = jnp.abs(y)
    program = Program(FUNCTIONS[name], x, y)
    given = dict(zip(program.inputs, ((-1.0, 1.0), (0.0, 1.0)), strict=True))
    bounds = bounds_of(program, given, frozenset(program.inputs))
    known = dict(zip(program.inputs, (x, y), strict=True))
    env = program.evaluate(range(len(program.specs)), known)
    for number, value in env.items():
        low, high = bounds[number].whole
        slack = 1e-5 * max(1.0, float(jnp.abs(value).max()))
        assert low - slack <= float(jnp.min(value)), program.makers.get(number)
        assert float(jnp.max(value)) <= high + slack, program.makers.get(number)


def test_coefficients_are_those_of_the_linear_part():
    program = Program(lambda m, g: (m + 0.25 * (g - m), m - g, m * m), jnp.ones(3), jnp.ones(3))
    m, _ = program.inputs
    found = bounds_of(program, {m: NON_NEGATIVE}, frozenset([m]))
    linear = [found[n].linear.get(m) for n in program.outputs]
    assert linear[:2] == [(0.75, 0.75), (1.0, 1.0)]
    assert linear[2] == (-np.inf, np.inf)
