"""Numbers of semantic IDs by hand and by loops; words and plots that hold them."""

import collections
import json
import math

import numpy as np
import pytest

from onerec_jax.tokenizer import report as reports
from onerec_jax.tokenizer.report import (
    agreement,
    code_usage,
    id_usage,
    nearest_rows,
    neighbours_kept,
    quality,
    readable_codes,
    reconstruction,
)
from onerec_jax.tokenizer.rq_kmeans import decode
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def world(items=80, levels=3, size=5, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    codebooks = rng.standard_normal((levels, size, dim)).astype(np.float32)
    codes = rng.integers(0, size, (items, levels)).astype(np.int32)
    x = decode(codes, codebooks) + 0.3 * rng.standard_normal((items, dim)).astype(np.float32)
    return x, codes, codebooks


def decoder(codebooks):
    return lambda codes: decode(codes, codebooks)


# -------------------------------------------------------------------------------------- of codes


def usage_of(counts) -> dict:
    """Usage of one level whose codes have these numbers of items."""
    codes = np.repeat(np.arange(len(counts)), counts)[:, None]
    return {name: value[0] for name, value in code_usage(codes, len(counts)).items()}


def test_even_use():
    usage = usage_of([3, 3, 3, 3])
    assert usage["utilisation"] == 1
    assert usage["entropy"] == pytest.approx(math.log(4))
    assert usage["normalised_entropy"] == pytest.approx(1)
    assert usage["gini"] == pytest.approx(0, abs=1e-12)
    assert usage["largest_code"] == 0.25


@pytest.mark.parametrize("size", [2, 4, 16])
def test_one_code_has_all(size):
    usage = usage_of([0] * (size - 1) + [7])
    assert usage["utilisation"] == 1 / size
    assert usage["entropy"] == usage["normalised_entropy"] == 0
    assert usage["gini"] == pytest.approx((size - 1) / size)
    assert usage["largest_code"] == 1


def test_use_by_hand():
    usage = usage_of([6, 0, 1, 1])
    entropy = -(0.75 * math.log(0.75) + 2 * 0.125 * math.log(0.125))
    assert usage["utilisation"] == 0.75
    assert usage["entropy"] == pytest.approx(entropy)
    assert usage["normalised_entropy"] == pytest.approx(entropy / math.log(4))
    assert usage["largest_code"] == 0.75
    # Half the mean difference between two codes, over the mean.
    differences = [abs(a - b) for a in (6, 0, 1, 1) for b in (6, 0, 1, 1)]
    assert usage["gini"] == pytest.approx(np.mean(differences) / 2 / 2)


def test_one_code_in_all():
    usage = code_usage(np.zeros((3, 2), np.int32), 1)
    assert usage["utilisation"] == [1, 1]
    assert usage["normalised_entropy"] == usage["gini"] == [0, 0]


def test_levels_are_measured_one_by_one():
    _, codes, _ = world()
    usage = code_usage(codes, 5)
    for level in range(3):
        alone = code_usage(codes[:, level : level + 1], 5)
        assert {name: value[level] for name, value in usage.items()} == {
            name: value[0] for name, value in alone.items()
        }
    json.dumps(usage)


# ---------------------------------------------------------------------------------------- of IDs


def fan_out(sids):
    """Mean and largest number of codes after a prefix, by level."""
    mean, most = [], []
    for level in range(sids.shape[1]):
        after = collections.defaultdict(set)
        for sid in sids.tolist():
            after[tuple(sid[:level])].add(sid[level])
        mean.append(sum(map(len, after.values())) / len(after))
        most.append(max(map(len, after.values())))
    return mean, most


@pytest.mark.parametrize(("levels", "size"), [(1, 6), (3, 3), (3, 9), (4, 2)])
def test_ids_against_loops(levels, size):
    _, sids, _ = world(levels=levels, size=size)
    usage = id_usage(sids, size)
    holders = collections.Counter(map(tuple, sids.tolist()))
    mean, most = fan_out(sids)
    assert usage["distinct_ids"] == len(holders)
    assert usage["collision_rate"] == pytest.approx(1 - len(holders) / 80)
    assert usage["largest_collision"] == max(holders.values())
    assert usage["fan_out_mean"] == pytest.approx(mean)
    assert usage["fan_out_max"] == most
    json.dumps(usage)


def test_ids_by_hand():
    sids = np.array([[0, 1], [0, 1], [0, 2], [1, 1]])
    assert id_usage(sids, 4) == {
        "distinct_ids": 3,
        "collision_rate": 0.25,
        "largest_collision": 2,
        "fan_out_mean": [2.0, 1.5],
        "fan_out_max": [2, 2],
    }


# -------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("block", [7, 80, 1 << 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reconstruction_against_numpy(monkeypatch, block, dtype):
    monkeypatch.setattr(reports, "BLOCK", block)
    x, codes, codebooks = world()
    x = (x + 3).astype(dtype)  # the mean counts
    found = reconstruction(x, codes, decoder(codebooks))
    exact = x.astype(np.float64)
    error = (exact - decode(codes, codebooks)) ** 2
    assert found["reconstruction_loss"] == pytest.approx(error.mean(), rel=1e-5)
    spread = ((exact - exact.mean(0)) ** 2).sum()
    ratio = found["reconstruction_loss_normalised"]
    assert ratio == pytest.approx(error.sum() / spread, rel=1e-5)


def test_reconstruction_at_its_ends():
    x, codes, codebooks = world()
    exact = reconstruction(decode(codes, codebooks), codes, decoder(codebooks))
    assert exact == {"reconstruction_loss": 0, "reconstruction_loss_normalised": 0}
    mean = reconstruction(x, codes, lambda codes: np.tile(x.mean(0), (len(codes), 1)))
    assert mean["reconstruction_loss_normalised"] == pytest.approx(1)
    assert mean["reconstruction_loss"] == pytest.approx(x.var(0).mean(), rel=1e-5)
    same = np.ones((3, 4), np.float32)  # no variance to divide by
    constant = reconstruction(same, codes[:3], lambda codes: np.ones((len(codes), 4), np.float32))
    assert constant["reconstruction_loss_normalised"] == 0


# ------------------------------------------------------------------------------------ neighbours


def brute_force(x, row, most):
    distance = ((x.astype(np.float64) - x[row]) ** 2).sum(1)
    distance[row] = np.inf
    return set(np.argsort(distance)[:most].tolist())


def test_nearest_rows_against_brute_force():
    x, _, _ = world(items=300)
    queries = np.arange(5, 295)  # more than a block
    near = nearest_rows(x, queries, 10)
    assert near.shape == (290, 10)
    assert [set(row) for row in near.tolist()] == [brute_force(x, row, 10) for row in queries]


def test_neighbours_kept_against_brute_force():
    """All items are queries and candidates here; no two share an ID, so that there are no ties."""
    _, codes, codebooks = world()
    codes = np.unique(codes, axis=0)
    y, noise = decode(codes, codebooks), np.random.default_rng(1).standard_normal((len(codes), 4))
    x = y + 0.3 * noise.astype(np.float32)
    rows = range(len(codes))
    kept = [len(brute_force(x, row, 10) & brute_force(y, row, 10)) / 10 for row in rows]
    assert 0.2 < np.mean(kept) < 0.9
    assert neighbours_kept(x, codes, decoder(codebooks)) == pytest.approx(np.mean(kept))


def test_neighbours_at_the_ends():
    x, codes, codebooks = world()
    assert neighbours_kept(x, codes, lambda codes: x) == 1
    far = np.random.default_rng(9).permutation(80)
    assert neighbours_kept(x, codes, lambda codes: x[far]) < 0.35  # 10 of 79 by chance
    assert neighbours_kept(x[:1], codes[:1], decoder(codebooks)) == 1
    assert neighbours_kept(x[:2], codes[:2], decoder(codebooks)) == 1  # one neighbour there is


def test_a_large_catalogue_is_sampled_by_a_fixed_seed(monkeypatch):
    monkeypatch.setattr(reports, "CANDIDATES", 50)
    monkeypatch.setattr(reports, "QUERIES", 20)
    x, codes, codebooks = world()
    asked = []

    def decoding(codes):
        asked.append(len(codes))
        return decode(codes, codebooks)

    found = neighbours_kept(x, codes, decoding)
    assert asked == [50]
    assert found == neighbours_kept(x, codes, decoding)
    assert len({found, *(neighbours_kept(x, codes, decoding, seed=seed) for seed in range(5))}) > 1


def test_quality_of_an_appended_code():
    """The IDs have a level that the codes have not."""
    x, codes, codebooks = world()
    sids = np.concatenate([codes, np.zeros((80, 1), np.int32)], axis=1)
    reading = quality(x, sids, codes, 5, decoder(codebooks))
    assert reading.items() >= id_usage(sids, 5).items()
    assert reading.items() >= code_usage(codes, 5).items()
    assert reading.items() >= reconstruction(x, codes, decoder(codebooks)).items()
    assert 0 < reading["neighbours_kept"] <= 1
    assert (len(reading["entropy"]), len(reading["fan_out_mean"])) == (3, 4)
    json.dumps(reading)


def test_agreement():
    groups = np.repeat(np.arange(4), 25)
    assert agreement(groups, groups) == pytest.approx(1)
    assert agreement(groups, 3 - groups) == pytest.approx(1)  # names of groups do not matter
    assert abs(agreement(groups, np.random.default_rng(0).permutation(groups))) < 0.1


# ----------------------------------------------------------------------------------------- words


def spoken() -> tuple[SemanticIds, list]:
    """Nine items: wars under code 2, cats under code 0, one silent item under code 1."""
    sids = [[2, 0], [2, 1], [2, 2], [2, 3], [2, 3], [0, 0], [0, 1], [0, 2], [1, 0]]
    texts = ["the war at sea", "the war in space", "The WAR of stars", "the war, again", "war the"]
    texts += ["the cat sleeps", "a cat and the dog", "cat in the hat", None]
    return SemanticIds(np.array(sids, np.int32), np.zeros((2, 4, 1), np.float32), {}), texts


def test_words_tell_a_code_from_the_others():
    ids, texts = spoken()
    shown = readable_codes(ids, texts)
    assert [(code["code"], code["items"]) for code in shown] == [(2, 5), (0, 3), (1, 1)]
    assert shown[0]["words"][0] == "war"
    assert shown[1]["words"][0] == "cat"
    assert "war" not in shown[1]["words"]
    # In all texts alike: it scores below the word that one code has to itself.
    assert all(code["words"].index("the") > 0 for code in shown[:2] if "the" in code["words"])
    assert shown[2]["words"] == []
    assert shown[2]["examples"] == [{"id": "1-0", "text": "(no text)"}]
    json.dumps(shown)


def test_examples_spread_over_the_second_code():
    ids, texts = spoken()
    shown = readable_codes(ids, texts, items=3)
    assert [example["id"] for example in shown[0]["examples"]] == ["2-0", "2-2", "2-3"]
    assert [example["text"] for example in shown[1]["examples"]] == texts[5:8]


def test_titles_are_shown_and_texts_are_read():
    ids, texts = spoken()
    titles = [f"title {row}" for row in range(7)] + [None, None]
    shown = readable_codes(ids, texts, titles, codes=2)
    assert len(shown) == 2
    assert shown[0]["words"][0] == "war"
    words = [example["text"] for example in shown[1]["examples"]]
    assert words == ["title 5", "title 6", "cat in the hat"]  # the last has no title


def test_an_example_is_one_line():
    """The text of an item may be a page long."""
    ids, texts = spoken()
    texts[5] = "a cat\n\n# sat | on\tthe mat " + "for long " * 500
    shown = readable_codes(ids, texts)
    example = shown[1]["examples"][0]["text"]
    assert example.startswith("a cat # sat | on the mat for long")
    assert len(example) == 80


def test_one_level_of_codes_reads_too():
    ids, texts = spoken()
    one = SemanticIds(ids.sids[:, :1], ids.codebooks[:1], {})
    assert readable_codes(one, texts)[0]["examples"][0]["id"] == "2"


# ---------------------------------------------------------------------------------------- output


@pytest.fixture(params=["plain", "appended"])
def reported(request):
    """IDs and a report of three readings, as `build` makes them."""
    x, codes, codebooks = world()
    sids = codes
    if request.param == "appended":
        sids = np.concatenate([codes, np.arange(80)[:, None] % 5], axis=1).astype(np.int32)
    ids = SemanticIds(sids, codebooks, {})
    other = np.random.default_rng(3).integers(0, 5, codes.shape).astype(np.int32)
    texts = [f"words of item {row}" for row in range(80)]
    report = {
        "dataset": "toy",
        "items": 80,
        "codebook_size": 5,
        "vectors": "vectors of v.npy",
        "quality": {
            "stored": quality(x, sids, codes, 5, decoder(codebooks)),
            "nearest": quality(x, other, other, 5, decoder(codebooks)),
        },
        "stability": 0.4321,
        "readable": readable_codes(ids, texts, [f"[b]title[/b] {row}" for row in range(80)]),
    }
    return ids, report


def numbers_of(report):
    """What a reader looks for, as it is written."""
    for reading in report["quality"].values():
        for level in range(3):
            yield f"{reading['entropy'][level]:.3f}"
            yield f"{reading['normalised_entropy'][level]:.3f}"
            yield f"{reading['gini'][level]:.3f}"
            yield f"{reading['utilisation'][level]:.1%} of 5"
            yield f"{reading['largest_code'][level]:.2%}"
        for mean, most in zip(reading["fan_out_mean"], reading["fan_out_max"], strict=True):
            yield f"{mean:.1f}"
            yield str(most)
        yield f"{reading['distinct_ids']} IDs for 80 items"
        yield f"collision rate {reading['collision_rate']:.2%}"
        yield f"largest {reading['largest_collision']} items"
        yield f"{reading['reconstruction_loss']:.6g}"
        yield f"{reading['reconstruction_loss_normalised']:.4f}"
        yield f"{reading['neighbours_kept']:.1%}"
    yield "0.432"
    for code in report["readable"]:
        yield ", ".join(code["words"])
        yield f"{code['items']} items"
        for example in code["examples"]:
            yield example["id"]
            yield example["text"]


def test_markdown_holds_the_numbers(reported):
    ids, report = reported
    text = reports.markdown(report)
    for words in ("# Semantic IDs of toy", "vectors of v.npy", "(codes.png)", *numbers_of(report)):
        assert words in text
    assert "## IDs as stored" in text
    assert "## Nearest centres" in text
    assert "## Before" not in text
    assert ("| appended |" in text) == (ids.levels == 4)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {9}


def test_the_terminal_shows_the_numbers(reported, capsys, monkeypatch):
    """In 80 columns, as where the output goes into a file."""
    monkeypatch.setenv("COLUMNS", "80")
    ids, report = reported
    reports.show(report)
    printed = capsys.readouterr().out
    for words in ("toy: IDs as stored", "toy: nearest centres", *numbers_of(report)):
        assert words in printed
    assert ("appended" in printed) == (ids.levels == 4)
    table = [line for line in printed.splitlines() if line[:1] in "┏┃┡│└"]
    assert table
    assert max(map(len, table)) <= 80


def test_a_report_without_words(reported, capsys):
    """Given vectors, no text; or an extension, which has no stability."""
    _, report = reported
    short = {name: value for name, value in report.items() if name != "readable"}
    del short["stability"]
    for words in (reports.markdown(short), reports.show(short) or capsys.readouterr().out):
        assert "another seed" not in words
        assert "commonest" not in words


def test_the_plot_is_a_picture(reported, tmp_path):
    ids, report = reported
    reports.draw(tmp_path / "codes.png", ids, report)
    data = (tmp_path / "codes.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000


def test_plotting_leaves_the_backend_alone(reported, tmp_path, monkeypatch):
    """A notebook that saves semantic IDs must show its plots afterwards."""
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "svg")
    matplotlib.use("svg")
    reports.draw(tmp_path / "codes.png", *reported)
    assert matplotlib.get_backend().lower() == "svg"
