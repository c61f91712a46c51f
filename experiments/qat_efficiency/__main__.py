"""The binary: python -m experiments.qat_efficiency."""

from pathlib import Path

from absl import flags

from experiments.harness import cli
from experiments.qat_efficiency import PRESETS, Config, run, to_text
from experiments.qat_efficiency.study import STUDY


def main(config: Config) -> None:
    values = flags.FLAGS
    workdir = values.workdir or f"runs/{STUDY}/{values.preset}"
    summary = run(
        config,
        workdir,
        workers=values.workers,
        shard=cli.parse_shard(values.shard),
        keep_checkpoints=values.keep_checkpoints,
    )
    print(to_text(summary))
    print(f"report: {Path(workdir) / 'report.html'}")


if __name__ == "__main__":
    cli.define_study_flags(STUDY)
    cli.main(main, PRESETS, default="laptop")
