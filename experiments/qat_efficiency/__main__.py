"""The binary: python -m experiments.qat_efficiency."""

from experiments.qat_efficiency import STUDY

if __name__ == "__main__":
    STUDY.main()
