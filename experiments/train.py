"""One training run at any scale: a language model, a corpus, a schedule, a mesh.

    python -m experiments.train --preset=laptop --workdir=runs/train
    python -m experiments.train --config.size=83k --config.mesh_data=2 --config.mesh_fsdp=4

Writes ``metrics.json`` (the loss curve) and ``result.json`` (loss on each evaluation split) beside the
checkpoints; stopped at any point, the same command goes on, on the same mesh or another.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

import jaxquant as jq
from experiments.harness import cli, data, files, models, sharding, train
from experiments.harness.checkpoints import Checkpoints
from experiments.optimizer_states import arms

# What may differ between a run and the run that goes on from its checkpoint.
_LAYOUT_FIELDS = ("mesh_data", "mesh_fsdp", "mesh_tensor", "checkpoint_every")


@dataclasses.dataclass
class Config:
    """One run."""

    size: str = "83k"  # of harness/models.py, by N
    kv_heads: int = 0  # grouped-query attention; 0: as many as heads
    scan: bool = False  # one program for all blocks: deep models compile sooner
    remat: bool = False  # blocks computed again in the backward pass: less memory
    recipe: str = ""  # of the blocks' linears, as "int8_train"; "": float
    state: str = "fp32"  # of the optimizer, as "fixed-5" or "felt-5.0"
    interval: int = 100  # steps between decisions of a state whose widths adapt
    state_shards: tuple[
        int, ...
    ] = ()  # of the state's pages, along fsdp and tensor; (): the mesh's
    steps: int = 2000
    schedule: str = "wsd"  # wsd, cosine
    seed: int = 0
    data: str = "sotu"  # sotu, text, tokens, generated
    data_path: str = ""
    shift_path: str = ""
    sequence: int = 128
    batch: int = 16
    peak_lr: float = 4e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    evaluation_windows: int = 128
    log_every: int = 20
    checkpoint_every: int = 500
    mesh_data: int = 1
    mesh_fsdp: int = -1
    mesh_tensor: int = 1


PRESETS = {
    "smoke": Config(size="3k", steps=60, sequence=64, evaluation_windows=8, checkpoint_every=20),
    "laptop": Config(),
    "tpu": Config(
        size="113m",
        steps=20_000,
        data="tokens",
        sequence=1024,
        batch=256,
        peak_lr=1e-3,
        dtype="bfloat16",
        checkpoint_every=1000,
    ),
}


def make_schedule(config: Config) -> train.Schedule:
    """Ten per cent warm-up; cosine to a tenth of the peak, or a stable phase and ten per cent cooldown."""
    warmup = max(1, config.steps // 10)
    if config.schedule == "cosine":
        return train.cosine(config.peak_lr, config.steps, warmup)
    if config.schedule == "wsd":
        return train.cooldown(config.peak_lr, warmup, config.steps - warmup, config.steps)
    raise ValueError(f"config.schedule is 'wsd' or 'cosine'; got {config.schedule!r}")


def _claim(workdir: Path, config: Config) -> None:
    """Marks the folder as this run's, or finds that it is.

    Raises:
        ValueError: it cannot be written, or holds another run.
    """
    own = {k: v for k, v in vars(config).items() if k not in _LAYOUT_FIELDS}
    content = {k: [*v] if isinstance(v, tuple) else v for k, v in own.items()}  # as JSON has it
    try:
        found = files.read_json(workdir / "config.json")
        if not isinstance(found, dict) and any((workdir / "checkpoints").glob("[0-9]*")):
            raise ValueError(
                f"workdir '{workdir}' holds checkpoints, but no whole config.json saying of which run; "
                "choose another --workdir"
            )
        if found is None and (workdir / "study.json").exists():
            raise ValueError(
                f"workdir '{workdir}' holds a study's records; choose another --workdir"
            )
        files.write_json(workdir / "config.json", found if isinstance(found, dict) else content)
    except OSError as error:
        raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None
    there = found if isinstance(found, dict) else content
    changed = ", ".join(
        f"{k} {there.get(k)!r} there, {v!r} here" for k, v in content.items() if there.get(k) != v
    )
    if changed:
        raise ValueError(
            f"workdir '{workdir}' holds another run ({changed}); choose another --workdir"
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """What is trained, and how.

    Attributes:
        model: its shape.
        init: seed -> parameters.
        loss: (params, tokens) -> scalar, activations spread over the mesh.
        evaluate: the same, wherever they lie.
        tx: the optimizer.
    """

    model: models.LMConfig
    init: Callable[[int], Any]
    loss: train.Loss
    evaluate: train.Loss
    tx: Any


def make_program(config: Config, mesh: Mesh, vocab_size: int) -> Program:
    """The model, its loss and its optimizer, as they lie on a mesh.

    Raises:
        ValueError: a recipe or a state that there is not; a batch or a model that the mesh does not divide.
    """
    if config.batch % sharding.batch_size(mesh):
        raise ValueError(
            f"config.batch {config.batch} does not divide over {sharding.batch_size(mesh)} devices"
        )
    shape = models.sized(
        config.size,
        vocab_size=vocab_size,
        dtype=config.dtype,
        scan=config.scan,
        remat=config.remat,
    )
    shape = dataclasses.replace(shape, kv_heads=config.kv_heads or shape.heads)
    if shape.kv_heads % config.mesh_tensor:
        raise ValueError(
            f"config.mesh_tensor {config.mesh_tensor} does not divide {shape.kv_heads} heads of keys and "
            f"values, as {config.size} has"
        )

    def make(seed: int) -> nnx.Module:
        model = models.LM(shape, nnx.Rngs(seed))
        return jq.nnx.quantize(model, {"blocks/.*": config.recipe}) if config.recipe else model

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
    layout = sharding.of_pages(mesh, config.state_shards)
    moments = arms.moments(config.state, config.interval, **layout)
    return Program(
        shape,
        lambda seed: nnx.state(make(seed), nnx.Param),
        train.next_token_loss(graphdef, mesh),
        train.next_token_loss(graphdef),
        train.adamw(0.9, 0.95, config.weight_decay, config.clip, moments),
    )


def check(config: Config) -> None:
    """Raises a ValueError for a field that no run could use."""
    cli.check_positive(
        config, "steps", "sequence", "batch", "evaluation_windows", "peak_lr", "clip"
    )
    cli.check_positive(config, "log_every", "checkpoint_every", "interval", "mesh_tensor")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is 0 to 2**32 − 1; got {config.seed}")
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(f"config.weight_decay is a number from 0; got {config.weight_decay}")
    if len(config.state_shards) not in (0, 2) or any(n < 1 for n in config.state_shards):
        raise ValueError(
            "config.state_shards is a number above 0 for each of fsdp and tensor, or empty; got "
            f"{config.state_shards}"
        )
    make_schedule(config)


def run(config: Config, workdir: str | Path) -> dict:
    """Trains, going on from a checkpoint where there is one, and evaluates.

    Args:
        config: the run.
        workdir: its folder.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError: bad input.
        Diverged: a loss that is not finite.
    """
    workdir = Path(workdir)
    check(config)
    mesh = sharding.make_mesh(config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    corpus = data.load(config.data, config.data_path, config.shift_path)
    program = make_program(config, mesh, corpus.vocab_size)
    batches = data.train_batches(
        corpus, config.sequence, config.batch, config.seed, jax.process_index(), jax.process_count()
    )
    _claim(workdir, config)
    state = train.init_state(lambda: program.init(config.seed), program.tx, mesh)
    with (
        Checkpoints(workdir / "checkpoints") as checkpoints,
        tqdm(total=config.steps, unit="step") as bar,
    ):

        def on_log(steps: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(steps)

        state, history = train.fit(
            train.make_step(program.loss, program.tx, mesh),
            state,
            batches,
            make_schedule(config),
            config.steps,
            mesh,
            checkpoints=checkpoints,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            on_log=on_log,
        )
    return _finish(workdir, config, corpus, program, state, history)


def _finish(workdir, config, corpus, program, state, history) -> dict:
    loss, model = jax.jit(program.evaluate), program.model
    evaluate = functools.partial(
        data.evaluation_windows, corpus, length=config.sequence, count=config.evaluation_windows
    )
    tokens = config.steps * config.batch * config.sequence
    result = {
        "parameters": model.non_embedding_parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / model.non_embedding_parameters,
        "epochs": corpus.epochs(tokens),
        "loss": {
            split: _mean_loss(loss, state.params, evaluate(split=split), config.batch)
            for split in corpus.evaluation
        },
    }
    files.write_json(workdir / "metrics.json", [{"step": s, "loss": x} for s, x in history])
    files.write_json(workdir / "result.json", result)
    return result


def _mean_loss(loss, params, windows: np.ndarray, batch: int) -> float:
    """The mean over windows, a batch at a time; the last may be smaller."""
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    total = sum(float(loss(params, jnp.asarray(part))) * len(part) for part in parts)
    return total / len(windows)


def main(config: Config) -> None:
    workdir = flags.FLAGS.workdir or f"runs/train/{flags.FLAGS.preset}"
    result = run(config, workdir)
    losses = ", ".join(f"{split} {loss:.4f}" for split, loss in result["loss"].items())
    print(f"loss in nats per token: {losses}; {result['epochs']:.2f} passes over the training text")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/train/PRESET where not given.")
    cli.main(main, PRESETS, default="laptop")
