"""Image sets for classification, and the Grain pipeline that reads them.

As in `data`: a set is known by a hash of its content, pipelines are deterministic in the seed, their
position is a small state that can be checkpointed, and each process of a run reads its own share.
"""

import dataclasses
import gzip
import hashlib
import math
import zlib
from pathlib import Path

import grain.python as grain
import numpy as np

from experiments.harness.running import files, packages
from jaxquant.artifacts.files import Missing, open_regular

SOURCES = ("fashion_mnist", "digits")
FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts the files
CLASSES = {
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "digits": tuple("0123456789"),
}
HELD_OUT_EVERY = 10  # of each class's training images, every tenth is held out for `valid`
_LARGEST = 2**30  # bytes of a file of images, packed or not, at most
_PIECE = 2**16
_DIGITS_TEST_EVERY = 5  # digits come without a test split: every fifth image of each class is one
_BRIGHTEST_DIGIT = 16

PACKAGE_URL = (
    "https://deb.debian.org/debian/pool/main/d/dataset-fashion-mnist/"
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"
)
PACKAGE_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: float32[N, H, W, 1] in [0, 1].
        labels: int32[N], indices of the set's classes.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images by split.

    Attributes:
        name: what the images are, for reports.
        train: what is trained on.
        valid: every tenth image of each class, held out from the training split as it was published.
        test: the published test split, or for digits every fifth image of each class.
        classes: what the labels mean.
        fingerprint: hash of all splits' pixels and labels, so that a trial names its data by what it
            holds.
    """

    name: str
    train: Images
    valid: Images
    test: Images
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of an image."""
        height, width, channels = self.train.pixels.shape[1:]
        return height, width, channels

    def epochs(self, images_seen: int) -> float:
        """Passes over the training images: above 1, images were repeated."""
        return images_seen / len(self.train)


def load(name: str, path: str = "") -> Dataset:
    """Loads an image set.

    Args:
        name: ``"fashion_mnist"``, 70,000 articles of clothing in 28 × 28 grey levels, from the four
            ``idx*-ubyte.gz`` files of its publication; ``"digits"``, scikit-learn's 1,797 handwritten
            digits of 8 × 8, for machines without the former.
        path: the folder of the four files; empty for the one of Debian's package
            `dataset-fashion-mnist`, of which `fetch_fashion_mnist` makes a copy elsewhere.

    Raises:
        ValueError: an unknown name; files that are missing, truncated, or not what they should be.

    Source: Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747; Alpaydin & Kaynak 1998, UCI Optical
    Recognition of Handwritten Digits.

    >>> digits = load("digits")
    >>> digits.shape, len(digits.train), len(digits.valid), len(digits.test)
    ((8, 8, 1), 1302, 140, 355)
    """
    if name not in SOURCES:
        raise ValueError(f"image set is one of {', '.join(SOURCES)}; got {name!r}")
    if name == "digits":
        if path:
            raise ValueError(f"image set 'digits' takes no path; got {path!r}")
        return _load_digits()
    folder = Path(path or FOLDER)
    train, test = (_read_split(folder, prefix) for prefix in ("train", "t10k"))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"training and test images in '{folder}' differ in size: "
            f"{train[0].shape[1:]} and {test[0].shape[1:]}"
        )
    return _dataset(name, "Fashion-MNIST", train, test, 255)


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError(
            "image set 'digits' comes with scikit-learn: pip install scikit-learn"
        ) from None
    found = load_digits()
    pixels, labels = found.images.astype(np.uint8), found.target.astype(np.uint8)  # pyright: ignore[reportAttributeAccessIssue]
    is_test = _every(labels, _DIGITS_TEST_EVERY)
    train, test = ((pixels[part], labels[part]) for part in (~is_test, is_test))
    return _dataset("digits", "scikit-learn digits", train, test, _BRIGHTEST_DIGIT)


def _every(labels: np.ndarray, step: int) -> np.ndarray:
    """Marks every step-th image of each class, so that a split has the classes' own shares."""
    marked = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        marked[np.flatnonzero(labels == label)[step - 1 :: step]] = True
    return marked


def _dataset(name: str, title: str, train, test, brightest: int) -> Dataset:
    """Splits and scales pairs of pixels, uint8[N, H, W], and labels, uint8[N]."""
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(f"{array.shape}:".encode() + array.tobytes())

    def images(pixels: np.ndarray, labels: np.ndarray) -> Images:
        return Images((pixels / np.float32(brightest))[..., None], labels.astype(np.int32))

    pixels, labels = train
    held_out = _every(labels, HELD_OUT_EVERY)
    return Dataset(
        name=title,
        train=images(pixels[~held_out], labels[~held_out]),
        valid=images(pixels[held_out], labels[held_out]),
        test=images(*test),
        classes=CLASSES[name],
        fingerprint=digest.hexdigest()[:16],
    )


# ---------------------------------------------------------------------------------------------------
# idx files


def _read_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise ValueError(f"'{folder}' has {len(pixels)} {prefix} images and {len(labels)} labels")
    classes = len(CLASSES["fashion_mnist"])
    if labels.max() >= classes:
        raise ValueError(
            f"{prefix} labels in '{folder}' go up to {labels.max()}; "
            f"they must lie in 0 … {classes - 1}"
        )
    return pixels, labels


def _read_idx(file: Path, rank: int) -> np.ndarray:
    """Reads an array of bytes: two zeros, type 8, the rank, each size in 4 bytes (big-endian), the items."""
    start = 4 + 4 * rank
    content = _decompress(file, start)
    if content[:4] != bytes([0, 0, 8, rank]) or len(content) < start:
        raise ValueError(
            f"'{file}' is not an idx file of {rank}-dimensional bytes: it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, not 00 00 08 {rank:02x}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    items = len(content) - start
    if math.prod(shape) != items:
        raise ValueError(f"'{file}' announces {math.prod(shape)} bytes {shape} and holds {items}")
    if not items:
        raise ValueError(f"'{file}' is empty: its shape is {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _decompress(file: Path, start: int) -> bytes:
    """Decompresses as many bytes as the header's sizes announce, and at most one more."""
    try:
        with (
            open_regular(file, _LARGEST, f"image file '{file}'") as packed,
            gzip.GzipFile(fileobj=packed) as content,
        ):
            head = content.read(start)
            items = math.prod(
                int(size) for size in np.frombuffer(head[4:], ">u4", len(head) // 4 - 1)
            )
            if items > _LARGEST:
                raise ValueError(
                    f"'{file}' announces {items:,} bytes; at most {_LARGEST:,} are read"
                )
            # Of a file of another kind some of the rest, which tells whether it is whole.
            return head + content.read(max(items, _PIECE) + 1)
    except Missing:
        raise ValueError(
            f"image file '{file}' does not exist: apt-get install dataset-fashion-mnist, or give "
            "the folder of the four idx*-ubyte.gz files, or choose the image set 'digits'"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"image file '{file}' is not a whole gzip file: {error}") from None


def fetch_fashion_mnist(folder: str | Path, url: str = PACKAGE_URL) -> Path:
    """Downloads Debian's package of Fashion-MNIST (31 MB) and unpacks it, without apt and without root.

    Args:
        folder: where the four files go.
        url: of the package on any Debian mirror; its SHA-256 must be `PACKAGE_SHA256`.

    Returns:
        The folder, for `load`.

    Raises:
        RuntimeError: the mirror cannot be reached.
        ValueError: it is not there, or what came is not the pinned package.
    """
    for name, content in packages.contents(packages.fetch(url, PACKAGE_SHA256)):
        if name.endswith("ubyte.gz"):
            files.write(Path(folder) / Path(name).name, content)
    return Path(folder)


# ---------------------------------------------------------------------------------------------------
# Pipelines


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image that keep its class.

    Attributes:
        shift: pixels that it moves at most along each axis; what comes in is black.
        flip: whether half of the images are mirrored left to right.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self):
        if self.shift < 0:
            raise ValueError(f"an augmentation's shift is at least 0; got {self.shift}")

    def __call__(self, image_HxWxC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a changed copy, determined by the generator's state.

        >>> image = np.eye(3, dtype=np.float32)[..., None]
        >>> Augmentation(shift=1)(image, np.random.default_rng(0))[..., 0].sum()
        np.float32(2.0)
        """
        height, width, _ = image_HxWxC.shape
        pad = self.shift
        if self.flip and rng.random() < 0.5:
            image_HxWxC = image_HxWxC[:, ::-1]
        padded = np.pad(image_HxWxC, ((pad, pad), (pad, pad), (0, 0)))
        top, left = rng.integers(2 * pad + 1, size=2)
        return padded[top : top + height, left : left + width]


class _Rows(grain.RandomAccessDataSource):
    def __init__(self, images: Images):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        return {"pixels": self._images.pixels[index], "labels": self._images.labels[index]}


def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    augmentation: Augmentation | None = None,
    share: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Returns an endless iterator of ``{"pixels": float32[B, H, W, 1], "labels": int32[B]}``.

    B is batch_size / shares.  Images are shuffled anew in each epoch, and changed anew too.  The global
    batch holds the same images, changed alike, for any number of shares, one after another.  ``get_state()``
    and ``set_state()`` checkpoint its position.

    Args:
        dataset: whose training split is read.
        batch_size: images per batch over all processes.
        seed: of the order and the augmentation.
        augmentation: random changes; None leaves the images as they are.
        share: (which, of how many) equal parts of each batch this process reads.

    Raises:
        ValueError: a batch that does not come apart evenly, or a shift beyond the image.

    >>> batch = next(train_batches(load("digits"), 32, seed=0))
    >>> batch["pixels"].shape, batch["labels"].shape
    ((32, 8, 8, 1), (32,))
    """
    index, shares = share
    if batch_size < 1 or batch_size % shares:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {shares} processes")
    rows = grain.MapDataset.source(_Rows(dataset.train)).shuffle(seed=seed)
    # As good as endless; repeat() without a number overflows Grain's lengths at a batch of one.
    rows = rows.repeat(2**60 // len(rows))
    if augmentation is not None:
        if augmentation.shift >= min(dataset.shape[:2]):
            raise ValueError(
                f"a shift by {augmentation.shift} moves images of {dataset.shape[:2]} out of sight"
            )
        rows = rows.random_map(
            lambda row, rng: row | {"pixels": augmentation(row["pixels"], rng)}, seed=seed
        )
    own = rows.batch(batch_size // shares)[index::shares]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(own.to_iter_dataset(options))
