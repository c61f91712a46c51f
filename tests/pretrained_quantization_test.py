"""The study on real models: its analysis on made-up records, and one model's arms in small."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.pretrained_quantization import PRESETS, run
from experiments.pretrained_quantization.arms import ARMS
from experiments.pretrained_quantization.report import findings, rows_of, write
from experiments.pretrained_quantization.study import Config, Trial, make_trials

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def record(model, arm, seed=0, **figures):
    common = {
        "trial": {"model": model, "arm": arm, "seed": seed},
        "bytes": {"before": 4000, "after": 400},
        "verdict": "pass",
        "few": {"examples": 50, "verdict": "inconclusive"},
        "reasons": ["because"],
    }
    return common | figures


def bits(arm, added):
    reference = [1.0, 1.2, 0.8]
    quantized = [b + a for b, a in zip(reference, added, strict=True)]
    return record("smollm2", arm, bits_per_byte={"reference": reference, "quantized": quantized})


def seed(arm, index, lost, divergence):
    accuracy = {"reference": 0.8, "quantized": 0.8 - lost}
    report = {"kl": {"mean": {"estimate": divergence}}}
    return record("vit", arm, index, accuracy=accuracy, report=report)


def test_changes_are_paired_and_have_their_intervals():
    (row,) = rows_of([bits("kv8", (0.01, 0.02, 0.03))])
    assert row["change"] == pytest.approx(2.0)
    half = 2.919986 * 1.0 / 3**0.5  # Student's t at 95 % with two degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((2 - half, 2 + half), rel=1e-4)
    seeds = [seed("w3 rtn", s, d, 0.1) for s, d in enumerate((0.01, 0.03))]
    (row,) = rows_of(seeds)
    assert row["change"] == pytest.approx(-2.0)


def test_findings_say_what_the_records_say():
    def said(gptq, searched):
        rows = rows_of(
            [
                bits("w3 rtn", (1.0, 1.1, 0.9)),
                bits("w3 gptq", (gptq, gptq, gptq)),
                bits("searched, the bytes of w3", (searched, searched, searched)),
            ]
        )
        return " ".join(findings(rows))

    assert "closes 50 % of the gap" in said(0.5, 0.5)
    assert "the search beats 3 bits" in said(0.5, 0.5)
    assert "the search loses to 3 bits" in said(0.5, 2.0)
    assert "the search is not told from 3 bits" in said(0.5, 1.0)


def test_a_search_is_judged_by_what_it_minimises_too():
    pairs = zip((0.05, 0.06, 0.04), (0.10, 0.12, 0.11), strict=True)
    records = []
    for index, (searched, uniform) in enumerate(pairs):
        records.append(seed("w3 rtn", index, 0.01 * index, uniform))
        records.append(seed("searched, the bytes of w3", index, 0.01 * (2 - index), searched))
    said = " ".join(findings(rows_of(records)))
    assert "the search is not told from 3 bits" in said
    half = 2.919986 * 0.01 / 3**0.5  # differences of 0.05, 0.06 and 0.07
    assert f"is +0.0600 nats less (90 % interval {0.06 - half:+.4f} to {0.06 + half:+.4f})" in said


@pytest.mark.long
def test_the_report_is_of_what_is_finished(tmp_path):
    summary = write(tmp_path, [bits("kv8", (0.0, 0.0, 0.0))], expected=3)
    assert summary["trials"] == {"finished": 1, "expected": 3}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "Q4_1" in (tmp_path / "report.html").read_text()


def test_trials_are_those_of_the_config():
    config = Config(models=("vit",), images="digits", arms=("w3 rtn",), seeds=2)
    assert [(t.model, t.arm, t.seed) for t in make_trials(config)] == [
        ("vit", "w3 rtn", 0),
        ("vit", "w3 rtn", 1),
    ]
    assert all(set(ARMS) == {"smollm2", "minilm", "vit"} for _ in PRESETS)
    assert Trial("vit", "w3 rtn").windows == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("gpt",)}, "config.models are of smollm2"),
        ({"models": ()}, "needs at least one"),
        ({"arms": ("w1",)}, "config.arms are of"),
        ({"steps": 0}, "config.steps"),
    ],
)
def test_misuse_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_trials(Config(**{"models": ("vit",), "images": "digits", **changes}))


@pytest.mark.long
def test_a_search_among_two_widths_on_a_small_vision_transformer(tmp_path, monkeypatch):
    name = "searched, the bytes of w3"
    fewer = dataclasses.replace(ARMS["vit"][name], searched=("w2a16", "w4a16"), by_layer=False)
    monkeypatch.setitem(ARMS["vit"], name, fewer)
    config = Config(models=("vit",), images="digits", steps=8, seeds=1, arms=(name,))
    with jax.numpy_dtype_promotion("standard"):  # as the binary runs
        (row,) = run(config, tmp_path)["rows"]
    assert row["bytes_after"] < row["bytes_before"] / 8
    assert np.isfinite(row["change"])


@pytest.mark.long
def test_a_search_and_a_method_on_a_small_vision_transformer(tmp_path):
    arms = ("w3 rtn", "searched, the bytes of w3")
    config = Config(models=("vit",), images="digits", steps=80, seeds=1, arms=arms)
    with jax.numpy_dtype_promotion("standard"):  # as the binary runs
        rows = run(config, tmp_path)["rows"]
    uniform, searched = rows
    assert searched["bytes_after"] <= uniform["bytes_after"] < uniform["bytes_before"] / 8
    assert all(np.isfinite(row["change"]) for row in rows)
    again = run(config, tmp_path)
    assert again["rows"] == rows
