"""The binary: python -m experiments.ptq_overtraining."""

from experiments.ptq_overtraining import STUDY

if __name__ == "__main__":
    STUDY.main()
