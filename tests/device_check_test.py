"""A device's first questions: asked whole, in small, on a CPU; and what happens where a part fails."""

import dataclasses
import json
import math
import resource
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT

from experiments.device_check import PRESETS, recording, running, settings

pytestmark = pytest.mark.exhaustive  # looks at our code alone, once

COMMAND = [sys.executable, "-m", "experiments.device_check", "--preset=tiny"]


def check(workdir, *flags: str) -> subprocess.CompletedProcess:
    return processor_seconds([*COMMAND, f"--workdir={workdir}", *flags])[0]


def processor_seconds(command: list[str]) -> tuple[subprocess.CompletedProcess, float]:
    """Runs a command, and tells what it took of a processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read(workdir) -> dict[tuple[str, str], dict]:
    lines = [json.loads(x) for x in (workdir / "results.jsonl").read_text().splitlines()]
    return {(x["part"], x["question"]): x for x in lines}


# ---- whole, in small


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, process, processor seconds) of the whole check."""
    workdir = tmp_path_factory.mktemp("check") / "run"
    return workdir, *processor_seconds([*COMMAND, f"--workdir={workdir}"])


def test_all_is_answered_and_says_how(finished):
    workdir, done, _ = finished
    assert done.returncode == 0, done.stderr[-3000:]
    found = read(workdir)
    assert {x["status"] for x in found.values()} == {"answered"}
    assert {x["kind"] for x in found.values()} == {"measured", "compiled"}
    assert {part for part, _ in found} == set(settings.LIMITS)
    assert all(line in done.stdout for line in ("exactness: a / 127", "(compiled): operands"))


def test_a_cpu_has_the_bits_that_numpy_has(finished):
    found = read(finished[0])
    exact = ("a / b", "1 / b", "a / 127", "square root", "scales", "codes", "int8 sums", "the CPU")
    lines = [
        v for (part, q), v in found.items() if part == "exactness" and any(x in q for x in exact)
    ]
    assert len(lines) > 25
    assert all(x["equal"] == x["of"] for x in lines)
    assert found["exactness", "int8_train forward beside float64"]["ulps"] <= 2
    rounded = found["exactness", "bfloat16 products, default beside float64"]
    assert 0 < rounded["relative_error"] < 1e-5


def test_what_is_multiplied_is_read_from_the_compiled_step(finished):
    found = read(finished[0])
    operands = found["train_step", "int8_train step: operands"]["operands"]
    for phase in ("forward", "dgrad", "wgrad"):
        assert operands[f"{phase}: s8 × s8"] > 0
    assert "s8" not in " ".join(found["train_step", "bf16 step: operands"]["operands"])
    assert found["products", "s8, forward: operands"]["operands"] == {"forward: s8 × s8": 1}


def test_times_are_ratios_and_training_learns(finished):
    found = read(finished[0])
    times = [x for (_, q), x in found.items() if q.endswith(": time")]
    assert all(math.isfinite(x["of_bf16"]) and x["of_bf16"] > 0 for x in times)
    assert found["optimizer", "jaxquant, 5 + 4 bits"]["bytes_per_element"] < 2
    for part in ("training_float", "training_int8"):
        (line,) = (x for (p, q), x in found.items() if p == part and q != running.PART)
        first, last = line["losses"]
        assert last < first - 0.1
        assert line["tokens_per_second"] > 0


def test_it_takes_little_of_a_processor_and_nine_minutes_at_most(finished):
    # Machines differ by four times. So time is counted in starts of a part: where one takes 2 s, 90 s.
    begin = [sys.executable, "-c", "import experiments.device_check.part"]
    a_start = min(processor_seconds(begin)[1] for _ in range(2))
    assert finished[2] < 45 * a_start
    assert sum(settings.LIMITS.values()) <= 9 * 60
    assert PRESETS["full"].patience == 1


def test_answers_are_kept_and_others_asked(finished):
    workdir = finished[0]
    before = read(workdir)
    done = check(workdir, "--config.parts=('environment',)")
    assert done.returncode == 0, done.stderr
    assert "environment:" not in done.stdout
    part = "environment", running.PART
    assert {k: v for k, v in read(workdir).items() if k != part} == {
        k: v for k, v in before.items() if k != part
    }
    other = check(workdir, "--config.rounds=3")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "other sizes or versions" in other.stderr


@pytest.mark.parametrize("flag", ["--config.parts=('gpu',)", "--config.rounds=0"])
def test_bad_input_is_one_line(tmp_path, flag):
    done = check(tmp_path, flag)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "config." in done.stderr


# ---- parts that fail


def test_a_part_that_is_killed_is_named_with_what_it_was_at(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_STARTING", 0.0)
    limits = {"exactness": 0.3, "environment": 200.0}
    monkeypatch.setattr(running, "LIMITS", limits)
    begun = {"part": "exactness", "question": "a / b", "kind": "measured", "status": "begun"}
    recording.Record(tmp_path).put(begun)
    config = dataclasses.replace(PRESETS["tiny"], parts=tuple(limits), patience=1.0)
    problems = running.problems(running.run(config, tmp_path))
    assert problems == [
        "exactness, a / b: killed after 0 s",
        f"exactness, {running.PART}: killed after 0 s",
    ]
    assert read(tmp_path)["environment", "versions"]["status"] == "answered"


def test_a_part_that_dies_is_named_with_its_last_words(tmp_path):
    code = "import os, sys; print('out of luck', file=sys.stderr, flush=True); os.abort()"
    reason = running._end_of([sys.executable, "-c", code], tmp_path / "logs" / "x.txt", 60)
    assert reason == "ended with status -6: out of luck"


def test_a_question_that_fails_is_a_line_and_the_next_one_is_asked(tmp_path, capfd):
    asker = recording.Asker(tmp_path, "products", "cpu", 60)
    asker("s8", "measured", lambda: {"x": 1 / 0})
    asker("bf16", "measured", lambda: {"x": jnp.float32(np.nan)})
    found = read(tmp_path)
    assert found["products", "s8"]["status"] == "failed"
    assert found["products", "s8"]["reason"] == "ZeroDivisionError: division by zero"
    assert found["products", "bf16"]["x"] == "nan"
    assert "1 / 0" in capfd.readouterr().err


def test_a_question_is_asked_once_a_device_while_there_is_time(tmp_path):
    asked = []

    def ask(device: str, seconds: float) -> None:
        asker = recording.Asker(tmp_path, "products", device, seconds)
        asker("s8", "measured", lambda: asked.append(device) or {})

    for device, seconds in (("cpu", 60), ("cpu", 60), ("gpu", 0), ("gpu", 60)):
        ask(device, seconds)
    assert asked == ["cpu", "gpu"]


def test_damaged_results_are_set_aside(tmp_path):
    (tmp_path / "results.jsonl").write_text("{]\n")
    assert recording.Record(tmp_path).lines == []
    assert list((tmp_path / "set-aside").iterdir())


# ---- counting units in the last place


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_neighbours_are_one_unit_apart(dtype):
    x = np.array([-2.0, -1.0, -0.25, 0.25, 1.0, 2.0], dtype)
    above = np.nextafter(x, np.array(4, dtype))
    found = recording.compare(above, x.astype(np.float64))
    assert (found["equal"], found["of"], found["ulps"]) == (0, 6, 1)


def test_zeros_differ_in_their_bits_alone():
    found = recording.compare(np.array([-0.0, 1.0], np.float32), np.array([0.0, 1.0]))
    assert (found["equal"], found["ulps"], found["relative_error"]) == (1, 0, 0)


def test_signs_are_far_apart_and_integers_are_counted():
    tiny = np.float32(1e-45)
    assert recording.compare(np.array([-tiny]), np.array([float(tiny)]))["ulps"] == 2
    assert recording.compare(np.array([-3], np.int8), np.array([4]))["ulps"] == 7
