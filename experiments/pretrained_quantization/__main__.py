"""The binary: python -m experiments.pretrained_quantization."""

from experiments.harness.running import study_cli
from experiments.pretrained_quantization import PRESETS, run, to_text
from experiments.pretrained_quantization.study import STUDY

if __name__ == "__main__":
    study_cli.study_main(STUDY, PRESETS, run, to_text)
