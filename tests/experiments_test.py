"""Every study's binary from outside: under smoke, killed, and with bad input."""

import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import children
import numpy as np
import pytest
from conftest import ROOT, study_command


def results(workdir) -> dict[str, bytes]:
    """What a run ends in: its records and its summary, as bytes."""
    paths = [*sorted((workdir / "trials").glob("*.json")), workdir / "summary.json"]
    return {path.name: path.read_bytes() for path in paths}


def test_smoke_ends_in_records_a_summary_and_a_report(smoke):
    records = [json.loads(p.read_text()) for p in (smoke.workdir / "trials").glob("*.json")]
    assert len(records) == 6
    for record in records:
        assert record["status"] == "done"
        for point in record["points"]:
            assert set(point["base"]) == {"valid", "shift"}
            assert len(point["added"]) == 2 * 3 * 2  # splits, widths, granularities
            for split, loss in point["base"].items():
                assert 1 < loss["mean"] < np.log(256), split
    summary = json.loads((smoke.workdir / "summary.json").read_text())
    assert summary["trials"] == {"finished": 6, "expected": 6, "diverged": []}
    assert {row["schedule"] for row in summary["headline"]["rows"]} == {"wsd", "cosine"}
    assert (smoke.workdir / "report.html").stat().st_size > 100_000
    assert "Does the loss" in smoke.stdout
    assert "report:" in smoke.stdout
    shares = [int(x) for x in re.findall(r"(\d+)%\|", smoke.stderr)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert "6 of 6 trials done" in smoke.stderr


def test_a_width_of_eight_bits_costs_least(smoke):
    summary = json.loads((smoke.workdir / "summary.json").read_text())
    added = {bits: [] for bits in (2, 4, 8)}
    for row in summary["added_loss"]:
        added[row["bits"]].append(row["mean"])
    assert np.mean(added[2]) > np.mean(added[4]) > np.mean(np.abs(added[8]))


@pytest.mark.exhaustive
@pytest.mark.long
def test_killed_at_five_random_moments_it_ends_in_the_same_bytes(smoke, tmp_path):
    rng, kills = random.Random(), 0
    for attempt in range(5):
        process = subprocess.Popen(
            study_command(tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            # The first run compiled what these read.
            process.wait(rng.uniform(0.08, 0.25) * smoke.seconds)
        except subprocess.TimeoutExpired:
            kills += 1
            # Every other time the parent alone dies, and its workers find out by themselves.
            if attempt % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert kills >= 3, "the run was over before it could be killed"
    done = subprocess.run(
        study_command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == results(smoke.workdir)


@pytest.mark.long
@pytest.mark.exhaustive
def test_a_half_written_record_is_set_aside_with_a_warning_and_made_again(smoke, tmp_path):
    shutil.copytree(smoke.workdir, tmp_path, dirs_exist_ok=True)
    victim = min((tmp_path / "trials").glob("*.json"))
    victim.write_bytes(victim.read_bytes()[:1000])
    done = children.run(study_command(tmp_path), cwd=ROOT, timeout=120)
    assert done.returncode == 0
    assert f"warning: {victim} is unusable" in done.stderr
    assert results(tmp_path) == results(smoke.workdir)


@pytest.mark.exhaustive
def test_help_shows_every_flag():
    command = [sys.executable, "-m", "experiments.ptq_overtraining", "--help"]
    done = children.run(command, cwd=ROOT, timeout=120)
    assert done.returncode == 0
    for flag in ("--preset", "--workdir", "--workers", "--shard", "--config.bits"):
        assert flag in done.stdout


@pytest.mark.exhaustive
def test_a_report_is_rebuilt_from_records_alone(smoke, tmp_path):
    (tmp_path / "trials").mkdir()
    for name in (
        "study.json",
        *(f"trials/{p.name}" for p in (smoke.workdir / "trials").glob("*.json")),
    ):
        (tmp_path / name).write_bytes((smoke.workdir / name).read_bytes())
    done = children.run(study_command(tmp_path), cwd=ROOT, timeout=120)
    assert done.returncode == 0
    assert results(tmp_path) == results(smoke.workdir)


# ---- bad input: one line and exit status 2


def bad_inputs(folder) -> dict[str, list[str]]:
    """Commands that must fail, by the words that their error must hold."""
    (folder / "empty.txt").write_text("")
    (folder / "garbage.txt").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "short.txt").write_text("too short")
    (folder / "file").write_text("")
    (folder / "other").mkdir()
    (folder / "other" / "study.json").write_text('{"study": "qat_efficiency"}')
    (folder / "train").mkdir()
    (folder / "train" / "config.json").write_text("{}")
    work, own = folder / "work", folder / "own"  # of studies, and of training runs

    def text(name):
        return ["--config.data=text", f"--config.data_path={folder / name}"]

    return {
        "--preset is one of smoke, laptop, full, rates, repetition, gptq, tpu; got 'huge'": study_command(
            work, "--preset=huge"
        ),
        "Unknown command line flag 'epochs'": study_command(work, "--epochs=3"),
        "--config.lr=1' is not --config.FIELD": study_command(work, "--config.lr=1"),
        "seeds": study_command(work, "--config.seeds=three"),
        "unexpected argument 'smoke'": study_command(work, "smoke"),
        "2 to 16 as an integer (or a traced array); got 0": study_command(
            work, "--config.bits=(0,)"
        ),
        "got -1": study_command(work, "--config.bits=(-1,)"),
        "1.5": study_command(work, "--config.bits=(1.5,)"),
        "got 33": study_command(work, "--config.bits=(4,33)"),
        "empty.txt' is empty": study_command(work, *text("empty.txt")),
        "absent.txt' does not exist": study_command(work, *text("absent.txt")),
        "garbage.txt' is not": study_command(work, *text("garbage.txt")),
        "short.txt has": study_command(work, *text("short.txt")),
        "cannot be written": study_command(folder / "file" / "work"),
        "holds the study 'qat_efficiency'": study_command(folder / "other"),
        "--workdir names a folder": study_command("", "--preset=smoke"),
        "--shard is i/n": study_command(work, "--shard=4/4"),
        "workers must be at least 1": study_command(work, "--workers=-2"),
        "model size is one of": study_command(own, "--config.size=70b", study="train"),
        "does not cover 1 device": study_command(own, "--config.mesh_fsdp=3", study="train"),
    }


# Those that no other test has: tests of the trials and of the data have the files, others more of the bits.
FEW_BAD_INPUTS = (
    "--preset is",
    "Unknown command line flag",
    "--config.lr",
    "unexpected argument",
    "2 to 16",
    "--shard is",
    "workers must",
    "model size",
    "does not cover",
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "wanted", [FEW_BAD_INPUTS, pytest.param(("",), marks=pytest.mark.long)], ids=["few", "all"]
)
def test_bad_input_ends_with_one_line_and_status_two(tmp_path, wanted):
    every = bad_inputs(tmp_path)
    commands = {words: every[words] for words in every if words.startswith(wanted)}
    assert len(commands) >= len(wanted)

    def run(command):
        return children.run(command, cwd=ROOT, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for words, done in zip(commands, pool.map(run, commands.values()), strict=True):
            lines = done.stderr.strip().splitlines()
            assert done.returncode == 2, (words, done.stderr[-1000:])
            assert len(lines) == 1, (words, lines)
            assert lines[0].startswith("error: "), lines
            assert words in lines[0], lines
            assert done.stdout == ""


@pytest.mark.exhaustive
def test_divergence_ends_with_one_line(tmp_path):
    command = study_command(tmp_path, "--config.peak_lr=1e30", study="train")
    done = children.run(command, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: training diverged: the loss is")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_files_without_permission_are_named(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("x" * 5000)
    secret.chmod(0)
    command = study_command(tmp_path / "w", "--config.data=text", f"--config.data_path={secret}")
    done = children.run(command, cwd=ROOT, timeout=120)
    assert (done.returncode, "cannot be read" in done.stderr) == (2, True)


@pytest.mark.exhaustive
@pytest.mark.long
def test_a_full_disk_loses_no_finished_record(smoke, tiny_disk):
    workdir = tiny_disk / "work"
    (workdir / "trials").mkdir(parents=True)
    finished = sorted((smoke.workdir / "trials").glob("*.json"))[:3]
    for path in [*finished, smoke.workdir / "study.json"]:
        (workdir / path.relative_to(smoke.workdir)).write_bytes(path.read_bytes())
    (tiny_disk / "ballast").write_bytes(b"x" * 450_000)
    done = subprocess.run(
        study_command(workdir), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "What was finished is kept" in last
    for path in finished:
        assert (workdir / "trials" / path.name).read_bytes() == path.read_bytes()

    (tiny_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", str(tiny_disk)], check=True)
    done = subprocess.run(
        study_command(workdir), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(workdir) == results(smoke.workdir)
