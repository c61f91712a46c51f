"""The binary: python -m experiments.train."""

import re
from pathlib import Path

from absl import flags

from experiments.harness.running import cli, files, processes, stopping
from experiments.train import PRESETS, Config, Watching, aot, run
from experiments.train.aot_table import to_text

FLAGS = flags.FLAGS


def main(config: Config) -> None:
    stopping.end_to_restart()
    if FLAGS.compile_only:
        _compile(config)
        return
    if FLAGS.topology:
        raise ValueError("--topology is for --compile_only; a run takes the devices that there are")
    if FLAGS.coordinator:
        processes.join(FLAGS.coordinator, FLAGS.processes, FLAGS.process, FLAGS.join_timeout)
    elif FLAGS.processes is not None or FLAGS.process is not None:
        raise ValueError("--processes and --process go with --coordinator=HOST:PORT")
    watching = Watching(FLAGS.metrics, _steps(FLAGS.profile), FLAGS.input_timeout)
    result = run(config, FLAGS.workdir or f"runs/train/{FLAGS.preset}", watching)
    if not processes.is_first():
        return
    losses = ", ".join(f"{split} {loss:.4f}" for split, loss in result["loss"].items())
    epochs = result["epochs"]
    passes = "" if epochs is None else f"; {epochs:.2f} passes over the training text"
    print(f"loss in nats per token: {losses}{passes}")


def _steps(text: str | None) -> tuple[int, int] | None:
    """Parses "10:12" as (10, 12)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise ValueError(f"--profile is FIRST:LAST, steps from 1 on, as 10:12; got {text!r}")
    return int(found[1]), int(found[2])


def _compile(config: Config) -> None:
    if not FLAGS.topology:
        raise ValueError("--compile_only needs a --topology, as v5e:16x16")
    record = aot.compiled(config, FLAGS.topology)
    print(to_text(record))
    if FLAGS.workdir:
        name = f"compiled_{FLAGS.topology.replace(':', '_')}.json"
        files.write_json(Path(FLAGS.workdir) / name, record)
    if not record["fits"]:
        raise RuntimeError(record["advice"])


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/train/PRESET where not given.")
    flags.DEFINE_bool(
        "compile_only", False, "Compile the step for --topology and say what it takes."
    )
    flags.DEFINE_string(
        "topology",
        None,
        "What to compile for: TPUs, as v5e:16x16 or v5p:4x4x4, or GPUs, as h100:8.",
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Several processes: HOST:PORT of the first, or auto on TPU pods, SLURM, Open MPI and GKE.",
    )
    flags.DEFINE_integer("processes", None, "How many there are, with --coordinator=HOST:PORT.")
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
    flags.DEFINE_float(
        "join_timeout",
        processes.SECONDS,
        "Seconds that a process waits for the others to be there.",
    )
    flags.DEFINE_list(
        "metrics", "tensorboard", "Writers, of tensorboard and wandb; empty for none."
    )
    flags.DEFINE_string("profile", None, "FIRST:LAST of the steps to take a profile of, as 10:12.")
    flags.DEFINE_float("input_timeout", 600, "Seconds that a batch may take; 0 for any number.")
    cli.main(main, PRESETS, default="laptop")
