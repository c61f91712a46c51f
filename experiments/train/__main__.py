"""The binary: python -m experiments.train."""

from pathlib import Path

from absl import flags

from experiments.harness import cli, files, processes
from experiments.train import PRESETS, Config, ahead, run
from experiments.train.ahead_table import to_text

FLAGS = flags.FLAGS


def main(config: Config) -> None:
    if FLAGS.compile_only:
        _compile(config)
        return
    if FLAGS.topology:
        raise ValueError("--topology is for --compile_only; a run takes the devices that there are")
    if FLAGS.coordinator:
        processes.join(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    elif FLAGS.processes is not None or FLAGS.process is not None:
        raise ValueError("--processes and --process go with --coordinator=HOST:PORT")
    result = run(config, FLAGS.workdir or f"runs/train/{FLAGS.preset}")
    if not processes.is_first():
        return
    losses = ", ".join(f"{split} {loss:.4f}" for split, loss in result["loss"].items())
    print(f"loss in nats per token: {losses}; {result['epochs']:.2f} passes over the training text")


def _compile(config: Config) -> None:
    if not FLAGS.topology:
        raise ValueError("--compile_only needs a --topology, as v5e:16x16")
    record = ahead.compiled(config, FLAGS.topology)
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
        "topology", None, "TPUs to compile for, as v5e:16x16, v5p:4x4x4 or v6e:4x4."
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Several processes: HOST:PORT of the first, or auto on TPU pods, SLURM, Open MPI and GKE.",
    )
    flags.DEFINE_integer("processes", None, "How many there are, with --coordinator=HOST:PORT.")
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
    cli.main(main, PRESETS, default="laptop")
