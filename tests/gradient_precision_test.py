"""The study of gradient precision: its arms, its grid, and what its report says of records."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.gradient_precision import PRESETS, forms, law, measuring, report, study
from experiments.gradient_precision.arms import FULL, Arm, Precision
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
