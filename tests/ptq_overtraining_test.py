import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from ptq_records import record

import jaxquant as jq
from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import trials
from experiments.ptq_overtraining import analysis, measuring, report, study

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

CONFIG = lm.sized("3k")


@pytest.fixture(scope="module")
def graphdef():
    return nnx.graphdef(nnx.eval_shape(lambda: lm.LM(CONFIG, nnx.Rngs(0))))


@pytest.fixture(scope="module")
def params():
    return nnx.state(lm.LM(CONFIG, nnx.Rngs(0)), nnx.Param)


WINDOWS = data.evaluation_windows(data.load("sotu"), "valid", 32, 6)


# ---- measuring


def test_the_evaluation_is_traced_once_over_all_widths(graphdef, params, monkeypatch):
    traced = chex.assert_max_traces(n=1)(
        lambda x, q, axis=-1, key=None: jq.fake_quant(x, q, axis, key)
    )
    calls = []

    def counting(x, quantizer, axis=-1, key=None):
        calls.append(x.shape)
        return (
            traced(x, quantizer, axis, key)
            if len(calls) == 1
            else jq.fake_quant(x, quantizer, axis, key)
        )

    monkeypatch.setattr("jaxquant.operations.dot.fake_quant", counting)
    measuring.make_evaluate.cache_clear()
    jax.clear_caches()  # traces of the same model by other tests
    evaluate = measuring.make_evaluate(graphdef, "channel")
    losses = [float(evaluate(params, jnp.float32(bits), WINDOWS).mean()) for bits in range(2, 10)]
    measuring.make_evaluate.cache_clear()
    assert len(set(losses)) == 8
    linears = 7 * CONFIG.layers
    assert len(calls) == linears, "each linear's weights are traced once over eight widths"


@pytest.mark.first(1)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "4"])
@pytest.mark.parametrize("scope", study.SCOPES)
def test_the_evaluation_is_of_the_rounded_weights(graphdef, params, granularity, scope):
    quantizer = jq.Quantizer(jq.Int(3), measuring.parse_granularity(granularity))

    def rounded(path, x):
        names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        if "kernel" in names and ("blocks" in names or scope == "all"):
            return jq.fake_quant(x, quantizer, axis=0)
        return jq.fake_quant(x, quantizer, axis=1) if "embedding" in names and scope == "all" else x

    by_hand = jax.tree_util.tree_map_with_path(rounded, params)
    expected = measuring.make_evaluate(graphdef, None)(by_hand, jnp.float32(0), WINDOWS)
    found = measuring.make_evaluate(graphdef, granularity, scope)(params, jnp.float32(3), WINDOWS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(
        found, measuring.make_evaluate(graphdef, None)(params, jnp.float32(0), WINDOWS)
    )


# ---- trials


def test_the_grid_crosses_everything_and_ids_are_distinct():
    config = study.PRESETS["laptop"]
    grid = study.make_trials(config)
    per_seed = 1 + len(config.tokens_per_parameter)  # one WSD trunk, separate cosine runs
    assert len(grid) == len(set(grid)) == len(config.sizes) * config.seeds * per_seed
    assert study.STUDY.cost(grid[0]) > 0


def test_long_runs_of_the_largest_size_are_left_out():
    lengths = {
        t.size: t.tokens_per_parameter
        for t in study.make_trials(study.PRESETS["full"])
        if t.schedule == "wsd"
    }
    assert lengths == {
        "21k": (20, 60, 200, 600),
        "83k": (20, 60, 200, 600),
        "332k": (20, 60),
    }


def test_wsd_branches_leave_the_trunk_in_order():
    (trial, *_) = study.make_trials(study.PRESETS["laptop"])
    assert trial.schedule == "wsd"
    ends = [trial.steps(d) for d in trial.tokens_per_parameter]
    starts = [trial.cooldown_start(d) for d in trial.tokens_per_parameter]
    assert all(s < e for s, e in zip(starts, ends, strict=True))
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": (0,)}, "2 to 16"),
        ({"bits": (-1,)}, "2 to 16"),
        ({"bits": (1.5,)}, "2 to 16"),
        ({"bits": (33,)}, "2 to 16"),
        ({"bits": ()}, "at least one"),
        ({"bits": (4, 4)}, "each once"),
        ({"sizes": ("70b",)}, "model size"),
        ({"schedules": ("linear",)}, "wsd, cosine"),
        ({"granularities": ("row",)}, "granularities"),
        ({"granularities": ("7",)}, "blocks of 7"),
        ({"scopes": ("head",)}, "linears, all"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 10**20}, "at most"),
        ({"peak_lr": float("inf")}, "peak_lr"),
        ({"tokens_per_parameter": ("20",)}, "integer of at least 1"),
        ({"tokens_per_parameter": (1.5, 2)}, "integer of at least 1"),
        ({"tokens_per_parameter": (True,)}, "integer of at least 1"),
        ({"tokens_per_parameter": (1, 2)}, "would come out as"),
        ({"batch": 4096}, "would come out as"),
        ({"max_tokens_per_parameter": (600, 600)}, "one number for each"),
        ({"max_tokens_per_parameter": (5,)}, "without any length"),
        ({"granularities": ("4", "04")}, "each given once"),
        ({"tokens_per_parameter": (30, 10)}, "rising"),
        ({"tokens_per_parameter": (0,)}, "at least 1; got 0"),
        ({"peak_lr": -1.0}, "peak_lr"),
        ({"dtype": "float8"}, "float8"),
        ({"sequence": 10**9}, "fewer than one sequence"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        study.make_trials(dataclasses.replace(study.PRESETS["smoke"], **change))


# ---- the exponent


def power_law(gamma, noise, rng, seeds=3, lengths=(1e6, 3e6, 9e6)):
    rows = [
        {"seed": s, "tokens": d, "mean": (1 + 0.3 * s) * d**gamma * np.exp(noise * rng.normal())}
        for s in range(seeds)
        for d in lengths
    ]
    return pd.DataFrame(rows)


def test_the_exponent_of_an_exact_power_law_is_recovered():
    fit = analysis.fit_exponent(power_law(0.507, 0.0, np.random.default_rng(0)))
    assert fit["gamma"] == pytest.approx(0.507)
    assert fit["high"] - fit["low"] < 1e-9


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits, n = np.random.default_rng(0), 0, 600
    for _ in range(n):
        fit = analysis.fit_exponent(power_law(0.5, 0.1, rng))
        hits += fit["low"] <= 0.5 <= fit["high"]
    assert abs(hits / n - analysis.CONFIDENCE) < 4 * np.sqrt(0.9 * 0.1 / n)


def test_no_exponent_is_claimed_where_there_is_none():
    table = power_law(0.5, 0.1, np.random.default_rng(0))
    assert analysis.fit_exponent(table[table["tokens"] == 1e6])["gamma"] is None
    negative = table.assign(mean=table["mean"].where(table["seed"] > 0, -1.0))
    assert "3 of 9 points add no loss" in analysis.fit_exponent(negative)["reason"]


def test_a_law_that_does_not_hold_is_said_not_to_hold():
    growing = [record(s, "wsd", (0.1, 0.2, 0.4)) for s in range(2)]
    falling = [record(s, "cosine", (0.1, 0.3, 0.2)) for s in range(2)]
    assert "training length? Yes." in report.to_text(analysis.summarize(growing, 2))
    mixed = analysis.summarize(growing + falling, 4)
    assert "training length? Yes in 1 of 2, no in 1 of 2." in report.to_text(mixed)
    assert [f.answer for f in report.findings(mixed)][:2] == ["yes", "no"]
    assert [row["grows"] for row in mixed["headline"]["rows"]] == ["yes", "no"]


def test_what_is_not_settled_is_said_not_to_be():
    one_length = [record(s, "wsd", (0.1, 0.2, 0.4)) for s in range(2)]
    for r in one_length:
        r["points"] = r["points"][:1]
    noisy = [record(s, "wsd", x) for s, x in enumerate([(0.1, 0.2, 0.01), (0.1, 0.2, 0.9)])]
    for records in (one_length, noisy):
        summary = analysis.summarize(records, 2)
        assert summary["headline"]["rows"][0]["grows"] == "unresolved"
        assert "γ_D, N = 14k, WSD: unresolved" in report.to_text(summary)
    broken = analysis.summarize([record(0, "wsd", (0.1, 0.2, None))], 1)
    (row,) = broken["headline"]["rows"]
    assert (row["grows"], row["added"]["90"]) == ("unresolved", None)
    assert row["reason"] == "1 of 3 points are not finite"
    assert "D/N 90: —" in report.to_text(broken)


def test_the_schedules_are_compared_with_an_interval():
    wsd = [record(s, "wsd", (0.1, 0.2 * (1 + s / 50), 0.4)) for s in range(3)]
    cosine = [record(s, "cosine", (0.1, 0.3, 0.9 * (1 + s / 50))) for s in range(3)]
    (row,) = analysis.schedule_effect(analysis.added_loss(wsd + cosine))
    assert row["ratio"]["90"] == pytest.approx(0.918 / 0.4)
    assert row["gamma"] == pytest.approx(0.37, abs=0.03)
    assert 0 < row["low"] < row["gamma"] < row["high"]
    assert report._schedule(row, row["p_value"]).answer == "faster under cosine"
    assert report._schedule(row, 0.2).answer == "unresolved", "corrected for several sizes"
    (same,) = analysis.schedule_effect(
        analysis.added_loss(
            wsd + [record(s, "cosine", (0.1, 0.2 * (1 + s / 50), 0.4)) for s in range(3)]
        )
    )
    assert same["gamma"] == pytest.approx(0)
    assert report._schedule(same, same["p_value"]).answer == "unresolved"


@pytest.mark.long
def test_a_trial_that_diverges_has_a_record_that_says_so(tmp_path):
    config = dataclasses.replace(
        study.PRESETS["smoke"],
        peak_lr=1e30,
        seeds=1,
        schedules=("cosine",),
        tokens_per_parameter=(20,),
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        summary = study.run(config, tmp_path, trials.Launch(workers=1))
    (diverged,) = summary["trials"]["diverged"]
    assert 0 < diverged["step"] <= 85
    assert summary["trials"]["finished"] == 1


def test_a_broken_model_gives_no_number_rather_than_a_wrong_one():
    assert measuring.mean_and_error(np.array([1.0, np.nan])) == {"mean": None, "se": None}
    broken = record(0, "wsd", (0.1, 0.2, None))
    summary = analysis.summarize([broken], 1)
    assert summary["headline"]["rows"][0]["gamma"] is None


@pytest.mark.long
def test_unfinished_and_diverged_trials_are_said(tmp_path):
    dead = record(1, "wsd", (0.1, 0.2, 0.4)) | {"status": "diverged", "step": 7, "points": []}
    summary = report.write(tmp_path, [record(0, "wsd", (0.1, 0.2, 0.4)), dead], expected=3)
    expected = (
        "2 of 3 trials are finished.\n1 of them diverged and is left out: 14k wsd seed 1 at step 7."
    )
    assert report.to_text(summary).startswith(expected)
    page = (tmp_path / "report.html").read_text()
    assert "1 of them diverged and is left out: 14k wsd seed 1 at step 7." in page


def test_a_report_without_records_is_still_a_report(tmp_path):
    summary = report.write(tmp_path, [], expected=3)
    assert "0 of 3" in report.to_text(summary)
    (finding,) = summary["findings"]
    assert (finding["answer"], finding["estimate"]) == ("unresolved", None)
