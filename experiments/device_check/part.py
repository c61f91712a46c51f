"""One part, in a process of its own: python -m experiments.device_check.part '{"part": …}'."""

import functools
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import jax

from experiments.device_check import environment, exactness, products, steps
from experiments.device_check.recording import Asker
from experiments.device_check.settings import Config

_PARTS: dict[str, Any] = {
    "environment": environment.ask,
    "exactness": exactness.ask,
    "train_step": steps.ask_steps,
    "products": products.ask,
    "optimizer": steps.ask_optimizer,
    "training_float": functools.partial(steps.ask_training, recipe="", state="fp32"),
    "training_int8": functools.partial(steps.ask_training, recipe="int8_train", state="even-5.0"),
}


def main(text: str) -> None:
    """Asks a part's questions.

    Args:
        text: of JSON: ``part``, ``workdir``, ``seconds``, and the ``config``.
    """
    given = json.loads(text)
    signal.alarm(math.ceil(given["seconds"]) + 5)  # it ends also where what started it is gone
    device = jax.devices()[0].device_kind
    asker = Asker(Path(given["workdir"]), given["part"], device, given["seconds"])
    _PARTS[given["part"]](Config(**given["config"]), asker)


if __name__ == "__main__":
    main(sys.argv[1])
