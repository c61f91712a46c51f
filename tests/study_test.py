"""A study is data: a small one runs, goes on, loads; the five say what they ask and what they take."""

import dataclasses
import importlib
import json

import pytest

from experiments.harness.running.trials import Launch
from experiments.harness.study import Finished, Study

STUDIES = (
    "optimizer_states",
    "pretrained_quantization",
    "ptq_overtraining",
    "qat_efficiency",
    "training_precision",
)


@dataclasses.dataclass(frozen=True)
class Config:
    bits: tuple[int, ...] = (2, 4)
    batch: int = 4
    workers: int = 1


@dataclasses.dataclass(frozen=True)
class Trial:
    bits: int


def run_trial(trial, context):
    context.progress(1.0, "")
    return {"error": 2.0**-trial.bits}


def report(done: Finished) -> dict:
    assert isinstance(done.config, Config)
    summary = {
        "errors": [r["error"] for r in done.records],
        "expected": len(done.trials),
        "is_whole": done.is_whole,
    }
    (done.workdir / "summary.json").write_text(json.dumps(summary))
    return summary


SMALL = Study(
    name="small",
    question="How large is half a step?",
    papers=("2411.04330",),
    presets={"smoke": Config(), "laptop": Config((2, 4, 8))},
    costs={"smoke": "nothing", "laptop": "a moment"},
    make_trials=lambda config: [Trial(bits) for bits in config.bits],
    run_trial=run_trial,
    cost=lambda trial: 1.0,
    compile_key=lambda trial: "",
    report=report,
    to_text=str,
    batches=lambda config: ("batch",),
)


def test_a_study_runs_goes_on_and_is_loaded(tmp_path):
    assert SMALL.run(Config(), tmp_path)["errors"] == [0.25, 0.0625]
    found = SMALL.run(Config((2, 4, 8)), tmp_path)
    assert found == {"errors": [0.25, 0.0625, 2.0**-8], "expected": 3, "is_whole": True}
    assert {r["trial"]["bits"] for r in SMALL.load(tmp_path)} == {2, 4, 8}
    parts = [SMALL.run(Config(), tmp_path / "parts", Launch(shard=(i, 2))) for i in range(2)]
    assert not any(part["is_whole"] for part in parts)
    assert len(parts[1]["errors"]) == 2


def test_what_it_asks_and_takes_is_what_help_opens_with():
    assert SMALL.about().splitlines() == [
        "How large is half a step?",
        "Papers: 2411.04330.",
        "",
        "  --preset=smoke   nothing",
        "  --preset=laptop  a moment",
    ]


def test_a_batch_that_the_devices_do_not_divide_is_refused(tmp_path, monkeypatch):
    class Three:
        size = 3

    monkeypatch.setattr("experiments.harness.training.sharding.make_mesh", lambda *axes: Three)
    with pytest.raises(ValueError, match=r"config\.batch 4 does not divide over 3 devices"):
        SMALL.run(Config(), tmp_path)


def test_a_folder_of_another_study_is_refused(tmp_path):
    SMALL.run(Config(), tmp_path)
    with pytest.raises(ValueError, match="holds the study 'small', not 'other'"):
        dataclasses.replace(SMALL, name="other").run(Config(), tmp_path)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_says_what_it_asks_and_what_each_preset_takes(name):
    study = importlib.import_module(f"experiments.{name}").STUDY
    assert study.name == name
    assert study.question.endswith("?")
    assert set(study.costs) == set(study.presets)
    assert len(study.make_trials(study.presets["smoke"])) > 1
