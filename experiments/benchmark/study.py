"""The config, the measurements, and the run of them."""

import dataclasses
import functools
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import jaxquant as jq
from experiments.benchmark import report
from experiments.benchmark.lm import VOCABULARY, Shape
from experiments.benchmark.optimizers import (
    COMPARISONS,
    EXACT,
    OURS,
    check_torch,
    make_runners,
    torch_versions,
)
from experiments.benchmark.serving import (
    DECODE,
    FORWARD,
    PAIRS,
    Service,
    logit_error,
    make_servers,
    open_service,
    service_deviation,
)
from experiments.benchmark.step import Contestant, deviation, enter
from experiments.benchmark.variants import (
    APIS,
    BASELINE,
    RIVALS,
    check_peers,
    make_variants,
    versions,
)
from experiments.harness.reporting import provenance
from experiments.harness.running import cli, files, machine
from experiments.harness.running.timing import interleaved_timing, paired_ratio

STUDY = "benchmark"
TRAIN, SERVE, OPTIM = PARTS = ("train", "serve", "optim")
_WARM_UP = 2  # rounds before the ones that count: the first touches fresh memory
_PASS = "x · c"  # what fake_quant is held against


@dataclasses.dataclass
class Config:
    """What is measured: the step, the matrix of fake_quant, and the models that are served.

    The forward pass is that of the step's model; a decoded token is one of batch 1 through another, whose
    weights should be more than the caches hold.
    """

    layers: int = 4
    width: int = 512
    heads: int = 8
    tokens: int = 128  # per sequence
    batch: int = 16
    rounds: int = 11
    peers: bool = True  # Qwix and AQT; False leaves them out, and the report says so
    matrix: int = 4096  # fake_quant of matrix × matrix float32 values
    seed: int = 0
    parts: str = ",".join(PARTS)  # which of them, with commas
    serve_batch: int = 8  # sequences of a forward pass
    serve_rounds: int = 31
    decode_layers: int = 1
    decode_width: int = 2048
    optim_rows: int = 4096  # of the matrix that is one parameter
    optim_columns: int = 2048
    optim_rounds: int = 21
    torch_peers: bool = False  # torchao and bitsandbytes themselves, of the extra `peers`


QUESTION = "How long do jaxquant's steps take beside those of its peers?"

PRESETS = {
    "smoke": Config(
        layers=1,
        width=64,
        heads=4,
        tokens=32,
        batch=2,
        rounds=2,
        matrix=256,
        serve_batch=2,
        serve_rounds=2,
        decode_width=128,
        optim_rows=128,
        optim_columns=128,
        optim_rounds=2,
    ),
    "laptop": Config(),
    "full": Config(width=1024, heads=16, rounds=31, serve_rounds=101, decode_layers=4),
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
    cli.check_positive(config, "serve_batch", "serve_rounds", "decode_layers", "decode_width")
    parts = _parts(config.parts)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is 0 to 2**32 − 1; got {config.seed}")
    shape = Shape(config.layers, config.width, config.heads)
    decoder = Shape(config.decode_layers, config.decode_width, config.heads)
    cli.check_positive(config, "optim_rows", "optim_columns", "optim_rounds")
    uses_peers = config.peers and bool(parts & {TRAIN, SERVE})
    uses_torch = config.torch_peers and OPTIM in parts
    if uses_peers:
        check_peers()
    if uses_torch:
        check_torch()
    workdir = Path(workdir)
    _claim(workdir)
    result = {
        "study": STUDY,
        "config": vars(config).copy(),
        "machine": _machine(),
        "versions": versions(uses_peers) | (torch_versions() if uses_torch else {}),
        "linears": len(shape.linears),
        **(_measure_steps(config, shape) if TRAIN in parts else {"steps": [], "rivals": []}),
        "passes": _measure_passes(config) if TRAIN in parts else [],
        **_measure_serving(config, {FORWARD: shape, DECODE: decoder} if SERVE in parts else {}),
        **_measure_optimizers(config, shape, COMPARISONS if OPTIM in parts else ()),
    }
    files.write_json(workdir / "benchmark.json", result)
    command = provenance.command("benchmark", PRESETS, config)
    report.write(workdir, result, provenance.Source("benchmark", QUESTION, (), command))
    return result


def _parts(text: str) -> set[str]:
    parts = {part.strip() for part in text.split(",")}
    if not parts <= set(PARTS):
        raise ValueError(f"config.parts is one or more of {', '.join(PARTS)}; got {text!r}")
    return parts


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
    return {
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _timed(runs: dict, rounds: int, what: str) -> dict:
    """Times the runs, after a warm-up of each, with one progress bar."""
    with tqdm(total=_WARM_UP + rounds, desc=what, unit="round") as bar:
        interleaved_timing(runs, _WARM_UP, on_round=bar.update)
        return interleaved_timing(runs, rounds, on_round=bar.update)


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


# ---------------------------------------------------------------------------------------------------
# Optimizers


def _measure_optimizers(config: Config, shape: Shape, comparisons: Sequence[str]) -> dict:
    found = [_measure_comparison(config, shape, comparison) for comparison in comparisons]
    return {
        "optimizers": [row for rows, _ in found for row in rows],
        "optimizer_pairs": [pair for _, pairs in found for pair in pairs],
    }


def _measure_comparison(
    config: Config, shape: Shape, comparison: str
) -> tuple[list[dict], list[dict]]:
    matrix = config.optim_rows, config.optim_columns
    runners = {r.name: r for r in make_runners(comparison, shape, matrix, config.torch_peers)}
    seconds = _timed(runners, config.optim_rounds, f"optimizers, {comparison}")
    rows = [
        {"contest": comparison, "variant": name, "bytes": r.nbytes, "elements": r.elements}
        | paired_ratio(seconds[name], seconds[EXACT])
        | {"seconds": seconds[name]}
        for name, r in runners.items()
    ]
    pairs = [
        {"contest": comparison, "ours": OURS, "other": name}
        | paired_ratio(seconds[OURS], seconds[name])
        for name in runners
        if name != OURS
    ]
    return rows, pairs


# ---------------------------------------------------------------------------------------------------
# Serving


def _measure_serving(config: Config, shapes: dict[str, Shape]) -> dict:
    found = [_measure_part(config, part, shape) for part, shape in shapes.items()]
    return {
        "serving": [row for rows, _ in found for row in rows],
        "serving_pairs": [pair for _, pairs in found for pair in pairs],
    }


def _measure_part(config: Config, part: str, shape: Shape) -> tuple[list[dict], list[dict]]:
    rng = np.random.default_rng(config.seed)
    size = (1, 1) if part == DECODE else (config.serve_batch, config.tokens)
    tokens_BxT = jnp.asarray(rng.integers(0, VOCABULARY, size), jnp.int32)
    servers = make_servers(part, config.peers)
    services = {
        server.name: open_service(server, shape, tokens_BxT, config.seed)
        for server in tqdm(servers, desc=f"compiling, {part}", unit="model")
    }
    seconds = _timed(services, config.serve_rounds, f"serving, {part}")
    reference = services[BASELINE].logits()
    rows = [
        _service_row(part, service, seconds, reference)
        | {"deviation": service_deviation(service, shape, tokens_BxT.size)}
        for service in services.values()
    ]
    pairs = [
        {"part": part, "ours": ours, "other": other} | paired_ratio(seconds[ours], seconds[other])
        for where, ours, other in PAIRS
        if where == part and {ours, other} <= seconds.keys()
    ]
    return rows, pairs


def _service_row(part: str, service: Service, seconds: dict, reference: jax.Array) -> dict:
    name = service.server.name
    error = logit_error(service.logits(), reference)
    return {
        "part": part,
        "variant": name,
        "library": service.server.library,
        "scales": service.server.scales,
        "products": service.products,
        **paired_ratio(seconds[name], seconds[BASELINE]),
        "error": error if math.isfinite(error) else None,
        "temporaries": service.temporaries,
        "arguments": service.arguments,
        "seconds": seconds[name],
    }
