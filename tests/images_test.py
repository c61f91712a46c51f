import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import deb

from experiments.harness.data import images

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_set(folder: Path, train=200, test=50, side=6) -> dict[str, np.ndarray]:
    """The four files of a set whose labels are shuffled and whose every image is different."""
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", train), ("t10k", test)):
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, side, side))
        arrays[f"{prefix}-labels-idx1-ubyte"] = rng.permutation(count) % 10
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return arrays


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path)
    return tmp_path


@pytest.fixture
def dataset(folder):
    return images.load("fashion_mnist", str(folder))


def take(batches, count):
    found = [next(batches) for _ in range(count)]
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def rows(pixels) -> list[bytes]:
    return [np.ascontiguousarray(image).tobytes() for image in pixels]


# ---- files


def test_files_are_read_as_they_were_written(tmp_path):
    arrays = write_set(tmp_path)
    found = images.load("fashion_mnist", str(tmp_path))
    assert found.shape == (6, 6, 1)
    assert found.train.pixels.dtype == found.test.pixels.dtype == np.float32
    np.testing.assert_array_equal(
        np.rint(found.test.pixels[..., 0] * 255), arrays["t10k-images-idx3-ubyte"]
    )
    np.testing.assert_array_equal(found.test.labels, arrays["t10k-labels-idx1-ubyte"])
    expected = dict(
        zip(
            rows(arrays["train-images-idx3-ubyte"].astype(np.uint8)),
            arrays["train-labels-idx1-ubyte"].tolist(),
            strict=True,
        )
    )
    for split in (found.train, found.valid):
        codes = np.rint(split.pixels[..., 0] * 255).astype(np.uint8)
        assert [expected[row] for row in rows(codes)] == split.labels.tolist()


def test_every_tenth_image_of_each_class_is_held_out(dataset):
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (180, 20, 50)
    assert np.bincount(dataset.valid.labels).tolist() == [2] * 10
    assert not set(rows(dataset.train.pixels)) & set(rows(dataset.valid.pixels))


def test_fingerprints_name_the_content(folder, dataset):
    again = images.load("fashion_mnist", str(folder))
    assert dataset.fingerprint == again.fingerprint
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(gzip.compress(bytes(content)))
    assert images.load("fashion_mnist", str(folder)).fingerprint != dataset.fingerprint


def test_digits():
    digits = images.load("digits")
    assert len(digits.train) + len(digits.valid) + len(digits.test) == 1797
    for split in (digits.train, digits.valid, digits.test):
        assert (split.pixels.min(), split.pixels.max()) == (0, 1)
        assert np.bincount(split.labels).min() > 0.9 * len(split) / 10
    everything = [r for s in (digits.train, digits.valid, digits.test) for r in rows(s.pixels)]
    assert len(set(everything)) == 1797


@pytest.mark.skipif(not Path(images.FOLDER).exists(), reason="dataset-fashion-mnist is absent")
def test_the_published_files():
    found = images.load("fashion_mnist")
    assert (len(found.train), len(found.valid), len(found.test)) == (54_000, 6_000, 10_000)
    assert np.bincount(found.test.labels).tolist() == [1000] * 10
    assert found.fingerprint == "985f2b3386c1b70c"


def test_the_package_is_unpacked_if_it_is_the_pinned_one(tmp_path, folder, monkeypatch):
    content = {
        f"./usr/share/datasets/fashion-mnist/{file.name}": file.read_bytes()
        for file in sorted(folder.glob("*.gz"))
    }
    package = deb(content | {"./usr/share/doc/README.gz": b"text"})
    source, target = tmp_path / "package.deb", tmp_path / "unpacked"
    source.write_bytes(package)
    with pytest.raises(ValueError, match="SHA-256"):
        images.fetch_fashion_mnist(target, source.as_uri())
    assert not target.exists()
    monkeypatch.setattr(images, "PACKAGE_SHA256", hashlib.sha256(package).hexdigest())
    assert images.fetch_fashion_mnist(target, source.as_uri()) == target
    assert len(list(target.iterdir())) == 4
    expected = images.load("fashion_mnist", str(folder)).fingerprint
    assert images.load("fashion_mnist", str(target)).fingerprint == expected


def replace(folder, name, content: bytes, compress=True):
    (folder / f"{name}.gz").write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize(
    ("name", "content", "compress", "message"),
    [
        ("train-images-idx3-ubyte", b"", True, "begins with nothing"),
        ("train-images-idx3-ubyte", idx(np.zeros((4, 4))), True, "begins with 00 00 08 02"),
        ("train-images-idx3-ubyte", idx(np.zeros((4, 4, 4)))[:-1], True, "64 bytes .* holds 63"),
        ("train-images-idx3-ubyte", idx(np.zeros((4, 4, 4)))[:9], True, "is not an idx file"),
        ("train-images-idx3-ubyte", idx(np.zeros((0, 4, 4))), True, "is empty"),
        ("train-images-idx3-ubyte", idx(np.zeros((9, 6, 6))), True, "9 train images and 200"),
        ("train-images-idx3-ubyte", idx(np.zeros((200, 5, 5))), True, "differ in size"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x0d\x01" + bytes(8), True, "begins with 00 00 0d 01"),
        ("t10k-labels-idx1-ubyte", idx(np.full(50, 10)), True, "up to 10; they must lie in 0"),
        ("t10k-labels-idx1-ubyte", b"garbage", False, "not a whole gzip"),
        (
            "t10k-labels-idx1-ubyte",
            gzip.compress(bytes(999), mtime=0)[:-9],
            False,
            "not a whole gzip",
        ),
    ],
)
def test_damaged_and_foreign_files_are_named(folder, name, content, compress, message):
    replace(folder, name, content, compress)
    with pytest.raises(ValueError, match=message):
        images.load("fashion_mnist", str(folder))


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"apt-get install dataset-fashion-mnist.*'digits'"):
        images.load("fashion_mnist", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="fashion_mnist, digits; got 'mnist'"):
        images.load("mnist")
    with pytest.raises(ValueError, match="takes no path"):
        images.load("digits", str(tmp_path))


# ---- batches


def test_an_epoch_reads_every_image_once_and_the_next_in_another_order(dataset):
    batches = images.train_batches(dataset, 20, seed=0)
    first, second = (rows(take(batches, 9)["pixels"]) for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(rows(dataset.train.pixels))


def test_labels_stay_with_their_images(dataset):
    label = dict(zip(rows(dataset.train.pixels), dataset.train.labels.tolist(), strict=True))
    batch = take(images.train_batches(dataset, 10, seed=1), 3)
    assert [label[row] for row in rows(batch["pixels"])] == batch["labels"].tolist()
    assert batch["labels"].dtype == np.int32


def test_augmentation_follows_from_the_seed_and_changes_with_the_epoch(dataset):
    augmentation = images.Augmentation(shift=2, flip=True)

    def epochs(seed):
        batches = images.train_batches(dataset, 180, seed, augmentation)
        return [next(batches)["pixels"] for _ in range(2)]

    first, second = epochs(0)
    np.testing.assert_array_equal(epochs(0), [first, second])
    assert not np.array_equal(epochs(1)[0], first)
    assert len(set(rows(first)) & set(rows(second))) < 30  # of 180; unchanged are 1 in 50


def test_augmentation_shifts_and_flips_and_nothing_else():
    image = np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1)
    expected = {
        np.roll(np.pad(turned, ((1, 1), (1, 1), (0, 0))), (dy, dx), (0, 1))[1:-1, 1:-1].tobytes()
        for turned in (image, image[:, ::-1])
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    rng = np.random.default_rng(0)
    augmentation = images.Augmentation(shift=1, flip=True)
    found = {augmentation(image, rng).tobytes() for _ in range(400)}
    assert found == expected


def test_position_can_be_checkpointed(dataset):
    def start():
        return images.train_batches(dataset, 8, 3, images.Augmentation(1, True))

    batches = start()
    take(batches, 30)
    state = batches.get_state()
    expected = take(batches, 3)
    fresh = start()
    fresh.set_state(state)
    found = take(fresh, 3)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_processes_share_the_same_global_batch(dataset):
    augmentation = images.Augmentation(2, True)
    whole = take(images.train_batches(dataset, 8, 0, augmentation), 3)
    shares = [
        take(images.train_batches(dataset, 8, 0, augmentation, (index, 4)), 3) for index in range(4)
    ]
    pixels = [x["pixels"].reshape(3, -1, *dataset.shape) for x in shares]
    found = np.concatenate(pixels, axis=1)
    np.testing.assert_array_equal(found, whole["pixels"].reshape(found.shape))
    with pytest.raises(ValueError, match="3 processes"):
        images.train_batches(dataset, 8, 0, None, (0, 3))


def test_bad_augmentations_are_named(dataset):
    with pytest.raises(ValueError, match="at least 0; got -1"):
        images.Augmentation(shift=-1)
    with pytest.raises(ValueError, match="shift by 6"):
        images.train_batches(dataset, 8, 0, images.Augmentation(shift=6))


def test_epochs_count_passes_over_the_training_images(dataset):
    assert dataset.epochs(90) == 0.5


# ---- bombs


def test_what_unpacks_to_more_than_it_announces_is_not_unpacked(folder):
    import resource

    name = "train-images-idx3-ubyte.gz"
    honest = gzip.decompress((folder / name).read_bytes())
    bomb = gzip.compress(honest + bytes(2**28), 1)
    assert len(bomb) < 2**21
    (folder / name).write_bytes(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"announces 7200 bytes \(200, 6, 6\) and holds 65537"):
        images.load("fashion_mnist", str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.parametrize("shape", [(2**31, 2**20, 2**10), (2**30, 1, 2), (2**32 - 1,) * 3])
def test_what_announces_more_than_is_read_is_not_unpacked(folder, shape):
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(99)))
    with pytest.raises(ValueError, match=r"announces [\d,]+ bytes; at most 1,073,741,824 are read"):
        images.load("fashion_mnist", str(folder))
