import numpy as np
import pytest

from experiments.harness import data


@pytest.fixture(scope="module")
def sotu():
    return data.load("sotu")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a small text\n" for i in range(400)))
    return path


def take(batches, count):
    return np.stack([next(batches) for _ in range(count)])


def test_sotu_is_split_by_document_and_by_year(sotu):
    assert list(sotu.evaluation) == ["valid", "shift"]
    train, valid, shift = sotu.train, *sotu.evaluation.values()
    assert train.size + valid.size + shift.size > 12_000_000
    documents = [set(split.tobytes().split(b"\0")) for split in (train, valid, shift)]
    assert sum(map(len, documents)) == 249
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert b"iPhone" not in train.tobytes()
    assert b"terrorists" in shift.tobytes()


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(text):
    corpus = data.load("text", str(text))
    windows = (corpus.train.size - 1) // 16
    batches = data.train_batches(corpus, 16, 1, seed=0)
    first, second = take(batches, windows)[:, 0], take(batches, windows)[:, 0]
    assert not np.array_equal(first, second)
    for epoch in (first, second):
        starts = np.sort(epoch.view([("", epoch.dtype)] * 17).ravel())
        expected = np.stack([corpus.train[i * 16 : i * 16 + 17] for i in range(windows)]).astype(
            np.int32
        )
        np.testing.assert_array_equal(starts, np.sort(expected.view(starts.dtype).ravel()))


def test_order_follows_from_the_seed(sotu):
    def first(seed):
        return next(data.train_batches(sotu, 64, 8, seed))

    np.testing.assert_array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


@pytest.mark.parametrize("source", ["sotu", "generated"])
def test_position_can_be_checkpointed(source):
    corpus = data.load(source)
    batches = data.train_batches(corpus, 32, 4, seed=3)
    take(batches, 7)
    state = batches.get_state()
    expected = take(batches, 3)
    fresh = data.train_batches(corpus, 32, 4, seed=3)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 3), expected)


def test_processes_share_the_same_global_batch(sotu):
    whole = next(data.train_batches(sotu, 32, 8, seed=0))
    shares = [next(data.train_batches(sotu, 32, 8, 0, (index, 4))) for index in range(4)]
    np.testing.assert_array_equal(np.concatenate(shares), whole)
    with pytest.raises(ValueError, match="3 processes"):
        data.train_batches(sotu, 32, 8, 0, (0, 3))


def test_epochs_count_passes_over_the_text(sotu):
    assert sotu.epochs(sotu.train.size // 2) == pytest.approx(0.5)
    assert sotu.epochs(3 * sotu.train.size) == 3
    assert data.load("generated").epochs(10**12) == 0


def test_evaluation_windows_are_spread_over_the_split(sotu):
    windows = data.evaluation_windows(sotu, "valid", 64, 10)
    assert windows.shape == (10, 65)
    assert windows[0].astype(np.uint8).tobytes() == sotu.evaluation["valid"][:65].tobytes()


# ---- the generated source


def test_generated_windows_have_the_stated_entropy_rate():
    source = data.markov_source(5)
    windows = np.stack([source.window(i, 258) for i in range(400)])
    states = windows[:, :-2] * source.vocab_size + windows[:, 1:-1]
    surprise = -np.log(source.probabilities[states, windows[:, 2:]]).mean(axis=1)
    error = surprise.std(ddof=1) / len(surprise) ** 0.5
    assert abs(surprise.mean() - source.entropy_rate) < 5 * error
    assert 0 < source.entropy_rate < np.log(source.vocab_size)


def test_stationary_distribution_is_stationary():
    source = data.markov_source()
    v = source.vocab_size
    pi, p = source.stationary.reshape(v, v), source.probabilities.reshape(v, v, v)
    np.testing.assert_allclose(np.einsum("ab,abc->bc", pi, p), pi, atol=1e-15)
    assert abs(pi.sum() - 1) < 1e-12
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-12)


def test_window_entropy_lies_above_the_rate_and_falls_to_it():
    source = data.markov_source()
    bounds = [source.window_entropy(n) for n in (1, 8, 64, 4096)]
    assert bounds == sorted(bounds, reverse=True)
    assert 0 < bounds[-1] - source.entropy_rate < 1e-3


def test_generated_tokens_never_repeat_between_seeds_and_splits():
    corpus = data.load("generated")
    seen = [take(data.train_batches(corpus, 32, 4, seed), 20).reshape(-1, 33) for seed in (0, 1)]
    rows = {row.tobytes() for batch in seen for row in batch}
    rows |= {row.tobytes() for row in data.evaluation_windows(corpus, "valid", 32, 50)}
    assert len(rows) == 2 * 20 * 4 + 50


# ---- bad input


def test_text_of_several_files_is_split_by_file(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} " * 50)
    corpus = data.load("text", str(tmp_path))
    assert b"file 9 " in corpus.evaluation["valid"].tobytes()
    assert b"file 9 " not in corpus.train.tobytes()
    assert corpus.fingerprint == data.load("text", str(tmp_path / "*.txt")).fingerprint


def test_token_files(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(1000, dtype=np.uint16) % 300)
    corpus = data.load("tokens", str(tmp_path / "t.npy"))
    assert (corpus.vocab_size, corpus.train.size) == (300, 900)
    assert next(data.train_batches(corpus, 8, 2, 0)).dtype == np.int32


def write(path, content: bytes):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: data.load("wiki"), "sotu, text, tokens, generated"),
        (lambda d: data.load("text"), "needs a path"),
        (lambda d: data.load("sotu", "x.txt"), "takes no path but 1/k"),
        (lambda d: data.load("sotu", "1/0"), "as in 1/8; got '1/0'"),
        (lambda d: data.load("sotu", "2/8"), "as in 1/8; got '2/8'"),
        (lambda d: data.load("sotu", "1/99999"), "every k-th; got 1/99999"),
        (lambda d: data.load("sotu", "", "x.txt"), "takes no shift_path; got 'x.txt'"),
        (lambda d: data.load("generated", "1/8"), "takes no path; got '1/8'"),
        (lambda d: data.load("text", str(d / "absent.txt")), "does not exist"),
        (lambda d: data.load("text", str(d / "*.md")), "no text files"),
        (lambda d: data.load("text", write(d / "empty.txt", b"")), "is empty"),
        (lambda d: data.load("text", write(d / "bin", bytes(range(256)))), "NUL|not UTF-8"),
        (lambda d: data.load("text", write(d / "nul", b"a\0b")), "NUL byte at offset 1"),
        (lambda d: data.load("tokens", write(d / "t.npy", b"garbage")), "not a .npy"),
        (lambda d: data.load("tokens", write(d / "z.npy", b"PK\x03\x04zip")), "not a .npy"),
        (lambda d: data.load("tokens", str(d)), "no .bin or .npy files"),
        (lambda d: data.load("text", "x" * 5000), "cannot be read"),
    ],
)
def test_bad_data_is_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_wrong_token_arrays_are_named(tmp_path):
    for array, message in (
        (np.ones(5), "float64"),
        (np.ones((2, 2), int), "1-D"),
        (np.array([-1, 2]), "-1"),
        (np.array([2**62]), "must lie in 0"),
    ):
        np.save(tmp_path / "t.npy", array)
        with pytest.raises(ValueError, match=message):
            data.load("tokens", str(tmp_path / "t.npy"))


def test_a_file_shorter_than_a_sequence_is_named(tmp_path):
    corpus = data.load("text", write(tmp_path / "short.txt", b"short"))
    with pytest.raises(ValueError, match="5 tokens, fewer than one sequence of 65"):
        data.train_batches(corpus, 64, 1, 0)


@pytest.mark.parametrize("k", [2, 8])
def test_a_share_of_the_addresses_is_every_kth_of_those_to_train_on(k):
    whole, part = data.load("sotu"), data.load("sotu", f"1/{k}")
    for split in ("valid", "shift"):
        np.testing.assert_array_equal(part.evaluation[split], whole.evaluation[split])
    split = whole.train.tobytes().split(data.SEPARATOR)
    assert part.train.tobytes().split(data.SEPARATOR) == split[::k]
    assert part.fingerprint != whole.fingerprint
    assert data.load("sotu", "1/1").fingerprint == whole.fingerprint
