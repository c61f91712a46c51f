"""A training run: its settings, model, loss, optimizer and schedule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import cli
from experiments.harness.running.cli import option
from experiments.harness.training import arms, delaying, sharding, train
from experiments.harness.training.divergence import DivergencePolicy
from jaxquant.operations.delaying import Scales, is_delayed

_MOST_TOKENS = 2**31 - 1  # of a step


@dataclasses.dataclass
class Config:
    """One run."""

    size: str = option("83k", "of the model by N, of harness/models/lm.py")
    kv_heads: int = option(0, "heads of keys and values; 0: as many as heads")
    scan: bool = option(False, "one program for all blocks: deep models compile sooner")
    remat: bool = option(False, "blocks computed again in the backward pass: less memory")
    recipe: str = option("", "of the blocks' linears, as int8_train; empty: float")
    state: str = option("fp32", "of the optimizer: fp32, fixed-5, felt-5.0 ...")
    interval: int = option(100, "steps between decisions of a state whose widths adapt")
    state_shards: tuple[int, ...] = option(
        (), "of the state's pages, along fsdp and tensor; (): the mesh's"
    )
    steps: int = option(2000, "training steps")
    schedule: str = option("wsd", "of the learning rate: wsd or cosine")
    seed: int = option(0, "of initialization and data order")
    data: str = option("sotu", "sotu, text, tokens, generated, arrayrecord or huggingface")
    data_path: str = option("", "where text or tokens lie")
    data_field: str = option("", "of documents, where they have several")
    tokenizer: str = option("", "of text: a tokenizer.json, or a name on a hub; empty: bytes")
    vocab_size: int = option(0, "of the model; 0: the corpus's")
    shift_path: str = option("", "text of another kind, to evaluate on")
    sequence: int = option(128, "tokens of a window")
    batch: int = option(16, "windows of a step")
    peak_lr: float = option(4e-3, "the highest learning rate")
    weight_decay: float = option(0.1, "of AdamW")
    clip: float = option(1.0, "the largest norm of the gradient")
    dtype: str = option("float32", "that models compute in: float32 or bfloat16")
    params_dtype: str = option(
        "float32",
        "of the parameters: float32, or bfloat16 whose updates are rounded stochastically",
    )
    evaluation_windows: int = option(128, "windows of text that are evaluated")
    on_spike: str = option(
        "stop", "stop, skip or roll_back, where a loss or gradient is not finite, or spikes"
    )
    spike: float = option(0.0, "a loss so many times the usual one is a spike; 0: none is")
    roll_back_steps: int = option(1, "steps to go back, at least; to a checkpoint")
    log_every: int = option(20, "steps between records of the loss")
    checkpoint_every: int = option(500, "steps between saves, at most")
    monitor_every: int = option(0, "steps between records of what the quantizers do; 0: none")
    mesh_data: int = option(1, "devices along the batch; -1: all that are left")
    mesh_fsdp: int = option(
        -1, "devices that weights and batch are sharded over; -1: all that are left"
    )
    mesh_tensor: int = option(1, "devices that products are sharded over")


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
    """Returns a schedule with 10 % warm-up: cosine to a tenth of the peak, or stable with 10 % cooldown."""
    warmup = max(1, config.steps // 10)
    if config.schedule == "cosine":
        return train.cosine(config.peak_lr, config.steps, warmup)
    if config.schedule == "wsd":
        return train.cooldown(config.peak_lr, warmup, config.steps - warmup, config.steps)
    raise ValueError(f"config.schedule is 'wsd' or 'cosine'; got {config.schedule!r}")


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, its loss and its optimizer.

    Attributes:
        model: its shape.
        init: seed -> parameters.
        loss: (params, tokens) -> scalar, activations spread over the mesh.
        evaluate: the same, wherever they lie.
        tx: the optimizer.
        apply: (params, updates, step) -> params.
        monitor: (params, tokens) -> what `jaxquant.nnx.monitor` gives, compiled; None where nothing is
            quantized.
    """

    model: lm.LMConfig
    init: Callable[[int], Any]
    loss: train.Loss
    evaluate: train.Loss
    tx: Any
    apply: train.Apply = train.to_nearest
    monitor: Callable[..., Any] | None = None


def make_program(config: Config, mesh: Mesh, vocab_size: int) -> Program:
    """Returns the model, its loss and its optimizer, as they lie on a mesh.

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
    tx = train.adamw(0.9, 0.95, config.weight_decay, config.clip, moments)
    dtype, apply = jnp.dtype(config.params_dtype), train.to_nearest
    if dtype == jnp.bfloat16:
        tx = jq.optim.in_float32(tx)
        apply = functools.partial(jq.optim.stochastic_apply, seed=config.seed)
    if config.recipe and is_delayed(jq.recipe(config.recipe)):
        tx, apply = delaying.weights_alone(tx), delaying.carrying_scales(apply)

    def init(seed: int) -> Any:
        state = nnx.state(make(seed), (nnx.Param, jq.nnx.DelayedScales))
        return jax.tree.map(
            lambda x: x if isinstance(x, Scales) else x.astype(dtype),
            state,
            is_leaf=lambda x: isinstance(x, Scales),
        )

    return Program(
        shape,
        init,
        train.next_token_loss(graphdef, mesh),
        train.next_token_loss(graphdef),
        tx,
        apply,
        _monitor(graphdef, mesh) if config.recipe else None,
    )


def _monitor(graphdef: nnx.GraphDef, mesh: Mesh) -> Callable[..., Any]:
    """Returns a compiled monitor of the loss, whose statistics every process has."""
    loss = functools.partial(
        train.next_token_loss_of, by_rows=functools.partial(sharding.rows, mesh=mesh)
    )
    statistics = jq.nnx.monitor(lambda model, tokens: loss(model, tokens))

    def monitor(params: Any, tokens: Any) -> Any:
        with sharding.use_mesh(mesh):
            return statistics(nnx.merge(graphdef, params), tokens)

    return jax.jit(monitor, out_shardings=NamedSharding(mesh, PartitionSpec()))


def make_divergence_policy(config: Config) -> DivergencePolicy:
    """Returns the run's policy for spikes and for losses that are not finite."""
    return DivergencePolicy(config.on_spike, config.spike or math.inf, config.roll_back_steps)


def load_corpus(config: Config) -> data.Corpus:
    """Returns the run's corpus."""
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
    if config.params_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"config.params_dtype is 'float32' or 'bfloat16'; got {config.params_dtype!r}"
        )
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
    make_divergence_policy(config)
    make_schedule(config)
