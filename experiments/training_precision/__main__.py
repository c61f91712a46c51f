"""The binary: python -m experiments.training_precision."""

from experiments.harness.running import study_cli
from experiments.training_precision import PRESETS, run, to_text
from experiments.training_precision.study import STUDY

if __name__ == "__main__":
    study_cli.study_main(STUDY, PRESETS, run, to_text)
