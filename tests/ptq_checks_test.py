"""Checks of the growth: of one exponent for all sizes, below one pass and above, under GPTQ, corrected."""

import json

import numpy as np
import pytest
from ptq_records import record

from experiments.harness.models import lm
from experiments.harness.reporting.statistics import t_test
from experiments.harness.running import packed
from experiments.ptq_overtraining import (
    analysis,
    corrections,
    one_exponent,
    passes,
    repetition,
    report,
    solvers,
)

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

SIZES = ("14k", "38k", "83k")
LENGTHS = (10, 30, 90)


def rows(records):
    return analysis.main_rows(analysis.added_loss(records), analysis.base_loss(records))


# ---- one exponent for all sizes


def at_sizes(interaction, rng, noise=0.02, gamma=0.5, seeds=3):
    """Records whose log δ is γ log D + interaction · log N log D about the middle size."""
    middle = np.log(lm.SIZES["38k"].non_embedding_parameters)
    return [
        record(
            seed,
            "wsd",
            [
                0.1
                * (d / 30) ** (gamma + interaction * (np.log(size_of(size)) - middle))
                * np.exp(noise * rng.normal())
                for d in LENGTHS
            ],
            size=size,
            lengths=LENGTHS,
        )
        for size in SIZES
        for seed in range(seeds)
    ]


def size_of(name):
    return lm.SIZES[name].non_embedding_parameters


@pytest.mark.parametrize(
    ("interaction", "answer"), [(-0.2, "no, it falls with N"), (0.2, "no, it rises with N")]
)
def test_an_exponent_that_changes_with_size_is_found(interaction, answer):
    (one,) = one_exponent.summaries(rows(at_sizes(interaction, np.random.default_rng(0))))
    assert one["interaction"]["value"] == pytest.approx(interaction, abs=0.03)
    assert one["interaction"]["low"] < interaction < one["interaction"]["high"]
    (found,) = one_exponent.findings([one])
    assert found.answer == answer


def test_one_exponent_is_rejected_as_often_as_its_level_says():
    rng, hits, n = np.random.default_rng(0), 0, 200
    for _ in range(n):
        (one,) = one_exponent.summaries(rows(at_sizes(0.0, rng)))
        hits += one["interaction"]["p_value"] < 0.1
    assert abs(hits / n - 0.1) < 4 * np.sqrt(0.1 * 0.9 / n)


def test_the_exponent_of_each_width_is_beside_that_of_four_bits():
    rng = np.random.default_rng(0)
    records = at_sizes(0.0, rng)
    for r in records:
        for point in r["points"]:
            (four,) = point["added"]
            slower = four["mean"] * (point["tokens_per_parameter"] / 30) ** -0.3
            point["added"] = [four, four | {"bits": 2, "mean": slower}]
    (one,) = one_exponent.summaries(rows(records))
    two, four = one["widths"]
    assert (two["bits"], four["bits"]) == (2, 4)
    assert two["difference"]["value"] == pytest.approx(-0.3, abs=1e-6)
    assert "difference" not in four


def test_one_seed_of_each_size_gives_no_interval(tmp_path):
    records = at_sizes(0.0, np.random.default_rng(0), seeds=1)
    (one,) = one_exponent.summaries(rows(records))
    assert one["reason"] == "one seed alone of each size"
    assert one_exponent.findings([one]) == []
    assert not one_exponent.section([one], []).tables


# ---- passes over the text


def bent(seed, below, above, size="14k"):
    """Lengths at 0.2, 0.8, 2 and 6 passes, growing with one exponent up to 0.8 and another from 2."""
    lengths = (10, 40, 100, 300)
    first = 0.1 + 0.001 * seed
    second = first * 4**below * (1 + 0.01 * seed)
    third = second * 1.5
    added = (first, second, third, third * 3**above * (1 + 0.01 * seed))
    return record(seed, "wsd", added, size, lengths, epochs=(0.2, 0.8, 2.0, 6.0))


def test_growth_below_one_pass_is_apart_from_that_above():
    found = passes.summaries(rows([bent(s, 0.6, 0.2) for s in range(3)]))
    parts = {row["part"]: row for row in found["rows"] if row["size"] == "all"}
    assert parts["below"]["mean"] == pytest.approx(0.6, abs=0.02)
    assert parts["above"]["mean"] == pytest.approx(0.2, abs=0.02)
    assert (parts["across"]["start"], parts["across"]["end"]) == (0.8, 2.0)
    below, slower = passes.findings(found)
    assert (below.answer, slower.answer) == ("yes", "yes")
    assert slower.estimate == pytest.approx(-0.4, abs=0.03)
    assert passes.section(found, []).tables


def test_a_run_that_repeats_nothing_has_no_such_section(tmp_path):
    short = [record(s, "wsd", (0.1, 0.2, 0.4), epochs=(0.1, 0.3, 0.9)) for s in range(2)]
    assert passes.summaries(rows(short)) == {}
    assert passes.findings({}) == []


def test_a_part_where_a_length_adds_nothing_is_left_out():
    broken = bent(0, 0.6, 0.2)
    broken["points"][0]["added"][0]["mean"] = -0.1
    found = passes.slopes(rows([broken]))
    assert set(found["part"]) == {"across", "above"}


# ---- GPTQ


def with_gptq(seed, gamma):
    own = record(seed, "wsd", [0.1 * d**0.5 * (1 + 0.01 * seed) for d in LENGTHS], lengths=LENGTHS)
    for point in own["points"]:
        (near,) = point["added"]
        share = 0.5 * (point["tokens_per_parameter"] / 10) ** gamma * (1 + 0.002 * seed)
        point["added"] = [near, near | {"solver": "gptq", "mean": near["mean"] * share}]
    return own


def test_gptq_is_beside_nearest_and_the_headline_is_of_nearest_alone(tmp_path):
    records = [with_gptq(seed, -0.2) for seed in range(3)]
    (row,) = solvers.summaries(analysis.added_loss(records))
    assert row["nearest"]["gamma"] == pytest.approx(0.5)
    assert row["gamma"] == pytest.approx(0.3)
    assert row["ratio"]["gamma"] == pytest.approx(-0.2)
    assert row["share"]["10"] == pytest.approx(0.5, abs=0.01)
    (found,) = solvers.findings([row])
    assert (found.answer, found.against) == ("yes", "below")
    summary = report.write(tmp_path, records, expected=3)
    assert [r["gamma"] for r in summary["headline"]["rows"]] == [pytest.approx(0.5)]
    assert {r["solver"]: r["gamma"] for r in summary["exponents"]} == {
        "nearest": pytest.approx(0.5),
        "gptq": pytest.approx(0.3),
    }
    assert "Does the growth survive GPTQ?" in (tmp_path / "report.html").read_text()


def test_no_growth_under_gptq_is_said():
    records = [with_gptq(seed, -0.9) for seed in range(3)]
    (found,) = solvers.findings(solvers.summaries(analysis.added_loss(records)))
    assert found.answer == "no"


# ---- corrections


def test_p_values_agree_with_the_intervals_and_q_values_are_of_the_family():
    rng = np.random.default_rng(0)
    fits = [
        analysis.fit_exponent(
            rows([record(s, "wsd", 0.1 * rng.lognormal(0, 0.4, 3)) for s in range(2)])
        )
        for _ in range(50)
    ]
    tested = corrections.tested(fits)
    for row in tested:
        assert (row["p_zero"] < 0.1) == (row["low"] > 0 or row["high"] < 0)
        assert row["q_zero"] >= row["p_zero"]
    assert any(row["p_zero"] < 0.1 <= row["q_zero"] for row in tested)


def test_a_growth_that_correction_takes_away_is_unresolved():
    row = {"grows": "yes", "size": "14k", "schedule": "wsd", "reason": None, "seeds": 2}
    row |= {"gamma": 1.0, "low": 0.1, "high": 1.9, "error": 0.43, "freedom": 4, "added": {}}
    sure = corrections.tested([row])[0]
    assert report._growth(sure).answer == "yes"
    assert report._growth(sure | {"q_zero": 0.2}).answer == "unresolved"


def test_a_difference_from_the_published_that_correction_takes_away_is_unresolved():
    row = {"grows": "yes", "size": "14k", "schedule": "wsd", "reason": None, "seeds": 2}
    row |= {"gamma": 0.7, "low": 0.6, "high": 0.8, "error": 0.05, "freedom": 4, "added": {}}
    (sure,) = corrections.tested([row])
    assert report._growth(sure).against == "above"
    assert report._growth(sure | {"q_published": 0.2}).against == "unresolved"


def test_student_s_test_and_interval_say_the_same():
    assert t_test(0.0, 0.0, 3) == 1.0
    assert t_test(1.0, 0.0, 3) == 0.0
    assert t_test(-2.92, 1.0, 2) == pytest.approx(0.1, abs=1e-3)


# ---- texts side by side


def kept(folder, records):
    for own in records:
        whole = {"study": "ptq_overtraining", "schema": 2} | own
        path = folder / "trials" / f"{own['id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole | {"checksum": packed.checksum(whole)}))
    return str(folder)


def on_text(share, gamma, per_length):
    return [
        record(
            s,
            "wsd",
            [0.1 * (d / 10) ** (gamma + 0.01 * s * s) for d in LENGTHS],
            lengths=LENGTHS,
            epochs=[d * per_length for d in LENGTHS],
            data_path=share,
        )
        for s in range(3)
    ]


def test_texts_are_set_side_by_side(tmp_path):
    eighth = kept(tmp_path / "eighth", on_text("1/8", 0.2, 0.08))
    whole = kept(tmp_path / "whole", on_text("", 0.5, 0.01))
    table, records = repetition.load([eighth, whole])
    assert list(dict.fromkeys(table["text"])) == ["sotu", "sotu 1/8"], "least repeated first"
    summary = repetition.write(tmp_path / "both", table, records)
    (change,) = summary["differences"]
    assert change["mean"] == pytest.approx(-0.3)
    (found,) = repetition.findings(summary["differences"])
    assert found.answer == "yes"
    at = {(s["text"], s["from"]): s for s in summary["steps"]}
    assert at["sotu 1/8", 30]["passes"] == pytest.approx([2.4, 7.2])
    assert at["sotu 1/8", 30]["difference"]["mean"] == pytest.approx(-0.3)
    assert at["sotu", 30]["difference"] is None
    assert (tmp_path / "both" / "report.html").exists()
    with pytest.raises(ValueError, match="no two of them the same"):
        repetition.load([eighth, eighth])
    with pytest.raises(ValueError, match="two workdirs or more"):
        repetition.load([eighth])
