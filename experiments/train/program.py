"""What one run trains: its settings, model, loss, optimizer and schedule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import cli
from experiments.harness.training import arms, sharding, train
from experiments.harness.training.guarding import Guard

_MOST_TOKENS = 2**31 - 1  # of a step


@dataclasses.dataclass
class Config:
    """One run."""

    size: str = "83k"  # of harness/models.py, by N
    kv_heads: int = 0  # grouped-query attention; 0: as many as heads
    scan: bool = False  # one program for all blocks: deep models compile sooner
    remat: bool = False  # blocks computed again in the backward pass: less memory
    recipe: str = ""  # of the blocks' linears, as "int8_train"; "": float
    state: str = "fp32"  # of the optimizer, as "fixed-5" or "felt-5.0"
    interval: int = 100  # steps between decisions of a state whose widths adapt
    # Of the state's pages, along fsdp and tensor; (): the mesh's.
    state_shards: tuple[int, ...] = ()
    steps: int = 2000
    schedule: str = "wsd"  # wsd, cosine
    seed: int = 0
    data: str = "sotu"  # sotu, text, tokens, generated, arrayrecord, huggingface
    data_path: str = ""
    data_field: str = ""  # of documents, where they have several
    tokenizer: str = ""  # of text: a tokenizer.json, or a name on a hub; "": bytes
    vocab_size: int = 0  # of the model: at least the corpus's, which it is for 0
    shift_path: str = ""
    sequence: int = 128
    batch: int = 16
    peak_lr: float = 4e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    evaluation_windows: int = 128
    on_spike: str = (
        "stop"  # stop, skip, roll_back: where a loss or gradient is not finite, or spikes
    )
    spike: float = 0.0  # a loss so many times the usual one is a spike; 0: none is
    roll_back_steps: int = 1  # at least; to a checkpoint
    log_every: int = 20
    checkpoint_every: int = 500
    monitor_every: int = 0  # steps between records of what the quantizers do; 0: none
    mesh_data: int = 1
    mesh_fsdp: int = -1
    mesh_tensor: int = 1


PRESETS = {
    "smoke": Config(size="3k", steps=60, sequence=64, evaluation_windows=8, checkpoint_every=20),
    "laptop": Config(),
    "tpu": Config(
        size="113m",
        steps=20_000,
        data="tokens",
        vocab_size=50_304,
        sequence=1024,
        batch=256,
        peak_lr=1e-3,
        dtype="bfloat16",
        checkpoint_every=1000,
    ),
    # Kumar's largest, quantized throughout, for a pod.
    "pod": Config(
        size="1.7b",
        scan=True,
        remat=True,
        recipe="int8_train",
        state="even-5.0",
        steps=100_000,
        data="tokens",
        vocab_size=50_304,
        sequence=2048,
        batch=256,
        peak_lr=3e-4,
        dtype="bfloat16",
        checkpoint_every=500,
    ),
}


def make_schedule(config: Config) -> train.Schedule:
    """Ten per cent warm-up; cosine to a tenth of the peak, or a stable phase and ten per cent cooldown."""
    warmup = max(1, config.steps // 10)
    if config.schedule == "cosine":
        return train.cosine(config.peak_lr, config.steps, warmup)
    if config.schedule == "wsd":
        return train.cooldown(config.peak_lr, warmup, config.steps - warmup, config.steps)
    raise ValueError(f"config.schedule is 'wsd' or 'cosine'; got {config.schedule!r}")


@dataclasses.dataclass(frozen=True)
class Program:
    """What is trained, and how.

    Attributes:
        model: its shape.
        init: seed -> parameters.
        loss: (params, tokens) -> scalar, activations spread over the mesh.
        evaluate: the same, wherever they lie.
        tx: the optimizer.
        monitor: (params, tokens) -> what `jaxquant.nnx.monitor` gives, compiled; None where nothing is
            quantized.
    """

    model: lm.LMConfig
    init: Callable[[int], Any]
    loss: train.Loss
    evaluate: train.Loss
    tx: Any
    monitor: Callable[..., Any] | None = None


def make_program(config: Config, mesh: Mesh, vocab_size: int) -> Program:
    """The model, its loss and its optimizer, as they lie on a mesh.

    Raises:
        ValueError: a recipe or a state that there is not; a batch or a model that the mesh does not divide.
    """
    if config.batch % sharding.batch_size(mesh):
        raise ValueError(
            f"config.batch {config.batch} does not divide over {sharding.batch_size(mesh)} devices"
        )
    shape = lm.sized(
        config.size,
        vocab_size=vocab_size,
        dtype=config.dtype,
        scan=config.scan,
        remat=config.remat,
    )
    shape = dataclasses.replace(shape, kv_heads=config.kv_heads or shape.heads)
    if shape.kv_heads % config.mesh_tensor:
        raise ValueError(
            f"config.mesh_tensor {config.mesh_tensor} does not divide {shape.kv_heads} heads of keys and "
            f"values, as {config.size} has"
        )

    def make(seed: int) -> nnx.Module:
        model = lm.LM(shape, nnx.Rngs(seed))
        return jq.nnx.quantize(model, {"blocks/.*": config.recipe}) if config.recipe else model

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
    layout = sharding.of_pages(mesh, config.state_shards)
    moments = arms.moments(config.state, config.interval, **layout)
    return Program(
        shape,
        lambda seed: nnx.state(make(seed), nnx.Param),
        train.next_token_loss(graphdef, mesh),
        train.next_token_loss(graphdef),
        train.adamw(0.9, 0.95, config.weight_decay, config.clip, moments),
        _monitor(graphdef, mesh) if config.recipe else None,
    )


def _monitor(graphdef: nnx.GraphDef, mesh: Mesh) -> Callable[..., Any]:
    """A compiled monitor of the loss, whose statistics every process has."""
    loss = functools.partial(
        train.next_token_loss_of, by_rows=functools.partial(sharding.rows, mesh=mesh)
    )
    statistics = jq.nnx.monitor(lambda model, tokens: loss(model, tokens))

    def monitor(params: Any, tokens: Any) -> Any:
        with sharding.known(mesh):
            return statistics(nnx.merge(graphdef, params), tokens)

    return jax.jit(monitor, out_shardings=NamedSharding(mesh, PartitionSpec()))


def make_guard(config: Config) -> Guard:
    """What the run does about losses that are not finite, and spikes."""
    return Guard(config.on_spike, config.spike or math.inf, config.roll_back_steps)


def load_corpus(config: Config) -> data.Corpus:
    """What the run reads."""
    return data.load_any(
        config.data,
        config.data_path,
        config.shift_path,
        config.tokenizer,
        config.data_field,
        config.vocab_size,
    )


def check(config: Config) -> None:
    """Raises a ValueError for a field that no run could use."""
    cli.check_positive(
        config, "steps", "sequence", "batch", "evaluation_windows", "peak_lr", "clip"
    )
    cli.check_positive(config, "log_every", "checkpoint_every", "interval", "mesh_tensor")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is 0 to 2**32 − 1; got {config.seed}")
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(f"config.weight_decay is a number from 0; got {config.weight_decay}")
    if len(config.state_shards) not in (0, 2) or any(n < 1 for n in config.state_shards):
        raise ValueError(
            "config.state_shards is a number above 0 for each of fsdp and tensor, or empty; got "
            f"{config.state_shards}"
        )
    if config.state_shards and config.state == arms.EXACT:
        raise ValueError(
            "config.state_shards are of a state in pages, as config.state=fixed-5; full precision has none"
        )
    cli.check_positive(config, "roll_back_steps")
    if config.spike and not config.spike > 1:
        raise ValueError(f"config.spike is a factor above 1, or 0 for none; got {config.spike}")
    if not 0 <= config.vocab_size <= data.LARGEST_VOCABULARY:
        raise ValueError(
            f"config.vocab_size is a number from 0 to {data.LARGEST_VOCABULARY}; got {config.vocab_size}"
        )
    if config.batch * config.sequence > _MOST_TOKENS:
        raise ValueError(
            f"config.batch x config.sequence is at most {_MOST_TOKENS} tokens a step; got {config.batch} x "
            f"{config.sequence}"
        )
    every = config.monitor_every
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(
            f"config.monitor_every is a whole number of steps, or 0 for none; got {every}"
        )
    if every and not config.recipe:
        raise ValueError(
            f"config.monitor_every {every} needs a quantized model, as config.recipe=int8_train; in float "
            "there is nothing to monitor"
        )
    make_guard(config)
    make_schedule(config)
