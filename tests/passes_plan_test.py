"""Plans of both passes by records of gradient_precision: from made-up records back to the law they follow."""

import dataclasses
import itertools
import json
import sys
import types
from typing import Any

import children
import numpy as np
import pytest
from conftest import ROOT
from gradient_precision_test import records

from experiments import costs
from experiments import plan as door
from experiments.gradient_precision import PRESETS, STUDY, law
from experiments.gradient_precision import planning as passes
from experiments.gradient_precision.arms import FULL
from experiments.harness.models import lm
from jaxquant import laws

CONFIG = dataclasses.replace(
    PRESETS["full"],
    sizes=("10k", "14k", "38k"),
    forward=(4, 8, 16),
    backward=(4, 6, 16),
    tokens_per_parameter=(10, 60),
    seeds=2,
    peak_lrs=(4e-3,),
)
WIDTHS = list(itertools.product(CONFIG.forward, CONFIG.backward))
LAPTOP = ROOT / "experiments" / "results" / "gradient_precision" / "laptop"
FLOPS = 2e11


def penalty(n, d, forward, backward):
    """Two terms that grow with training: the forward pass's is the larger, the backward pass's grows more."""
    of_forward = 0.5 * d**0.2 * np.exp(-forward / 1.5)
    return of_forward + 0.02 * d**0.35 * n**-0.1 * np.exp(-backward / 1.2)


def loss(n, d, forward, backward):
    return 60.0 * n**-0.35 + 120.0 * d**-0.35 + 0.9 + penalty(n, d, forward, backward)


def loss_of(trial, ratio, rng):
    n = lm.SIZES[trial.size].non_embedding_parameters
    bits = (16, 16) if trial.method == FULL else (trial.forward, trial.backward)
    d = trial.steps(ratio) * trial.batch * trial.sequence
    noise = 5e-4 * np.random.default_rng(trial.seed).normal() + 5e-4 * rng.normal()
    return float(loss(n, d, *bits) * np.exp(noise))


def least(cost, forward, backward):
    """The least loss of a budget, by NumPy: (loss, N)."""
    n = np.geomspace(1e3, 1e8, 20_001)
    c = (cost(forward) + 2 * cost(backward)) / 3
    found = loss(n, FLOPS / (6 * n * c), forward, backward)
    i = int(np.argmin(found))
    return float(found[i]), float(n[i])


@pytest.fixture(scope="module")
def made():
    return records(CONFIG, loss_of)


class Flags(types.SimpleNamespace):
    """Flags as they are parsed, without absl's, of which a process has one set."""

    def __getitem__(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(value=getattr(self, name))


def asked(**changed: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("N", "D", "serve_bits", "memory", "precisions", "backward"))
    return {"flops": FLOPS} | nothing | changed


@pytest.fixture(scope="module")
def chosen(made):
    patch = pytest.MonkeyPatch()
    for name, value in (("BOOTSTRAPS", 20), ("STARTS", 6), ("_RESAMPLED_STARTS", 6)):
        patch.setattr(law, name, value)
    yield passes.choose(*passes.of_study(made))
    patch.undo()


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_law_that_made_the_runs_is_the_one_that_they_do_not_reject(chosen):
    assert chosen.fits[0].law.name == "terms that grow"
    assert chosen.widths == ([4, 8, 16], [4, 6, 16])
    ranks: Any = passes.ranks(chosen).set_index("law")
    assert ranks.loc["terms that grow", "rejected"] == "no"
    assert ranks.loc["Quartet", "rejected"] == "yes"
    assert "is the one law" in passes.notes(chosen)[0]


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "cost", [laws.bits_linear, laws.chip_cost("h100", "float"), laws.chip_cost("b200", "float")]
)
def test_the_split_that_made_the_runs_is_found_again(chosen, cost):
    found = passes.plan(chosen, {"flops": FLOPS, "cost": cost})
    expected: dict[Any, Any] = {pair: least(cost, *pair) for pair in WIDTHS}
    best = min(expected, key=lambda pair: expected[pair])
    assert {(r.forward, r.backward) for r in found.rows} == set(WIDTHS)
    assert best in {(r.forward, r.backward) for r in (found.best, *found.alike)}
    for row in found.rows:
        pair = row.forward, row.backward
        true = expected[pair][0] - expected[best][0]
        assert row.excess == pytest.approx(true, abs=0.01)
        assert row.N == pytest.approx(expected[pair][1], rel=0.2)  # noqa: SIM300
        if true > 0.05:
            assert row.is_apart
    assert any(row.is_apart for row in found.rows)
    table: Any = passes.beside(found).set_index("choice")
    even = min((r.loss for r in found.rows if r.forward == r.backward), default=None)
    assert float(table.loc["one width for both", "loss"]) == pytest.approx(even, abs=1e-4)
    assert table.loc["both in 16 bits", "bits"] == "16/16"
    assert table.loc["the plan", "bits"] == found.best.pair


@pytest.mark.long
@pytest.mark.exhaustive
def test_bits_that_were_not_trained_may_be_asked_for(chosen):
    found = passes.plan(chosen, {"flops": FLOPS, "forward": [6.0], "backward": [5.0, 3.0]})
    rows = {row.pair: row for row in found.rows}
    assert rows.keys() == {"6/5", "6/3"}
    assert "P_backward" in rows["6/3"].outside
    assert "P_backward" not in rows["6/5"].outside


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_door_plans_both_passes_and_keeps_it(chosen, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(door, "_records", lambda name: (door.GRADIENT, made))
    monkeypatch.setattr(passes, "choose", lambda table, names: chosen)
    found = door.answer("anywhere", None, asked(), costs.Hardware("b200", "float"))
    said = "; ".join(found.notes)
    assert "the runs had int operands, and what is counted are float ones" in said
    assert "a step costs (c(P_forward) + 2 c(P_backward)) / 3" in said
    assert isinstance(found.plan, laws.PassPlan)
    assert "int, stochastic, h8" in found.of
    given = dict.fromkeys(("params", "tokens", "serve_bits", "memory", "method", "operands"))
    given |= {"flops": FLOPS, "fit": "anywhere", "chip": "H100", "workdir": str(tmp_path)}
    monkeypatch.setattr(door, "FLAGS", Flags(**given))
    door.run(None)
    out = capsys.readouterr().out
    assert "not told apart from" in out
    assert passes.BESIDE in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["rows"]) == len(WIDTHS)
    assert summary["given"]["chip"] == "H100"
    assert any("1 to 8 bits as s8" in note for note in summary["notes"])
    assert summary["optimum"].startswith("P_forward* = ")
    assert summary["best"].startswith(("Train at", "An extrapolation: "))
    assert (tmp_path / "report.html").exists()


def test_what_no_plan_of_both_passes_can_have_is_refused(made, monkeypatch):
    few = dataclasses.replace(CONFIG, forward=(16,))
    with pytest.raises(ValueError, match="no grid of several forward and several backward"):
        passes.of_study(records(few, loss_of))
    monkeypatch.setattr(door, "_records", lambda name: (door.GRADIENT, made))
    for changed, words in (
        ({"serve_bits": 4.0}, "--serve_bits is not of a plan of both passes"),
        ({"memory": 1e9}, "--memory is not of a plan of both passes"),
        ({"flops": None}, "a plan of both passes, as anywhere gives, needs --flops; got none"),
    ):
        with pytest.raises(ValueError, match=words):
            door.answer("anywhere", None, asked(**changed))
    with pytest.raises(ValueError, match="--method is one of int, stochastic, h8; got 'ste'"):
        door.answer("anywhere", "ste", asked())
    with pytest.raises(ValueError, match="--backward_precisions is of a gradient_precision study"):
        door.answer("kumar2024", None, asked(backward=[4.0]))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--flops=1e13", f"--fit={LAPTOP}"],
            f"the runs of {LAPTOP} tell no plan: all runs have N = ",
        ),
        (["--flops=1e13", f"--fit={LAPTOP}", "--chip=h10"], "--chip is one of v5e"),
        (
            ["--flops=1e13", f"--fit={LAPTOP}", "--method=lsq"],
            "--method is one of int, nearest, h8",
        ),
        (["--flops=1e13", "--backward_precisions=x"], "--backward_precisions are numbers"),
        (["--flops=1e13", "--backward_precisions=4"], "the runs of kumar2024 have no backward"),
        (["--flops=1e13", "--precisions="], "--precisions are numbers above 0, such as"),
        (
            ["--flops=1e13", "--backward_precisions=4,nan"],
            "--backward_precisions are numbers above 0",
        ),
        (
            ["--flops=1e13", "--precisions=8,32", "--chip=h100"],
            "--precisions are up to 16 bits where",
        ),
        (["--flops=1e13", "--fit=nowhere"], "the workdir of a gradient_precision study, or: "),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words):
    command = [sys.executable, "-m", "experiments.plan", *flags]
    done = children.run(command, timeout=300, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_study_that_the_door_takes_has_committed_records():
    assert STUDY.load(LAPTOP)
    study, own = door._records(str(LAPTOP))
    assert study is door.GRADIENT
    assert passes.family(passes.of_study(own)[0]) == "int"
