"""Records of several learning rates: told apart everywhere, and the best one named."""

import pytest
from ptq_records import LENGTHS, record

from experiments.harness.running import record_store
from experiments.ptq_overtraining import added_laws, analysis, rates, report, study

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others


def grown(gamma, level=0.1):
    return [level * (d / LENGTHS[0]) ** gamma for d in LENGTHS]


def at_rates(schedule="wsd", seeds=1, **rates_and_losses):
    """Records of the rates 0.1, 0.2, 0.4, with γ of 0.2, 0.5 and 0.9 in turn."""
    losses = rates_and_losses.get("losses", (2.1, 2.0, 2.3))
    return [
        record(
            s, schedule, [x * (1 + 0.01 * s * i) for i, x in enumerate(grown(g))],
            base=b, peak_lr=lr,
        )
        for lr, g, b in zip((0.1, 0.2, 0.4), (0.2, 0.5, 0.9), losses, strict=True)
        for s in range(seeds)
    ]  # fmt: skip


def test_runs_of_other_rates_are_no_seeds():
    summary = analysis.summarize(at_rates(), 3)
    found = {row["peak_lr"]: row["gamma"] for row in summary["exponents"]}
    assert found == pytest.approx({0.1: 0.2, 0.2: 0.5, 0.4: 0.9})
    assert {row["seeds"] for row in summary["added_loss"] + summary["base_loss"]} == {1}
    (row,) = summary["headline"]["rows"]
    assert (row["seeds"], row["gamma"]) == (1, pytest.approx(0.5))


def test_trunks_of_other_rates_are_other_trunks():
    added = analysis.added_loss(at_rates(seeds=2))
    assert len(set(added_laws.runs(added)["trunk"])) == 6


def test_with_one_rate_nothing_names_it():
    one = [record(s, "wsd", grown(0.5)) for s in range(2)]
    other_sizes = [record(s, "wsd", grown(0.5), size="38k", peak_lr=0.2) for s in range(2)]
    added, base = analysis.added_loss(one + other_sizes), analysis.base_loss(one + other_sizes)
    assert rates.summaries(added, base) == []
    summary = analysis.summarize(one + other_sizes, 4)
    tables = ("exponents", "added_loss", "base_loss")
    assert not {"peak_lr", "solver"} & {key for name in tables for key in summary[name][0]}
    assert len(summary["headline"]["rows"]) == 2


def test_the_best_rate_is_of_least_base_loss_at_the_longest_length():
    base = analysis.base_loss(at_rates())
    assert analysis.best_rates(base) == {("14k", "wsd"): 0.2}
    short_of_a_seed = at_rates(seeds=2)
    best_but_diverged = [r for r in short_of_a_seed if r["id"] != "1wsd14k0.2"]
    assert len(best_but_diverged) == 5
    base = analysis.base_loss(best_but_diverged)
    assert analysis.best_rates(base) == {("14k", "wsd"): 0.1}


def test_whether_growth_survives_tuning_is_answered_at_the_best_rate():
    records = at_rates(seeds=2) + at_rates("cosine", seeds=2, losses=(2.2, 2.1, 2.0))
    added, base = analysis.added_loss(records), analysis.base_loss(records)
    wsd, cosine = rates.findings(rates.summaries(added, base))
    assert wsd.quantity == "γ_D at the best of 3 rates, 0.2, N = 14k, WSD"
    assert (wsd.answer, wsd.estimate) == ("yes", pytest.approx(0.5, abs=0.01))
    assert "at the other rates 0.20 to 0.90" in wsd.note
    assert "at an end" in cosine.note
    assert "at an end" not in wsd.note


def test_one_seed_at_each_rate_has_an_interval_from_all_of_them():
    records = [
        record(0, "wsd", (0.1, 0.2 * bend, 0.4), base=b, peak_lr=lr)
        for lr, b, bend in ((0.1, 2.0, 1.0), (0.2, 2.1, 1.3), (0.4, 2.2, 0.8))
    ]
    rows = rates.summaries(analysis.added_loss(records), analysis.base_loss(records))
    assert {row["freedom"] for row in rows} == {3}
    widths = [row["high"] - row["low"] for row in rows]
    assert max(widths) == pytest.approx(min(widths))
    alone = analysis.fit_exponent(analysis.added_loss(records[1:2]))
    assert alone["high"] - alone["low"] > widths[1]


def test_no_growth_at_the_best_rate_is_said():
    records = [record(s, "wsd", grown(-0.4), peak_lr=0.1, base=2.0) for s in range(2)]
    records += [record(s, "wsd", grown(0.6), peak_lr=0.2, base=2.5) for s in range(2)]
    (found,) = rates.findings(
        rates.summaries(analysis.added_loss(records), analysis.base_loss(records))
    )
    assert found.answer == "no"


@pytest.mark.long
def test_the_report_of_several_rates(tmp_path):
    dead = record(0, "wsd", grown(0.5), peak_lr=0.8)
    dead |= {"status": "diverged", "step": 7, "points": []}
    summary = report.write(tmp_path, [*at_rates(seeds=2), dead], expected=7)
    page = (tmp_path / "report.html").read_text()
    assert "Does the growth survive tuning of the learning rate?" in page
    assert "14k wsd 0.8 seed 0 at step 7" in report.to_text(summary)
    assert "peak learning rate 0.1, 0.2, 0.4, 0.8" in page
    assert [row["is_best"] for row in summary["rates"]] == [False, True, False]


def test_the_preset_crosses_rates_and_its_trials_keep_their_names():
    grid = study.make_trials(study.PRESETS["rates"])
    assert {t.peak_lr for t in grid} == set(study.PRESETS["rates"].peak_lrs)
    names = {record_store.trial_id(t) for t in grid}
    assert len(names) == len(grid)
    assert "de242640e40f" in names, "records of this name exist"
