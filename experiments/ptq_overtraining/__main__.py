"""The binary: python -m experiments.ptq_overtraining."""

from experiments.harness.running import study_cli
from experiments.ptq_overtraining import PRESETS, run, to_text
from experiments.ptq_overtraining.study import STUDY

if __name__ == "__main__":
    study_cli.study_main(STUDY, PRESETS, run, to_text)
