"""The binary: python -m experiments.benchmark."""

from pathlib import Path

from absl import flags

from experiments.benchmark import PRESETS, Config, run, to_text
from experiments.benchmark.study import STUDY
from experiments.harness.running import cli


def main(config: Config) -> None:
    workdir = flags.FLAGS.workdir or f"runs/{STUDY}/{flags.FLAGS.preset}"
    try:
        result = run(config, workdir)
    except KeyboardInterrupt:
        # Rounds before and after a pause cannot be compared, so there is nothing to go on from.
        raise RuntimeError("stopped; nothing is kept, the same command starts anew") from None
    print(to_text(result))
    print(f"report: {Path(workdir) / 'report.html'}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, f"Folder of results and report; runs/{STUDY}/PRESET where not given."
    )
    cli.main(main, PRESETS, default="laptop")
