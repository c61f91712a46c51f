"""The binary: python -m experiments.device_check."""

from collections import Counter

from absl import flags

from experiments import device_check
from experiments.device_check import PRESETS, Config
from experiments.device_check.running import problems
from experiments.harness.running import cli


def main(config: Config) -> None:
    lines = device_check.run(
        config, flags.FLAGS.workdir or f"runs/device_check/{flags.FLAGS.preset}"
    )
    counts = Counter(line["status"] for line in lines)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    failed = problems(lines)
    if failed:
        raise RuntimeError("; ".join(failed))


if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, "Folder of results; runs/device_check/PRESET where not given."
    )
    cli.main(main, PRESETS, default="full", about=device_check.__doc__)
