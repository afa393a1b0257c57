"""From a data set to its semantic IDs, and on to those of a grown one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import build_dataset
from onerec_jax.data.splits import item_popularity, make_split
from onerec_jax.errors import InputError
from onerec_jax.sharding import make_mesh
from onerec_jax.tokenizer import build, content
from onerec_jax.tokenizer.alignment import AlignmentConfig
from onerec_jax.tokenizer.build import Tokenizer, extend, tokenize
from onerec_jax.tokenizer.config import Files, TokenizerConfig, config_of, files_key
from onerec_jax.tokenizer.pairs import PairConfig, mine_pairs
from onerec_jax.tokenizer.rq_kmeans import KMeansConfig, encode
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.tokenizer.vectors import ItemTokens

ITEMS = 24
CFG = TokenizerConfig(codebook_size=4, kmeans=KMeansConfig(iterations=5), text_dim=4)
KEEP = dataclasses.replace(CFG, collisions="keep")
ALIGNMENT = AlignmentConfig(
    layers=1,
    queries=2,
    width=8,
    heads=2,
    ff_dim=8,
    caption_layers=1,
    caption_width=8,
    caption_vocabulary=20,
    caption_length=4,
    batch_size=8,
    steps=3,
    warmup_steps=1,
    log_every=1,
)
ALIGNED = dataclasses.replace(CFG, align="tiny", alignment=ALIGNMENT)

TOY = [(user, item) for user in range(8) for item in (2 * user, 2 * user + 1, 3, 16 + user % 4)]
"""Eight users of four actions: items 0 to 15 are trained on, 16 to 19 only tested, 20+ unseen.

Every user's last two actions are validation and test."""
LIKED = [(user, (5 * user + 3 * step) % 16) for user in range(12) for step in range(8)]
"""Twelve users of eight actions, so that items have users in common."""


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One device, as the mesh is tested with `kmeans.py`; no plots, which are with `report.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda: make_mesh(1))
        patch.setattr(build.reports, "draw", lambda path, *args: path.write_bytes(b"a plot"))
        yield


def dataset_of(texts=None, ids=range(ITEMS), log=TOY, **columns):
    """Item n of the log has the n-th id; rows of the data set are in the order of the ids."""
    ids = list(ids)
    items = pl.DataFrame({"item_id": ids, **columns})
    if texts is not None:
        items = items.with_columns(pl.Series("text", texts, dtype=pl.String))
    rows = [(user, ids[item]) for user, item in log]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    meta = {"origin": "a test", "licence": "none"}
    return build_dataset("toy", items, None, frame, meta=meta, split="leave-one-out")


def texts(items=ITEMS):
    rng = np.random.default_rng(0)
    words = ["war", "love", "space", "dog", "sea", "film", "red", "blue"]
    return [" ".join(rng.choice(words, 4)) for _ in range(items)]


def random_vectors(items=ITEMS, dim=4, seed=1):
    return np.random.default_rng(seed).standard_normal((items, dim)).astype(np.float32)


def save(tmp_path, vectors) -> Files:
    path = tmp_path / "vectors.npy"
    np.save(path, vectors)
    return Files(vectors=path)


def refused(make, *args, match, **options) -> str:
    with pytest.raises(InputError, match=match) as caught:
        make(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quality(tokenizer):
    return tokenizer.report["quality"]


# ------------------------------------------------------------------------- fitted, saved and read


def test_the_data_set_is_as_described():
    popularity = item_popularity(dataset_of(), make_split(dataset_of()))
    np.testing.assert_array_equal(popularity > 0, np.arange(ITEMS) < 16)


def test_table_and_manifest():
    dataset = dataset_of(texts())
    tokenizer = tokenize(dataset, CFG)
    ids = tokenizer.ids
    assert ids.sids.shape == ids.codes.shape == (ITEMS, 3)
    assert ids.sids.dtype == ids.codes.dtype == np.int32
    assert ids.sids.min() >= 0
    assert ids.sids.max() < 4
    assert ids.codebooks.shape == (3, 4, 4)
    np.testing.assert_array_equal(ids.item_ids, np.arange(ITEMS))
    np.testing.assert_array_equal(ids.codes, encode(tokenizer.vectors, ids.codebooks))
    manifest = ids.manifest
    assert manifest["dataset_fingerprint"] == dataset.fingerprint
    assert (manifest["fitted_items"], manifest["items"]) == (16, ITEMS)
    assert manifest["settings"]["codebook_size"] == 4
    assert manifest["content"]["kind"] == "tfidf"
    assert manifest["aligned"] is False
    assert config_of(ids) == CFG
    assert manifest["quality"] == quality(tokenizer)["stored"]
    stored, fitted = quality(tokenizer)["stored"], quality(tokenizer)["fitted"]
    assert stored["distinct_ids"] == len(np.unique(ids.sids, axis=0))
    assert stored["distinct_ids"] > fitted["distinct_ids"]
    assert stored["reconstruction_loss"] > fitted["reconstruction_loss"]
    assert "nearest" not in quality(tokenizer)  # plain k-means: the fitted codes are the nearest
    assert "stability" not in tokenizer.report
    assert tokenize(dataset, CFG).ids.fingerprint == ids.fingerprint


@pytest.mark.parametrize("kind", ["int", "string"])
def test_round_trip(tmp_path, kind):
    ids = range(ITEMS) if kind == "int" else [f"B{row:03}ü" for row in range(ITEMS)]
    made = tokenize(dataset_of(texts(), ids), CFG, stability=True)
    made.save(tmp_path / "ids")
    read = Tokenizer.load(tmp_path / "ids")
    assert read.ids.fingerprint == made.ids.fingerprint
    assert read.ids.item_ids.tolist() == list(ids)
    assert read.report == json.loads(json.dumps(made.report))
    assert read.encoder.fingerprint == made.encoder.fingerprint
    assert read.aligner is None
    assert config_of(read.ids) == CFG
    assert SemanticIds.load(tmp_path / "ids").fingerprint == made.ids.fingerprint
    names = {path.name for path in (tmp_path / "ids").iterdir()}
    assert names >= {"report.json", "report.md", "codes.png", "encoder", "semantic_ids.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_a_part_that_is_missing(aligned, tmp_path):
    folder = tmp_path / "ids"
    aligned.save(folder)
    for gone in ("encoder", "aligner", "report.json", "semantic_ids.json", "sids.npy"):
        (folder / gone).rename(tmp_path / gone)
        assert str(folder) in refused(Tokenizer.load, folder, match=gone.partition(".")[0])
        (tmp_path / gone).rename(folder / gone)
    Tokenizer.load(folder)


def test_a_bare_table_is_no_tokenizer(tmp_path):
    ids = tokenize(dataset_of(texts()), CFG).ids
    dataclasses.replace(ids, manifest={"dataset": "toy"}).save(tmp_path / "ids")
    refused(Tokenizer.load, tmp_path / "ids", match="does not say what")


def test_stability_and_readable_codes():
    titles = [f"title {row}" for row in range(ITEMS)]
    report = tokenize(dataset_of(texts(), title=titles), CFG, stability=True).report
    assert -0.5 < report["stability"] <= 1
    assert sum(code["items"] for code in report["readable"]) == ITEMS
    shown = [example["text"] for code in report["readable"] for example in code["examples"]]
    assert set(shown) <= set(titles)
    words = {word for code in report["readable"] for word in code["words"]}
    assert words <= {word for text in texts() for word in text.split()}
    assert [set(level) for level in report["fit"]] == [{"inertia", "reseeded", "seconds"}] * 3


def test_progress_is_told():
    lines = []
    tokenize(dataset_of(texts()), CFG, stability=True, say=lines.append)
    assert any("level 3 of 3" in line for line in lines)
    assert any("another seed" in line for line in lines)


def test_the_mesh_does_not_matter():
    dataset = dataset_of(texts())
    one, eight = (tokenize(dataset, CFG, mesh=make_mesh(data)).ids for data in (1, 8))
    np.testing.assert_array_equal(one.sids, eight.sids)
    np.testing.assert_allclose(one.codebooks, eight.codebooks, atol=1e-5)


# -------------------------------------------------------------------- nothing learned from the test


def test_text_of_a_test_item_does_not_move_the_others():
    """Codebooks and codes of all other items stay; with spreading, those it may not outrank."""
    plain, changed = texts(), texts()
    changed[17] = "zebra zebra war war war"
    before, after = (tokenize(dataset_of(words), KEEP).ids for words in (plain, changed))
    np.testing.assert_array_equal(before.codebooks, after.codebooks)
    others = np.arange(ITEMS) != 17
    np.testing.assert_array_equal(before.sids[others], after.sids[others])
    assert (before.sids[17] != after.sids[17]).any()
    # Training items choose first, so that an item without training actions cannot displace them.
    for policy in ("spread", "append"):
        cfg = dataclasses.replace(CFG, collisions=policy)
        before, after = (tokenize(dataset_of(words), cfg).ids for words in (plain, changed))
        np.testing.assert_array_equal(before.sids[:16, :2], after.sids[:16, :2])


def test_text_of_a_training_item_does_move_the_codebooks():
    """The counterpart: the test above would pass for codebooks that read no text."""
    changed = texts()
    changed[3] = "war war war"
    before, after = (tokenize(dataset_of(words), CFG).ids for words in (texts(), changed))
    assert not np.array_equal(before.codebooks, after.codebooks)


# -------------------------------------------------------------------------------- given content


def test_given_vectors_are_used_in_row_order(tmp_path):
    vectors = random_vectors()
    vectors[20] = vectors[5]  # never seen, but the same vector as a training item
    files = save(tmp_path, vectors)
    kept = tokenize(dataset_of(), KEEP, files)
    ids = kept.ids
    np.testing.assert_array_equal(ids.sids[20], ids.sids[5])
    np.testing.assert_array_equal(ids.sids, encode(vectors, ids.codebooks))
    assert set(quality(kept)) == {"stored"}
    assert "readable" not in kept.report
    assert str(files.vectors) in kept.report["vectors"]
    assert kept.encoder is None
    spread = tokenize(dataset_of(), CFG, files).ids
    np.testing.assert_array_equal(spread.codes, ids.sids)
    np.testing.assert_array_equal(spread.codebooks, ids.codebooks)
    assert (spread.sids[20] != spread.sids[5]).any()
    same = (spread.sids[:, :-1] == ids.sids[:, :-1]).all(1)  # but where a prefix is full
    assert same.sum() > 20
    # The most popular item of every prefix chooses first and so keeps its nearest code.
    popularity = item_popularity(dataset_of(), make_split(dataset_of()))
    for prefix in np.unique(ids.sids[:, :-1], axis=0):
        rows = np.flatnonzero((ids.sids[:, :-1] == prefix).all(1))
        first = rows[np.argmax(popularity[rows])]
        assert spread.sids[first, -1] == ids.sids[first, -1]


def test_an_appended_code_counts_by_popularity(tmp_path):
    files = save(tmp_path, random_vectors() // 1)
    made = tokenize(dataset_of(), dataclasses.replace(CFG, collisions="append"), files)
    sids, codes = made.ids.sids, made.ids.codes
    assert sids.shape == (ITEMS, 4)
    np.testing.assert_array_equal(sids[:, :3], codes)
    popularity = item_popularity(dataset_of(), make_split(dataset_of()))
    for sid in np.unique(codes, axis=0):
        rows = np.flatnonzero((codes == sid).all(1))
        assert sids[rows[np.argsort(-popularity[rows], kind="stable")], 3].tolist() == list(
            range(len(rows))
        )
    assert quality(made)["stored"]["collision_rate"] == 0
    assert quality(made)["fitted"]["collision_rate"] > 0
    assert len(quality(made)["stored"]["fan_out_mean"]) == 4


@pytest.mark.parametrize("kind", ["int", "string"])
def test_vectors_from_parquet_are_found_by_id(tmp_path, kind):
    """In any row order, with an item more; the same table as from .npy in the right order."""
    ids = list(range(100, 100 + ITEMS)) if kind == "int" else [f"i{n}" for n in range(ITEMS)]
    dataset, vectors = dataset_of(ids=ids), random_vectors(ITEMS + 1)
    order = np.random.default_rng(2).permutation(ITEMS + 1)
    named = pl.Series([*ids, -1 if kind == "int" else "more"])
    frame = pl.DataFrame({"item_id": named, "vector": vectors.tolist()})
    frame[order.tolist()].write_parquet(tmp_path / "v.parquet")
    rows = [ids.index(item) for item in dataset.items["item_id"].to_list()]
    direct = tokenize(dataset, CFG, save(tmp_path, vectors[rows])).ids
    found = tokenize(dataset, CFG, Files(vectors=tmp_path / "v.parquet")).ids
    np.testing.assert_array_equal(found.sids, direct.sids)


def test_tokens_are_pooled_without_alignment(tmp_path):
    values = np.random.default_rng(4).standard_normal((ITEMS, 3, 4)).astype(np.float16)
    tokens = ItemTokens(values, np.tile([1, 2, 3], ITEMS // 3).astype(np.int32))
    tokens.save(tmp_path / "t.npz")
    made = tokenize(dataset_of(), KEEP, Files(tokens=tmp_path / "t.npz"))
    np.testing.assert_array_equal(made.vectors, tokens.pooled())
    np.testing.assert_array_equal(made.ids.sids, encode(tokens.pooled(), made.ids.codebooks))
    assert made.ids.manifest["content"]["kind"] == "tokens"


def test_a_memory_mapped_file_is_fitted_in_mini_batches(tmp_path):
    vectors = random_vectors().astype(np.float16)
    cfg = dataclasses.replace(CFG, kmeans=KMeansConfig(iterations=4, mini_batch=8))
    made = tokenize(dataset_of(), cfg, save(tmp_path, vectors), stability=True)
    assert isinstance(made.vectors, np.memmap)
    assert made.vectors.dtype == np.float16
    np.testing.assert_array_equal(made.ids.codes, encode(vectors, made.ids.codebooks))
    whole = tokenize(dataset_of(), CFG, save(tmp_path, vectors))
    losses = [quality(part)["fitted"]["reconstruction_loss_normalised"] for part in (made, whole)]
    assert losses[0] < 3 * losses[1]
    made.save(tmp_path / "ids")
    assert Tokenizer.load(tmp_path / "ids").ids.fingerprint == made.ids.fingerprint


@pytest.mark.parametrize("assignment", ["balanced", "sweep"])
def test_balanced_codes_are_those_of_the_fit(tmp_path, assignment):
    """Sixteen fitted items, four codes: four items each on every level, as stored."""
    cfg = dataclasses.replace(KEEP, kmeans=KMeansConfig(iterations=5, assignment=assignment))
    made = tokenize(dataset_of(), cfg, save(tmp_path, random_vectors() ** 3))
    for level in range(3):
        assert np.bincount(made.ids.sids[:16, level], minlength=4).tolist() == [4, 4, 4, 4]
    nearest = encode(made.vectors, made.ids.codebooks)
    np.testing.assert_array_equal(made.ids.codes, nearest)
    np.testing.assert_array_equal(made.ids.sids[16:], nearest[16:])  # never fitted
    assert (made.ids.sids[:16] != nearest[:16]).any()
    assert set(quality(made)) == {"stored", "nearest"}
    stored, reading = quality(made)["stored"], quality(made)["nearest"]
    assert np.mean(stored["normalised_entropy"]) > np.mean(reading["normalised_entropy"])


# ----------------------------------------------------------------------------------- alignment


@pytest.fixture(scope="module")
def aligned():
    """Text, compressed by pairs mined from the log and by captions."""
    return tokenize(dataset_of(texts(), log=LIKED), ALIGNED)


def test_alignment_of_text(aligned, tmp_path):
    assert aligned.ids.codebooks.shape == (3, 4, 2 * 8)
    assert aligned.vectors.shape == (ITEMS, 16)
    np.testing.assert_allclose(np.linalg.norm(aligned.vectors, axis=1), 1, rtol=1e-5)
    assert aligned.ids.manifest["aligned"] is True
    assert "aligned" in aligned.report["vectors"]
    assert [row["step"] for row in aligned.report["alignment"]] == [1, 2, 3]
    assert {"contrastive", "caption"} <= set(aligned.report["alignment"][0])
    assert config_of(aligned.ids) == ALIGNED
    aligned.save(tmp_path / "ids")
    read = Tokenizer.load(tmp_path / "ids")
    again = read.aligner.encode(ItemTokens.from_vectors(read.encoder.encode(texts())))
    np.testing.assert_array_equal(again.reshape(ITEMS, -1), aligned.vectors)
    assert read.report["alignment"] == aligned.report["alignment"]


def test_pairs_from_a_file_are_those_mined(aligned, tmp_path):
    dataset = dataset_of(texts(), log=LIKED)
    pairs = mine_pairs(dataset, make_split(dataset), PairConfig(), say=lambda line: None)
    pairs.save(tmp_path / "pairs.parquet", dataset)
    lines = []
    files = Files(pairs=tmp_path / "pairs.parquet")
    same = tokenize(dataset, ALIGNED, files, say=lines.append)
    np.testing.assert_array_equal(same.vectors, aligned.vectors)
    assert f"{len(pairs)} item pairs" in lines
    fewer = dataclasses.replace(
        pairs, **{name: getattr(pairs, name)[:9] for name in ("first", "second", "score", "kind")}
    )
    fewer.save(tmp_path / "pairs.parquet", dataset)
    other = tokenize(dataset, ALIGNED, files)
    assert not np.array_equal(other.vectors, aligned.vectors)


def test_alignment_of_given_tokens_without_text(tmp_path):
    rng = np.random.default_rng(4)
    tokens = ItemTokens(
        rng.standard_normal((ITEMS, 3, 4)).astype(np.float16),
        rng.integers(1, 4, ITEMS).astype(np.int32),
    )
    tokens.save(tmp_path / "t.npz")
    files, dataset = Files(tokens=tmp_path / "t.npz"), dataset_of(log=LIKED)
    message = refused(tokenize, dataset, ALIGNED, files, match="captions is on")
    assert "alignment.no-captions" in message
    bare = dataclasses.replace(ALIGNMENT, captions=False)
    made = tokenize(dataset, dataclasses.replace(ALIGNED, alignment=bare), files)
    assert made.aligner.input_dim == 4
    assert made.vectors.shape == (ITEMS, 16)
    assert "caption" not in made.report["alignment"][0]


def test_alignment_of_given_vectors_by_captions_only(tmp_path):
    """No pairs to be had from this log, and none are asked for."""
    files = save(tmp_path, random_vectors())
    nothing = dataclasses.replace(CFG.pairs, user_to_item=False)
    cfg = dataclasses.replace(ALIGNED, pairs=nothing)
    refused(tokenize, dataset_of(texts()), cfg, files, match="no item pairs")
    captions = dataclasses.replace(cfg, alignment=dataclasses.replace(ALIGNMENT, pairs=False))
    made = tokenize(dataset_of(texts()), captions, files)
    assert made.vectors.shape == (ITEMS, 16)
    assert "contrastive" not in made.report["alignment"][0]


def test_alignment_reads_no_test_item(aligned):
    """Neither its text, nor the actions that are held out."""
    changed = texts()
    changed[20] = "sea sea sea sea"  # nobody's
    held = [(user, 21 if step >= 6 else item) for step, (user, item) in by_step(LIKED)]
    for dataset in (dataset_of(changed, log=LIKED), dataset_of(texts(), log=held)):
        other = tokenize(dataset, ALIGNED)
        np.testing.assert_array_equal(other.ids.codebooks, aligned.ids.codebooks)


def by_step(log):
    return [(number % 8, row) for number, row in enumerate(log)]


def test_pairs_without_alignment_are_refused(tmp_path):
    files = Files(pairs=tmp_path / "pairs.parquet")
    refused(tokenize, dataset_of(texts()), CFG, files, match="--pairs .*--tokenizer.align")


# ----------------------------------------------------------------------------------- bad input


def test_default_size_never_exceeds_the_training_items(tmp_path):
    """Four times as many items as fitted ones."""
    files = save(tmp_path, random_vectors())
    made = tokenize(dataset_of(), dataclasses.replace(CFG, codebook_size=0), files)
    assert made.ids.codebook_size == 16
    assert config_of(made.ids).codebook_size == 16  # an extension must not choose again


def test_codebook_larger_than_the_catalogue():
    cfg = dataclasses.replace(CFG, codebook_size=17)
    refused(tokenize, dataset_of(texts()), cfg, match=r"--tokenizer.codebook-size 17 .* 16 train")


def test_more_ids_than_int64_are_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(build, "read_content", None)
    cfg = dataclasses.replace(CFG, levels=32)
    refused(tokenize, dataset_of(texts()), cfg, match="32 levels of 4 codes are too many")
    cfg = dataclasses.replace(CFG, levels=31, collisions="append")
    refused(tokenize, dataset_of(texts()), cfg, match="32 levels of 4 codes are too many")


def test_fewer_distinct_vectors_than_codes(tmp_path):
    files = save(tmp_path, random_vectors()[np.arange(ITEMS) % 3])
    message = refused(tokenize, dataset_of(), CFG, files, match="16 training items have 3 distinct")
    assert str(files.vectors) in message
    assert "--tokenizer.codebook-size 4" in message
    made = tokenize(dataset_of(), dataclasses.replace(CFG, codebook_size=3), files)
    assert np.isfinite(made.ids.codebooks).all()
    assert len(np.unique(made.ids.sids, axis=0)) == ITEMS  # 24 of 27 IDs
    repeated = [texts()[row % 3] for row in range(ITEMS)]
    refused(tokenize, dataset_of(repeated), CFG, match="3 distinct vectors")


def test_fewer_distinct_vectors_on_disk_than_codes(tmp_path):
    """Nobody counts them in a memory map; it must end well all the same."""
    files = save(tmp_path, random_vectors()[np.arange(ITEMS) % 3])
    cfg = dataclasses.replace(CFG, kmeans=KMeansConfig(iterations=3, mini_batch=8))
    made = tokenize(dataset_of(), cfg, files)
    assert np.isfinite(made.ids.codebooks).all()


def test_neither_text_nor_vectors():
    refused(tokenize, dataset_of(), CFG, match="'text'.*--vectors")


def test_vectors_and_tokens(tmp_path):
    files = Files(vectors=tmp_path / "v.npy", tokens=tmp_path / "t.npz")
    refused(tokenize, dataset_of(), CFG, files, match="--vectors and --tokens")


def bad_vectors():
    finite = random_vectors().astype(np.float64)
    nan, infinite = finite.copy(), finite.copy()
    nan[7, 1], infinite[9, 0] = np.nan, 1e300
    return {
        "rows": (finite[1:], r"shape \(23, 4\).*24 items"),
        "flat": (finite[:, 0], r"shape \(24,\)"),
        "nan": (nan, "row 7 is not finite"),
        "too large": (infinite, "row 9 is not finite"),
        "constant": (np.ones((ITEMS, 2)), "all 24 rows are equal"),
        "objects": (np.array([[None]] * ITEMS), "cannot be read"),
        "words": (np.array([["a", "b"]] * ITEMS), "--vectors"),
    }


@pytest.mark.parametrize("kind", bad_vectors())
@pytest.mark.parametrize("mini_batch", [0, 8])
def test_bad_vectors(tmp_path, kind, mini_batch):
    """The same words for a file that is read at once and one that is mapped."""
    vectors, match = bad_vectors()[kind]
    if mini_batch and vectors.dtype == np.float64:
        with np.errstate(over="ignore"):
            vectors = vectors.astype(np.float32)
    files = save(tmp_path, vectors)
    cfg = dataclasses.replace(CFG, kmeans=KMeansConfig(iterations=2, mini_batch=mini_batch))
    message = refused(tokenize, dataset_of(), cfg, files, match=match)
    assert f"--vectors {files.vectors}" in message


@pytest.mark.parametrize("file", ["vectors.npy", "vectors.parquet", "tokens.npz", "vectors.csv"])
@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "folder"])
def test_unreadable_files(tmp_path, file, kind):
    path = tmp_path / file
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"1,2\n3,4\n" if kind == "garbage" else b"")
    files = Files(**{file.partition(".")[0]: path})
    assert str(path) in refused(tokenize, dataset_of(), CFG, files, match="cannot be read")


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore lines"), MemoryError()],
    ids=["device", "host"],
)
def test_out_of_memory_is_one_line(monkeypatch, error):
    def fit(*args, **options):
        raise error

    monkeypatch.setattr(build, "fit_rq_kmeans", fit)
    message = refused(tokenize, dataset_of(texts()), CFG, match="k-means of 16 x 4 points .* GB")
    assert "--tokenizer.kmeans.chunk" in message
    assert "--tokenizer.kmeans.mini-batch" in message


def test_other_errors_of_the_device_are_bugs(monkeypatch):
    def fit(*args, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(build, "fit_rq_kmeans", fit)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tokenize(dataset_of(texts()), CFG)


def test_files_key(tmp_path):
    """Follows the bytes of the files, not their names."""
    files = save(tmp_path, random_vectors())
    key = files_key(files)
    assert key.keys() == {"vectors", "tokens", "pairs"}
    assert key["tokens"] is None
    moved = files.vectors.rename(tmp_path / "moved.npy")
    assert files_key(Files(vectors=moved)) == key
    assert files_key(save(tmp_path, random_vectors(seed=2))) != key
    refused(files_key, Files(pairs=tmp_path / "no"), match="cannot be read")


# ----------------------------------------------------------------------------------- extension

OLD = [10 * n for n in range(ITEMS)]
NEW = [10 * n + 5 for n in range(0, 60)]
"""Sixty items that come later; their rows lie between those of the old ones."""


def grown(make_texts=True, ids=None, **changes):
    """The catalogue of `OLD` and `NEW`; texts by id, so that old items keep theirs."""
    ids = OLD + NEW if ids is None else ids
    by_id = dict(zip(OLD + NEW, texts(ITEMS + 60), strict=True))
    words = [by_id[item] for item in ids] if make_texts else None
    return dataset_of(words, ids, **changes)


def rows_of(dataset, ids):
    place = {item: row for row, item in enumerate(dataset.items["item_id"].to_list())}
    return [place[item] for item in ids]


def vectors_for(dataset, seed=1):
    """One vector an item, by its id."""
    by_id = dict(zip(OLD + NEW, random_vectors(ITEMS + 60, seed=seed), strict=True))
    return np.stack([by_id[item] for item in dataset.items["item_id"].to_list()])


@pytest.mark.parametrize("source", ["text", "vectors", "mapped", "aligned"])
def test_an_extension_gives_what_fitting_would_have_given(tmp_path, source):
    """Nobody used the new items: fitting anew on the grown catalogue has the same codebooks."""
    cfg, small, large = KEEP, grown(ids=OLD), grown()
    if source == "aligned":
        # Captions by words of training items: the same in both.
        cfg = dataclasses.replace(ALIGNED, collisions="keep")
        small, large = grown(ids=OLD, log=LIKED), grown(log=LIKED)
    if source == "mapped":
        cfg = dataclasses.replace(cfg, kmeans=KMeansConfig(iterations=3, mini_batch=8))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    given = source in ("vectors", "mapped")
    first = save(tmp_path / "a", vectors_for(small)) if given else Files()
    second = save(tmp_path / "b", vectors_for(large)) if given else Files()
    tokenize(small, cfg, first).save(tmp_path / "ids")
    known = Tokenizer.load(tmp_path / "ids")
    lines = []
    more = extend(known, large, second, say=lines.append)
    anew = tokenize(large, cfg, second)
    np.testing.assert_array_equal(more.ids.codebooks, anew.ids.codebooks)
    np.testing.assert_array_equal(more.ids.sids, anew.ids.sids)
    np.testing.assert_array_equal(more.ids.codes, anew.ids.codes)
    np.testing.assert_array_equal(more.ids.item_ids, sorted(OLD + NEW))
    manifest = more.ids.manifest
    assert manifest["dataset_fingerprint"] == large.fingerprint != small.fingerprint
    assert manifest["items"] == 84
    assert manifest["fitted_items"] == known.ids.manifest["fitted_items"]
    assert manifest["extended"] == [{"from": known.ids.fingerprint, "known": 24, "new": 60}]
    assert manifest["quality"] == more.report["quality"]["stored"]
    assert more.report["items"] == 84
    assert config_of(more.ids) == config_of(known.ids)
    more.save(tmp_path / "more")
    assert Tokenizer.load(tmp_path / "more").ids.fingerprint == more.ids.fingerprint


@pytest.mark.parametrize("policy", ["keep", "append", "spread"])
@pytest.mark.parametrize("assignment", ["plain", "balanced"])
def test_known_items_keep_their_ids(tmp_path, policy, assignment):
    """Though new ones are as popular and some have the very vectors of known ones."""
    kmeans = KMeansConfig(iterations=5, assignment=assignment)
    cfg = dataclasses.replace(CFG, collisions=policy, kmeans=kmeans, codebook_size=8)
    small = grown(ids=OLD, make_texts=False)
    busy = TOY + [(user, 24 + 3 * user + step) for user in range(8, 14) for step in range(4)]
    large = grown(make_texts=False, log=busy)
    vectors = vectors_for(large)
    twins = rows_of(large, NEW[:10])
    vectors[twins] = vectors[rows_of(large, OLD[:10])]
    known = tokenize(small, cfg, save(tmp_path, vectors_for(small)))
    more = extend(known, large, save(tmp_path, vectors))
    rows = rows_of(large, OLD)
    np.testing.assert_array_equal(more.ids.sids[rows], known.ids.sids)
    np.testing.assert_array_equal(more.ids.codes, encode(vectors, known.ids.codebooks))
    new = np.setdiff1d(np.arange(84), rows)
    nearest, stored = more.ids.codes[new], more.ids.sids[new]
    if policy == "keep":
        np.testing.assert_array_equal(stored, nearest)
    if policy == "append":
        np.testing.assert_array_equal(stored[:, :3], nearest)
    if policy != "keep":
        assert len(np.unique(more.ids.sids, axis=0)) == 84
    if policy == "spread":
        assert (stored != nearest).any()
        free = ~(nearest[:, None] == more.ids.sids[rows]).all(-1).any(1)  # nobody known is there
        assert (stored[free] == nearest[free]).all(1).mean() > 0.5


def test_an_extension_of_an_extension(tmp_path):
    """In two steps as in one, where no new item gets in the way of another."""
    known = tokenize(grown(ids=OLD), KEEP)
    half = extend(known, grown(ids=OLD + NEW[:30]))
    half.save(tmp_path / "half")
    both = extend(Tokenizer.load(tmp_path / "half"), grown())
    np.testing.assert_array_equal(both.ids.sids, extend(known, grown()).ids.sids)
    steps = both.ids.manifest["extended"]
    assert [step["new"] for step in steps] == [30, 30]
    assert [step["from"] for step in steps] == [known.ids.fingerprint, half.ids.fingerprint]
    for policy in ("append", "spread"):
        cfg = dataclasses.replace(CFG, collisions=policy, codebook_size=8)
        half = extend(tokenize(grown(ids=OLD), cfg), grown(ids=OLD + NEW[:30]))
        both = extend(half, grown())
        rows = rows_of(grown(), OLD + sorted(NEW[:30]))
        before = rows_of(grown(ids=OLD + NEW[:30]), OLD + sorted(NEW[:30]))
        np.testing.assert_array_equal(both.ids.sids[rows], half.ids.sids[before])
        assert len(np.unique(both.ids.sids, axis=0)) == 84


def test_items_that_vanished_are_no_matter():
    """Nobody's items 20 to 23 leave the catalogue, others come."""
    known = tokenize(grown(ids=OLD), CFG)
    later = grown(ids=OLD[:20] + NEW[:5])
    more = extend(known, later)
    np.testing.assert_array_equal(more.ids.sids[rows_of(later, OLD[:20])], known.ids.sids[:20])
    assert more.ids.manifest["extended"][0]["known"] == 20
    assert more.ids.item_ids.tolist() == sorted(OLD[:20] + NEW[:5])


def test_string_ids_extend_too(tmp_path):
    old, new = [f"B{n:02}" for n in OLD], [f"A{n:02}" for n in NEW[:6]]  # the new ones come first
    words = texts(30)
    tokenize(dataset_of(words[:24], old), CFG).save(tmp_path / "ids")
    known, later = Tokenizer.load(tmp_path / "ids"), dataset_of(words, old + new)
    more = extend(known, later)
    place = {item: row for row, item in enumerate(known.ids.item_ids.tolist())}
    for row, item in enumerate(more.ids.item_ids.tolist()):
        if item in place:
            assert more.ids.sids[row].tolist() == known.ids.sids[place[item]].tolist()
    more.save(tmp_path / "more")
    assert Tokenizer.load(tmp_path / "more").ids.item_ids.tolist() == sorted(old + new)


def test_new_words_change_nothing_for_known_items():
    """The encoder is the old one: its vocabulary and weights do not follow the new texts."""
    known = tokenize(grown(ids=OLD), KEEP)
    words = [*texts(24), *["zebra zebra love"] * 10]
    more = extend(known, dataset_of(words, OLD + NEW[:10]))
    assert more.encoder is known.encoder
    rows = rows_of(dataset_of(words, OLD + NEW[:10]), NEW[:10])
    vectors = known.encoder.encode(["love"])
    expected = encode(np.tile(vectors, (10, 1)), known.ids.codebooks)
    np.testing.assert_array_equal(more.ids.sids[rows], expected)


class TestRefusedExtensions:
    """Each in one line that says what to do, and nothing is made."""

    @pytest.fixture
    def known(self, tmp_path):
        return tokenize(grown(ids=OLD), CFG, save(tmp_path, vectors_for(grown(ids=OLD))))

    @pytest.fixture
    def of_text(self):
        return tokenize(grown(ids=OLD), CFG)

    def test_nothing_new(self, of_text):
        refused(extend, of_text, grown(ids=OLD), match="only items of these .* nothing to extend")
        refused(extend, of_text, grown(ids=OLD[:20]), match="only items")

    def test_nothing_known(self, of_text):
        other = dataset_of(texts(), [item + 1 for item in OLD])
        refused(extend, of_text, other, match="no item of these semantic IDs")

    def test_ids_of_another_type(self, of_text):
        names = dataset_of(texts(84), [str(item) for item in OLD + NEW])
        refused(extend, of_text, names, match="String item ids.*Int64")

    def test_rows_in_another_order(self, known, tmp_path):
        files = save(tmp_path, vectors_for(grown())[::-1])
        refused(extend, known, grown(), files, match="get their old codes.*another order")

    def test_other_vectors(self, known, tmp_path):
        files = save(tmp_path, vectors_for(grown(), seed=8))
        refused(extend, known, grown(), files, match=r"only \d+.\d% of the known items")

    def test_vectors_of_another_width(self, known, tmp_path):
        files = save(tmp_path, vectors_for(grown())[:, :3])
        refused(extend, known, grown(), files, match="3 wide, the codebooks 4")

    def test_vectors_of_the_old_items_only(self, known, tmp_path):
        files = save(tmp_path, vectors_for(grown(ids=OLD)))
        refused(extend, known, grown(), files, match=r"shape \(24, 4\).*84 items")

    def test_vectors_with_a_hole(self, known, tmp_path):
        vectors = vectors_for(grown())
        vectors[2] = np.nan
        refused(extend, known, grown(), save(tmp_path, vectors), match="row 2 is not finite")

    def test_no_vectors_where_there_were_some(self, known):
        message = refused(extend, known, grown(), match="made of vectors of")
        assert "give --vectors" in message

    def test_tokens_where_there_were_vectors(self, known, tmp_path):
        files = Files(tokens=tmp_path / "t.npz")
        refused(extend, known, grown(), files, match="made of vectors of .*: give --vectors")

    def test_vectors_where_there_was_text(self, of_text, tmp_path):
        files = save(tmp_path, vectors_for(grown()))
        refused(extend, of_text, grown(), files, match="made of TF-IDF.*: give no file")

    def test_no_text_where_there_was_some(self, of_text):
        refused(extend, of_text, grown(make_texts=False), match="no column 'text'")

    def test_pairs(self, of_text, tmp_path):
        refused(extend, of_text, grown(), Files(pairs=tmp_path / "p.parquet"), match="--pairs")

    def test_other_texts(self, of_text):
        """The same ids, but another catalogue."""
        other = dataset_of(texts(84)[::-1], OLD + NEW)
        refused(extend, of_text, other, match="of the known items get their old codes")

    def test_the_encoder_of_another_table(self, of_text, tmp_path):
        of_text.save(tmp_path / "ids")
        other = tokenize(dataset_of(texts(48)[24:], OLD), CFG)
        other.save(tmp_path / "other")
        shutil.rmtree(tmp_path / "ids" / "encoder")
        shutil.copytree(tmp_path / "other" / "encoder", tmp_path / "ids" / "encoder")
        mixed = Tokenizer.load(tmp_path / "ids")
        refused(extend, mixed, grown(), match="is another one than when")

    def test_a_table_without_item_ids(self, of_text):
        bare = dataclasses.replace(of_text.ids, item_ids=None)
        mixed = dataclasses.replace(of_text, ids=bare)
        refused(extend, mixed, grown(), match="do not say which items")

    def test_more_items_on_one_id_than_numbers(self, tmp_path):
        cfg = dataclasses.replace(CFG, collisions="append")
        small, large = grown(ids=OLD), grown()
        known = tokenize(small, cfg, save(tmp_path, vectors_for(small)))
        vectors = vectors_for(large)
        vectors[rows_of(large, NEW)] = vectors[rows_of(large, OLD[:1])]
        files = save(tmp_path, vectors)
        refused(extend, known, large, files, match="items share one ID, more than the 4 codes")


class FakeModel:
    """A sentence model whose vectors count letters; `version` stands for its weights."""

    def __init__(self, version):
        self.fingerprint = f"version {version}"

    def vectors(self, texts, *, say=None):
        return np.array([[text.count(letter) for letter in "aeod"] for text in texts], np.float32)

    def tokens(self, texts, *, max_tokens, say=None):
        values = self.vectors(texts)[:, None].repeat(2, 1)[:, :max_tokens]
        return ItemTokens(values.astype(np.float16), np.full(len(texts), values.shape[1], np.int32))


def test_a_sentence_model(monkeypatch):
    """Its vectors as they are; its tokens if they are to be aligned; never another version's."""
    asked = []

    def load(name, *, say=None):
        asked.append(name)
        return FakeModel(version)

    version = 1
    monkeypatch.setattr(content, "load_sentence_encoder", load)
    cfg = dataclasses.replace(KEEP, text="some-model")
    known = tokenize(grown(ids=OLD), cfg)
    np.testing.assert_array_equal(known.vectors, FakeModel(1).vectors(texts(84)[:24]))
    assert "some-model" in known.report["vectors"]
    assert known.encoder is None
    more = extend(known, grown())
    np.testing.assert_array_equal(more.ids.sids[rows_of(grown(), OLD)], known.ids.sids)
    cfg = dataclasses.replace(ALIGNED, text="some-model", text_tokens=1)
    tokens, origin, _ = build.read_content(grown(), cfg, Files(), None, print, None)
    assert tokens.values.shape == (84, 1, 4)
    assert origin == {"kind": "sentence", "model": "some-model", "fingerprint": "version 1"}
    version = 2
    assert "some-model" in refused(extend, known, grown(), match="is another one than when")
    assert set(asked) == {"some-model"}
