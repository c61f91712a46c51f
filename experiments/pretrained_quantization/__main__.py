"""The binary: python -m experiments.pretrained_quantization."""

from experiments.pretrained_quantization import STUDY

if __name__ == "__main__":
    STUDY.main()
