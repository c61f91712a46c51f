"""The study of gradient precision: its arms, its grid, and what its report says of records."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from experiments.gradient_precision import (
    PRESETS,
    STUDY,
    comparisons,
    forms,
    law,
    measuring,
    noise,
    report,
    running,
    runs,
    study,
)
from experiments.gradient_precision.arms import FULL, RECIPES, Arm, Precision
from experiments.harness.models import lm

TINY = lm.LMConfig(layers=1, width=32, heads=2, kv_heads=2, hidden=32, vocab_size=32)
TOKENS = jax.random.randint(jax.random.key(0), (4, 33), 0, 32)


def gradient_error(arm, precision, draws=8):
    model, plain = measuring.Model(TINY, arm), measuring.Model(TINY, Arm(FULL))
    params = model.init(jax.random.key(1))
    sums = jax.jit(measuring.gradient_sums, static_argnums=(0, 1, 5))(
        model, plain, params, TOKENS, precision, draws
    )
    return measuring.gradient_error(jax.device_get(sums), draws)


def grid(rounding, hadamard=8, family="int"):
    return Arm(family, rounding=rounding, block=8, hadamard=hadamard)


def test_nearest_has_bias_alone_and_stochastic_rounding_variance_alone():
    nearest = gradient_error(grid("nearest", 0), Precision.of(16, 4))
    stochastic = gradient_error(grid("stochastic", 0), Precision.of(16, 4), draws=32)
    # Scaled by powers of two all else is the same, so what is not drawn has no variance at all.
    assert nearest["variance"] < 1e-9
    assert nearest["bias"] > 0.05
    assert stochastic["variance"] > 1e-3
    assert stochastic["bias"] < stochastic["least_bias"] < nearest["bias"]
    assert nearest["forward"] == pytest.approx(stochastic["forward"])


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["nvfp4_train", "nvfp4_eden_train-h32", "mxfp4_train"])
def test_recipes_draw_anew_for_each_scale_of_the_loss(name):
    found = gradient_error(Arm(name), Precision.of(4, 4))
    assert found["variance"] > 1e-3
    assert found["forward"] > 0.05


@pytest.mark.long
@pytest.mark.exhaustive
def test_stacked_layers_have_the_same_arms():
    config = dataclasses.replace(TINY, layers=2, scan=True)
    own = measuring.programs(config, grid("stochastic"), 4)
    params = own.init(jax.random.key(0)).params
    for bits in ((16, 4), (4, 4)):
        sums = jax.device_get(own.gradient(params, Precision.of(*bits), TOKENS))
        found = measuring.gradient_error(sums, 4)
        assert found["variance"] > 1e-3
        assert (found["forward"] > 0.05) == (bits[0] == 4)
    assert own.traces["gradient"] == 1


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["int", "float"])
def test_16_bits_are_full_precision_and_fewer_cost_more(family):
    found = [
        gradient_error(grid("stochastic", 8, family), Precision.of(*b))
        for b in ((16, 16), (16, 8), (16, 4), (4, 16))
    ]
    assert found[0]["variance"] < 1e-4
    assert found[0]["forward"] < 1e-2
    assert found[0]["variance"] < found[1]["variance"] < found[2]["variance"]
    assert found[3]["variance"] < 1e-4
    assert found[3]["forward"] > 0.05


GAP = {
    **{"C_forward": 0.5, "gamma_D_forward": 0.2, "gamma_N_forward": 0.0, "gamma_forward": 1.5},
    **{
        "C_backward": 0.02,
        "gamma_D_backward": 0.35,
        "gamma_N_backward": -0.1,
        "gamma_backward": 1.2,
    },
}


def loss_of(trial, d, rng):
    """The loss that a law and a seed give a trial; a rate of 8e-3 is worse than 4e-3."""
    n = lm.SIZES[trial.size].non_embedding_parameters
    full = 60.0 * n**-0.35 + 120.0 * (d * n) ** -0.35 + 0.9
    full *= np.exp(0.003 * np.random.default_rng(trial.seed).normal()) * (
        1 + 5 * (trial.peak_lr - 4e-3)
    )
    if trial.method == FULL:
        return full
    row = {"N": [n], "D": [d * n], "loss_full": [full]}
    row |= {"P_forward": [trial.forward], "P_backward": [trial.backward]}
    return float(forms.GAP.predict(GAP, row)[0] * np.exp(1e-4 * rng.normal()))


def records(config, losses=loss_of):
    """Records whose losses are made up: what the report must find again."""
    rng, found = np.random.default_rng(0), []
    for number, trial in enumerate(study.make_trials(config)):
        points = []
        for d in trial.tokens_per_parameter:
            steps = trial.steps(d)
            noise = 2.0 ** (2 - trial.backward)
            gradient = {
                "bias": noise,
                "variance": noise**2,
                "least_bias": noise / 4,
                "forward": 0.1,
            }
            points.append(
                {"tokens_per_parameter": d, "tokens": steps * trial.batch * trial.sequence}
                | {"epochs": 0.1, "windows": 8, "train_loss": 2.0, "gradient": gradient}
                | {"loss": {"mean": losses(trial, d, rng), "se": 0.01}}
                | {"traces": {"step": 1, "evaluate": 1, "gradient": 1}}
            )
        head = {"id": str(number), "trial": dataclasses.asdict(trial), "status": "done"}
        head |= {"versions": {"jax": "x"}, "unigram_entropy": 9.0, "entropy_rate": None}
        found.append(head | {"points": points})
    return found


LAW = dataclasses.replace(PRESETS["full"], forward=(4, 6, 16), backward=(4, 6, 16))


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_report_finds_the_law_that_made_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(law, "BOOTSTRAPS", 20)
    monkeypatch.setattr(law, "STARTS", 8)
    monkeypatch.setattr(law, "_RESAMPLED_STARTS", 8)
    summary = report.write(tmp_path, records(LAW), 100)
    [found] = summary["laws"]
    fitted = {p["name"]: p for p in found["gap"]["parameters"]}
    for name, value in GAP.items():
        if name.startswith("gamma"):
            assert fitted[name]["value"] == pytest.approx(value, abs=0.05), name
            assert fitted[name]["low"] - 0.02 <= value <= fitted[name]["high"] + 0.02, name
    assert found["paired"][0]["law"] == forms.GAP.name
    assert found["paired"][0]["r2_by_P_backward"] > 0.9
    quartet = next(row for row in found["laws"] if row["law"] == "Quartet")
    assert quartet["r2_by_P_forward"] is None  # it says nothing of a width that it has not seen
    # Of both rates, the one that is better in full precision and in few bits.
    assert {row["peak_lr"] for row in summary["gaps"]} == {4e-3}
    said = report.to_text(summary)
    assert "γ_D of the backward pass, int, stochastic, h8: yes" in said
    assert "more forward" in said  # its bits are worth more: a smaller scale, a larger height
    row = next(r for r in found["split"] if r["budget"] == 7 and r["size"] == "38k")
    assert row["forward"] == pytest.approx(21 - 2 * row["backward"])
    html = (tmp_path / "report.html").read_text()
    assert "The best split of bits" in html
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == {"bits", "noise"}


def recipe_loss(trial, d, rng):
    """MXFP4 loses most, FP8 least; without stochastic rounding NVFP4 loses more; one run diverges."""
    lost = {"nvfp4_train": 0.03, "mxfp4_train": 0.08, "fp8_train": 0.01}.get(trial.method, 0.0)
    lost += {"stochastic": 0.02, "last": -0.02}.get(trial.part, 0.0)
    if trial.method == "mxfp4_train" and trial.peak_lr == 8e-3 and trial.seed == 1:
        return None
    return 2.0 + 0.02 * trial.seed + 5 * (trial.peak_lr - 4e-3) + lost + 1e-4 * rng.normal()


RECIPE = dataclasses.replace(
    PRESETS["recipes"],
    recipes=("nvfp4_train", "mxfp4_train", "fp8_train"),
    parts=("stochastic", "last"),
    peak_lrs=(4e-3, 8e-3),
)


def test_recipes_are_ranked_by_pairs_and_parts_earn_what_they_are_worth(tmp_path):
    made = records(RECIPE, recipe_loss)
    summary = report.write(tmp_path, made, len(made))
    gaps = {row["name"]: row["mean"] for row in summary["gaps"]}
    assert gaps["mxfp4_train"] == pytest.approx(0.08, abs=1e-3)
    first = [(row["first"], row["second"]) for row in summary["order"]]
    assert first == [
        ("fp8_train", "nvfp4_train"),
        ("fp8_train", "mxfp4_train"),
        ("nvfp4_train", "mxfp4_train"),
    ]
    parts = {row["part"]: row["mean"] for row in summary["parts"]}
    assert parts == {
        "stochastic": pytest.approx(0.02, abs=1e-3),
        "last": pytest.approx(0.02, abs=1e-3),
    }
    said = report.to_text(summary)
    assert "mxfp4_train less nvfp4_train, 94k at D/N 20: nvfp4_train is better" in said
    assert "mxfp4_train less nvfp4_train, 94k at D/N 20, as NVIDIA 2025" in said
    # The run that diverged is named with its rate and seed, and is in no mean.
    assert "94k mxfp4_train 4/4 at rate 0.008, seed 1" in said
    assert [row["why"] for row in summary["trials"]["diverged"]] == ["not finite"]
    assert all(row["seeds"] == 3 for row in summary["gaps"])
    assert (tmp_path / "figures" / "recipes.svg").exists()


def test_a_loss_above_that_of_single_tokens_has_diverged():
    made = records(RECIPE, lambda trial, d, rng: 9.5 if trial.method == "fp8_train" else 2.0)
    table = runs.at_best_rate(runs.kept(runs.runs(made)))
    assert "fp8_train" not in set(table["method"])
    assert {row["why"] for row in runs.diverged(made)} == {
        "loss 9.50, above the entropy of single tokens"
    }


def test_a_rate_at_which_a_seed_diverged_is_not_the_best_one():
    def losses(trial, d, rng):
        better = trial.peak_lr == 8e-3
        return None if better and trial.seed == 2 else 2.0 - 0.1 * better

    table = runs.at_best_rate(runs.kept(runs.runs(records(RECIPE, losses))))
    assert set(table["peak_lr"]) == {4e-3}


def rounding_loss(trial, d, rng):
    """Nearest loses 0.05, EDEN 0.01; a rotation gains nothing."""
    lost = {"nearest": 0.05, "eden": 0.01}.get(trial.rounding, 0.0) * (trial.backward == 4)
    return 2.0 + 0.02 * trial.seed + lost + 1e-4 * rng.normal()


def test_roundings_that_differ_in_one_thing_are_paired():
    config = dataclasses.replace(PRESETS["rounding"], backward=(4, 6))
    table = runs.gaps(runs.at_best_rate(runs.kept(runs.runs(records(config, rounding_loss)))))
    found = {
        (row["first"], row["second"]): row["mean"]
        for row in comparisons.roundings(table)
        if row["pair"] == "16/4"
    }
    assert found.keys() == {
        ("eden, h8", "nearest, h8"),
        ("eden, h8", "stochastic, h8"),
        ("nearest, h8", "stochastic, h8"),
        ("nearest, plain", "nearest, h8"),
        ("nearest, plain", "stochastic, plain"),
        ("stochastic, plain", "stochastic, h8"),
    }
    assert found["nearest, plain", "stochastic, plain"] == pytest.approx(-0.05, abs=1e-3)
    assert found["stochastic, plain", "stochastic, h8"] == pytest.approx(0.0, abs=1e-3)


def test_gaps_that_follow_the_variance_are_said_to():
    def losses(trial, d, rng):
        return 2.0 + (trial.method != FULL) * 0.5 * 2.0 ** (4 - 2 * trial.backward)

    config = dataclasses.replace(LAW, backward=(3, 4, 5, 6, 8), forward=(16,), peak_lrs=())
    table = runs.gaps(runs.runs(records(config, losses)))
    rows = [r for r in noise.relations(table) if r["of"] == "full forward precision"]
    assert {r["measure"] for r in rows if r["mean"] == pytest.approx(1.0)} == {"bias", "variance"}


def test_the_grids_have_what_the_presets_promise():
    full = study.make_trials(PRESETS["full"])
    rates = len(PRESETS["full"].peak_lrs)
    assert len(full) == 2 * rates * 3 * (1 + 4 * 5)
    assert sum(len(t.tokens_per_parameter) for t in full) / rates >= 150
    assert len({running.compile_key(t) for t in full}) == 2 * 2  # full precision, and the grid
    recipes = study.make_trials(PRESETS["recipes"])
    assert {t.method for t in recipes} - {FULL} <= set(RECIPES)
    assert {t.part for t in recipes} == {"", "stochastic", "hadamard", "tiles", "last"}
    rounding = {running.compile_key(t) for t in study.make_trials(PRESETS["rounding"])}
    assert len(rounding) == 1 + 2 * 2 + 1  # EDEN rotates


@pytest.mark.parametrize(
    ("preset", "field", "value", "words"),
    [
        ("laptop", "families", ("fixed",), "config.families are of"),
        ("laptop", "roundings", ("up",), "config.roundings are of"),
        ("laptop", "recipes", ("fp2_train",), "config.recipes are of"),
        ("laptop", "parts", ("tiles",), "config.recipes must have"),
        ("laptop", "families", (), "both empty"),
        ("laptop", "forward", (1,), "from 2 to 16; got 1"),
        ("laptop", "backward", (17,), "from 2 to 16; got 17"),
        ("laptop", "hadamard", (12,), "powers of two from 2, or 0; got 12"),
        ("laptop", "block", 16, "has blocks of 16, which do not divide the width 24 of size 14k"),
        ("laptop", "hadamard", (16,), "has rotations of 16, which do not divide"),
        ("rounding", "hadamard", (4,), "multiples of config.block 8 for eden; got 4"),
        (
            "recipes",
            "sizes",
            ("83k",),
            "mxfp4_train has blocks of 32, which do not divide the width 48",
        ),
        ("recipes", "scan", True, "config.parts 'last' needs layers with rules of their own"),
        ("laptop", "draws", 1, "whole number from 2; got 1"),
        ("laptop", "sizes", ("9k",), "model size is one of"),
        ("laptop", "tokens_per_parameter", (20, 10), "rising order"),
        ("laptop", "batch", 4096, "would come out as"),
    ],
)
def test_bad_grids_are_refused(preset, field, value, words):
    config = dataclasses.replace(PRESETS[preset], **{field: value})
    with pytest.raises(ValueError, match=words):
        study.make_trials(config)


def test_a_wrong_flag_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "experiments.gradient_precision", "--preset=laptop"]
    command += ["--config.block=16", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "which do not divide the width 24 of size 14k" in done.stderr


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.usefixtures("as_users_compute")
def test_the_smoke_preset_runs_whole_compiles_once_and_goes_on(tmp_path):
    config = PRESETS["smoke"]
    summary = STUDY.run(config, tmp_path)
    assert summary["trials"]["finished"] == summary["trials"]["expected"] == 12
    programs = {row["arm"]: row for row in summary["programs"]}
    assert programs["int, stochastic, h8"]["pairs"] == 4
    assert {row["compilations"] for row in programs.values()} == {1}
    gaps = {(row["name"], row["pair"]): row for row in summary["gaps"]}
    assert abs(gaps["int, stochastic, h8", "16/16"]["mean"]) < 1e-3
    assert gaps["int, stochastic, h8", "16/4"]["bias"] < 0.05
    assert gaps["int, stochastic, h8", "16/4"]["variance"] > 1e-3
    kept = {path.name: path.read_bytes() for path in (tmp_path / "trials").glob("*.json")}
    first = sorted(kept)[0]
    (tmp_path / "trials" / first).unlink()
    again = STUDY.run(config, tmp_path)
    assert again["gaps"] == summary["gaps"]
    assert (tmp_path / "trials" / first).read_bytes() == kept[first]
