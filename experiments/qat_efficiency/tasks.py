"""The two tasks: a model, its data, which layer gets which recipe, and what it is evaluated on.

Shape suffixes: N examples, T tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from flax import nnx

import jaxquant as jq
from experiments.harness import data
from experiments.harness.data import corruptions, images, ood
from experiments.harness.models import lm, vision
from experiments.harness.training import train

MODELS = ("vision", "language")
# Named by the weights of their blocks' products; all widths divide by 32, as QuEST's rotations need.
VISION_SIZES = {
    "8k": vision.ViTConfig(layers=1, width=32, heads=2, hidden=64),
    "98k": vision.ViTConfig(layers=2, width=64, heads=2, hidden=256),
    "442k": vision.sized("small"),
    "1.8m": vision.sized("base"),
}
LANGUAGE_SIZES = {
    "10k": lm.LMConfig(layers=1, width=32, heads=2, kv_heads=2, hidden=64),
    "94k": lm.LMConfig(layers=2, width=64, heads=2, kv_heads=2, hidden=160),
    "332k": lm.sized("332k"),
    "1.3m": lm.sized("1.3m"),
    "30m": lm.sized("30m"),
}
SIZES = {"vision": VISION_SIZES, "language": LANGUAGE_SIZES}
# What a model is judged by, and the sign with which more is better.
PRIMARY = {"vision": ("accuracy", 1.0), "language": ("nll", -1.0)}
SUFFIXES = {"ste": "", "lsq": "-lsq", "quest": "-quest"}
# Of weights: the largest magnitude, or that of the least squared error.
RANGES = ("absmax", "searched")
_ACTIVATION_SUFFIXES = {"tensor": "", "token": "-token"}
ACTIVATIONS = tuple(_ACTIVATION_SUFFIXES)
CODE_BYTES = 200_000  # of program code, as text unlike the training text
_WIDTH = re.compile(r"w([2-8])a([2-8]|16)")
_FLOAT_BITS = 16
_FEW_BITS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a task. Fields of the other model are at their defaults.

    Attributes:
        model: of `MODELS`.
        size: of `SIZES`.
        data: for vision an image set, for language a text source of `harness.data`.
        data_path: where it lies, where it needs a path.
        fingerprint: of the data.
        batch: examples in a training batch.
        evaluation: examples (images, windows of text) in each evaluation split, at most.
        evaluation_batch: examples that are evaluated together, and so share their activations' ranges.
        grid: vision: patches along a side of the image.
        corrupted: vision: images evaluated under each corruption, at most.
        corruptions, severities: vision: of `harness.corruptions`.
        sequence: language: tokens in a window.
    """

    model: Literal["vision", "language"]
    size: str
    data: str
    data_path: str
    fingerprint: str
    batch: int
    evaluation: int
    evaluation_batch: int
    grid: int = 0
    corrupted: int = 0
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = ()
    sequence: int = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled examples.

    Attributes:
        inputs: float32[N, H, W, 1] images or int32[N, T] tokens.
        labels: int32[N] classes or int32[N, T] next tokens.
        groups: a name for each label, of which the worst is looked for; None where nothing is.
    """

    inputs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What `make_task` made of settings.

    Attributes:
        settings: those.
        make: a fresh model from a seed.
        loss: from a graphdef to the training loss.
        batches: an endless iterator of training batches from a seed.
        inputs: a batch's inputs, as the model is called with.
        selection: examples on which a method is chosen, not evaluated.
        splits: examples on which methods are compared; the first is the main one.
        corrupted: by corruption, one split for each severity.
    """

    settings: Settings
    make: Callable[[int], nnx.Module]
    loss: Callable[[nnx.GraphDef], train.Loss]
    batches: Callable[[int], Any]
    inputs: Callable[[Any], np.ndarray]
    selection: Split
    splits: dict[str, Split]
    corrupted: dict[str, tuple[Split, ...]]

    @property
    def main(self) -> str:
        return next(iter(self.splits))

    def calibration(self, count: int, seed: int) -> list[np.ndarray]:
        """Inputs of `count` training batches in an order of their own."""
        batches: Iterator[Any] = self.batches(_CALIBRATION_SEED + seed)
        return [self.inputs(next(batches)) for _ in range(count)]


_CALIBRATION_SEED = 2_000_000  # beyond the seeds of training


# ---------------------------------------------------------------------------------------------------
# Which layer gets what


def parse_width(width: str) -> tuple[int, int]:
    """Bits of weights and of activations, 16 for floating point.

    Raises:
        ValueError: anything but w2 … w8 with a2 … a8 or a16.

    >>> parse_width("w3a16")
    (3, 16)
    """
    match = _WIDTH.fullmatch(width) if isinstance(width, str) else None
    if match is None:
        raise ValueError(
            f"config.widths are named as 'w4a8', weights and activations of 2 to 8 bits, or a16 for "
            f"activations in floating point; got {width!r}"
        )
    return int(match[1]), int(match[2])


def outer_rules(model: str, width: str) -> dict[str, str]:
    """What the first and the last layer get at every width: 8 bits.

    >>> outer_rules("vision", "w2a16")
    {'patches': 'w8a16', 'head': 'w8a16'}
    """
    outer = "w8a16" if parse_width(width)[1] == _FLOAT_BITS else "w8a8"
    # An embedding's rows are looked up, so that it has no activations to quantize.
    return (
        {"patches": outer} | {"head": outer}
        if model == "vision"
        else {"embed": "w8a16", "head": outer}
    )


def rules(
    model: str,
    width: str,
    estimator: str = "ste",
    group: int = 0,
    ranges: str = "absmax",
    activations: str = "tensor",
) -> dict[str, str | jq.DotGeneral]:
    """Every layer's recipe: the blocks' linears as asked for, the first and the last layer at 8 bits.

    Args:
        model: of `MODELS`.
        width: as of `parse_width`.
        estimator: of `SUFFIXES`.
        group: neighbours along a weight's inputs that share a scale; 0 is a whole output channel.
        ranges: of the weights, of `RANGES`.
        activations: what shares a scale of the activations, of `ACTIVATIONS`; QuEST has its own rows.

    >>> rules("language", "w4a4", "lsq")
    {'embed': 'w8a16', 'head': 'w8a8', 'blocks/.*': 'w4a4-lsq'}
    """
    name = width + (SUFFIXES[estimator] or _ACTIVATION_SUFFIXES[activations])
    made = name if not group and ranges == "absmax" else _changed(jq.recipe(name), group, ranges)
    return {**outer_rules(model, width), "blocks/.*": made}


def _changed(recipe: jq.DotGeneral, group: int, ranges: str) -> jq.DotGeneral:
    """A recipe whose weights have other groups and ranges."""
    forward = recipe.forward
    assert forward.rhs is not None
    weights = dataclasses.replace(
        forward.rhs,
        granularity=group or forward.rhs.granularity,
        calibration=jq.calibration.mse() if ranges == "searched" else forward.rhs.calibration,
    )
    # Integers of several groups cannot be summed before they are scaled.
    is_simulated = group and forward.lhs is not None
    arithmetic = "simulated" if is_simulated else forward.arithmetic
    forward = dataclasses.replace(forward, rhs=weights, arithmetic=arithmetic)
    return dataclasses.replace(recipe, forward=forward)


def is_grouped(width: str) -> bool:
    """Whether arms of a width also come with a scale for each group, and with searched ranges.

    With more bits than 4 a channel's largest magnitude costs too little for either to matter.
    """
    return parse_width(width)[0] <= _FEW_BITS


# ---------------------------------------------------------------------------------------------------
# The tasks


def load(model: str, source: str, path: str) -> images.Dataset | data.Corpus:
    """A task's data.

    Raises:
        ValueError: data that is not there, with the ways to get it.
    """
    if model == "language":
        return ood.with_code_text(data.load(source, path), CODE_BYTES)
    try:
        return images.load(source, path)
    except ValueError as error:
        if source == "digits" or "does not exist" not in str(error):
            raise
        raise ValueError(
            f"no Fashion-MNIST at '{path or images.FOLDER}': apt-get install dataset-fashion-mnist, or "
            "experiments.harness.data.images.fetch_fashion_mnist(FOLDER) and --config.images_path=FOLDER, or "
            "--config.images=digits"
        ) from None


@functools.lru_cache(maxsize=2)
def make_task(settings: Settings) -> Task:
    """The task of settings.

    Raises:
        RuntimeError: data that is no longer what the settings were made for.
        ValueError: a size or a corruption that does not exist, or images that the grid does not divide.
    """
    loaded = load(settings.model, settings.data, settings.data_path)
    data.unchanged(loaded, settings.fingerprint, settings.data_path or settings.data)
    if isinstance(loaded, images.Dataset):
        return _vision(settings, loaded)
    return _language(settings, loaded)


def vision_config(
    settings: Settings, shape: tuple[int, int, int], classes: int
) -> vision.ViTConfig:
    """The model of a size for images of a shape."""
    side = shape[0]
    if side % settings.grid:
        raise ValueError(
            f"config.grid: images of {side} pixels cannot be cut into {settings.grid} × "
            f"{settings.grid} patches"
        )
    return dataclasses.replace(
        VISION_SIZES[settings.size],
        image=side,
        patch=side // settings.grid,
        channels=shape[2],
        classes=classes,
    )


def _vision(settings: Settings, dataset: images.Dataset) -> Task:
    config = vision_config(settings, dataset.shape, len(dataset.classes))
    # A mirrored digit is another sign; a mirrored shoe is a shoe.
    augmentation = images.Augmentation(flip=settings.data != "digits")

    def split(part: images.Images, count: int) -> Split:
        # Evenly spaced, for images may be stored in an order.
        count = _whole_batches(min(count, len(part)), settings.evaluation_batch)
        at = np.linspace(0, len(part) - 1, count).astype(int)
        names = np.array(dataset.classes)[part.labels[at]]
        return Split(part.pixels[at], part.labels[at], names)

    test = split(dataset.test, settings.evaluation)
    few = split(dataset.test, settings.corrupted)
    return Task(
        settings,
        make=lambda seed: vision.ViT(config, nnx.Rngs(seed)),
        loss=vision.classification_loss,
        batches=lambda seed: images.train_batches(dataset, settings.batch, seed, augmentation),
        inputs=lambda batch: batch["pixels"],
        selection=split(dataset.valid, settings.evaluation),
        splits={"test": test},
        corrupted={
            name: tuple(_corrupted(few, name, severity) for severity in settings.severities)
            for name in settings.corruptions
        },
    )


def _corrupted(split: Split, name: str, severity: int) -> Split:
    pixels = np.asarray(corruptions.corrupt(split.inputs, name, severity))
    return dataclasses.replace(split, inputs=pixels)


def _language(settings: Settings, corpus: data.Corpus) -> Task:
    config = dataclasses.replace(LANGUAGE_SIZES[settings.size], vocab_size=corpus.vocab_size)
    length = settings.sequence

    def split(name: str, count: int) -> Split:
        windows = data.evaluation_windows(corpus, name, length, count)
        groups = _documents(corpus, name, length, count)
        return Split(windows[:, :-1], windows[:, 1:], groups)

    # Every other window of the text like the training text is for choosing.
    both = split("valid", 2 * settings.evaluation)
    halves = [
        Split(
            both.inputs[i::2], both.labels[i::2], None if both.groups is None else both.groups[i::2]
        )
        for i in (0, 1)
    ]
    others = [name for name in corpus.evaluation if name != "valid"]
    splits = {"valid": halves[0]} | {name: split(name, settings.evaluation) for name in others}
    batch = settings.evaluation_batch
    return Task(
        settings,
        make=lambda seed: lm.LM(config, nnx.Rngs(seed)),
        loss=train.next_token_loss,
        batches=lambda seed: data.train_batches(corpus, length, settings.batch, seed),
        inputs=lambda batch: batch[:, :-1],
        selection=_first(halves[1], _whole_batches(len(halves[1].inputs), batch)),
        splits={k: _first(v, _whole_batches(len(v.inputs), batch)) for k, v in splits.items()},
        corrupted={},
    )


def _documents(corpus: data.Corpus, name: str, length: int, count: int) -> np.ndarray | None:
    """The document of each predicted token, "document 3" as they follow each other in the split."""
    tokens = corpus.evaluation[name]
    if isinstance(tokens, data.MarkovSource):
        return None
    # A separator belongs to the document that it ends.
    ends = tokens[:] == data.SEPARATOR[0]
    number = (np.cumsum(ends) - ends).astype(np.int32)
    numbered = dataclasses.replace(
        corpus, evaluation={name: number}, vocab_size=int(number[-1]) + 1
    )
    windows = data.evaluation_windows(numbered, name, length, count)[:, 1:]
    return np.char.add("document ", (windows + 1).astype(str))


def _first(split: Split, count: int) -> Split:
    groups = None if split.groups is None else split.groups[:count]
    return Split(split.inputs[:count], split.labels[:count], groups)


def _whole_batches(count: int, batch: int) -> int:
    """The most that whole batches hold; all of less than one."""
    return count if count < batch else count - count % batch
