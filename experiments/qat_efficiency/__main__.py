"""The binary: python -m experiments.qat_efficiency."""

from experiments.harness.running import study_cli
from experiments.qat_efficiency import PRESETS, run, to_text
from experiments.qat_efficiency.study import STUDY

if __name__ == "__main__":
    study_cli.study_main(STUDY, PRESETS, run, to_text)
