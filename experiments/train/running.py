"""A run: from a corpus and its newest checkpoint to its losses."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from experiments.harness import data
from experiments.harness.running import files, processes, stopping
from experiments.harness.running.checkpoints import Checkpoints
from experiments.harness.training import sharding, throughput, train
from experiments.train import run_identity
from experiments.train.monitoring import Monitor
from experiments.train.program import (
    Config,
    Program,
    check,
    load_corpus,
    make_divergence_policy,
    make_program,
    make_schedule,
)
from experiments.train.watching import Watch, Watching

_NOTHING = Watching()


def run(config: Config, workdir: str | Path, watching: Watching = _NOTHING) -> dict:
    """Trains, going on from a checkpoint where there is one, and evaluates.

    Args:
        config: the run.
        workdir: its folder.
        watching: what to look at meanwhile.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError: bad input, or a folder that another process works in.
        Diverged: a loss that is not finite, or spikes, which the guard could not get by.
        Preempted: told to stop by SIGTERM; what there is has been saved.
        Hung: no batch came in time.
    """
    workdir = Path(workdir)
    check(config)
    watching.check(config.steps)
    mesh = sharding.make_mesh(config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    corpus = load_corpus(config)
    vocabulary = config.vocab_size or corpus.vocab_size
    if vocabulary < corpus.vocab_size:
        raise ValueError(
            f"config.vocab_size is at least the corpus's {corpus.vocab_size}; got {vocabulary}"
        )
    there = run_identity.read(workdir)
    config = dataclasses.replace(config, state_shards=run_identity.page_shards(config, mesh, there))
    program = make_program(config, mesh, vocabulary)
    batches = data.train_batches(
        corpus, config.sequence, config.batch, config.seed, sharding.share(mesh)
    )
    processes.agree("the config", json.dumps(dataclasses.asdict(config)))
    processes.agree("the data", corpus.fingerprint)
    flops = program.model.step_flops(config.batch, config.sequence)
    meter = throughput.Throughput(config.batch * config.sequence, flops, [*mesh.devices.flat])
    with _alone(workdir):
        run_identity.check_or_write(workdir, config, corpus.fingerprint)
        content = dataclasses.asdict(config)
        monitor = Monitor(program.monitor, config.monitor_every, workdir)
        parts = batches, make_schedule(config), meter, monitor
        with Watch(watching, workdir, content, *parts) as watch:
            state, history = _trained(config, workdir, program, mesh, watch)
            result = _finish(workdir, config, corpus, program, state, history)
            watch.on_end(result["loss"])
        return result


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Holds the folder for this run, whose first process does it for all.

    Raises:
        ValueError: another run holds it.
    """
    problem = None
    with contextlib.ExitStack() as held:
        if processes.is_first():
            try:
                held.enter_context(files.alone(workdir))
            except ValueError as error:
                problem = error
        if processes.any_of(problem is not None):
            raise problem or ValueError(f"process 0 could not take workdir '{workdir}'")
        yield


def _trained(
    config: Config, workdir: Path, program: Program, mesh: Mesh, watch: Watch
) -> tuple[train.TrainState, train.History]:
    """Returns (state, history) after the last step."""
    guard = make_divergence_policy(config)
    # As far back as the guard may go.
    every = train.saving_interval(config.checkpoint_every, config.log_every)
    keep = 2 + (guard.steps // every if guard.action == "roll_back" else 0)
    state = train.init_state(lambda: program.init(config.seed), program.tx, mesh)
    with (
        stopping.preemption_requested() as preemption_requested,
        Checkpoints(workdir / "checkpoints", keep, every) as checkpoints,
        tqdm(total=config.steps, unit="step", disable=not processes.is_first()) as bar,
    ):

        def on_log(steps: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(steps)
            watch.on_log(steps, loss, checkpoints.seconds)

        skips = guard.action == "skip"
        step = train.make_step(program.loss, program.tx, mesh, skips, program.apply)
        return train.fit(
            watch.step(step),
            state,
            watch.batches,
            make_schedule(config),
            config.steps,
            mesh,
            checkpoints=checkpoints,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            on_log=on_log,
            guard=guard,
            preemption_requested=preemption_requested,
        )


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
    for value in result["loss"].values():
        if not math.isfinite(value):  # the last update, which no later loss has shown
            raise train.Diverged(config.steps, value)
    if processes.is_first():
        files.write_json(workdir / "metrics.json", [{"step": s, "loss": x} for s, x in history])
        files.write_json(workdir / "result.json", result)
    return result


def _mean_loss(loss, params, windows: np.ndarray, batch: int) -> float:
    """Returns the mean over windows, a batch at a time; the last may be smaller."""
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    total = sum(float(loss(params, jnp.asarray(part))) * len(part) for part in parts)
    return total / len(windows)
