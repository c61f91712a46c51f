"""The study `optimizer_states`: from outside under its smallest preset, and what it says of records."""

import dataclasses
import json
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, study_command

from experiments.harness.training.arms import apply_of, budget_of, optimizer, weights_dtype
from experiments.optimizer_states import analysis, law, report, study

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


@pytest.mark.long
def test_it_runs_to_its_report_and_goes_on_where_it_stopped(tmp_path):
    command = study_command(
        tmp_path,
        "--config.seeds=1",
        '--config.arms=("fp32","felt-5.0","even-5.0","bf16:even-5.0")',
        study="optimizer_states",
    )
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "0 of 4" not in done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trials"] == {"finished": 4, "expected": 4, "diverged": []}
    bits = {row["arm"]: row["bits"] for row in summary["gaps"]}
    assert bits["fp32"] == pytest.approx(32, abs=0.1)
    assert bits["felt-5.0"] < 5.2
    assert bits["bf16:even-5.0"] == bits["even-5.0"]
    assert [row["state"] for row in summary["weights"]] == ["even-5.0"]
    assert (tmp_path / "report.html").stat().st_size > 100_000


def record(arm, seed, loss, nbytes=100, **trial):
    settings = {"task": "language", "schedule": "wsd", "arm": arm, "seed": seed, "is_tuning": False}
    settings |= {"peak_lr": 1.0, "size": "94k", "data": "sotu", "data_fingerprint": "", "steps": 1}
    settings |= {"batch": 1, "sequence": 1, "interval": 1}
    leaf = {"slot": "mu", "path": "w", "role": "matrix", "bits": 4.0, "elements": 1}
    return {
        "trial": settings | trial,
        "status": "done",
        "measures": {"loss valid": loss},
        "state_bytes": nbytes,
        "parameters": 10,
        "versions": {},
        "snapshots": [{"step": 1, "leaves": [leaf]}] if budget_of(arm) else [],
    }


def records(gain):
    rng, found = np.random.default_rng(0), []
    for seed in range(3):
        base = 1.5 + 0.01 * seed
        found.append(record("fp32", seed, base, 3200))
        found.append(record("even-5.0", seed, base + 0.02, 500))
        found.append(record("felt-5.0", seed, base + 0.02 - gain + 1e-4 * rng.normal(), 500))
    return [*found, record("fp32", 0, 1.9, is_tuning=True, peak_lr=2.0)]


def weights_records(gap, scatter):
    """Arms whose weights are in bfloat16, worse by a gap that scatters."""
    scatter = np.array([-1.0, 0.2, 0.8]) * scatter
    found = []
    for seed in range(3):
        base = 1.5 + 0.01 * seed
        found += [record("fp32", seed, base, 80), record("even-5.0", seed, base + 0.02, 13)]
        found += [record("bf16:even-5.0", seed, base + 0.02 + gap + scatter[seed], 13)]
    return found


@pytest.mark.parametrize(
    ("gap", "scatter", "answer"),
    [
        (0.0, 2e-3, "within the spread over seeds"),
        (0.009, 2e-2, "unresolved"),
        (0.05, 2e-3, "worse"),
    ],
)
def test_weights_are_compared_with_float32_weights_of_the_same_state(gap, scatter, answer):
    summary = analysis.summarize(weights_records(gap, scatter), expected=9)
    (row,) = summary["weights"]
    assert row["gap"] == pytest.approx(gap)
    assert row["exact_sd"] == pytest.approx(0.01)
    assert (row["bytes"], row["bytes_float32"]) == pytest.approx((3.3, 5.3))
    first = report.findings(summary)[0]
    assert first.question.startswith("Do weights in bfloat16")
    assert first.answer == answer
    assert "bf16" not in {f.answer for f in report.findings(summary)}


def test_arms_of_weights_have_their_types():
    assert weights_dtype("bf16-nearest:fp32") == weights_dtype("bf16:even-5.0") == jnp.bfloat16
    assert weights_dtype("even-5.0") == np.float32
    for arm, moved in {"bf16:fp32": True, "bf16-nearest:fp32": False}.items():
        ones = {"w": jnp.ones(4096, jnp.bfloat16)}
        found = apply_of(arm)(ones, {"w": jnp.full(4096, 1e-3)}, jnp.int32(0))
        assert bool((found["w"] != 1).any()) == moved


def test_gaps_are_paired_by_seed_and_bits_are_bytes():
    rows = {row["arm"]: row for row in analysis.gaps(analysis.runs(records(0.01)))}
    assert rows["even-5.0"]["gap"] == pytest.approx(0.02)
    assert rows["even-5.0"]["sd"] == pytest.approx(0.0, abs=1e-12)
    assert rows["even-5.0"]["exact_sd"] == pytest.approx(0.01)
    assert rows["even-5.0"]["bits"] == pytest.approx(5.0)
    assert len(analysis.tuning(records(0.0))) == 2


@pytest.mark.parametrize(
    ("gain", "answer"), [(0.01, "better"), (0.0, "unresolved"), (-0.01, "worse")]
)
def test_the_first_finding_says_whether_moving_widths_pay(gain, answer):
    summary = analysis.summarize(records(gain), expected=10)
    first = report.findings(summary)[0]
    assert first.question == "Do adaptive widths beat an even allocation of the same budget?"
    assert first.answer == answer
    assert "felt-5.0" in report.to_text(summary)


def law_records(cost, floor=lambda bits: 0.0):
    """Records at several N, D and bits: what bits leave of the tokens, and what they add to the loss."""
    rng, found = np.random.default_rng(0), []
    for size, n in (("10k", 10240), ("20k", 20480), ("41k", 40960)):
        for tokens in (10 * n, 20 * n, 40 * n):
            for arm, bits in (("fp32", 32), *((f"fixed-{b}", b) for b in (2, 3, 4, 6, 8))):
                for seed in range(2):
                    loss = 60 * n**-0.35 + 120 * (tokens * cost(bits)) ** -0.35 + 0.9 + floor(bits)
                    loss *= np.exp(0.002 * rng.normal())
                    found.append(record(arm, seed, loss, size=size, steps=tokens))
    return found


@pytest.mark.long
def test_a_law_says_whether_bits_of_the_state_cost_tokens_a_floor_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(law, "BOOTSTRAPS", 20)
    monkeypatch.setattr(law, "STARTS", 6)
    made = law_records(lambda bits: 1 - np.exp(-bits / 1.5))
    summary = report.write(tmp_path, made, expected=len(made))
    assert law.finding(summary["law"]).answer == "like fewer tokens"
    assert summary["law"]["without_narrowest"][0]["law"] == "state bits cost D"
    assert "without 2 bits" in (tmp_path / "report.html").read_text()
    floor = law.summarize(analysis.runs(law_records(lambda bits: 1.0, lambda bits: 2**-bits)))
    assert floor is not None
    assert law.finding(floor).answer == "neither: they raise the loss"
    nothing = law.summarize(analysis.runs(law_records(lambda bits: 1.0)))
    assert nothing is not None
    assert nothing["control"]["is_rejected"]
    assert "do not show" in law.finding(nothing).note


def test_the_report_is_written_of_any_records(tmp_path):
    for found in ([], records(0.01)[:1], records(0.01)):
        report.write(tmp_path, found, expected=10)
        assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("fixed-8",)}, "config.arms has 'fp32'"),
        ({"arms": ("fp32", "fixed-9")}, "bits must be an integer from 2 to 8"),
        ({"arms": ("fp32", "nf4")}, "a state is one of fp32, fixed-B"),
        ({"arms": ("fp32", "fp32")}, "each once"),
        ({"schedules": ("linear",)}, "config.schedules are of wsd, cosine"),
        ({"language_sizes": ("1k",)}, "config.language_sizes are of"),
        ({"vision_size": "1k"}, "config.vision_size is one of"),
        ({"tokens_per_parameter": (0,)}, "integer of at least 1"),
        ({"tuning": (1.0,)}, "config.tuning holds factors other than 1"),
        ({"snapshots": 0}, "snapshots"),
    ],
)
def test_a_field_that_no_run_could_use_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        study.make_trials(dataclasses.replace(study.PRESETS["smoke"], **change))


def test_every_arm_of_the_presets_has_a_transformation():
    for config in study.PRESETS.values():
        for arm in config.arms:
            assert callable(optimizer(arm, 10, 100).update)
