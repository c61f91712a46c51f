"""Tokens written once: whole or to be gone on with, and the same as those read at first hand."""

import json
import os
import sys
from pathlib import Path

import children
import numpy as np
import pytest
from conftest import ROOT

from experiments.harness import data
from experiments.harness.data import tokens
from experiments.tokenize import Config, run

TEXTS = [f"document {i}: " + "word " * (i * 7 % 23) for i in range(50)]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return Config("huggingface", str(path), shard_tokens=500)


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("datasets")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


def test_shards_hold_the_documents_in_order(tmp_path, lines):
    meta = run(lines, tmp_path / "w")
    corpus = data.load("tokens", str(tmp_path / "w"))
    others = [text for i, text in enumerate(TEXTS) if i % 10 != 9]
    expected = b"".join(text.encode() + b"\0" for text in others)
    assert bytes(corpus.train[:].astype(np.uint8)) == expected
    held_out = b"\0".join(text.encode() for i, text in enumerate(TEXTS) if i % 10 == 9)
    assert bytes(corpus.evaluation["valid"][:].astype(np.uint8)) == held_out
    assert corpus.vocab_size == 256
    assert meta["tokens"] == {"train": len(expected), "valid": len(held_out)}
    sizes = [x.stat().st_size for x in sorted((tmp_path / "w").glob("train*"))]
    assert sizes == [1024 + 1000] * (len(expected) // 500) + [1024 + 2 * (len(expected) % 500)]


@pytest.mark.first(2)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_stopped_it_goes_on_to_the_same_bytes(tmp_path, lines, monkeypatch, stop):
    run(lines, tmp_path / "whole")
    with monkeypatch.context() as patch:
        written = []

        def stopped(path, content):
            if len(written) > stop:
                raise KeyboardInterrupt
            written.append(path)
            return write(path, content)

        write = tokens.write_llm_c
        patch.setattr(tokens, "write_llm_c", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(lines, tmp_path / "w")
    with pytest.raises(ValueError, match="is not whole"):
        data.load("tokens", str(tmp_path / "w"))
    run(lines, tmp_path / "w")
    assert contents(tmp_path / "w") == contents(tmp_path / "whole")


def test_killed_at_the_very_end_it_is_whole_the_next_time(tmp_path, lines, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run(lines, tmp_path / "w")
    meta = run(lines, tmp_path / "w")
    assert data.load("tokens", str(tmp_path / "w")).train.size == meta["tokens"]["train"]


def killed(self, missing_ok=False):
    if self.name == tokens.UNFINISHED:
        raise KeyboardInterrupt
    self.exists() and os.remove(self)


def test_text_is_cut_into_shards(tmp_path):
    (tmp_path / "text.txt").write_text("one text " * 300)
    run(Config(data_path=str(tmp_path / "text.txt"), shard_tokens=1000), tmp_path / "w")
    at_first_hand = data.load("text", str(tmp_path / "text.txt"))
    corpus = data.load("tokens", str(tmp_path / "w"))
    np.testing.assert_array_equal(corpus.train[:], at_first_hand.train[:])
    np.testing.assert_array_equal(
        corpus.evaluation["valid"][:], at_first_hand.evaluation["valid"][:]
    )


@pytest.mark.exhaustive
def test_what_is_there_is_looked_at(tmp_path, lines):
    run(lines, tmp_path / "w")
    with pytest.raises(ValueError, match="shard_tokens 500 there, 400 here"):
        run(Config("huggingface", lines.data_path, shard_tokens=400), tmp_path / "w")
    damaged = tmp_path / "w" / "train_000002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\7")
    with pytest.raises(ValueError, match=r"train_000002.bin' is not what was written"):
        run(lines, tmp_path / "w")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="something else"):
        run(lines, tmp_path / "other")
    with pytest.raises(ValueError, match=r"config.data is one of text, sotu"):
        run(Config("tokens", lines.data_path), tmp_path / "v")
    with pytest.raises(ValueError, match=r"config.shard_tokens must be a number above 0"):
        run(Config("huggingface", lines.data_path, shard_tokens=0), tmp_path / "v")


def test_large_vocabularies_have_32_bits(tmp_path):
    content = np.array([1, 2**17], np.uint32)
    tokens.write_llm_c(tmp_path / "a.bin", content)
    found = data.load("tokens", str(tmp_path / "a.bin"))
    np.testing.assert_array_equal([*found.train[:], *found.evaluation["valid"][:]], content)


@pytest.mark.exhaustive
@pytest.mark.long
def test_a_run_trains_on_them(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"body": text * 9}) for text in TEXTS))
    common = (
        "--config.data=huggingface",
        f"--config.data_path={texts}",
        "--config.data_field=body",
    )
    model = (
        "--preset=smoke",
        "--config.steps=20",
        "--config.batch=4",
        "--config.evaluation_windows=4",
    )
    for name, module, flags in (
        ("w", "tokenize", common),
        ("a", "train", (*model, "--config.data=tokens", f"--config.data_path={tmp_path / 'w'}")),
        ("b", "train", (*model, *common)),
    ):
        command = [sys.executable, "-m", f"experiments.{module}", f"--workdir={tmp_path / name}"]
        done = children.run([*command, *flags], cwd=ROOT, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads((tmp_path / x / "result.json").read_text()) for x in "ab"]
    assert results[0]["epochs"] > 0
    assert results[1]["epochs"] is None
    assert all(0 < result["loss"]["valid"] < 5.6 for result in results)
