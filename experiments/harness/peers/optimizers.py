"""AdamW with the quantized state of its peers, torchao and bitsandbytes, as optax transformations.

A step decodes both moments (`peer_codes`), lets optax's Adam update them, takes its direction from the
updated moments while they are exact, and only then encodes them: that is the order of both peers.  Their
update, where b is a bias correction 1 − βᵗ,

    −η (m / b₁) / (√v / √b₂ + ε) − η λ p

is optax's: ε is outside the root and is not scaled.

Where this is not what they do:
    bitsandbytes' CUDA kernel decays weights after the step, which differs by η λ times the step; its other
        backends, torchao and optax decay the weights that the step starts from.
    bitsandbytes' CUDA kernel divides approximately, and skips elements whose gradient is not finite.
    bitsandbytes' CPU backend rounds by a table of 65536 steps of [−1, 1], where zero becomes 1.5e-5 of the
        scale, and does not keep signs; what is followed here is the CUDA kernel.
    Moments add up in optax's order, (1 − β) g + β m, which may differ in the last bit.
    Moments of leaves that are not coded are float32; torchao's have their parameter's type.
    A leaf is eligible by its global shape; torchao asks for the shape of the device's own part.

Sources: torchao 0.18, `torchao/optim/adam.py`; bitsandbytes 0.50, `optim/optimizer.py` and `csrc/kernels.cu`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.harness.peers.codes import (
    Coded,
    Peer,
    Rounding,
    bitsandbytes,
    decode,
    eligible,
    encode,
    torchao,
    zeros,
)


def scale_by_coded_adam(
    peer: Peer, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` whose moments are a peer's codes between steps.

    Args:
        peer: `torchao(bits)` or `bitsandbytes()`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.

    Returns:
        A transformation with optax's state, where `mu` and `nu` have a `Coded` for each eligible leaf and
        float32 for the others.  Moments are computed in float32; updates are of the gradients' type.

    >>> state = scale_by_coded_adam(torchao(4)).init({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
    >>> state.mu["kernel"].codes.shape, state.mu["bias"].dtype
    ((2048,), dtype('float32'))
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        moment = lambda: jax.tree.map(lambda leaf: zeros(leaf.shape, peer), params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), moment(), moment())

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)
        mu = jax.tree.map(_decoder(peer, peer.mu), gradients, state.mu)
        nu = jax.tree.map(_decoder(peer, peer.nu), gradients, state.nu)
        steps, state = adam.update(gradients, state._replace(mu=mu, nu=nu))
        mu = jax.tree.map(_encoder(peer, peer.mu), state.mu)
        nu = jax.tree.map(_encoder(peer, peer.nu), state.nu)
        steps = jax.tree.map(lambda step, like: step.astype(like.dtype), steps, updates)
        return steps, state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _decoder(peer: Peer, rounding: Rounding) -> Callable[[jax.Array, Any], jax.Array]:
    def decoded(like: jax.Array, moment: Any) -> jax.Array:
        is_coded = isinstance(moment, Coded)
        return decode(moment, like.shape, peer, rounding) if is_coded else moment

    return decoded


def _encoder(peer: Peer, rounding: Rounding) -> Callable[[jax.Array], Any]:
    def encoded(moment: jax.Array) -> Any:
        return encode(moment, peer, rounding) if eligible(moment.shape, peer) else moment

    return encoded


def torchao_adamw(
    learning_rate: optax.ScalarOrSchedule,
    bits: int = 4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Any = None,
) -> optax.GradientTransformation:
    """torchao's `AdamW4bit` or `AdamW8bit`; defaults are its own.

    Args:
        learning_rate: a number or an optax schedule.
        bits: of both moments, 4 or 8.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate, decoupled.
        mask: which leaves decay, as `optax.adamw` takes it.

    Raises:
        ValueError: other bits.

    >>> tx = torchao_adamw(1e-3, bits=8)
    """
    return _adamw(torchao(bits), learning_rate, b1, b2, eps, weight_decay, mask)


def bitsandbytes_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Any = None,
) -> optax.GradientTransformation:
    """bitsandbytes' `AdamW8bit`; arguments and defaults as `torchao_adamw`'s.

    >>> tx = bitsandbytes_adamw(optax.linear_schedule(1e-3, 0, 100))
    """
    return _adamw(bitsandbytes(), learning_rate, b1, b2, eps, weight_decay, mask)


def _adamw(peer: Peer, learning_rate, b1, b2, eps, weight_decay, mask):
    return optax.chain(
        scale_by_coded_adam(peer, b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
