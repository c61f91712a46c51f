import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.artifacts import Card
from jaxquant.artifacts.checksums import with_checksum
from jaxquant.quality import Verdict
from jaxquant.quality.gates import Check
from jaxquant.quality.versions import Versions

CARD = Card.empty()


def verdict(status) -> Verdict:
    return Verdict(status, "99", (Check("mean KL", status, f"Mean KL says {status}."),))


def writes(text):
    return lambda path: path.write_text(text)


@pytest.fixture
def versions(tmp_path) -> Versions:
    return Versions(tmp_path / "versions")


def publish(versions, *statuses):
    return [
        versions.publish(writes(f"{i}"), CARD, None if status is None else verdict(status))
        for i, status in enumerate(statuses)
    ]


def test_a_frozen_model_is_published_with_its_card_and_verdict(versions):
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    frozen = jq.nnx.freeze(jq.nnx.quantize(model, {".*": "w8a8"}))
    assert versions.names() == ()
    assert versions.publish(frozen, CARD, verdict("pass")) == "0001"
    x = jnp.array(np.random.default_rng(0).normal(size=(2, 32)), jnp.float32)
    np.testing.assert_array_equal(jq.nnx.load(versions.path("0001"), model)(x), frozen(x))
    assert versions.verdict("0001") == verdict("pass")
    card = versions.card("0001")
    assert card.verdict == verdict("pass").to_dict()
    assert [row["path"] for row in card.coverage["rows"]] == ["kernel"]
    assert card.versions["flax"]


def test_the_latest_that_passed_serves(versions):
    assert publish(versions, "pass", "pass", "fail", "inconclusive", None) == [
        "0001", "0002", "0003", "0004", "0005",
    ]  # fmt: skip
    assert versions.latest_passing() == "0002"
    assert versions.path("0002").read_text() == "1"
    assert versions.verdict("0005") is None
    versions.withdraw("0002", "too slow")
    assert versions.latest_passing() == "0001"
    assert versions.withdrawn("0002") == "too slow"
    assert versions.withdrawn("0001") is None


def test_a_damaged_version_does_not_serve(versions):
    publish(versions, "pass", "pass", "pass", "pass")
    versions.path("0004").write_text("other")
    record = versions.root / "0003" / "version.json"
    record.write_text(record.read_text().replace('"pass"', '"fail"', 1))
    versions.path("0002").unlink()
    assert versions.latest_passing() == "0001"
    assert "0004/model has 5 bytes; 1 were written" in versions.problem("0004")
    assert "version.json is damaged" in versions.problem("0003")
    assert "model is missing" in versions.problem("0002")


def test_where_none_serves_the_reasons_are_named(versions):
    with pytest.raises(ValueError, match="nothing is published"):
        versions.latest_passing()
    publish(versions, "fail", "pass", None)
    versions.withdraw("0002", "wrong data")
    with pytest.raises(
        ValueError, match="0003 is not judged; 0002 is withdrawn: wrong data; 0001 is judged 'fail'"
    ):
        versions.latest_passing()


def test_going_back_is_one_call(versions):
    publish(versions, "pass", "fail", "pass", "pass")
    assert versions.roll_back("slow") == "0003"
    assert versions.roll_back("slower") == "0001"
    with pytest.raises(ValueError, match="0001 serves on"):
        versions.roll_back("slowest")
    assert versions.latest_passing() == "0001"
    assert publish(versions, "pass") == ["0005"]
    assert versions.latest_passing() == "0005"


def test_a_version_is_withdrawn_once(versions):
    publish(versions, "pass")
    versions.withdraw("0001", "first")
    with pytest.raises(ValueError, match="withdrawn already: first"):
        versions.withdraw("0001", "second")
    (versions.root / "0001" / "withdrawn.json").write_text("{")
    assert "withdrawn" in versions.problem("0001")


def test_a_publication_that_fails_leaves_nothing(versions):
    def fails(path):
        path.write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        versions.publish(fails, CARD, verdict("pass"))
    assert list(versions.root.iterdir()) == []
    assert publish(versions, "pass") == ["0001"]


_PUBLISH = """
import sys
from jaxquant.artifacts import Card
from jaxquant.quality.versions import Versions
card, versions = Card.empty(), Versions(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(25):
    print(versions.publish(lambda path: path.write_text(f"{sys.argv[2]} {i}"), card, None))
"""


@pytest.mark.long
def test_two_processes_publish_at_once(versions):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PUBLISH, str(versions.root), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    names = [process.communicate(timeout=120)[0].split() for process in started]
    for name, published in zip("ab", names, strict=True):
        texts = [versions.path(version).read_text() for version in published]
        assert texts == [f"{name} {i}" for i in range(25)]
    assert sorted(names[0] + names[1]) == list(versions.names())
    assert len(versions.names()) == 50


def test_one_of_many_withdraws(versions):
    publish(versions, "pass")

    def withdraw(i):
        try:
            versions.withdraw("0001", str(i))
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(withdraw, range(8))) == 1
    assert json.loads((versions.root / "0001" / "withdrawn.json").read_text())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.path("0001"), "no version '0001'; it has none"),
        (lambda v: v.publish(lambda path: None, CARD, None), "wrote nothing"),
        (lambda v: v.publish(writes(""), CARD, True), "verdict is a Verdict"),
        (lambda v: v.publish(3, CARD, verdict("pass")), "a function of a path; got 3"),
        (
            lambda v: v.publish(writes(""), CARD, verdict("great")),
            "status is 'pass', .*got 'great'",
        ),
        (lambda v: v.publish(writes(""), None, verdict("pass")), "card is a Card.*got None"),
        (lambda v: v.withdraw("0001", ""), "reason in words"),
        (lambda v: v.roll_back("why"), "nothing is published"),
        (
            lambda v: v.publish(
                writes(""), Card(**{**CARD.to_dict(), "verdict": verdict("pass")}), verdict("fail")
            ),
            "another verdict",
        ),
    ],
)
def test_misuse_is_named(versions, call, message):
    with pytest.raises(ValueError, match=message):
        call(versions)
    assert not versions.names()


def test_other_files_in_the_folder_are_no_versions(versions):
    publish(versions, "pass")
    (versions.root / "README").write_text("")
    Path(versions.root / ".abc.tmp").mkdir()
    assert versions.names() == ("0001",)


def test_folders_without_a_record_are_no_versions(versions):
    (versions.root / "2024" / "model").mkdir(parents=True)
    (versions.root / "0002").mkdir()
    (versions.root / "0002" / "notes").write_text("mine")
    (versions.root / "20250101").write_text("a file")
    with pytest.raises(
        ValueError, match=r"no version to serve: 0002 is no version, .*; 2024 is no"
    ):
        versions.latest_passing()
    assert publish(versions, "pass", "pass") == ["0001", "0003"]  # what is there stays
    assert (versions.root / "0002" / "notes").read_text() == "mine"
    assert versions.names() == ("0001", "0003")
    assert versions.roll_back("slow") == "0001"
    with pytest.raises(ValueError, match=r"no version '2024', since that has no version\.json"):
        versions.card("2024")


def test_a_record_holds_its_own_name(versions):
    publish(versions, "pass", "fail")
    for name in ("0003", "0010", "00011"):
        shutil.copytree(versions.root / "0001", versions.root / name)
        assert f"is the record of '0001', not of '{name}'" in versions.problem(name)
    assert versions.latest_passing() == "0001"
    with pytest.raises(ValueError, match="is the record of '0001', not of '0003'"):
        versions.card("0003")


def test_records_of_before_they_held_their_names_serve(versions):
    publish(versions, "pass")
    path = versions.root / "0001" / "version.json"
    content = json.loads(path.read_text())
    assert content.pop("name") == "0001"
    kind = content.pop("kind")
    del content["version"], content["sha256"]
    path.write_text(with_checksum(kind, 1, content))
    assert versions.latest_passing() == "0001"
    path.write_text(with_checksum(kind, 2, content))
    assert "is the record of None" in versions.problem("0001")


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def deep(path):
    path.write_text("[" * 100_000)


def elsewhere(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("file", ["version.json", "model"])
@pytest.mark.parametrize("spoil", [as_folder, as_pipe, as_device, deep, elsewhere])
def test_a_bad_version_keeps_no_other_from_serving(versions, spoil, file):
    publish(versions, "pass", "pass")
    spoil(versions.root / "0002" / file)
    assert versions.latest_passing() == "0001"
    assert versions.problem("0002").startswith("damaged: ")
    assert publish(versions, "pass") == ["0003"]


@pytest.mark.parametrize("spoil", [as_folder, as_pipe, as_device, deep])
def test_what_says_that_a_version_is_withdrawn_may_be_damaged(versions, spoil):
    publish(versions, "pass", "pass")
    versions.withdraw("0002", "slow")
    spoil(versions.root / "0002" / "withdrawn.json")
    assert versions.problem("0002") == "withdrawn: for a reason that cannot be read"
    assert versions.latest_passing() == "0001"


def test_what_is_published_lies_within(versions, tmp_path):
    (tmp_path / "large").write_bytes(b"1")
    with pytest.raises(ValueError, match="is a link that leads out"):
        versions.publish(lambda path: path.symlink_to(tmp_path / "large"), CARD, verdict("pass"))
    with pytest.raises(ValueError, match="is a pipe; it must be a regular file"):
        versions.publish(os.mkfifo, CARD, verdict("pass"))
    assert versions.names() == ()


def test_a_full_disk_withdraws_nothing(versions, monkeypatch):
    publish(versions, "pass")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space.*withdrawn\.json"):
        versions.withdraw("0001", "slow")
    assert versions.latest_passing() == "0001"
