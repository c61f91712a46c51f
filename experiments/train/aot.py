"""A run's step, compiled for TPUs or GPUs that are not there, and what the compiler says of it.

It proves that a step lowers, what it takes of a chip's memory, and what it multiplies and sends; it says
nothing of time.  It runs in a process of its own, since some programs abort it.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.harness.training import chips, hlo, kernels, sharding, targets, train
from experiments.train.program import (
    Config,
    Program,
    check,
    load_corpus,
    make_program,
    make_schedule,
)

_MATTERS = 0.02  # of what is too much
_COMPILER = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt"}  # packages that compile


def compiled(config: Config, topology: str) -> dict[str, Any]:
    """Compiles a run's step for a topology, and returns what it takes of each chip.

    Args:
        config: of the run.
        topology: of TPUs, as ``v5e:16x16``, or GPUs of one host, as ``h100:8``.

    Returns:
        A record for `aot_table.to_text`: bytes, products, collectives and operations on each device, and
        whether they fit.

    Raises:
        ValueError: no compiler, a topology that it does not know, or settings that no run could use.
        RuntimeError: the compiler failed otherwise.
    """
    if missing := targets.missing_compiler(topology):
        raise ValueError(f"--compile_only needs {missing}")
    check(config)
    request = json.dumps({"config": dataclasses.asdict(config), "topology": topology})
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train.aot"],
        input=request,
        capture_output=True,
        text=True,
        env=os.environ | targets.environment(topology),
        check=False,
    )
    answer = _answer(done.stdout)
    if answer is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(
            f"the compiler ended with exit status {done.returncode}: {' '.join(lines[-1:])[:500]}"
        )
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _answer(text: str) -> dict[str, Any] | None:
    """Returns the JSON on the last line."""
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(text.splitlines()[-1])
        return found if isinstance(found, dict) else None
    return None


# ---------------------------------------------------------------------------------------------------
# In the child


def _main() -> None:
    request = json.load(sys.stdin)
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in request["config"].items()
    }
    try:
        found = _measure(Config(**fields), request["topology"])
    except ValueError as error:
        found = {"error": " ".join(str(error).split())}
    print(json.dumps(found))


def _measure(config: Config, topology: str) -> dict[str, Any]:
    devices, platform = targets.devices(topology), targets.platform_of(topology)
    mesh = sharding.make_mesh(
        config.mesh_data, config.mesh_fsdp, config.mesh_tensor, devices=devices
    )
    vocabulary = config.vocab_size or load_corpus(config).vocab_size
    program = make_program(config, mesh, vocabulary)
    arguments = _arguments(config, program, mesh)
    chip = chips.of_kind(devices[0].device_kind)
    found = {
        "topology": topology,
        "chip": chip.name,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "config": dataclasses.asdict(config),
        "versions": {name: metadata.version(name) for name in ("jax", _COMPILER[platform])},
        "parameters": sum(x.size for x in jax.tree.leaves(arguments[0].params)),
        "hbm": chip.hbm // chip.cores,
        "bytes": _argument_bytes(arguments[0]),
        "model_flops": program.model.step_flops(config.batch, config.sequence),
    }
    step: Any = train.make_step(program.loss, program.tx, mesh, apply=program.apply)
    try:
        executable = targets.lower(step, arguments, topology).compile()
        measured = _analyze(executable)
        if platform == "cuda":  # whose compiler does not refuse what does not fit
            return found | measured | _fit(measured, config, found["hbm"], found["bytes"]["state"])
        return found | {"fits": True} | measured
    except jax.errors.JaxRuntimeError as error:
        return found | _out_of_memory(str(error), config, found["bytes"]["state"])


def _arguments(config: Config, program: Program, mesh: Mesh) -> tuple[Any, ...]:
    """Returns the step's arguments, as shapes with their shardings."""
    state = jax.eval_shape(lambda: train.fresh(lambda: program.init(config.seed), program.tx))
    state = jax.tree.map(_with_sharding, state, sharding.of_state(mesh, state))
    alike = NamedSharding(mesh, P())
    tokens = jax.ShapeDtypeStruct(
        (config.batch, config.sequence + 1), jnp.int32, sharding=NamedSharding(mesh, sharding.ROWS)
    )
    schedule = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_schedule(config)))
    return state, tokens, jax.tree.map(lambda x: _with_sharding(x, alike), schedule)


def _with_sharding(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _argument_bytes(state: Any) -> dict[str, float]:
    """Returns bytes on one device of the parameters, of the optimizer's state, and of it in float32."""

    def held(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    parameters = held(state.params)
    elements = sum(
        math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params)
    )
    return {"parameters": parameters, "state": held(state.opt_state), "state_float32": 8 * elements}


def _analyze(executable: Any) -> dict[str, Any]:
    memory, costs = executable.memory_analysis(), executable.cost_analysis() or {}
    program = hlo.parse(executable.as_text())
    held = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    found = {
        "memory": held,
        "products": list(_products(program)),
        "collectives": list(_collectives(program)),
    }
    if costs:
        compiler = {"flops": costs["flops"], "bytes_accessed": costs["bytes accessed"]}
        return found | {"compiler": compiler}
    launched = kernels.kernels(program)
    count = sum(x.times for x in launched)
    return found | {"kernels": {"times": count, "bytes": sum(x.times * x.nbytes for x in launched)}}


def _fit(measured: Any, config: Config, hbm: int, state: float) -> dict[str, Any]:
    """Returns whether what a step holds is less than a chip's memory, with advice where it is not."""
    used = sum(measured["memory"].values())
    if used <= hbm:
        return {"fits": True}
    return _too_large(used, hbm, config, state)


def _products(program: hlo.Program) -> Iterator[dict[str, Any]]:
    count, flops = collections.Counter(), collections.Counter()
    for x in program.products():
        count[x.phase, x.kinds] += x.times
        flops[x.phase, x.kinds] += x.flops
    for (phase, kinds), times in sorted(count.items()):
        yield {
            "phase": phase, "operands": kinds, "times": times, "flops": flops[phase, kinds],
        }  # fmt: skip


def _collectives(program: hlo.Program) -> Iterator[dict[str, Any]]:
    times, moved = collections.Counter(), dict[tuple, float]()
    for x in program.collectives():
        kinds = " + ".join(sorted({a.kind for a in x.arrays}))
        times[x.kind, kinds, x.devices] += x.times
        key = x.kind, kinds, x.devices
        moved[key] = moved.get(key, 0) + x.nbytes
    for key, nbytes in sorted(moved.items(), key=lambda item: -item[1]):
        kind, kinds, devices = key
        yield {
            "kind": kind, "types": kinds, "devices": devices, "times": times[key], "bytes": nbytes,
        }  # fmt: skip


def _out_of_memory(message: str, config: Config, state: float) -> dict[str, Any]:
    """Parses the compiler's out-of-memory error, and adds advice.

    Raises:
        RuntimeError: it failed for another reason.
    """
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"memory required .*?\({size}\) exceeds available HBM \({size}\)", message
    )
    if found is None:
        raise RuntimeError(" ".join(message.split())[:500])
    used, usable = (_bytes(found[i], found[i + 1]) for i in (1, 3))
    return _too_large(used, usable, config, state)


def _too_large(used: float, usable: float, config: Config, state: float) -> dict[str, Any]:
    return {
        "fits": False,
        "used": used,
        "usable": usable,
        "beyond": used - usable,
        "advice": _advice(used, usable, state, config),
    }


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** (" KMGT".index(unit))


def _advice(used: float, usable: float, state: float, config: Config) -> str:
    """Returns settings that take less memory, the cheapest first, without those that cannot matter."""
    changes, beyond = [], used - usable
    if not config.remat:
        changes.append("--config.remat=True (blocks are computed again instead of kept)")
    if not config.scan:
        changes.append("--config.scan=True (one block's temporaries at a time)")
    if config.state == "fp32" and state > _MATTERS * beyond:
        changes.append("--config.state=fixed-5 (the optimizer's state in a sixth of the bytes)")
    if config.dtype == "float32":
        changes.append("--config.dtype=bfloat16 (activations in half the bytes)")
    if config.mesh_data > 1:
        changes.append("a smaller --config.mesh_data, which leaves more to fsdp")
    batch = max(1, int(config.batch * usable / used))
    changes += [
        f"--config.mesh_tensor={2 * config.mesh_tensor} (heads, hidden units and vocabulary over more chips)",
        f"--config.batch={batch} or fewer, where activations are what takes it",
        f"{math.ceil(used / usable)} times as many chips",
    ]
    return f"the step does not fit: {beyond / 2**30:.2f} GiB too much; try {'; '.join(changes)}"


if __name__ == "__main__":
    _main()
