import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant import artifacts, calibration
from jaxquant.artifacts import Card, checksums, folders
from jaxquant.nnx.modules import read
from jaxquant.quality import Verdict
from jaxquant.quality.gates import Check

FIELDS = (
    "coverage",
    "rules",
    "data",
    "licence",
    "seeds",
    "quality",
    "verdict",
    "calibration",
    "notes",
)
NOTHING = dict.fromkeys(FIELDS)
FORMATS = ("safetensors", "orbax")
X = jnp.array(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
VERDICT = Verdict("fail", "99", (Check("mean KL", "fail", "Mean KL is 0.5 | too much."),))
OPERATION = jq.DotGeneral(
    jq.Operands(jq.Quantizer(jq.INT8, calibration=calibration.Range(jnp.float32(2))))
)


@functools.cache
def tree():
    dtypes = (
        "bfloat16",
        "float16",
        "int4",
        "uint4",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "bool",
    )
    return {
        "types": {name: X[0].astype(name) for name in dtypes},
        "shapes": {0: jnp.ones(()), 1: jnp.ones((0, 3)), 2: jnp.bfloat16(1.5), 3: {}},
        "not numbers": jnp.array([jnp.nan, -jnp.inf, -0.0]),
        "quantized": {
            name: jq.quantize(X, jq.Quantizer(jq.parse(name))).pack()
            for name in ("int5", "mxfp4", "nvfp4")
        },
        "unpacked": jq.quantize(X, jq.Quantizer(jq.INT4)),
        "operations": {"up": {"dot_general": OPERATION}, "7": {7: jq.recipe("w4a16")}},
    }


def bits(value) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(value)]


@pytest.mark.first(1)
@pytest.mark.parametrize("format", FORMATS)
def test_a_tree_comes_back_bit_for_bit(tmp_path, format):
    card = Card(**{**NOTHING, "data": "digits", "seeds": {"data": 3}})
    artifacts.save(tmp_path / "a" / "model", tree(), card, format=format)
    found, read_card = artifacts.load(tmp_path / "a" / "model")
    assert jax.tree.structure(found) == jax.tree.structure(tree())
    chex.assert_trees_all_equal_shapes_and_dtypes(found, tree())
    assert bits(found) == bits(tree())
    assert read_card == artifacts.load_card(tmp_path / "a" / "model")
    assert dataclasses.replace(read_card, versions=None) == card
    assert read_card.versions["jax"] == jax.__version__
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "model"]


def test_every_file_is_listed_with_its_hash(tmp_path):
    artifacts.save(tmp_path / "model", tree(), Card(**NOTHING), format="orbax")
    listed = json.loads((tmp_path / "model" / "card.json").read_text())["files"]
    there = {
        path.relative_to(tmp_path / "model").as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file() and path.name not in ("card.json", "card.md")
    }
    assert {name: entry["sha256"] for name, entry in listed.items()} == there


def small(path, format="safetensors") -> Path:
    artifacts.save(path / "model", {"w": X, "b": X[0]}, Card(**NOTHING), format=format)
    return path / "model"


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def resealed(path: Path, **changes) -> None:
    """A card whose own hash is right, as another version of this library would write it."""
    content = json.loads(path.read_text()) | changes
    kind, version = content.pop("kind"), content.pop("version")
    del content["sha256"]
    path.write_text(checksums.with_checksum(kind, version, content))


ARRAYS, CARD, TREE = "arrays.safetensors", "card.json", "tree.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flipped(f / ARRAYS, -5), "arrays.safetensors is damaged"),
        (
            lambda f: (f / ARRAYS).write_bytes((f / ARRAYS).read_bytes()[:-9]),
            "bytes; .* were written",
        ),
        (lambda f: (f / ARRAYS).unlink(), "arrays.safetensors is missing"),
        (lambda f: flipped(f / TREE, 30), "tree.json is damaged"),
        (lambda f: (f / CARD).unlink(), "card.json is missing"),
        (lambda f: (f / CARD).write_text("{"), "card.json is not whole JSON"),
        (lambda f: (f / CARD).write_text("[1]"), "card.json is not of a jaxquant artifact"),
        (lambda f: (f / CARD).write_text('{"kind": "x"}'), "card.json is not of a jaxquant"),
        (
            lambda f: (f / CARD).write_text((f / CARD).read_text().replace("null", '"mit"', 1)),
            "card.json is damaged",
        ),
        (lambda f: resealed(f / CARD, version=2), "card.json is of version 2; this is version 1"),
        (lambda f: resealed(f / CARD, format="npz"), "the format 'npz'"),
        (lambda f: resealed(f / CARD, files={}), "does not list its file tree.json"),
        (lambda f: resealed(f / CARD, files={TREE: 3}), "does not say which files it has"),
        (lambda f: resealed(f / CARD, card={"data": ""}), "card.json holds no card"),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_an_error(tmp_path, damage, message):
    folder = small(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        artifacts.load(folder)


NOWHERE = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "../../../../../../../../etc/passwd",
        "/etc/passwd",
        "/proc/self/environ",
        "arrays/../../outside",
        "..",
        ".",
        "",
        "a//b",
        "./tree.json",
        "a\0b",
    ],
)
def test_what_a_folder_lists_lies_within_it(tmp_path, name):
    folder = small(tmp_path)
    (tmp_path / "outside").write_bytes(b"")
    listed = json.loads((folder / CARD).read_text())["files"]
    resealed(folder / CARD, files={**listed, name: NOWHERE})
    with pytest.raises(ValueError, match="what it lists are names of files within it"):
        artifacts.load(folder)


def test_links_lead_nowhere_else(tmp_path):
    folder = small(tmp_path)
    (tmp_path / "outside").write_bytes(b"")
    listed = json.loads((folder / CARD).read_text())["files"]
    for name, target in {"file": "../outside", "deep": "/dev/zero"}.items():
        (folder / name).symlink_to(target)
        resealed(folder / CARD, files={**listed, name: NOWHERE})
        with pytest.raises(ValueError, match=rf"{name} is a link that leads out of .*model"):
            artifacts.load(folder)
        with pytest.raises(ValueError, match="is a link that leads out"):
            checksums.digests(folder)
        (folder / name).unlink()
    (folder / "above").symlink_to("..")  # a folder above, by a link
    resealed(folder / CARD, files={**listed, "above/outside": NOWHERE})
    with pytest.raises(ValueError, match="outside is a link that leads out"):
        artifacts.load(folder)
    (folder / "above").unlink()
    (folder / "same").symlink_to(TREE)
    resealed(folder / CARD, files={**listed, "same": listed[TREE]})
    assert set(artifacts.load(folder)[0]) == {"w", "b"}


def rewritten(folder: Path, arrays: dict) -> None:
    """Other arrays in a folder whose digests are right."""
    (folder / ARRAYS).unlink()
    folders.write_safetensors(folder / ARRAYS, arrays)
    listed = checksums.digests(folder)
    resealed(folder / CARD, files={name: listed[name] for name in (ARRAYS, TREE)})


TYPED = {"w": X, "b": X[0], "n": jnp.array([jnp.nan, 1.0]), "i": X[0].astype("int4")}
TYPED |= {"bool": X[0] > 0, "f": X[0].astype("float4_e2m1fn"), "e": X.astype("float8_e4m3fn")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"w": a["w"].T.copy()}, None),
        (lambda a: a | {"w": a["w"].reshape(-1)}, r"w is float32\[8, 64\].*; got float32\[512\]"),
        (lambda a: a | {"w": a["w"].astype(np.float64)}, r"w is float32.*; got float64"),
        (lambda a: a | {"w": a["w"].view(np.int32)}, r"w is float32.*; got int32"),
        (
            lambda a: a | {"i": a["i"][:-1]},
            r"i is int4\[64\], held as uint8\[64\]; got uint8\[63\]",
        ),
        (lambda a: a | {"i": a["i"].view(np.int8)}, r"i is int4.*; got int8"),
        (lambda a: a | {"i": a["i"] + np.uint8(64)}, "i has bytes that are no int4"),
        (lambda a: a | {"f": a["f"] | np.uint8(16)}, "f has bytes that are no float4_e2m1fn"),
        (
            lambda a: a | {"bool": np.full(64, 2, np.uint8).view(bool)},
            "bool has bytes that are no bool",
        ),
        (lambda a: a | {"b": a["b"] * np.float32("nan")}, "b has a NaN or an Inf, and had none"),
        (lambda a: a | {"b": a["b"] / np.float32(0)}, "b has a NaN or an Inf, and had none"),
        (lambda a: a | {"e": np.full(512, 0x7F, np.uint8)}, "e has a NaN or an Inf, and had none"),
        (lambda a: {k: v for k, v in a.items() if k != "w"}, "arrays that are missing: w"),
        (lambda a: a | {"other": a["b"]}, "arrays without a description: other"),
    ],
)
def test_arrays_are_held_to_what_was_written(tmp_path, change, message):
    artifacts.save(tmp_path / "model", TYPED, Card(**NOTHING))
    folder = tmp_path / "model"
    assert bits(artifacts.load(folder)[0]) == bits(TYPED)
    stored = folders.read_safetensors(folder / ARRAYS)
    with np.errstate(all="ignore"):
        changed = change(stored)
    if message is None:  # the transpose has another shape
        message = r"w is float32\[8, 64\]"
    rewritten(folder, changed)
    with pytest.raises(ValueError, match=f"does not hold what its tree describes: .*{message}"):
        artifacts.load(folder)


def test_folders_of_before_nans_were_noted_are_read(tmp_path):
    artifacts.save(tmp_path / "model", TYPED, Card(**NOTHING))
    folder = tmp_path / "model"
    index = json.loads((folder / TREE).read_text())
    assert index.pop("not_finite") == ["n"]
    (folder / TREE).write_text(json.dumps(index))
    rewritten(folder, folders.read_safetensors(folder / ARRAYS))
    assert bits(artifacts.load(folder)[0]) == bits(TYPED)


def test_orbax_does_not_cast_what_is_not_described(tmp_path):
    for name, arrays, message in (
        ("type", {"w": X.astype(jnp.int32), "b": X[0]}, r"w is float32.*; got int32"),
        ("shape", {"w": X[:4], "b": X[0]}, r"w is float32\[8, 64\].*; got float32\[4, 64\]"),
        ("missing", {"w": X}, "b is float32.*; got absent"),
        ("extra", {"w": X, "b": X[0], "c": X}, "c is absent.*; got float32"),
    ):
        (tmp_path / name).mkdir()
        folder = small(tmp_path / name, "orbax")
        artifacts.save(tmp_path / name / "other", arrays, Card(**NOTHING), format="orbax")
        (folder / "arrays").rename(tmp_path / name / "gone")
        (tmp_path / name / "other" / "arrays").rename(folder / "arrays")
        listed = checksums.digests(folder)
        kept = {k: v for k, v in listed.items() if k.startswith("arrays/") or k == TREE}
        resealed(folder / CARD, files=kept)
        with pytest.raises(ValueError, match=message):
            artifacts.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_description_nested_without_end_is_an_error(tmp_path, text):
    folder = small(tmp_path)
    index = json.loads((folder / TREE).read_text())
    index["descriptions"]["w"] = text
    (folder / TREE).write_text(json.dumps(index))
    rewritten(folder, folders.read_safetensors(folder / ARRAYS))
    with pytest.raises(ValueError, match="nests deeper than 100 levels"):
        artifacts.load(folder)


def test_a_damaged_orbax_checkpoint_is_an_error(tmp_path):
    folder = small(tmp_path, "orbax")
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flipped(largest, -1)
    with pytest.raises(ValueError, match=f"{largest.name} is damaged"):
        artifacts.load(folder)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    small(tmp_path)
    before = checksums.digests(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        small(tmp_path)
    broken = dataclasses.replace(jq.quantize(X, jq.Quantizer(jq.INT8)), scale=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"could not be read back.*do not divide"):
        artifacts.save(tmp_path / "other", {"w": broken}, Card(**NOTHING))

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(folders, "with_checksum", fails)
    with pytest.raises(OSError, match="no space"):
        artifacts.save(tmp_path / "other", {"w": X}, Card(**NOTHING))
    assert checksums.digests(tmp_path) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: artifacts.save(p, {"w": X}, Card(**NOTHING), format="npz"),
            "'safetensors', 'orb",
        ),
        (lambda p: artifacts.save(p, {"w": X}, None), "card is a Card"),
        (lambda p: artifacts.save(p, {}, Card(**NOTHING)), "at least one array"),
        (lambda p: artifacts.save(p, {"w": "text"}, Card(**NOTHING)), "got str at w"),
        (lambda p: Card(**{**NOTHING, "data": 3}), "data is a text"),
        (lambda p: Card(**{**NOTHING, "notes": b""}), "notes is a text"),
        (lambda p: Card(**{**NOTHING, "quality": [1]}), "quality is a dictionary"),
        (lambda p: Card(**{**NOTHING, "quality": {"kl": float("nan")}}), "quality.kl is nan"),
        (lambda p: Card(**{**NOTHING, "seeds": {1: 2}}), "seeds is"),
        (lambda p: Card(**{**NOTHING, "rules": 3}), "rules are as in"),
        (lambda p: Card.from_dict(NOTHING), "has the fields"),
        (lambda p: artifacts.load(p / "nothing"), "card.json is missing"),
    ],
)
def test_misuse_is_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_card_says_what_is_known_and_what_is_not():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    rules = {"head|body": None, ".*": "w4a16", "x": OPERATION}
    card = Card(
        coverage=jq.nnx.coverage(model, {".*": "w4a16"}),
        rules=rules,
        data="CIFAR-10",
        licence=None,
        seeds=np.int32(3),
        quality={"kl": {"mean": {"estimate": 0.5, "se": 0.1, "low": 0.25, "high": 0.75}}, "n": 9},
        verdict=VERDICT,
        calibration={"up": {"range": jnp.float32(2)}},
        notes=None,
    )
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    text = card.to_markdown()
    for line in (
        "| data | CIFAR-10 |",
        "| licence | not stated |",
        "| seeds | 3 |",
        r"| rules | head\|body → float, .* → w4a16, x → int8/tensor × float simulated |",
        "fail at tier 99",
        "- Mean KL is 0.5 | too much.",
        "| kl.mean | 0.5 (0.25 to 0.75) |",
        "| n | 9 |",
        f"| kernel | dot | [[2, 64], [64, 8]] | w4a16 | {64 * 8 * 4} | {64 * 8 // 2 + 8 * 4} |",
        "| up | range 2.0 |",
    ):
        assert line in text.splitlines(), line
    assert Card(**NOTHING).to_markdown().count("not stated") == 6 + 4


# ---------------------------------------------------------------------------------------------------
# NNX models


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Linear(32, 64, rngs=rngs), nnx.Einsum("nh,hm->nm", (64, 16), rngs=rngs)]
        )
        self.head = nnx.Linear(16, 4, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.drop(self.norm(self.embed(tokens)))
        return self.head(self.layers[1](nnx.relu(self.layers[0](x))))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        mask = jnp.ones((3, 3, 3, 8)).at[0].set(0)
        self.conv = nnx.Conv(3, 8, (3, 3), mask=mask, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.up(self.attention(x))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 32, rngs=rngs)
        make = nnx.split_rngs(splits=2)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = make(rngs)

    def __call__(self, tokens):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.embed.attend(run(self.embed(tokens), self.blocks))


TOKENS = jnp.arange(6).reshape(2, 3)
IMAGES = jnp.array(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32)
ATTENTION = {".*attention": "a8kv8"}
CASES = {
    "calibrated": (Perceptron, {"head": None, ".*": "w4a8"}, TOKENS[0], True),
    "learned": (Perceptron, {"head": "w16a4-lsq", ".*": "w4a4-lsq"}, TOKENS[0], True),
    "convolution": (Convolutional, {".*": "w8a8"}, IMAGES, True),
    "stacked": (Stacked, {**ATTENTION, ".*": "w4a8"}, TOKENS, True),
    "stacked blocks": (Stacked, {**ATTENTION, ".*": "w4a16g16"}, TOKENS, False),
}


def made(case: str):
    """A frozen model, the class that it is of, and an input."""
    cls, rules, x, calibrated = CASES[case]
    model = cls(nnx.Rngs(0))
    if cls is Perceptron:
        model.norm.var[...] = jnp.linspace(0.5, 2, 32)
        model.drop.rngs = model.drop.rngs  # its key and count are variables of the model
    quantized = jq.nnx.quantize(model, rules)
    if calibrated:
        jq.nnx.calibrate(quantized, [x])
    return jq.nnx.freeze(quantized), cls, x


@nnx.jit
def run(model, x):
    return model(x)


@pytest.mark.first(1)
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_models_outputs_are_the_saved_ones_bit_for_bit(tmp_path, case):
    frozen, cls, x = made(case)
    jq.nnx.save(tmp_path / "model", frozen)
    expected = np.asarray(run(frozen, x))
    abstract = nnx.eval_shape(lambda: cls(nnx.Rngs(1)))
    architecture = cls(nnx.Rngs(1))
    before = bits(nnx.state(architecture, nnx.Param))
    for model in (abstract, architecture):
        found = run(jq.nnx.load(tmp_path / "model", model), x)
        np.testing.assert_array_equal(found, expected)
    assert bits(nnx.state(architecture, nnx.Param)) == before
    assert bits(nnx.state(cls(nnx.Rngs(0)), nnx.Param)) != before  # so the numbers were the file's


def test_orbax_holds_the_same_model(tmp_path):
    frozen, cls, x = made("stacked")
    jq.nnx.save(tmp_path / "model", frozen, format="orbax")
    loaded = jq.nnx.load(tmp_path / "model", nnx.eval_shape(lambda: cls(nnx.Rngs(1))))
    np.testing.assert_array_equal(run(loaded, x), run(frozen, x))
    assert read(loaded.blocks.up.kernel).nbytes == read(frozen.blocks.up.kernel).nbytes


def test_a_layer_that_no_rule_reaches_keeps_its_weights(tmp_path):
    class Upsampled(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.up, self.out = (
                nnx.ConvTranspose(4, 4, (3,), rngs=rngs),
                nnx.Linear(4, 2, rngs=rngs),
            )

        def __call__(self, x):
            return self.out(self.up(x))

    frozen, x = jq.nnx.freeze(jq.nnx.quantize(Upsampled(0), {"out": "w8a8"})), jnp.ones((1, 5, 4))
    jq.nnx.save(tmp_path / "model", frozen)
    for model in (Upsampled(1), nnx.eval_shape(lambda: Upsampled(1))):
        np.testing.assert_array_equal(jq.nnx.load(tmp_path / "model", model)(x), frozen(x))


def test_a_quantized_model_is_saved_too(tmp_path):
    quantized = jq.nnx.quantize(Perceptron(nnx.Rngs(0)), {".*": "w8a8"})
    jq.nnx.save(tmp_path / "model", quantized)
    loaded = jq.nnx.load(tmp_path / "model", Perceptron(nnx.Rngs(1)))
    np.testing.assert_array_equal(loaded(TOKENS[0]), quantized(TOKENS[0]))
    frozen = jq.nnx.freeze(loaded)
    np.testing.assert_array_equal(frozen(TOKENS[0]), quantized(TOKENS[0]))


@pytest.mark.long
def test_smoothed_products_are_saved_with_their_scales(tmp_path):
    batches = [X[:, :32], X[:, 32:]]
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    frozen = jq.ptq.quantize(model, {".*": "w4a16"}, batches, method="awq")
    jq.nnx.save(tmp_path / "model", frozen)
    loaded = jq.nnx.load(tmp_path / "model", nnx.Linear(32, 8, rngs=nnx.Rngs(1)))
    np.testing.assert_array_equal(read(loaded.kernel_scale), read(frozen.kernel_scale), strict=True)
    np.testing.assert_array_equal(loaded(batches[0]), frozen(batches[0]))


def test_the_card_is_filled_in_and_streams_are_not_saved(tmp_path):
    frozen, cls, _ = made("calibrated")
    jq.nnx.save(tmp_path / "model", frozen, Card(**{**NOTHING, "licence": "MIT"}))
    found, card = artifacts.load(tmp_path / "model")
    assert card.licence == "MIT"
    assert {row["path"] for row in card.coverage["rows"]} == {
        "embed/embedding",
        "layers/0/kernel",
        "layers/1/kernel",
        "head/kernel",
    }
    found_range = read(frozen.layers[0].kernel_input_range)
    assert card.calibration["layers/0/kernel"] == {"range": float(found_range)}
    assert set(found["variables"]) == {"embed", "norm", "layers", "head"}
    concrete = cls(nnx.Rngs(5))
    loaded = jq.nnx.load(tmp_path / "model", concrete)
    assert loaded.drop.rngs.key[...] == concrete.drop.rngs.key[...]
    started = jq.nnx.load(tmp_path / "model", nnx.eval_shape(lambda: cls(nnx.Rngs(5))))
    assert started.drop.rngs.key[...] == jax.random.key(0)
    assert started.drop.rngs.count[...] == 0


class Wider(Perceptron):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.head = nnx.Linear(16, 5, use_bias=False, rngs=rngs)


class Deeper(Perceptron):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.last = nnx.Linear(4, 4, rngs=rngs)


class Shallower(Perceptron):
    def __init__(self, rngs):
        super().__init__(rngs)
        del self.norm


class WiderInside(Perceptron):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.layers[0] = nnx.Linear(32, 65, rngs=rngs)


class Other(Perceptron):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.layers[1] = nnx.Conv(64, 16, (1,), rngs=rngs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wider, r"head/kernel has shape \(16, 5\) here, and was saved with \(16, 4\)"),
        (Deeper, "lacks the model's last/bias, last/kernel"),
        (Shallower, "what the model does not: norm/"),
        (WiderInside, r"layers/0/bias has shape \(65,\) here, and was saved with \(64,\)"),
        (Other, "lacks the model's layers/1/bias"),
        (
            lambda rngs: jq.nnx.quantize(Perceptron(rngs), {".*": "w8a8"}),
            "is quantized; load takes",
        ),
    ],
)
def test_another_architecture_is_an_error(tmp_path, make, message):
    jq.nnx.save(tmp_path / "model", made("calibrated")[0])
    with pytest.raises(ValueError, match=message):
        jq.nnx.load(tmp_path / "model", make(nnx.Rngs(0)))


class Typed(nnx.Module):
    """Layers of which each computes in a type of its own."""

    def __init__(self, linear=None, norm=None, embed=None, out=None, parameters=jnp.float32):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, 32, dtype=embed, rngs=rngs)
        self.norm = nnx.LayerNorm(32, dtype=norm, rngs=rngs)
        self.up = nnx.Linear(
            32, 16, dtype=linear, param_dtype=parameters, preferred_element_type=out, rngs=rngs
        )
        self.drop = nnx.Dropout(0.5, deterministic=True)

    def __call__(self, tokens):
        return self.up(self.norm(self.embed(tokens)).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"linear": jnp.bfloat16}, {}, "up has dtype None here, and was saved with bfloat16"),
        ({}, {"linear": "bfloat16"}, "up has dtype bfloat16 here, and was saved with None"),
        ({"norm": jnp.float32}, {}, "norm has dtype None here, and was saved with float32"),
        ({"embed": jnp.bfloat16}, {}, "embed has dtype float32 here, and was saved with bfloat16"),
        ({"out": jnp.float32}, {}, "up has preferred_element_type None here"),
        (
            {},
            {"norm": jnp.bfloat16, "linear": jnp.bfloat16},
            r"norm has dtype bfloat16 here.* \(and 1 more differ\); load takes the model that was quan",
        ),
    ],
)
def test_a_model_that_computes_in_other_types_is_an_error(tmp_path, saved, here, message):
    jq.nnx.save(tmp_path / "model", jq.nnx.freeze(jq.nnx.quantize(Typed(**saved), {"up": "w8a8"})))
    for make in (lambda: Typed(**here), lambda: nnx.eval_shape(lambda: Typed(**here))):
        with pytest.raises(ValueError, match=message):
            jq.nnx.load(tmp_path / "model", make())
    same = jq.nnx.load(tmp_path / "model", Typed(**saved))  # names of types and types are alike
    assert same.up.dtype == saved.get("linear")


def test_types_of_parameters_are_the_saved_ones_whatever_the_models(tmp_path):
    frozen = jq.nnx.freeze(jq.nnx.quantize(Typed(), {"up": "w8a8"}))
    jq.nnx.save(tmp_path / "model", frozen)
    loaded = jq.nnx.load(tmp_path / "model", Typed(parameters=jnp.bfloat16))
    assert loaded.up.bias.dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(loaded(TOKENS[0]), frozen(TOKENS[0]))


def test_folders_of_before_types_were_noted_are_read(tmp_path):
    frozen = jq.nnx.freeze(jq.nnx.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), {".*": "w8a8"}))
    jq.nnx.save(tmp_path / "model", frozen)
    tree, card = artifacts.load(tmp_path / "model")
    artifacts.save(tmp_path / "before", {k: v for k, v in tree.items() if k != "types"}, card)
    loaded = jq.nnx.load(tmp_path / "before", nnx.Linear(32, 8, rngs=nnx.Rngs(1)))
    np.testing.assert_array_equal(loaded(X[:, :32]), frozen(X[:, :32]))


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path):
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing in this Linear is quantized"):
        jq.nnx.save(tmp_path / "model", model)
    own = jq.Quantizer(jq.INT8, calibration=lambda x, axes, format: jnp.float32(1))
    quantized = jq.nnx.quantize(model, {".*": jq.DotGeneral(jq.Operands(own))})
    with pytest.raises(ValueError, match=r"forward.lhs.calibration is .*<lambda>"):
        jq.nnx.save(tmp_path / "model", quantized)
    with pytest.raises(ValueError, match="is not of an NNX model"):
        jq.nnx.load(small(tmp_path), model)
