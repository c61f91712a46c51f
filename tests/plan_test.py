"""The planner's door."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import children
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from experiments import costs
from experiments import plan as door
from experiments.training_precision import planning
from experiments.training_precision.study import PUBLISHED, STUDY
from jaxquant import laws


def plan(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.plan", *flags]
    return children.run(command, timeout=300, cwd=ROOT)


@pytest.mark.exhaustive
def test_a_plan_is_printed_and_kept(tmp_path):
    done = plan("--flops=1e20", "--serve_bits=4", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "D_crit" in done.stdout
    assert "warning: N = " in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["bits"] for row in summary["rows"]} >= {4, 8, 16}
    assert summary["given"]["serve_bits"] == 4
    assert summary["best"].startswith("An extrapolation: ")  # N beyond what was fitted
    assert (tmp_path / "report.html").exists()
    said = [line for line in done.stdout.splitlines() if "reject this form" in line]
    assert len(said) == 1
    assert "--fit=experiments/results/training_precision/full" in said[0]
    assert PUBLISHED == ROOT / "experiments/results/training_precision/full"
    assert said[0].removeprefix("warning: ") in summary["warnings"]


def test_the_backward_pass_is_said_to_be_in_16_bits():
    budget = asked(flops=1e20, precisions=(4, 8, 16))
    by_bits = door.answer("kumar2024", None, budget)
    assert "no backward widths: their gradient products are in 16 bits" in by_bits.notes[0]
    assert str(by_bits.plan) == str(laws.plan(laws.KUMAR_2024, **budget)).replace(
        "warning:", f"warning: {door.REJECTED}\nwarning:", 1
    )
    found = door.answer("kumar2024", None, budget, costs.Hardware("b200", "float"))
    said = "; ".join(found.notes)
    assert "1 to 4 bits as f4 (4.00 × bf16)" in said
    assert "the runs had int operands" in said
    assert "a step costs (c(P) + 2 c(16)) / 3" in said
    for row, cost in zip(found.plan.rows, (2.25 / 3, 2.5 / 3, 1.0), strict=True):
        assert 6 * row.N * row.D * cost == pytest.approx(1e20)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--flops=-1"], "flops must be a number above 0"),
        (["--flops=x"], "could not convert"),
        (["--flops=1e20", "--fit=nowhere"], "--fit is one of kumar2024, quest2025"),
        (["--flops=1e20", "--precisions=a"], "--precisions are numbers"),
        (["--flops=1e20", "--precisions=3"], "is next to nothing"),
        (["--flops=1e20", "--method=lsq"], "--method is of a study's fit; kumar2024 has none"),
        (["--flops=1e20", "--chip=h10"], "--chip is one of v5e, v5p, v6e, tpu7x, A100, H100"),
        (["--flops=1e20", "--chip=v5e", "--operands=x"], "--operands is int or float; got 'x'"),
        (["--flops=1e20", "--operands=int"], "--operands is of --chip, which is not given"),
        (["--params=1e8", "--tokens=1e10", "--chip=h100"], "leave nothing to buy; give --flops"),
        (["--flops=1e20", "--workdir=/proc/x"], "workdir '/proc/x' cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words):
    done = plan(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- by the records of a study


@pytest.fixture(scope="module")
def published():
    return STUDY.load(PUBLISHED)


@pytest.fixture(scope="module")
def chosen(published):
    return planning.choose(planning.of_study(published, "ste"))


def asked(**changed: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "flops": 1e13,
        "N": None,
        "D": None,
        "serve_bits": None,
        "memory": None,
    }
    return options | {"precisions": (4, 6, 8, 16)} | changed


@pytest.mark.long
@pytest.mark.exhaustive
def test_our_runs_reject_bits_that_cost_parameters(chosen):
    kept = {f.law.name for f in chosen.fits}
    assert kept <= {laws.GROWING_ONE.name, laws.GROWING_ERROR.name}
    assert "resampled within sizes" in chosen.resampled
    ranks: Any = planning.ranks(chosen).set_index("law")
    assert ranks.loc[laws.KUMAR_ONE.name, "rejected"] == "yes"
    assert float(ranks.loc[laws.PANFEROV.name, "ΔAICc"]) > 10
    text = planning.union_text(chosen)
    assert all(name in text for name in kept)
    assert "union" in text or len(kept) == 1


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_chosen_fit_is_that_of_more_starts(chosen, published):
    table = planning.of_study(published, "ste")
    for fitted in chosen.fits:
        more = laws.fit(fitted.law, table, starts=160, bootstraps=0)
        assert fitted.objective == pytest.approx(more.objective, rel=1e-6)


@pytest.mark.long
@pytest.mark.exhaustive
def test_intervals_are_the_union_over_laws_that_are_not_rejected(chosen):
    both = dataclasses.replace(chosen, fits=(*chosen.fits, chosen.kumar))
    beside: Any
    found, beside = planning.plan(chosen, None, asked())
    alone = [laws.plan(f, **asked()) for f in chosen.fits]
    optima: list[Any] = [one.optimum for one in alone]
    assert found.optimum is not None
    assert found.optimum.low == min(o.low for o in optima)
    assert found.optimum.high == max(o.high for o in optima)
    assert found.best in found.rows
    for row, first in zip(found.rows, alone[0].rows, strict=True):
        same = [laws.plan(f, N=row.N, D=row.D, precisions=[row.bits]).best for f in chosen.fits]
        assert row.loss == first.loss
        assert row.low == min(one.low for one in same)
        assert row.high == max(one.high for one in same)
    assert list(beside["plan by"])[-2:] == [
        "N_eff, one width, fitted to these runs",
        "Kumar et al. 2024, as published",
    ]
    costs = beside["loss added by the likeliest law"].astype(float)
    assert costs[0] == 0
    assert (costs >= 0).all()
    wider, others = planning.plan(both, None, asked())
    pairs = list(zip(wider.rows, found.rows, strict=True))
    # Where one of the laws says nothing, neither does the union.
    assert not any(w.low > r.low or w.high < r.high for w, r in pairs)
    assert any(w.high - w.low > r.high - r.low for w, r in pairs)
    assert "fitted to these runs" not in " ".join(others["plan by"])


@pytest.mark.long
@pytest.mark.exhaustive
def test_a_plan_by_records_has_all_that_a_plan_has(chosen, published):
    ptq = planning.added(published, "ste")
    found, _ = planning.plan(chosen, ptq, asked(serve_bits=3, memory=1e6))
    assert found.optimum is None
    assert all(row.added > 0 and row.critical > 0 and row.low < row.high for row in found.rows)
    beside: Any
    found, beside = planning.plan(chosen, None, asked(flops=None, N=1e5, D=1e6))
    assert set(beside["N"]) == {"1e+05"}
    _, beside = planning.plan(chosen, None, asked(precisions=(3,)))
    assert "next to nothing" in beside["P"].iloc[-1]  # Kumar's published constants
    assert beside["N"].iloc[-1] == "—"


@pytest.mark.parametrize(("independent", "count"), [(17.9, 2), (18.0, 1)])
def test_runs_that_are_few_for_the_largest_law_are_said_to_be(independent, count):
    fits: Any = (SimpleNamespace(law=laws.PANFEROV),)
    ranked: Any = SimpleNamespace(independent=independent)
    said = planning.notes(planning.Chosen(ranked, fits, cast(Any, None), ""))
    assert len(said) == count
    assert "is the one law" in said[0]
    assert count == 1 or "worth 18 independent ones" in said[1]


def test_units_are_resampled_within_sizes_where_these_have_seeds():
    table: Any = pd.DataFrame({"size": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1]})
    table = table.assign(unit=["a/0", "a/1", "b/0", "b/1"])
    assert planning._units(table)[0] == {"groups": "unit", "strata": "size"}
    options, text = planning._units(table.iloc[:3])
    assert options == {"groups": "unit"}
    assert text == "3 units of a size and a seed, resampled over all, since a size has one seed"


def test_runs_that_no_law_can_be_fitted_to_are_refused_in_words():
    table: Any = pd.DataFrame(
        {"size": ["a", "b"] * 4, "seed": [0, 0, 1, 1] * 2, "N": [1e4, 4e4] * 4}
    )
    table = table.assign(
        D=np.geomspace(1e5, 1e6, 8), P_w=[2, 2, 4, 4] * 2, loss=np.linspace(3, 2, 8)
    )
    table = table.assign(unit=table["size"] + "/" + table["seed"].astype(str))
    with pytest.raises(ValueError, match="needs 12 runs or more; got 8"):
        planning.choose(table)


@pytest.mark.long
@pytest.mark.exhaustive
def test_a_plan_by_records_is_printed():
    done = plan("--flops=1e13", f"--fit={PUBLISHED}", "--precisions=4,8")
    assert done.returncode == 0, done.stderr
    for words in (planning.RANKED, planning.BESIDE, "ΔAICc", "the union, over bootstraps"):
        assert words in done.stdout
