"""Answers as lines of JSON, each written as soon as it is there."""

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.harness.running import files
from experiments.harness.running.timing import interleaved_timing, paired_ratio

Kind = Literal["measured", "compiled"]  # executed, or read from the compiled program
BEGUN, ANSWERED, FAILED, SKIPPED = "begun", "answered", "failed", "skipped"
NO_TIME = {"status": SKIPPED, "reason": "too little time was left"}
_LONGEST = 600  # letters of an error
_HIDDEN = ("part", "question", "kind", "device", "status", "seconds")


class Record:
    """The lines of a folder's ``results.jsonl``, which is replaced as a whole with each line."""

    def __init__(self, workdir: Path):
        self._path = workdir / "results.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self._path.exists():
            try:
                self.lines = [json.loads(x) for x in self._path.read_text().splitlines()]
                assert all({"part", "question", "status"} <= x.keys() for x in self.lines)
            except (ValueError, AttributeError, AssertionError):
                files.quarantine(self._path, "these are no results; all is asked anew")
                self.lines = []

    def put(self, line: Mapping[str, Any]) -> None:
        """Writes a line in the place of an earlier one of the same part and question."""
        key = line["part"], line["question"]
        self.lines = [x for x in self.lines if (x["part"], x["question"]) != key] + [dict(line)]
        text = "".join(json.dumps(x, allow_nan=False) + "\n" for x in self.lines)
        files.write(self._path, text)


class Asker:
    """Asks a part's questions, each once for a device, while there is time."""

    def __init__(self, workdir: Path, part: str, device: str, seconds: float):
        """Starts the part's clock.

        Args:
            workdir: of the results.
            part: its name.
            device: JAX's device_kind; another one's answers do not count.
            seconds: after which the part is killed.
        """
        self._record, self._head = Record(workdir), {"part": part, "device": device}
        self._end, self._longest = time.monotonic() + seconds, 0.0

    def __call__(self, question: str, kind: Kind, answer: Callable[[], Mapping[str, Any]]) -> None:
        """Asks, and writes what comes back, or how it failed."""
        head = self._head | {"question": question, "kind": kind}
        answered = (head | {"status": ANSWERED}).items()
        if any(answered <= line.items() for line in self._record.lines):
            return
        start, found = time.monotonic(), NO_TIME
        if self._end - start > self._longest:
            self._record.put(head | {"status": BEGUN})
            try:
                found = {"status": ANSWERED, **plain(answer())}
            except Exception as error:
                traceback.print_exc()
                words = " ".join(f"{type(error).__name__}: {error}".split())
                found = {"status": FAILED, "reason": words[:_LONGEST]}
        seconds = time.monotonic() - start
        self._longest = max(self._longest, seconds)
        line = head | found | {"seconds": round(seconds, 3)}
        self._record.put(line)
        print(to_text(line), flush=True)


def to_text(line: Mapping[str, Any]) -> str:
    """Returns a line for the screen.

    >>> to_text({"part": "products", "question": "s8", "status": "answered", "kind": "measured", "x": 0.5})
    'products: s8 (measured): x 0.5'
    """
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()}
    values = ", ".join(f"{k} {v}" for k, v in shown.items() if k not in _HIDDEN)
    status = line["kind"] if line["status"] == ANSWERED else line["status"]
    return f"{line['part']}: {line['question']} ({status}): {values}"


def plain(value: Any) -> Any:
    """Returns numbers of NumPy and JAX as Python's; what is not finite, as a word.

    >>> plain({"a": np.float32(0.5), "b": [float("inf")]})
    {'a': 0.5, 'b': ['inf']}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def race(
    own: Callable[[], None], base: Callable[[], None], name: str, rounds: int
) -> dict[str, Any]:
    """Returns seconds of each round, and their ratio to the baseline's in the same rounds.

    Args:
        own: returns when the device has finished.
        base: likewise.
        name: of the baseline.
        rounds: that count; one before them does not.
    """
    runs = {"base": base, "own": own}
    interleaved_timing(runs, 1)
    seconds = interleaved_timing(runs, rounds)
    ratio = paired_ratio(seconds["own"], seconds["base"])
    return {f"of_{name}": ratio["median"], "interval": [ratio["low"], ratio["high"]]} | {
        "seconds_each": seconds["own"]
    }


def compare(found: Any, exact: np.ndarray) -> dict[str, Any]:
    """Returns how many numbers have the bits of the exact result, and the largest difference.

    Args:
        found: of the device.
        exact: in float64 or integers; it is rounded once, to the type of `found`.

    Returns:
        ``equal`` of ``of``; ``ulps``, the largest difference, counted in numbers of the type;
        ``relative_error``, ‖found − rounded‖ / ‖rounded‖.

    >>> compare(np.float32([1.0, 2.0]), np.array([1.0, 2.0 + 2**-22]))["ulps"]
    1
    """
    found = np.asarray(found)
    rounded = exact.astype(found.dtype)
    wide, want = found.astype(np.float64), rounded.astype(np.float64)
    return {
        "equal": int(np.sum(_bits(found) == _bits(rounded))),
        "of": found.size,
        "ulps": int(np.abs(_ordered(found) - _ordered(rounded)).max(initial=0)),
        "relative_error": float(np.linalg.norm(wide - want) / (np.linalg.norm(want) or 1.0)),
    }


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"i{x.dtype.itemsize}").astype(np.int64)


def _ordered(x: np.ndarray) -> np.ndarray:
    """Returns integers that count the type's numbers in order, both zeros as one."""
    if "int" in x.dtype.name:
        return x.astype(np.int64)
    top = np.int64(2) ** (8 * x.dtype.itemsize - 1)
    return np.where(_bits(x) < 0, -(_bits(x) + top), _bits(x))
