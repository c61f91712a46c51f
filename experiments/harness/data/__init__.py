"""Token sources and the Grain pipelines that read them.

A corpus has a training split and evaluation splits: ``valid`` (like the training text) and, where there
is one, ``shift`` (unlike it).  Pipelines are deterministic in the seed, their position is a small
state that can be checkpointed, and each process of a run reads its own share.
"""

from experiments.harness.data.corpus import HELD_OUT_EVERY, LARGEST_VOCABULARY, Corpus
from experiments.harness.data.loading import (
    DOCUMENTS,
    SOURCES,
    load,
    load_any,
    load_documents,
    unchanged,
)
from experiments.harness.data.markov import MarkovSource, markov_source
from experiments.harness.data.tokenizers import BYTES, SEPARATOR
from experiments.harness.data.windows import check_length, evaluation_windows, train_batches

__all__ = [
    "BYTES",
    "DOCUMENTS",
    "HELD_OUT_EVERY",
    "LARGEST_VOCABULARY",
    "SEPARATOR",
    "SOURCES",
    "Corpus",
    "MarkovSource",
    "check_length",
    "evaluation_windows",
    "load",
    "load_any",
    "load_documents",
    "markov_source",
    "train_batches",
    "unchanged",
]
