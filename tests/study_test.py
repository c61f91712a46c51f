"""A study is data: a small one runs, goes on, loads; the five say what they ask and what they take."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
from absl import flags
from conftest import ROOT

from experiments.harness import study as binary
from experiments.harness.running import cli
from experiments.harness.running.trials import Launch
from experiments.harness.study import Finished, Study

STUDIES = (
    "gradient_precision",
    "optimizer_states",
    "pretrained_quantization",
    "ptq_overtraining",
    "qat_efficiency",
    "training_precision",
)


@dataclasses.dataclass
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


@dataclasses.dataclass(frozen=True)
class Frozen:
    workers: int = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"presets": {}, "costs": {}},
            "study 'small': presets needs at least one config; got none",
        ),
        (
            {"presets": {"smoke": {}}},
            r"presets\['smoke'\] must be an instance of a dataclass; got {}",
        ),
        ({"presets": {"smoke": Config}}, r"presets\['smoke'\] must be an instance of a dataclass"),
        ({"presets": {"smoke": Frozen()}}, r"presets\['smoke'\] must not be frozen.*above Frozen"),
        ({"costs": {"smoke": ""}}, "costs needs the names of presets, smoke, laptop; got smoke"),
        ({"costs": {"smoke": "", "laptop": "", "tpu": ""}}, "got smoke, laptop, tpu"),
    ],
)
def test_a_study_that_is_not_whole_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_the_binary_starts_with_laptop_or_else_the_first_preset():
    assert SMALL.default == "laptop"
    presets, costs = {"one": Config(), "two": Config()}, {"one": "", "two": ""}
    assert dataclasses.replace(SMALL, presets=presets, costs=costs).default == "one"


def test_a_config_needs_no_number_of_workers(tmp_path):
    @dataclasses.dataclass
    class Bits:
        bits: tuple[int, ...] = (2, 4)

    study = dataclasses.replace(
        SMALL,
        presets={"smoke": Bits()},
        costs={"smoke": ""},
        batches=lambda config: (),
        report=lambda done: {"errors": [r["error"] for r in done.records]},
    )
    assert study.run(Bits(), tmp_path) == {"errors": [0.25, 0.0625]}


def test_a_grid_without_trials_or_with_one_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="study 'small': make_trials gave no trial"):
        SMALL.run(Config(()), tmp_path)
    with pytest.raises(ValueError, match=r"1 come up again: Trial\(bits=4\)$"):
        SMALL.run(Config((4, 2, 4)), tmp_path)


def test_a_shard_without_any_record_writes_no_report_and_says_so(tmp_path, monkeypatch, capsys):
    parts = Launch(shard=(2, 3))
    assert SMALL.run(Config(), tmp_path, parts) == {}
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(binary, "_launch", lambda: parts)
    monkeypatch.setattr(binary, "define_study_flags", lambda name: None)
    monkeypatch.setattr(cli, "main", lambda run, presets, **_: run(Config()))
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", str(tmp_path), "", flag_values=values)
    flags.DEFINE_string("shard", "2/3", "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(binary, "FLAGS", values)
    SMALL.main()
    expected = "Shard 2/3 has no trial to run, and no trial has a record yet: no report.\n"
    assert capsys.readouterr().out == expected


def test_without_papers_help_names_none():
    assert "Papers" not in dataclasses.replace(SMALL, papers=()).about()


def test_whole_numbers_are_one_or_several():
    @dataclasses.dataclass
    class Sizes:
        seeds: int = 3
        bits: tuple[int, ...] = (2, 4)

    cli.check_whole(Sizes(), "seeds", "bits")
    with pytest.raises(ValueError, match=r"^config\.seeds .*0"):
        cli.check_whole(Sizes(seeds=0), "seeds")
    with pytest.raises(ValueError, match=r"each of config\.bits .*0"):
        cli.check_whole(Sizes(bits=(0,)), "bits")


@pytest.mark.exhaustive
def test_help_of_a_binary_without_presets_has_none_and_may_be_cut_short():
    command = [sys.executable, "-m", "experiments.pack", "--help"]
    whole = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--workdir" in whole.stdout
    assert "--preset" not in whole.stdout
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as cut:
        assert cut.stdout is not None
        assert cut.stderr is not None
        cut.stdout.close()
        assert cut.stderr.read() == ""
    assert cut.returncode == 0


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_says_what_it_asks_and_what_each_preset_takes(name):
    study = importlib.import_module(f"experiments.{name}").STUDY
    assert study.name == name
    assert study.question.endswith("?")
    assert set(study.costs) == set(study.presets)
    assert len(study.make_trials(study.presets["smoke"])) > 1
