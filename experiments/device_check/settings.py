"""The parts, their limits, and the sizes of what they ask."""

import dataclasses

from experiments.harness.running import cli
from experiments.harness.running.cli import option

# Seconds of each part, the most valuable first: nine minutes together.
LIMITS = {
    "environment": 40,
    "exactness": 110,
    "train_step": 150,
    "products": 60,
    "optimizer": 60,
    "training_float": 60,
    "training_int8": 60,
}


@dataclasses.dataclass
class Config:
    """What is asked, and how large it is."""

    parts: tuple[str, ...] = option(tuple(LIMITS), "which of them")
    patience: float = option(1.0, "times the limits, for a machine that others use too")
    size: str = option("113m", "of the model by N, of harness/models/lm.py")
    vocab_size: int = option(50_304, "of the model")
    sequence: int = option(1024, "tokens of a window")
    batch: int = option(16, "windows of a step")
    recipes: tuple[str, ...] = option(
        ("int8_train", "fp8_train", "w8a8", "mxfp8_train"), "whose train steps are timed"
    )
    steps: int = option(200, "of the training runs")
    rounds: int = option(7, "of timing, the contestants in turn")
    calls: int = option(20, "of a product within a round")
    rows: int = option(8192, "of the left operand of products")
    width: int = option(4096, "of the right operand, both ways")
    stored: int = option(8192, "rows and columns of a stored weight")
    layers: int = option(12, "of the model whose parameters the optimizer updates")
    hidden: int = option(768, "width of the same")
    optimizers: int = option(7, "how many of those of the benchmark")
    values: int = option(2**20, "that are divided")


_TINY = {
    "size": "3k",
    "vocab_size": 256,
    "sequence": 16,
    "batch": 2,
    "steps": 20,
    "layers": 1,
    "optimizers": 2,
}
_TINY |= {"rounds": 2, "calls": 2, "rows": 32, "width": 32, "stored": 64, "hidden": 32}
PRESETS = {
    "full": Config(),
    "tiny": Config(patience=4.0, recipes=("int8_train",), values=2**12, **_TINY),
}


def check(config: Config) -> None:
    """Raises a ValueError for a field that no check could use."""
    whole = [name for name, value in vars(Config()).items() if isinstance(value, int)]
    cli.check_whole(config, *whole)
    cli.check_positive(config, "patience")
    cli.check_each_once(config, "parts", "recipes")
    cli.check_choices(config, "parts", LIMITS)
