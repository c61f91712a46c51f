import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

import jaxquant
from experiments.harness import data
from experiments.harness.data import paths, tokenizers
from experiments.harness.pretrained import files as weights
from experiments.harness.pretrained import minilm, references
from experiments.harness.running import files, record_store
from jaxquant.artifacts import files as regular


def test_json_round_trips_every_float(tmp_path):
    value = {"x": [0.1, 1 / 3, 1e-300, -0.0], "n": None}
    files.write_json(tmp_path / "deep" / "a.json", value)
    assert files.read_json(tmp_path / "deep" / "a.json") == value
    assert files.read_json(tmp_path / "absent.json") is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_a_half_written_file_is_set_aside(tmp_path, caplog):
    (tmp_path / "a.json").write_text('{"x": [1, 2')
    assert files.read_json(tmp_path / "a.json") is None
    assert "not whole JSON" in caplog.text
    assert len(list((tmp_path / "set-aside").iterdir())) == 1


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, DEEP + "]" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000])
def test_json_within_json_without_end_is_set_aside(tmp_path, caplog, text):
    (tmp_path / "a.json").write_text(text)
    assert files.read_json(tmp_path / "a.json") is None
    assert "nests deeper than 100 levels" in caplog.text


def test_json_is_held_to_its_bounds():
    assert regular.parse_json("[" * 100 + "]" * 100, "it")
    for text, message in (
        ("[" * 101 + "]" * 101, "it is not whole JSON: it nests deeper than 100 levels"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands there twice"),
        (b"\xff", "not whole JSON"),
        ("", "not whole JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            regular.parse_json(text, "it")


def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch):
    files.write(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space.*a\.txt"):
        files.write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# ---------------------------------------------------------------------------------------------------
# What is no file of ours


@pytest.fixture(autouse=True)
def _no_waiting():
    """What waits for the other end of a pipe is interrupted, and fails."""

    def stop(*_):
        raise TimeoutError("a reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def as_folder(path):
    path.mkdir()


def as_pipe(path):
    os.mkfifo(path)


def as_device(path):
    path.symlink_to("/dev/zero")


def as_vast(path):
    with open(path, "wb") as file:
        file.truncate(2**41)


OTHERS = {
    as_folder: "is a folder; it must be a regular file",
    as_pipe: "is a pipe; it must be a regular file",
    as_device: "is a device; it must be a regular file",
    as_vast: r"has 2,199,023,255,552 bytes; at most [\d,]+ are read",
}


def _versions(path, call):
    return call(jaxquant.versions.Versions(path.parent.parent))


# Each reads the file at a path, of which the folder above is there.
READERS = {
    "harness JSON": files.read_json,
    "store": lambda p: record_store.RecordStore(p.parent, "study"),
    "artifact": lambda p: jaxquant.artifacts.load(p.parent),
    "card": lambda p: jaxquant.artifacts.load_card(p.parent),
    "optimizer state": lambda p: jaxquant.optim.load(p.parent, None),
    "program": jaxquant.serving.load,
    "version": lambda p: _versions(p, lambda v: v.card("0001")),
    "text": lambda p: data.load("text", str(p)),
    "tokens": lambda p: data.load("tokens", str(p)),
    "documents": lambda p: data.load_documents("arrayrecord", str(p)),
    "vocabulary": lambda p: data.load("tokens", str(p.with_name("a.bin"))),
    "tokenizer": tokenizers.load.__wrapped__,
    "GGUF": weights.read_gguf,
    "weights": weights.read_safetensors,
    "encoder": lambda p: minilm.load(p.parent),
    "judgements": lambda p: references.judgements("wordsim353", p.parent),
}
NAMES = {
    "store": "study.json",
    "artifact": "card.json",
    "card": "card.json",
    "optimizer state": "state.json",
    "version": "0001/version.json",
    "tokens": "a.bin",
    "vocabulary": "meta.json",
    "tokenizer": "tokenizer.json",
    "encoder": "config.json",
    "judgements": "wordsim353.tsv",
}
# Read piece by piece, or where they lie: of any size; and folders of which all files are read.
OF_ANY_SIZE = {"tokens", "documents", "GGUF", "weights"}
TAKE_FOLDERS = {"text", "tokens", "documents", "tokenizer"}


@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_says_what_it_found_in_place_of_a_file(tmp_path, reader, make):
    if (make is as_vast and reader in OF_ANY_SIZE) or (
        make is as_folder and reader in TAKE_FOLDERS
    ):
        pytest.skip("which it takes")
    path = tmp_path / NAMES.get(reader, "file")
    path.parent.mkdir(exist_ok=True)
    if reader == "encoder":
        (tmp_path / "model.safetensors").write_bytes(b"")
    if reader == "vocabulary":
        (tmp_path / "a.bin").write_bytes(b"12345678")
    make(path)
    with pytest.raises(ValueError, match=OTHERS[make]) as found:
        READERS[reader](path)
    assert path.name in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", [DEEP, '{"kind":' * 5000])
@pytest.mark.parametrize("reader", ["artifact", "card", "optimizer state", "version", "encoder"])
def test_no_reader_of_json_goes_down_without_end(tmp_path, reader, text):
    path = tmp_path / NAMES[reader]
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    if reader == "encoder":
        (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path.name}.* nests deeper than 100 levels"):
        READERS[reader](path)


def test_folders_of_text_pass_over_what_is_no_file(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 50)
    os.mkfifo(tmp_path / "b.txt")
    assert [file.name for file in paths.files_at(str(tmp_path))] == ["a.txt"]


@pytest.mark.parametrize("make", [as_folder, as_pipe, as_device], ids=lambda make: make.__name__)
def test_a_lock_is_a_file(tmp_path, make):
    make(tmp_path / ".lock")
    with (
        pytest.raises(
            ValueError, match=r"\.lock cannot be read: it is a|cannot be written: Is a directory"
        ),
        files.alone(tmp_path),
    ):
        pass


@pytest.mark.long
def test_at_the_command_line_it_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "experiments.tokenize", "--config.data=text"]
    done = subprocess.run(
        [*command, "--config.data_path=/dev/zero", f"--workdir={tmp_path / 'w'}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr
        == "error: data file '/dev/zero' cannot be read: it is a device; it must be a regular file\n"
    )


# ---------------------------------------------------------------------------------------------------
# Writers beside each other, and full disks


_WRITERS = """
    import json, os, sys
    os.getpid = lambda: 1  # as in containers, each of which counts from 1
    from experiments.harness.running import files
    path, mark = sys.argv[1] + "/record.json", sys.argv[2]
    torn = 0
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(3000):
        files.write_json(path, {"by": mark, "number": i, "text": mark * 500})
        found = json.loads(open(path).read())
        torn += found["text"] != found["by"] * 500
    print(torn)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "apart",
    [[], pytest.param(["unshare", "--pid", "--fork"], marks=pytest.mark.long)],
    ids=["patched", "unshare"],
)
def test_two_processes_of_one_number_write_to_one_folder(tmp_path, apart):
    if apart and subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    fast = "os.fsync = lambda descriptor: None  # 6,000 of them take minutes on a disk"
    code = textwrap.dedent(_WRITERS).replace(
        "import json, os, sys\n", f"import json, os, sys\n{fast}\n"
    )
    if apart:
        code = code.replace("os.getpid = lambda: 1", "assert os.getpid() == 1")
    started = [
        subprocess.Popen(
            [*apart, sys.executable, "-c", code, str(tmp_path), mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mark in "ab"
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        out, err = process.communicate(timeout=90)
        assert (process.returncode, out) == (0, "0\n"), err[-2000:]
    assert json.loads((tmp_path / "record.json").read_text())["number"] == 2999
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


_FULL = """
    import resource, sys
    import jax.numpy as jnp, numpy as np, optax
    import jaxquant as jq
    from jaxquant.optim import fixed, quantize_state
    from experiments.harness.running import files
    from pathlib import Path

    folder = Path(sys.argv[1])
    noise = np.random.default_rng(0).normal(size=(256, 1024))  # which nothing packs
    card, weights = jq.artifacts.Card.empty(), {"w": jnp.float32(noise)}
    state = quantize_state(optax.adam(1e-3), fixed(8)).init(weights)
    versions = jq.versions.Versions(folder / "versions")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for name, save in {
        "safetensors": lambda path: jq.artifacts.save(path, weights, card),
        "orbax": lambda path: jq.artifacts.save(path, weights, card, format="orbax"),
        "state": lambda path: jq.optim.save(path, state),
        "program": lambda path: jq.serving.export(
            lambda w, x: x @ w["w"], jnp.ones((1, 256)), weights=weights, path=path),
        "versions": lambda path: versions.publish(
            lambda path: path.write_bytes(bytes(200_000)), card, None),
        "harness": lambda path: files.write(path, bytes(200_000)),
    }.items():
        try:
            save(folder / name)
        except Exception as error:
            print(name, type(error).__name__, getattr(error, "errno", None), name in str(error))
"""


@pytest.mark.long
def test_a_full_disk_is_the_systems_error_with_a_path_whoever_writes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FULL), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    names = ("safetensors", "orbax", "state", "program", "versions", "harness")
    assert done.stdout.splitlines() == [f"{name} OSError {errno.EFBIG} True" for name in names], (
        done.stderr[-2000:]
    )
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


def test_a_library_that_words_the_systems_error_itself_is_heard(tmp_path):
    for text in ("I/O error: x (os error 28)", "x [os_error_code='28']", os.strerror(errno.ENOSPC)):
        with (
            pytest.raises(OSError, match=r"No space left on device: .*a'") as found,
            regular.writing(tmp_path / "a"),
        ):
            raise RuntimeError(text)
        assert found.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="no such"), regular.writing(tmp_path / "a"):
        raise RuntimeError("no such thing")
