"""The study of training precision: its numerics, its grid, and what its report says of records."""

import dataclasses
import itertools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments.harness.models import lm
from experiments.harness.running import memory, trials
from experiments.training_precision import PRESETS, analysis, one_width, report, running, study
from experiments.training_precision.numerics import METHODS, Numerics, Precision
from jaxquant import laws

TINY = lm.LMConfig(layers=1, width=16, heads=2, kv_heads=2, hidden=32, vocab_size=32)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)


def start(method, bits):
    numerics, precision = Numerics(TINY, method), Precision.of(bits, bits, bits)
    return numerics, precision, numerics.init(jax.random.key(1), precision, TOKENS)


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_at_16_bits_nothing_is_lost(method):
    numerics, precision, params = start(method, 16)
    plain = Numerics(TINY, "ste")
    exact = plain.losses(
        dataclasses.replace(params, steps={}), TOKENS, Precision.of(16, 16, 16), jnp.float32(16)
    )
    found = numerics.losses(params, TOKENS, precision, precision.weights)
    np.testing.assert_allclose(found, exact, atol=5e-3)


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_fewer_bits_change_more_and_all_have_gradients(method):
    errors = []
    for bits in (4, 8):
        numerics, precision, params = start(method, bits)
        plain = Numerics(TINY, "ste").losses(
            dataclasses.replace(params, steps={}), TOKENS, Precision.of(16, 16, 16), jnp.float32(16)
        )
        found = numerics.losses(params, TOKENS, precision, precision.weights)
        errors.append(float(jnp.mean(jnp.abs(found - plain))))
        gradients = jax.grad(numerics.loss)(params, TOKENS, precision)
        for path, x in jax.tree.leaves_with_path(gradients):
            assert bool(jnp.isfinite(x).all() & (x != 0).any()), path
    assert errors[0] > 3 * errors[1]


@pytest.mark.parametrize("part", ["weights", "activations", "cache"])
def test_each_part_has_bits_of_its_own(part):
    numerics, precision, params = start("ste", 16)
    losses = [
        numerics.losses(params, TOKENS, changed, changed.weights)
        for changed in (precision, dataclasses.replace(precision, **{part: jnp.float32(3)}))
    ]
    assert float(jnp.max(jnp.abs(losses[0] - losses[1]))) > 1e-4


def test_served_as_trained_lsq_is_what_it_was():
    numerics, precision, params = start("lsq", 4)
    own = numerics.losses(params, TOKENS, precision, jnp.float32(4))
    fewer = numerics.losses(params, TOKENS, precision, jnp.float32(2))
    trained = numerics.loss(params, TOKENS, precision)
    assert float(own.mean()) == pytest.approx(float(trained))
    assert float(jnp.max(jnp.abs(own - fewer))) > 1e-3


def test_the_grid_has_each_precision_once():
    grid = study.make_trials(PRESETS["smoke"])
    assert len(set(grid)) == len(grid) == 6 + 3 + 6
    full = study.make_trials(PRESETS["full"])
    assert (
        len(full) == 279 + 2 * 3 * 3 * 2 * 3
    )  # LSQ and QuEST, a tensor alone: sizes, tensors, bits, seeds
    assert sum(len(t.tokens_per_parameter) for t in full) >= 150
    assert {t.method for t in full if t.size == "332k"} == {"ste"}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("methods", ("pact",), "config.methods are of"),
        ("tied", (0,), "from 1 to 16; got 0"),
        ("tied", (2, 3), "has nothing for 'float'"),
        ("single", (1,), "from 2 to 16; got 1"),
        ("sizes", ("9k",), "model size is one of"),
        ("reduced_sizes", ("332k",), "config.reduced_sizes is of config.sizes"),
        ("separate", ("rtn",), "config.separate are of ste, lsq"),
        ("tokens_per_parameter", (30, 10), "rising order"),
        ("max_tokens_per_parameter", (10,), "one number for each"),
        ("seeds", 0, "config.seeds must be a number above 0"),
        ("batch", 4096, "would come out as"),
    ],
)
def test_bad_grids_are_refused(field, value, words):
    config = dataclasses.replace(PRESETS["laptop"], **{field: value})
    with pytest.raises(ValueError, match=words):
        study.make_trials(config)


def records(seeds=2, single=()):
    """Records whose losses a law made, by the fewest bits of each: what the report must find again."""
    params = {"A": 60.0, "alpha": 0.35, "B": 120.0, "beta": 0.35, "E": 0.9, "gamma": 2.5, "n": 0.3}
    rng, found = np.random.default_rng(0), []
    config = dataclasses.replace(
        PRESETS["laptop"], methods=("ste",), seeds=seeds, tied=(2, 3, 4, 6, 8, 16), single=single
    )
    for number, trial in enumerate(study.make_trials(config)):
        n, points = lm.SIZES[trial.size].non_embedding_parameters, []
        for d in trial.tokens_per_parameter:
            bits = min(trial.weights, trial.activations, trial.cache)
            row = {"N": [n], "D": [d * n], "P_w": [bits]}
            loss = laws.KUMAR_ONE.predict(params, row)[0] * np.exp(0.003 * rng.normal())
            served = [
                {"bits": b, "mean": max(0.0, trial.weights - b) / 100, "se": 0.001}
                for b in trial.serving
            ]
            point = {"tokens_per_parameter": d, "tokens": d * n, "windows": 8}
            points.append(point | {"loss": {"mean": loss, "se": 0.01}, "served": served})
        head = {"id": str(number), "trial": dataclasses.asdict(trial), "status": "done"}
        head |= {"versions": {"jax": "x"}, "entropy_rate": None}
        found.append(head | {"points": points})
    return found


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_report_finds_the_law_that_made_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(one_width, "BOOTSTRAPS", 40)
    made = records(single=(2, 4))
    summary = report.write(tmp_path, made, expected=len(made))
    (method,) = summary["methods"]
    assert method["laws"][0]["r2"] > 0.98
    assert method["control"]["p_value"] <= 0.05
    values = {p["name"]: p for p in method["fits"][laws.KUMAR_ONE.name]["parameters"]}
    assert values["gamma"]["low"] < 2.5 < values["gamma"]["high"]
    assert "Are 7 to 8 bits compute-optimal" in report.to_text(summary)
    html = (tmp_path / "report.html").read_text()
    assert "printed and derived" in html
    assert "Weights, activations and cache apart" in html
    # Served in fewer bits, models of fewer bits lose less in these records.
    added = [row for row in summary["robustness"] if row["kind"] == "added"]
    assert added
    assert all(row["mean"] < 0 for row in added)


def test_growth_between_the_longest_runs_is_their_own():
    """Gaps that rise as D^0.5 at first, then as D^0.1, and fall as N^-0.2."""
    rows = []
    for size, n, lengths in (
        ("14k", 14e3, (10, 30, 90)),
        ("38k", 38e3, (10, 30, 90)),
        ("83k", 83e3, (10,)),
    ):
        for length, seed in itertools.product(lengths, range(3)):
            d = length * n
            growth = d**0.5 if length <= 30 else (30 * n) ** 0.5 * 3**0.1
            rows.append({"size": size, "seed": seed, "N": n, "D": d, "d_over_n": length, "P_w": 4})
            rows[-1] |= {
                "gap": 1e-3 * growth * n**-0.2 * (1 + 0.01 * seed),
                "unit": f"{size}/{seed}",
            }
    (found,) = one_width.of_gaps(pd.DataFrame(rows))["widths"]
    assert found["late"]["points"] == 12
    assert found["late"]["D"]["value"] == pytest.approx(0.1, abs=1e-6)
    assert found["D"]["value"] > 0.25


def test_a_grid_that_no_law_fits_says_why():
    made = [r for r in records() if r["trial"]["size"] == "14k"]
    summary = analysis.summarize(made, expected=len(made))
    assert "no law could be fitted: all runs have N = 13824" in report.to_text(summary)


def optimum(low, high, flops=1e12, is_determined=True):
    bits = (low + high) / 2
    own = {"bits": bits, "low": low, "high": high, "is_determined": is_determined}
    return own | {"flops": flops, "text": f"{bits:.2f}"}


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        (optimum(6.9, 7.8), "yes"),
        (optimum(4.9, 5.6), "no"),
        (optimum(5.9, 7.5), "unresolved"),
        (optimum(6.9, 7.8, is_determined=False), "unresolved"),
    ],
)
def test_seven_to_eight_bits_hold_where_the_whole_interval_allows_them(found, answer):
    method = {"method": "ste", "optima": [found], "control": {"is_rejected": False}}
    assert report._best(method).answer == answer


def test_the_best_precision_grows_where_intervals_are_apart():
    first, last = optimum(5.0, 5.5, 1e11), optimum(6.0, 6.5)
    assert report._compute({"method": "ste", "optima": [first, last]}).answer == "yes"
    near = optimum(5.4, 6.5)
    assert report._compute({"method": "ste", "optima": [first, near]}).answer == "unresolved"


@pytest.fixture
def _own_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.usefixtures("_own_promotion")
def test_the_grid_compiles_once_for_a_method(tmp_path, monkeypatch):
    """Before a method's programs are dropped, and at the end, there is one of each; no method comes twice."""
    running.programs.cache_clear()
    kinds, clear_compiled = [], memory.clear_compiled

    def compiled(method: str) -> list[int]:
        own = running.programs("3k", method, "float32", 256)
        return [f._cache_size() for f in (own.init, own.step, own.evaluate)]

    def watched(kind):
        if kinds and kind != kinds[-1]:
            assert compiled(kinds[-1][1]) == [1, 1, 1]
        kinds.append(kind)
        clear_compiled(kind)

    monkeypatch.setattr(memory, "clear_compiled", watched)
    study.run(PRESETS["smoke"], tmp_path, trials.Launch(workers=1))
    assert compiled(kinds[-1][1]) == [1, 1, 1]
    assert len(kinds) == 15
    assert len([*itertools.groupby(kinds)]) == len(PRESETS["smoke"].methods)


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.usefixtures("_own_promotion")
@pytest.mark.skipif(
    "JAXQUANT_TIMINGS" not in os.environ, reason="a timing: set JAXQUANT_TIMINGS on a quiet machine"
)
def test_traced_bits_pay_three_times(tmp_path):
    """Against the same grid with a compilation for each precision, as static bits would need."""
    running.programs.cache_clear()
    start = time.monotonic()
    study.run(PRESETS["smoke"], tmp_path / "traced", trials.Launch(workers=1))
    traced = time.monotonic() - start
    start = time.monotonic()
    for number, trial in enumerate(study.make_trials(PRESETS["smoke"])):
        running.programs.cache_clear()
        context = running.trials.Context(tmp_path / str(number), lambda amount, note: None)
        (tmp_path / str(number)).mkdir()
        running.run_trial(trial, context)
    apart = time.monotonic() - start
    print(f"traced bits {traced:.0f} s, a compilation each {apart:.0f} s: {apart / traced:.1f} x")
    assert apart > 3 * traced
