"""Measured latency of the arms whose products run on stored integers, in turn with the float model.

Times are no part of a record: they lie in ``latency.json``, with what they were measured on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

import jaxquant as jq
from experiments.harness.running import files, machine, packed
from experiments.harness.running.timing import interleaved_timing, paired_ratio
from experiments.qat_efficiency import tasks
from experiments.qat_efficiency.stages import Arm, Trial, arm_rules

FILE = "latency.json"
_LAYOUT = 1
_WARM_UP = 3
# Arms whose frozen models run the same program share a measurement; it depends on no weight's value.
_PROGRAMS = {
    ("ptq", "rtn"): "rtn",
    ("ptq", "gptq"): "rtn",
    ("ptq", "awq"): "awq",
    ("ptq", "smoothquant"): "smoothquant",
    ("ptq", "hadamard+gptq"): "hadamard",
    ("qat", "ste"): "rtn",
}


def program(arm: Arm) -> str | None:
    """The name of the program that an arm's frozen model runs; None where its products are simulated.

    >>> program(Arm("qat", "ste", "w4a4")), program(Arm("qat", "lsq", "w4a4"))
    ('rtn', None)
    >>> program(Arm("ptq", "gptq", "w2a16", 32)), program(Arm("ptq", "gptq", "w4a4", 32))
    ('rtn g32', None)
    """
    method = _PROGRAMS.get((arm.family, arm.method))
    if method is None or (arm.group and tasks.parse_width(arm.width)[1] != 16):
        return None
    return dataclasses.replace(arm, method=method, ranges="absmax").setting


def measure(workdir: Path, trials: Sequence[Trial], rounds: int) -> list[dict]:
    """The rows of ``latency.json``: read where it is of this grid and machine, else measured.

    Nothing is measured for records that were packed: they were made at another time, and times that were
    kept beside them are read whatever the machine.

    A row is a model, a width, a program, and the median of the ratios to the float model's time within a
    round, with its interval.
    """
    programs = {
        (trial.task.model, arm.width, name): arm
        for trial in reversed(trials)
        for arm in trial.arms
        if (name := program(arm)) is not None
    }
    wanted = sorted(programs)
    head = {
        "layout": _LAYOUT,
        "machine": _machine(),
        "rounds": rounds,
        "sizes": {trial.task.model: _size(trial.task) for trial in trials},
        "wanted": [list(row) for row in wanted],
    }
    path = workdir / FILE
    known = files.read_json(path)
    is_packed = bool(packed.read(workdir))
    same = [k for k in head if not (is_packed and k == "machine")]
    if isinstance(known, dict) and all(known.get(k) == head[k] for k in same):
        return known["rows"]
    if is_packed or not rounds:
        return []
    settings = {trial.task.model: trial.task for trial in trials}
    with tqdm(total=len(wanted) + len(settings) * (rounds + _WARM_UP), desc="latency") as bar:
        rows = [
            row
            for name, chosen in settings.items()
            for row in _race(
                chosen,
                {(w, p): programs[m, w, p] for m, w, p in wanted if m == name},
                rounds,
                bar.update,
            )
        ]
    files.write_json(path, head | {"rows": rows})
    return rows


def _size(settings: tasks.Settings) -> list[Any]:
    return [settings.size, settings.data, settings.grid, settings.sequence, settings.batch]


def _race(
    settings: tasks.Settings,
    programs: Mapping[tuple[str, str], Arm],
    rounds: int,
    advance: Callable[[], Any],
) -> list[dict]:
    task = tasks.make_task(settings)
    (batch,) = task.calibration(1, 0)
    model = task.make(0)
    runs = {("", "float"): _forward(model, batch)}
    for key, arm in programs.items():
        alike = dataclasses.replace(arm, family="ptq", ranges="absmax")  # "gptq" runs as "rtn" does
        method = _PROGRAMS[arm.family, arm.method]
        chosen = arm_rules(task, alike)
        frozen = jq.ptq.quantize(model, chosen, [batch], method, progress=False)
        runs[key] = _forward(frozen, batch)
        advance()
    names = {f"{width} {method}": run for (width, method), run in runs.items()}
    interleaved_timing(names, _WARM_UP, on_round=advance)
    seconds = interleaved_timing(names, rounds, on_round=advance)
    return [
        {"model": settings.model, "width": width, "program": method}
        | paired_ratio(seconds[f"{width} {method}"], seconds[" float"])
        for width, method in runs
        if method != "float"
    ]


def _forward(model: nnx.Module, inputs: np.ndarray) -> Callable[[], None]:
    graphdef, state = nnx.split(model)
    placed = jax.device_put(inputs)
    forward = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, placed).compile()

    def run() -> None:
        jax.block_until_ready(forward(state, placed))

    return run


def _machine() -> dict[str, Any]:
    versions = machine.versions()
    return {
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "device": versions["device"],
        "jax": versions["jax"],
        "jaxquant": versions["jaxquant"],
    }
