"""Larger corpora: token files, tokenizers, ArrayRecord, Hugging Face's datasets."""

import importlib.util
import json

import numpy as np
import pytest

from experiments.harness import data
from experiments.harness.data import array_records, hub, shards, tokenizers, tokens
from experiments.harness.data.corpus import of_splits

array_record = pytest.importorskip("array_record.python.array_record_module")
library = pytest.importorskip("tokenizers")
pytest.importorskip("datasets")

TEXTS = [
    f"document {i} says " + " ".join(f"word{(i * j) % 17}" for j in range(40)) for i in range(60)
]


def llm_c(path, content, dtype=np.uint16, count=None):
    path.parent.mkdir(exist_ok=True)
    header = np.zeros(tokens.HEADER, np.int32)
    header[:2] = tokens.MAGIC[np.dtype(dtype)]
    header[2] = len(content) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(content, dtype).tobytes())
    return path


def take(batches, count):
    return np.stack([next(batches) for _ in range(count)])


# ---- token files


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_are_one_sequence(tmp_path, dtype):
    content = np.random.default_rng(0).integers(0, 999, 1000)
    llm_c(tmp_path / "train_000002.bin", content[700:], dtype)
    llm_c(tmp_path / "train_000001.bin", content[:700], dtype)
    corpus = data.load("tokens", str(tmp_path))
    np.testing.assert_array_equal(corpus.train[:], content[:900])
    np.testing.assert_array_equal(corpus.evaluation["valid"][:], content[900:])
    assert corpus.vocab_size == content.max() + 1
    whole = data.load("tokens", str(llm_c(tmp_path / "one" / "all.bin", content, dtype)))
    assert whole.fingerprint == corpus.fingerprint
    a, b = (take(data.train_batches(c, 32, 4, 0), 5) for c in (corpus, whole))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "at", [slice(0, 10), slice(3, 8), slice(None, None, 3), slice(9, 2), slice(5, 99, 4)]
)
def test_any_part_of_shards_is_that_of_the_whole(at):
    whole = np.arange(10)
    parts = shards.Shards([whole[:4], whole[4:5], whole[5:]])
    np.testing.assert_array_equal(parts[at], whole[at])
    for start, stop in ((0, 10), (3, 8), (4, 5), (7, 7), (0, 0), (10, 10)):
        part = parts.cut(start, stop)
        assert part.size == stop - start
        np.testing.assert_array_equal(part[at], whole[start:stop][at])


def test_shards_are_cut_without_a_copy(tmp_path):
    for name in ("a.bin", "b.bin"):
        llm_c(tmp_path / name, np.arange(1000))
    found = data.load("tokens", str(tmp_path))
    for split in (found.train, found.evaluation["valid"]):
        assert all(isinstance(part, np.memmap) for part in split._parts)
    assert (found.train.size, found.evaluation["valid"].size) == (1800, 200)


def test_a_large_corpus_is_known_by_a_sample_whatever_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.harness.data.corpus._HASHED_TOKENS", 4096)
    views = shards.Shards._views
    read = []

    def watched(self, start, stop):
        read.append(stop - start)
        return views(self, start, stop)

    content = np.random.default_rng(0).integers(0, 999, 9000)
    prints = []
    for name, cuts in (("one", []), ("many", [10, 4000, 4001]), ("other", [])):
        if name == "other":
            content[-1] += 1
        for i, part in enumerate(np.split(content, cuts)):
            llm_c(tmp_path / name / f"{i}.bin", part)
        found = data.load("tokens", str(tmp_path / name))
        with monkeypatch.context() as patch:
            patch.setattr(shards.Shards, "_views", watched)
            of_splits("", found.train, found.evaluation["valid"], None, 999)
        prints.append(found.fingerprint)
    # Neighbours alone of the training split, 8100 tokens, and all of the other.
    assert sorted(set(read)) == [4, 900]
    assert sum(read) == 3 * (4096 + 900)
    assert prints[0] == prints[1] != prints[2]


def test_a_corpus_too_large_to_be_read_through_has_a_stated_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_READ_THROUGH", 500)
    llm_c(tmp_path / "a.bin", np.arange(1000))
    with pytest.raises(ValueError, match=r"the 1,000 tokens at .* --config.vocab_size"):
        data.load("tokens", str(tmp_path))
    found = data.load("tokens", str(tmp_path), vocab_size=1000)
    assert found.vocab_size == 1000
    assert take(data.train_batches(found, 16, 4, 0), 14).max() > 800
    found = data.load("tokens", str(tmp_path), vocab_size=800)
    with pytest.raises(ValueError, match="a vocabulary of 800 has no token"):
        take(data.train_batches(found, 16, 4, 0), 14)
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 1024}))
    for where in (tmp_path, tmp_path / "*.bin"):
        assert data.load("tokens", str(where)).vocab_size == 1024
    np.save(tmp_path / "t.npy", np.arange(1000))  # as ever, and no meta.json counts
    assert data.load("tokens", str(tmp_path / "t.npy")).vocab_size == 1000


def test_files_named_val_are_held_out(tmp_path):
    rng = np.random.default_rng(0)
    train, valid = rng.integers(0, 50, 500), rng.integers(0, 50, 80)
    for names in (("train.bin", "val.bin"), ("fineweb_train_000001.bin", "fineweb_val_000000.bin")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name, content in zip(names, (train, valid), strict=True):
            (folder / name).write_bytes(content.astype(np.uint16).tobytes())
        corpus = data.load("tokens", str(folder))
        np.testing.assert_array_equal(corpus.train[:], train)
        np.testing.assert_array_equal(corpus.evaluation["valid"][:], valid)


def test_a_vocabulary_that_is_stated_is_held_to(tmp_path):
    llm_c(tmp_path / "train.bin", np.full(200, 70))
    llm_c(tmp_path / "val.bin", np.full(200, 3))
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 50}))
    corpus = data.load("tokens", str(tmp_path))
    assert corpus.vocab_size == 50
    with pytest.raises(ValueError, match="a vocabulary of 50 has no token 70"):
        next(data.train_batches(corpus, 16, 2, 0))


WRONG_VERSION = np.array([20240520, 3] + [0] * 254, np.int32)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: (d / "a.bin").write_bytes(b"abc"), "no whole number of uint16 tokens"),
        (lambda d: (d / "a.bin").write_bytes(b""), "is empty"),
        (lambda d: llm_c(d / "a.bin", range(9), count=10), "10 tokens of uint16; it has 9"),
        (lambda d: llm_c(d / "a.bin", [2**20 + 1] * 9, np.uint32), "must lie in 0"),
        (lambda d: (d / "a.bin").write_bytes(WRONG_VERSION), "version is 1; got 3"),
        (lambda d: (d / "a.bin").write_bytes(WRONG_VERSION.byteswap()), "written big-endian"),
        (
            lambda d: (d / "a.bin").write_bytes(WRONG_VERSION.tobytes()[:40]),
            "cut off within llm.c's header: it has 40 bytes of 1024",
        ),
        (
            lambda d: (llm_c(d / "a.bin", [1]), llm_c(d / "b.bin", [1], np.uint32)),
            "a.bin uint16, b.bin uint32",
        ),
        (
            lambda d: (llm_c(d / "a.bin", range(99)), (d / "meta.json").write_text("{}")),
            "says no vocab_size",
        ),
        (
            lambda d: (llm_c(d / "a.bin", range(99)), (d / "meta.json").write_text("{")),
            "meta.json' is not whole JSON",
        ),
        (
            lambda d: (
                llm_c(d / "a.bin", range(99)),
                (d / "meta.json").write_text('{"vocab_size": 0}'),
            ),
            "says a vocab_size of 0; it is 1 to",
        ),
    ],
)
def test_bad_token_files_are_named(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load("tokens", str(tmp_path))


# ---- tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small one, trained here."""
    found = library.Tokenizer(library.models.BPE())
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    found.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    found.save(str(path))
    return path


def test_text_is_tokenized_and_separated(tmp_path, tokenizer):
    for i, text in enumerate(TEXTS[:20]):
        (tmp_path / f"{i:02}.txt").write_text(text)
    corpus = data.load("text", str(tmp_path), tokenizer=str(tokenizer))
    encoder = library.Tokenizer.from_file(str(tokenizer))
    parts = np.split(corpus.train, np.flatnonzero(corpus.train == 0))
    documents = [encoder.decode([t for t in part if t]) for part in parts]
    assert documents == [text for i, text in enumerate(TEXTS[:20]) if i % 10 != 9]
    assert corpus.vocab_size == encoder.get_vocab_size()
    assert corpus.train.size < sum(map(len, TEXTS[:20])) / 2
    assert (
        corpus.fingerprint
        == data.load("text", str(tmp_path), tokenizer=str(tokenizer.parent)).fingerprint
    )
    assert corpus.fingerprint != data.load("text", str(tmp_path)).fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/tokenizer.json", "cannot be read"),
        ("{}", "cannot be read"),
        ("bare", "to stand between"),
    ],
)
def test_bad_tokenizers_are_named(tmp_path, name, message):
    path = tmp_path / "tokenizer.json"
    if name == "{}":
        path.write_text(name)
    elif name == "bare":
        library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(ValueError, match=message):
        data.load("sotu", tokenizer=str(path) if name in ("{}", "bare") else name)


def test_a_tokenizer_does_what_it_says_and_no_more(tmp_path, tokenizer):
    """Some come set to cut and pad, to take special tokens from text, or with numbers left out."""
    plain = tokenizers.load(str(tokenizer))
    found = library.Tokenizer.from_file(str(tokenizer))
    found.enable_truncation(3)
    found.enable_padding(length=64)
    found.save(str(tmp_path / "tokenizer.json"))
    set_ = tokenizers.load(str(tmp_path))
    for text in (b"a", b"a long text " * 9, b"one<|endoftext|>two"):
        np.testing.assert_array_equal(set_.encode(text), plain.encode(text))
        assert plain.separator not in plain.encode(text)
        assert found.decode(plain.encode(text).tolist()).encode() == text
    model = library.models.WordLevel({"</s>": 0, "far": 70_000}, unk_token="</s>")
    library.Tokenizer(model).save(str(tmp_path / "gap.json"))
    gap = tokenizers.load(str(tmp_path / "gap.json"))
    assert gap.vocab_size == 70_001
    assert gap.encode(b"far").tolist() == [70_000]


# ---- documents


def example(**features: bytes) -> bytes:
    """A serialized tf.train.Example, of less than 128 bytes a level."""

    def field(number: int, content: bytes) -> bytes:
        size, parts = len(content), []
        while size > 127:
            parts.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *parts, size]) + content

    entries = [field(1, k.encode()) + field(2, field(1, field(1, v))) for k, v in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def records(folder, contents):
    folder.mkdir(exist_ok=True)
    for part in range(2):
        writer = array_record.ArrayRecordWriter(
            str(folder / f"part-{part}.array_record"), "group_size:1"
        )
        for content in contents[part * len(contents) // 2 : (part + 1) * len(contents) // 2]:
            writer.write(content)
        writer.close()
    return folder


@pytest.fixture(params=["arrayrecord", "examples", "jsonl", "parquet"])
def corpus(request, tmp_path, tokenizer, monkeypatch):
    """The same texts in each kind of file."""
    monkeypatch.setattr(hub, "_WINDOW", 9)
    texts = [text.encode() for text in TEXTS]
    if request.param == "arrayrecord":
        where = "arrayrecord", str(records(tmp_path / "a", texts)), str(tokenizer)
    elif request.param == "examples":
        messages = [example(id=b"7", text=text) for text in texts]
        where = "arrayrecord", str(records(tmp_path / "a", messages)), str(tokenizer), "text"
    elif request.param == "jsonl":
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        where = "huggingface", str(tmp_path / "a.jsonl"), str(tokenizer)
    else:
        import pandas as pd

        (tmp_path / "a").mkdir()
        pd.DataFrame({"body": TEXTS[:30]}).to_parquet(tmp_path / "a" / "0.parquet")
        pd.DataFrame({"body": TEXTS[30:]}).to_parquet(tmp_path / "a" / "1.parquet")
        where = "huggingface", str(tmp_path / "a"), str(tokenizer), "body"
    return data.load_documents(*where)


def seen(batches, encoder, count) -> set[str]:
    """The documents that lie whole in the first batches, by their text."""
    windows = take(batches, count)[:, 0]
    flat = np.concatenate([windows[0, :1], windows[:, 1:].ravel()])
    parts = np.split(flat, np.flatnonzero(flat == 0))[1:-1]
    return {encoder.decode(part[1:].tolist()) for part in parts}


def test_documents_are_read_once_each_epoch_and_some_are_held_out(corpus, tokenizer):
    encoder = library.Tokenizer.from_file(str(tokenizer))
    others = {text for i, text in enumerate(TEXTS) if i % 10 != 9}
    valid = encoder.decode(corpus.evaluation["valid"].tolist(), skip_special_tokens=False)
    assert valid.split("<|endoftext|>") == [text for text in TEXTS if text not in others]
    in_order = [encoder.decode(x[:-1].tolist()) for x in corpus.train.in_order(0)]
    assert in_order == [text for text in TEXTS if text in others]
    assert [x.tolist() for x in corpus.train.in_order(50)] == [
        x.tolist() for x in [*corpus.train.in_order(0)][50:]
    ]
    total = sum(x.size for x in corpus.train.in_order(0))
    # Two passes have all but those that the ends cut.
    assert len(others - seen(data.train_batches(corpus, 16, 1, 3), encoder, 2 * total // 16)) == 0
    first, second = (seen(data.train_batches(corpus, 16, 1, s), encoder, 60) for s in (3, 4))
    assert first
    assert first != second


def test_a_position_of_documents_is_exact(corpus):
    whole = take(data.train_batches(corpus, 16, 4, 0), 60)  # a few epochs
    for stops in ((1,), (20,), (45,), (7, 9, 30)):  # also of a run that has gone on before
        batches, at = data.train_batches(corpus, 16, 4, 0), 0
        for stop in stops:
            np.testing.assert_array_equal(take(batches, stop - at), whole[at:stop])
            state, at = json.loads(json.dumps(batches.get_state())), stop
            batches = data.train_batches(corpus, 16, 4, 0)
            batches.set_state(state)
        np.testing.assert_array_equal(take(batches, 60 - at), whole[at:])


@pytest.mark.parametrize("shares", [2, 4])
def test_shares_of_documents_make_the_same_batch(corpus, shares):
    whole = take(data.train_batches(corpus, 16, 4, 0), 10)
    parts = [take(data.train_batches(corpus, 16, 4, 0, (i, shares)), 10) for i in range(shares)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_field_of_bytes_is_found_in_an_example():
    message = example(a=b"x" * 300, b=b"second")
    assert array_records.example_field(message, "a") == b"x" * 300
    assert array_records.example_field(message, "b") == b"second"
    with pytest.raises(ValueError, match="one of the records' a, b; got 'c'"):
        array_records.example_field(message, "c")
    for size in range(1, 40):
        with pytest.raises(ValueError, match=r"tf\.train\.Example|one of the records'"):
            array_records.example_field(message[:size], "b")


def load(source, path, **options):
    return data.load_documents(source, str(path), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: data.load("arrayrecord", str(d)), "experiments.tokenize makes tokens"),
        (lambda d: load("text", d), "one of arrayrecord, huggingface"),
        (lambda d: load("arrayrecord", ""), "needs a path"),
        (lambda d: load("arrayrecord", d), "no .array_record or .arrayrecord files"),
        (lambda d: load("arrayrecord", d / "text.jsonl"), "is no ArrayRecord file"),
        (lambda d: load("arrayrecord", records(d / "r", [b"\xff"] * 20)), "is not UTF-8 text"),
        (
            lambda d: load("arrayrecord", records(d / "r", [b"text"] * 20), field="text"),
            "tf.train.Example",
        ),
        (lambda d: load("huggingface", d / "text.jsonl", field="body"), "has text; got 'body'"),
        (lambda d: load("huggingface", d / "numbers.jsonl"), "has text; got a int"),
        (lambda d: load("huggingface", d), "of one kind"),
        (lambda d: load("huggingface", d / "absent.jsonl"), "absent.jsonl' does not exist"),
        (lambda d: load("huggingface", d / "few.jsonl"), "has no documents"),
    ],
)
def test_bad_documents_are_named(tmp_path, call, message):
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n' * 20)
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n' * 20)
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n' * 3)
    (tmp_path / "a.csv").write_text("text\none\n")
    with pytest.raises(ValueError, match=message):
        next(data.train_batches(call(tmp_path), 16, 2, 0))


def test_a_dataset_that_breaks_off_says_so(tmp_path):
    for name in ("0.jsonl", "1.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n' * 40)
    found = load("huggingface", tmp_path)
    (tmp_path / "1.jsonl").write_text('{"text": \n')
    for read in (
        lambda: next(data.train_batches(found, 16, 2, 0)),
        lambda: [*found.train.in_order(0)],
        lambda: load("huggingface", tmp_path),  # as it looks for what is held out
    ):
        with pytest.raises(RuntimeError, match=r"broke off: .*; the same command goes on"):
            read()


@pytest.mark.parametrize(
    ("missing", "read"),
    [
        ("datasets", lambda: load("huggingface", "name")),
        ("tokenizers", lambda: data.load("sotu", tokenizer="a-name-of-none")),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, missing, read):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    with pytest.raises(ValueError, match=r"pip install -e '\.\[hub\]'"):
        read()
