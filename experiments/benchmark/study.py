"""The config, the two measurements, and the run of them."""

import dataclasses
import functools
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import jaxquant as jq
from experiments.benchmark import report
from experiments.benchmark.lm import VOCABULARY, Shape
from experiments.benchmark.step import Contestant, deviation, enter
from experiments.benchmark.timing import paired_ratio, race
from experiments.benchmark.variants import (
    APIS,
    BASELINE,
    RIVALS,
    check_peers,
    make_variants,
    versions,
)
from experiments.harness import cli, files

STUDY = "benchmark"
_WARM_UP = 2  # rounds before the ones that count: the first touches fresh memory
_PASS = "x · c"  # what fake_quant is held against


@dataclasses.dataclass
class Config:
    """The step, how often it is timed, and the matrix of the second measurement."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    tokens: int = 128  # per sequence
    batch: int = 16
    rounds: int = 11
    peers: bool = True  # Qwix and AQT; False leaves them out, and the report says so
    matrix: int = 4096  # fake_quant of matrix × matrix float32 values
    seed: int = 0


PRESETS = {
    "smoke": Config(layers=1, width=64, heads=4, tokens=32, batch=2, rounds=2, matrix=256),
    "laptop": Config(),
    "full": Config(width=1024, heads=16, rounds=31),
}


def run(config: Config, workdir: str | Path) -> dict:
    """Measures, and writes ``benchmark.json`` and the report.

    Args:
        config: what to measure.
        workdir: the folder of results; those of an earlier benchmark are replaced.

    Returns:
        What ``benchmark.json`` holds.

    Raises:
        ValueError: bad input, or peers that are wanted and not installed.
        RuntimeError: a peer that does not work with this version of JAX.
    """
    cli.check_positive(config, "layers", "width", "heads", "tokens", "batch", "rounds", "matrix")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is 0 to 2**32 − 1; got {config.seed}")
    shape = Shape(config.layers, config.width, config.heads)
    if config.peers:
        check_peers()
    workdir = Path(workdir)
    _claim(workdir)
    result = {
        "study": STUDY,
        "config": vars(config).copy(),
        "machine": _machine(),
        "versions": versions(config.peers),
        **_measure_steps(config, shape),
        "passes": _measure_passes(config),
    }
    files.write_json(workdir / "benchmark.json", result)
    report.write(workdir, result)
    return result


def _claim(workdir: Path) -> None:
    """Finds before the work that the folder can be written and is nobody else's.

    Raises:
        ValueError: it cannot, or it is.
    """
    for marker in ("study.json", "config.json"):
        if (workdir / marker).exists():
            raise ValueError(
                f"workdir '{workdir}' holds another study or run; choose another --workdir"
            )
    probe = workdir / ".writable"
    try:
        files.write(probe, "")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None


def _machine() -> dict:
    """What the numbers were measured on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _timed(runs: dict, rounds: int, what: str) -> dict:
    """A race after a race that warms every contestant up, under one bar."""
    with tqdm(total=_WARM_UP + rounds, desc=what, unit="round") as bar:
        race(runs, _WARM_UP, on_round=bar.update)
        return race(runs, rounds, on_round=bar.update)


# ---------------------------------------------------------------------------------------------------
# The train step


def _measure_steps(config: Config, shape: Shape) -> dict:
    rng = np.random.default_rng(config.seed)
    tokens_BxT1 = jnp.asarray(
        rng.integers(0, VOCABULARY, (config.batch, config.tokens + 1)), jnp.int32
    )
    entries = [(v, api) for api in APIS for v in make_variants(config.peers) if api in v.models]
    contestants = {
        (api, variant.name): enter(variant, api, shape, tokens_BxT1, config.seed)
        for variant, api in tqdm(entries, desc="compiling", unit="step")
    }
    seconds = _timed(contestants, config.rounds, "train steps")
    count = config.batch * config.tokens
    return {
        "linears": len(shape.linears),
        "steps": [
            _step_row(contestant, seconds, deviation(contestant, shape, count))
            for contestant in contestants.values()
        ],
        "rivals": [
            {"api": api, "ours": ours, "peer": peer}
            | paired_ratio(seconds[api, ours], seconds[api, peer])
            for ours, peer in RIVALS
            for api in APIS
            if (api, peer) in seconds
        ],
    }


def _step_row(contestant: Contestant, seconds: dict, deviates: str) -> dict:
    variant, api = contestant.variant, contestant.api
    own, baseline = seconds[api, variant.name], seconds[api, BASELINE]
    return {
        "api": api,
        "variant": variant.name,
        "library": variant.library,
        "scales": variant.scales,
        "products": contestant.products,
        "deviation": deviates,
        **paired_ratio(own, baseline),
        "temporaries": contestant.temporaries,
        "arguments": contestant.arguments,
        "loss": contestant.loss if math.isfinite(contestant.loss) else None,
        "seconds": own,
    }


# ---------------------------------------------------------------------------------------------------
# fake_quant against one pass over the matrix


def _measure_passes(config: Config) -> list[dict]:
    """`fake_quant` per channel along either axis, and x · c; each writes a new array."""
    x = jax.random.normal(jax.random.key(config.seed), (config.matrix, config.matrix))
    quantizer = jq.Quantizer(jq.INT8, "channel")
    programs = {
        _PASS: jax.jit(lambda x, c: x * c),
        "fake_quant, axis 0": jax.jit(lambda x, c: jq.fake_quant(x, quantizer, 0)),
        "fake_quant, axis 1": jax.jit(lambda x, c: jq.fake_quant(x, quantizer, 1)),
    }
    runs: dict[str, Callable[[], None]] = {
        name: functools.partial(_run_pass, program, x, jnp.float32(1.5))
        for name, program in programs.items()
    }
    seconds = _timed(runs, config.rounds, "fake_quant")
    return [
        {"program": name} | paired_ratio(own, seconds[_PASS]) | {"seconds": own}
        for name, own in seconds.items()
    ]


def _run_pass(program: Callable[..., jax.Array], x: jax.Array, c: jax.Array) -> None:
    program(x, c).block_until_ready()
