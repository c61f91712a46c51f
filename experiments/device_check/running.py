"""Runs the parts one after another, each in a process that ends with its limit."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jaxquant as jq
from experiments.device_check.recording import ANSWERED, BEGUN, FAILED, NO_TIME, Record
from experiments.device_check.settings import LIMITS, Config, check
from experiments.harness.running import files

PART = "the part itself"
_STARTING = 5.0  # seconds, at least, that are worth a process


def run(config: Config, workdir: str | Path) -> list[dict[str, Any]]:
    """Asks all that is not answered yet.

    Args:
        config: what is asked.
        workdir: the folder of results; those of the same check that was stopped count.

    Returns:
        The lines of ``results.jsonl``.

    Raises:
        ValueError: bad input, or a folder that holds another check or is in use.
    """
    check(config)
    workdir = Path(workdir).absolute()
    with files.alone(workdir):
        _claim(config, workdir)
        end = time.monotonic() + config.patience * sum(LIMITS.values())
        for part in LIMITS:
            if part in config.parts:
                limit = min(config.patience * LIMITS[part], end - time.monotonic())
                _run_part(config, workdir, part, limit)
        return Record(workdir).lines


def problems(lines: list[dict[str, Any]]) -> list[str]:
    """Returns what failed, by part and question.

    >>> problems([{"part": "products", "question": "s8", "status": "failed", "reason": "killed after 60 s"}])
    ['products, s8: killed after 60 s']
    """
    bad = (x for x in lines if x["status"] == FAILED)
    return [f"{x['part']}, {x['question']}: {x['reason']}" for x in bad]


def _claim(config: Config, workdir: Path) -> None:
    """Writes what is asked, or finds that the folder's results are of something else."""
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    for field in ("parts", "patience", "recipes"):  # they change no answer
        content.pop(field)
    content |= {"jaxquant": jq.__version__, "jax": importlib.metadata.version("jax")}
    known = files.read_json(workdir / "check.json")
    if known is None and any((workdir / name).exists() for name in ("study.json", "config.json")):
        raise ValueError(f"workdir '{workdir}' holds a study or a run; choose another --workdir")
    if known not in (None, content):
        raise ValueError(
            f"workdir '{workdir}' holds a check of other sizes or versions; choose another --workdir"
        )
    files.write_json(workdir / "check.json", content)


def _run_part(config: Config, workdir: Path, part: str, limit: float) -> None:
    """Runs a part, and writes how it ended; what it was at then is the question that failed."""
    line = {"part": part, "question": PART, "kind": "measured"}
    if limit < _STARTING:
        Record(workdir).put(line | NO_TIME)
        return
    Record(workdir).put(line | {"status": BEGUN})
    start = time.monotonic()
    given = {"part": part, "workdir": str(workdir), "seconds": limit}
    text = json.dumps(given | {"config": dataclasses.asdict(config)})
    command = [sys.executable, "-m", "experiments.device_check.part", text]
    reason = _end_of(command, workdir / "logs" / f"{part}.txt", limit)
    record = Record(workdir)
    for one in record.lines:
        if one["part"] == part and one["status"] == BEGUN and one["question"] != PART:
            record.put(one | {"status": FAILED, "reason": reason or "it never ended"})
    ended = {"status": FAILED, "reason": reason} if reason else {"status": ANSWERED}
    record.put(line | ended | {"seconds": round(time.monotonic() - start, 1)})


def _end_of(command: list[str], log: Path, limit: float) -> str:
    """Runs a command with all that it starts, and returns what went wrong, or ""."""
    log.parent.mkdir(exist_ok=True)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(log.parent.parent / "compiled")}
    with log.open("w") as errors:
        environment = cache | dict(os.environ)
        process = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"killed after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return ""
    last = [text for text in log.read_text().splitlines() if text.strip()][-1:]
    return f"ended with status {status}: {''.join(last)[:300]}"
