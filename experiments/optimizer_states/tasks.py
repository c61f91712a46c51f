"""What is trained: a trial as data, and the model, the data and the measures of its task."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.harness import data
from experiments.harness.data import images
from experiments.harness.models import lm, vision
from experiments.harness.training import train
from experiments.harness.training.arms import HINDSIGHT, budget_of

COOLDOWN = 0.2  # the share of a WSD run in which the learning rate falls
WARMUP = 0.05
# From 41k on every matrix has at least 4096 elements, below which torchao's codecs leave a leaf exact.
LANGUAGE_SIZES = {
    "10k": lm.sized("10k"),
    "20k": lm.LMConfig(layers=2, width=32, heads=2, kv_heads=2, hidden=64),
    "41k": lm.LMConfig(layers=1, width=64, heads=2, kv_heads=2, hidden=128),
    "94k": lm.sized("94k"),
    "803k": lm.LMConfig(layers=4, width=128, heads=4, kv_heads=4, hidden=352),
    "30m": lm.sized("30m"),
}
VISION_SIZES = {
    "8k": vision.ViTConfig(layers=1, width=32, heads=2, hidden=64),
    "98k": vision.ViTConfig(layers=2, width=64, heads=2, hidden=256),
    "442k": vision.sized("small"),
    "1.8m": vision.sized("base"),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    arm: str
    schedule: str
    seed: int
    size: str
    data: str
    data_path: str
    data_fingerprint: str
    grid: int
    sequence: int
    batch: int
    steps: int
    peak_lr: float
    is_tuning: bool
    interval: int
    snapshots: int
    evaluation: int
    log_every: int
    checkpoint_every: int

    @property
    def stops(self) -> list[int]:
        """The steps after which the widths are looked at."""
        ends = {round(self.steps * (i + 1) / self.snapshots) for i in range(self.snapshots)}
        return sorted(ends - {0})

    def plan(self) -> train.Schedule:
        """The learning rate."""
        warmup = max(1, round(WARMUP * self.steps))
        if self.schedule == "cosine":
            return train.cosine(self.peak_lr, self.steps, warmup)
        start = self.steps - max(1, round(COOLDOWN * self.steps))
        return train.cooldown(self.peak_lr, warmup, start, self.steps)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's model, data and measures."""

    make: Any
    graphdef: Any
    loss: Any
    batches: Any
    evaluate: Any


@functools.lru_cache(maxsize=2)
def _load(task: str, source: str, path: str, fingerprint: str) -> Any:
    loaded = data.load(source, path) if task == "language" else images.load(source, path)
    return data.unchanged(loaded, fingerprint, path or source)


def vision_config(size: str, grid: int, dataset: images.Dataset) -> vision.ViTConfig:
    side, _, channels = dataset.shape
    if side % grid:
        raise ValueError(
            f"config.grid: images of {side} pixels cannot be cut into {grid} × {grid} patches"
        )
    return dataclasses.replace(
        VISION_SIZES[size],
        image=side,
        patch=side // grid,
        channels=channels,
        classes=len(dataset.classes),
    )


@functools.lru_cache(maxsize=4)
def make_task(trial: Trial) -> Task:
    """The task of a trial whose arm, schedule and rate do not matter."""
    loaded = _load(trial.task, trial.data, trial.data_path, trial.data_fingerprint)
    if isinstance(loaded, images.Dataset):
        config = vision_config(trial.size, trial.grid, loaded)
        make = lambda seed: vision.ViT(config, nnx.Rngs(seed))  # noqa: E731
        augmentation = images.Augmentation(flip=trial.data != "digits")
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
        return Task(
            make,
            graphdef,
            vision.classification_loss(graphdef),
            lambda seed: images.train_batches(loaded, trial.batch, seed, augmentation),
            functools.partial(_evaluate_images, graphdef, loaded, trial.evaluation),
        )
    shape = dataclasses.replace(LANGUAGE_SIZES[trial.size], vocab_size=loaded.vocab_size)
    make = lambda seed: lm.LM(shape, nnx.Rngs(seed))  # noqa: E731
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
    loss = train.next_token_loss(graphdef)
    return Task(
        make,
        graphdef,
        loss,
        lambda seed: data.train_batches(loaded, trial.sequence, trial.batch, seed),
        functools.partial(_evaluate_text, loss, loaded, trial.sequence, trial.evaluation),
    )


def _evaluate_text(loss: Any, corpus: data.Corpus, sequence: int, count: int, params: Any) -> dict:
    """Mean loss, in nats a token, of each split."""
    found = {}
    for split in corpus.evaluation:
        windows = data.evaluation_windows(corpus, split, sequence, count)
        each = jax.jit(
            lambda p, w: jax.lax.map(lambda x: loss(p, x[None]), w, batch_size=min(64, len(w)))
        )
        found[f"loss {split}"] = float(np.asarray(each(params, windows), np.float64).mean())
    return found


def _evaluate_images(graphdef: Any, dataset: images.Dataset, count: int, params: Any) -> dict:
    """Mean loss, in nats an image, and accuracy on test images."""
    at = np.linspace(0, len(dataset.test) - 1, min(count, len(dataset.test))).astype(int)
    pixels, labels = dataset.test.pixels[at], dataset.test.labels[at]
    loss = vision.classification_loss(graphdef)

    @jax.jit
    def measure(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        right = jnp.argmax(nnx.merge(graphdef, params)(x), axis=-1) == y
        return loss(params, {"pixels": x, "labels": y}), jnp.mean(right.astype(jnp.float32))

    parts = np.array_split(np.arange(len(at)), max(1, len(at) // 500))
    found = np.array(
        [[float(v) for v in measure(params, pixels[i], labels[i])] + [len(i)] for i in parts]
    )
    mean = np.average(found[:, :2], axis=0, weights=found[:, 2])
    return {"loss test": float(mean[0]), "accuracy test": float(mean[1])}


def step_cost(trial: Trial) -> float:
    """Work of a step: weights × tokens."""
    if trial.task == "language":
        return LANGUAGE_SIZES[trial.size].step_cost * trial.batch * trial.sequence
    return VISION_SIZES[trial.size].block_parameters * trial.batch * trial.grid**2


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return trial.task, trial.size, trial.arm


def cost(trial: Trial) -> float:
    """Work of a trial: what its progress adds up to."""
    passes = 2 if (budget_of(trial.arm) or ("",))[0] == HINDSIGHT else 1
    return passes * trial.steps * step_cost(trial)
