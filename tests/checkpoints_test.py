import errno
import json
import os
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.harness.running import checkpoints as module
from experiments.harness.running.checkpoints import Checkpoints


class Position:
    def __init__(self):
        self.state = {"at": 0}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def state(value, dtype=jnp.float32):
    return {"w": jnp.full((64, 8), value, dtype), "b": jnp.zeros(3)}


@pytest.fixture
def folder(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (10, 20):
            position = Position()
            position.set_state({"at": step})
            checkpoints.save(step, state(step), position, [(step, 1.5)], [2.0, float("nan")])
    return tmp_path / "run"


def restore(folder, like=None, at_most=100):
    position = Position()
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(like or state(0), position, at_most), position.state


def test_the_newest_is_restored_with_its_position_and_history(folder):
    (found, history, pending), position = restore(folder)
    np.testing.assert_array_equal(found["w"], 20)
    assert (history, position) == ([(20, 1.5)], {"at": 20})
    np.testing.assert_array_equal(pending, [2.0, np.nan])


def test_what_is_saved_is_what_was_given_whatever_becomes_of_it(tmp_path):
    history, position = [(10, 1.5)], Position()
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(10, state(10), position, history)
        history.append((20, 1.0))
        position.state["at"] = 99
    (_, found, _), restored = restore(tmp_path / "run")
    assert (found, restored) == ([(10, 1.5)], {"at": 0})


def test_later_ones_than_wanted_are_passed_over(folder):
    (found, *_), position = restore(folder, at_most=19)
    np.testing.assert_array_equal(found["w"], 10)
    assert position == {"at": 10}
    assert restore(folder, at_most=5)[0] is None


def biggest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncate", "remove", "json"])
def test_a_damaged_one_is_set_aside_with_a_warning(folder, damage, caplog):
    if damage == "truncate":
        victim = biggest_file(folder / "20")
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    elif damage == "remove":
        shutil.rmtree(folder / "20" / "state")
    else:
        (victim,) = (folder / "20" / "extra").glob("metadata*")
        victim.write_text('{"layo')
    (found, *_), _ = restore(folder)
    np.testing.assert_array_equal(found["w"], 10)
    assert "unusable" in caplog.text
    assert "set aside" in caplog.text
    assert [p.name.split("-")[:2] for p in (folder.parent / "set-aside").iterdir()] == [
        ["run", "20"]
    ]


def test_a_save_that_was_cut_off_is_not_seen(folder):
    (folder / "30.orbax-checkpoint-tmp-0").mkdir()
    (folder / "30.orbax-checkpoint-tmp-0" / "half").write_text("…")
    (found, *_), _ = restore(folder)
    np.testing.assert_array_equal(found["w"], 20)


def test_arrays_of_another_type_or_shape_are_never_cast(folder, caplog):
    assert restore(folder, like=state(0, jnp.bfloat16))[0] is None
    assert "other shapes or types" in caplog.text


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_sealed", [True, False])
def test_any_flipped_byte_is_found(folder, caplog, is_sealed):
    """Of 60, drawn over all bytes of the newest checkpoint, its seal included, or where that was lost."""
    paths = sorted(p for p in (folder / "20").rglob("*") if p.is_file())
    whole = {path: path.read_bytes() for path in paths}
    places = np.cumsum([len(content) for content in whole.values()])
    with Checkpoints(folder) as checkpoints:
        assert checkpoints._find_damage(20) is None
        if not is_sealed:
            (folder / "20" / "seal.json").unlink()
        for place in np.random.default_rng(0).choice(places[-1], 60, replace=False):
            number = int(np.searchsorted(places, place, side="right"))
            if paths[number].exists():
                content = bytearray(whole[paths[number]])
                content[place - (places[number - 1] if number else 0)] ^= 1 << int(place % 8)
                paths[number].write_bytes(content)
                assert checkpoints._find_damage(20) is not None, (paths[number], place)
                paths[number].write_bytes(whole[paths[number]])
    content = bytearray(whole[paths[0]])
    content[0] ^= 1
    paths[0].write_bytes(content)
    (found, *_), _ = restore(folder)
    np.testing.assert_array_equal(found["w"], 10)
    reason = "is not what was written" if is_sealed else "seal.json cannot be read"
    assert reason in caplog.text


NESTED = "[" * 100_000


@pytest.mark.parametrize("seal", ["null", "[]", '"x"', "{}", "", '{"size":', NESTED, None, "other"])
def test_a_seal_that_is_none_is_damage(folder, seal, caplog):
    path = folder / "20" / "seal.json"
    if seal is None:
        path.unlink()
    else:
        of_another = (folder / "10" / "seal.json").read_text()
        path.write_text(of_another if seal == "other" else seal)
    (found, *_), _ = restore(folder)
    np.testing.assert_array_equal(found["w"], 10)
    assert "is unusable" in caplog.text


@pytest.mark.parametrize("is_sealed", [True, False])
def test_one_that_was_killed_before_it_was_in_its_place_is_not_seen_and_goes(folder, is_sealed):
    shutil.copytree(folder / "20", folder / "30.unsealed")
    if not is_sealed:
        (folder / "30.unsealed" / "seal.json").unlink()
    (found, *_), _ = restore(folder)
    np.testing.assert_array_equal(found["w"], 20)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(30, state(31), Position(), [])
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20", "30"]
    (found, *_), _ = restore(folder)
    np.testing.assert_array_equal(found["w"], 31)


def test_at_no_moment_is_one_in_its_place_without_a_seal_that_fits(tmp_path):
    unsealed, is_over = [], threading.Event()

    def watch():
        while not is_over.is_set():
            for path in tmp_path.glob("run/*"):
                if path.name.isdecimal() and not (path / "seal.json").exists() and path.exists():
                    unsealed.append(path)

    watching = threading.Thread(target=watch)
    watching.start()
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        for step in range(12):
            checkpoints.save(step, state(step), Position(), [])
    is_over.set()
    watching.join()
    assert not unsealed
    assert restore(tmp_path / "run")[0] is not None


def test_what_keeps_it_from_being_sealed_is_raised(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_digests", full)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(10, state(10), Position(), [])
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()
    assert restore(tmp_path / "run")[0] is None


def test_those_that_were_sealed_in_their_place_are_read(folder):
    """As they were written before: by Orbax's manager, and sealed afterwards."""
    extra = json.loads((folder / "20" / "extra" / "metadata").read_text())
    with ocp.CheckpointManager(folder) as manager:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state(40)), extra=ocp.args.JsonSave(extra)
        )
        manager.save(40, args=args)
    (folder / "40" / "seal.json").write_text(json.dumps(module._digests(folder / "40")))
    (found, *_), position = restore(folder)
    np.testing.assert_array_equal(found["w"], 40)
    assert position == {"at": 20}
