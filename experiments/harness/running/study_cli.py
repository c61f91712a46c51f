"""The door of every study of trials: where they run, by flags."""

from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from experiments.harness.running import cli, ray_launcher
from experiments.harness.running.trials import Launch

FLAGS = flags.FLAGS


def study_main(
    study: str, presets: Mapping[str, Any], run: Callable[..., dict], to_text: Callable[[dict], str]
) -> None:
    """The binary of a study of trials: its flags, its run, and its finding on the terminal.

    Args:
        study: its name, of flags and folders.
        presets: config dataclasses by name.
        run: from (config, workdir, where trials run) to the summary.
        to_text: the summary in words.
    """
    define_study_flags(study)

    def run_and_say(config: Any) -> None:
        workdir = FLAGS.workdir or f"runs/{study}/{FLAGS.preset}"
        print(to_text(run(config, workdir, _launch())))
        print(f"report: {str(workdir).rstrip('/')}/report.html")

    cli.main(run_and_say, presets, default="laptop")


def _launch() -> Launch:
    cluster = None
    if FLAGS.launcher == "ray":
        if FLAGS.workers is not None:
            raise ValueError(
                "--workers are of this machine; with --launcher=ray see --ray_resources"
            )
        resources = ray_launcher.parse_resources(FLAGS.ray_resources)
        cluster = ray_launcher.Ray(FLAGS.ray_address, resources, FLAGS.ray_retries)
    shard = parse_shard(FLAGS.shard)
    return Launch(FLAGS.workers, shard, FLAGS.keep_checkpoints, cluster)


def define_study_flags(study: str) -> None:
    """The flags that every study has."""
    flags.DEFINE_string(
        "workdir", None, f"Folder of records and report; runs/{study}/PRESET where not given."
    )
    flags.DEFINE_integer(
        "workers", None, "Processes on this machine; the config's where not given."
    )
    flags.DEFINE_string(
        "shard", "0/1", "i/n: run every n-th trial from the i-th, as one of n jobs."
    )
    flags.DEFINE_enum(
        "launcher", "local", ["local", "ray"], "Where trials run: this machine, or a Ray cluster."
    )
    flags.DEFINE_string("ray_address", "auto", "Of the cluster; local makes one on this machine.")
    flags.DEFINE_string("ray_resources", "num_cpus=1", "Of a trial, as num_cpus=8,TPU=4.")
    flags.DEFINE_integer("ray_retries", 3, "Of a trial whose machine was lost.", lower_bound=0)
    flags.DEFINE_bool("keep_checkpoints", False, "Keep scratch folders of finished trials.")


def parse_shard(text: str) -> tuple[int, int]:
    """i/n as numbers.

    Raises:
        ValueError: anything else, or i not below n.

    >>> parse_shard("2/8")
    (2, 8)
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard is i/n with 0 ≤ i < n, as in 0/4; got {text!r}")
    return int(index), int(count)
