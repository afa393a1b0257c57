"""One model over one catalogue: checked questions, features, lists."""

import gc
import json
import shutil

import jax
import numpy as np
import polars as pl
import pytest
import serving_world

from onerec_jax.data.batches import BatchBuilder, log_from_histories
from onerec_jax.data.schema import FEEDBACK
from onerec_jax.errors import InputError
from onerec_jax.run import Run
from onerec_jax.serving.catalogue import IdIndex, open_for_serving, publish
from onerec_jax.serving.questions import UnknownId
from onerec_jax.serving.recommender import Recommender

WIDTH = 99
"""More than there are IDs: one shape to compile."""


def by_loops(recommender, run, user, n, *, without=()):
    """Items of one stored user: the beams of the library, unrolled by hand."""
    position = np.diff(run.dataset.offsets)[[user]].astype(np.int32)
    batch = run.builder(np.array([user]), position)
    trie, leaves = recommender.generator.trie, len(run.ids.leaf_sids)
    beams = recommender.generator.search(run.load_best(), batch, trie=trie, width=leaves)
    assert len(np.unique(beams.leaf)) == leaves
    found = []
    for leaf, logp in zip(beams.leaf[0], beams.logp[0], strict=True):
        alike = [row for row in range(run.dataset.num_items) if run.ids.leaf_of_item[row] == leaf]
        alike.sort(key=lambda row: run.tie_order[row])
        found += [(row, logp) for row in alike if leaf >= 0 and row not in without]
    return found[:n]


def pairs(listed):
    return [(item.row, item.logp) for item in listed]


def test_lists_of_stored_users_against_loops(served, recommender):
    run = Run.open(served)
    lists = recommender.recommend([0, "1", 5], n=4, beam_width=WIDTH)
    for user, listed in zip([0, 1, 5], lists, strict=True):
        seen = set(recommender.catalogue.history(user).tolist())
        wanted = by_loops(recommender, run, user, 4, without=seen)
        assert [row for row, _ in pairs(listed)] == [row for row, _ in wanted]
        np.testing.assert_allclose([p for _, p in pairs(listed)], [p for _, p in wanted], rtol=1e-5)
        for item in listed:
            assert item.item_id == run.dataset.items["item_id"][item.row]
            assert item.semantic_id == tuple(run.ids.sids[item.row])


def actions_of(dataset, user):
    """The stored log of a user, as a client would send it."""
    first, end = dataset.offsets[user : user + 2]
    names = {"item_id", "time_s", "rating", "playtime_s", *FEEDBACK}
    table = dataset.interactions[int(first) : int(end)]
    return table.select([c for c in table.columns if c in names]).to_dicts()


def test_actions_in_a_request_become_the_features_that_the_log_has(recommender):
    """No feature may differ between training and serving, holes and ties included."""
    for user in range(serving_world.USERS):
        sent = actions_of(recommender.run.dataset, user)
        assert {None} < {value for action in sent for value in action.values()}
        stored, given = recommender.query(user), recommender.query(sent)
        assert stored.log is None
        assert given.log is not None
        batch = recommender.gather([stored, given])[0]
        for name in ("short", "positive", "lifelong"):
            pathway = getattr(batch, name)
            for x in jax.tree.leaves(pathway):
                # What says nothing at all counts as positive if it is sent, and not in the log.
                if name != "positive" or not any(silent(action) for action in sent):
                    np.testing.assert_array_equal(x[0], x[1])


def silent(action):
    return all(value is None for name, value in action.items() if name not in ("item_id", "time_s"))


def test_bare_items_are_recent_and_positive(recommender):
    log = log_from_histories([[4, 9, 9]], recommender.run.spec)
    builder = BatchBuilder(log, recommender.builder.items, recommender.builder.cfg)
    wanted = builder(np.zeros(1, int), np.array([3]))
    found = recommender.gather([recommender.query(["4", 9, np.int64(9)])])[0]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    as_actions = recommender.gather([recommender.query([4, {"item_id": 9}, {"item_id": "9"}])])[0]
    jax.tree.map(np.testing.assert_array_equal, as_actions, wanted)


def test_times_of_actions_and_of_the_request_count(recommender):
    sent = [{"item_id": 3, "time_s": 100}, {"item_id": 4, "time_s": 4000}]
    latest, later = recommender.query(sent), recommender.query(sent, request_time_s=20_000)
    ages = recommender.gather([latest, later])[0].short.age[:, :2]
    assert ages[0, 0] == 1 < ages[0, 1] < ages[1, 0] < ages[1, 1]
    stored = recommender.query(2), recommender.query(2, request_time_s=2_000_000_000)
    ages = recommender.gather(stored)[0].short.age
    assert (ages[1] > ages[0]).any()


def test_together_as_alone(recommender):
    histories = [3, [1, 2, 3] * 7, [], [{"item_id": 7, "rating": 5.0}]]
    together = recommender.recommend(histories, n=5, beam_width=WIDTH)
    for history, listed in zip(histories, together, strict=True):
        (alone,) = recommender.recommend([history], n=5, beam_width=WIDTH)
        assert [item.row for item in listed] == [item.row for item in alone]
        np.testing.assert_allclose(
            [item.logp for item in listed], [item.logp for item in alone], rtol=1e-5
        )


def test_what_is_excluded_and_what_is_allowed(recommender):
    (everything,) = recommender.recommend([[]], n=99, beam_width=WIDTH)
    assert sorted(item.row for item in everything) == list(range(serving_world.ITEMS))
    logps = [item.logp for item in everything]
    assert logps == sorted(logps, reverse=True)
    order = [item.row for item in everything]

    def rows(history=(), **options):
        (listed,) = recommender.recommend([list(history)], n=99, beam_width=WIDTH, **options)
        return [item.row for item in listed]

    assert rows(exclude=[order[0], "3"]) == [r for r in order if r not in (order[0], 3)]
    authors = recommender.run.dataset.items["author_id"].to_list()
    assert rows(exclude_authors=["a1"]) == [r for r in order if authors[r] != "a1"]
    assert rows(allowed=[5, 9, 20]) == [r for r in order if r in (5, 9, 20)]
    assert rows(allowed=[5, 9, 20], exclude=[9]) == [r for r in order if r in (5, 20)]
    assert 4 not in rows([4, 8])
    assert {4, 8} < set(rows([4, 8], include_seen=True))


@pytest.mark.parametrize(
    ("history", "options", "words"),
    [
        *serving_world.BAD_QUESTIONS,
        ("nobody", {}, "no user 'nobody'"),
        (99, {}, "no user '99'"),
        (10**30, {}, "no user"),
        (1.5, {}, "not float"),
        (None, {}, "not NoneType"),
        ({"item_id": 3}, {}, "not dict"),
        ([], {"exclude_authors": ["a9"]}, "no author 'a9'"),
    ],
)
def test_bad_questions(recommender, history, options, words):
    with pytest.raises(InputError) as error:
        recommender.recommend([3, history], **options)
    message = str(error.value)
    assert message.startswith("history ")
    assert words in message
    assert "\n" not in message
    assert isinstance(error.value, UnknownId) == (" has no " in message and "time_s" not in message)


def test_a_list_of_histories_is_asked_for(recommender):
    with pytest.raises(InputError, match="histories is a list"):
        recommender.recommend("3")


def test_more_than_there_is(recommender):
    """A history of a million actions, and n and beam width of a billion."""
    (listed,) = recommender.recommend([[3] * 10**6], n=10**9, beam_width=10**9)
    assert len(listed) == serving_world.ITEMS - 1


# --------------------------------------------------------------------------------- the catalogue


def test_similar_items_against_all_vectors(recommender):
    run = recommender.run
    vectors = run.ids.vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(0, serving_world.ITEMS, 7):
        rows, cosine = recommender.catalogue.similar(row, 5)
        others = [other for other in range(serving_world.ITEMS) if other != row]
        score = unit[others] @ unit[row]
        best = sorted(zip(-score.round(5), run.tie_order[others], others, strict=True))[:5]
        np.testing.assert_array_equal(rows, [other for _, _, other in best])
        np.testing.assert_allclose(cosine, [-s for s, _, _ in best], atol=1e-4)
    assert len(recommender.catalogue.similar(0, 999)[0]) == serving_world.ITEMS - 1


@pytest.mark.parametrize("ids", [["a", "b b", "ü"], [-4, 7, 2**40]])
def test_ids_of_both_kinds(ids):
    index = IdIndex(pl.Series(ids), "thing")
    assert index.rows(ids).tolist() == index.rows(map(str, ids)).tolist() == [0, 1, 2]
    assert [index[row] for row in range(3)] == ids
    assert index.like(str(ids[1])[:1], 9) == ids[1:2]
    for unknown in ("", "c", " 7 7", "07", 8, 2**70, "9" * 5000):
        with pytest.raises(UnknownId, match="no thing"):
            index.row(unknown)


def test_search_by_title(recommender):
    catalogue, order = recommender.catalogue, recommender.run.tie_order
    found = catalogue.search("ITEM 1", 99).tolist()
    assert sorted(found) == [11, 12, 13, 14, 16, 17, 18, 19, 21]
    assert found == sorted(found, key=lambda row: order[row])
    assert catalogue.search("1 item", 3).tolist() == found[:3]
    assert catalogue.search(".*", 9).tolist() == []
    assert len(catalogue.search("", 99)) == serving_world.ITEMS
    assert catalogue.title(0) == "item 0"
    assert catalogue.describe(1)["title"] == "<b>Bold</b> & “quoted”"


# ------------------------------------------------------------------------- folders that are wrong


def test_half_a_run_folder(copied):
    (copied / "features.json").unlink()
    with pytest.raises(InputError, match="is no run folder"):
        Recommender.load(copied)


def test_no_checkpoint_yet(copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(InputError, match="no validated checkpoint"):
        Recommender.load(copied)
    assert not (copied / "checkpoints").exists()  # a reader writes nothing


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut", "overwritten", "gone", "flipped"])
def test_a_damaged_checkpoint(copied, damage, capfd):
    """One line, and nothing beside it."""
    files = [path for path in (copied / "checkpoints" / "3" / "model").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    middle = len(data) // 2
    if damage == "gone":
        largest.unlink()
    else:
        ends = {
            "cut": b"",
            "overwritten": b"\xff" * (len(data) - middle),
            "flipped": bytes([data[middle] ^ 1]) + data[middle + 1 :],
        }
        largest.write_bytes(data[:middle] + ends[damage])
    with pytest.raises(InputError, match="checkpoint step 3") as error:
        Recommender.load(copied)
    assert "\n" not in str(error.value)
    del error
    gc.collect()  # the reads that Orbax gave up complain here, or not at all
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "metrics/metrics", "model/_METADATA"])
def test_damaged_tables_of_a_checkpoint(copied, name, capfd):
    path = copied / "checkpoints" / "3" / name
    path.write_bytes(b"\x99" + path.read_bytes()[1:])
    with pytest.raises(InputError, match="cannot be read") as error:
        Recommender.load(copied)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_not_finite(copied):
    run = Run.open(copied)
    serving_world.save_checkpoint(run, 5, seed=0, change=lambda x: x * np.inf)
    with pytest.raises(InputError, match=r"step 5 .*is not finite"):
        Recommender.load(copied)


# --------------------------------------------------------------------------- a newer catalogue


def test_a_grown_catalogue_is_served(copied, tmp_path, recommender):
    old = Run.open(copied)
    data, ids = serving_world.grow(tmp_path / "grown", old)
    publish(copied, data, ids)
    grown = Recommender.load(copied)
    assert grown.run.dataset.num_items == serving_world.ITEMS + 3
    new = {100 + serving_world.ITEMS - 3 + i for i in range(3)}
    (listed,) = grown.recommend([[1, 2]], n=99, beam_width=WIDTH)
    assert new < {item.item_id for item in listed}
    (few,) = grown.recommend([[min(new)]], n=99, beam_width=WIDTH)
    assert min(new) not in {item.item_id for item in few}
    # The new author sorts first, and is none that the model knows; the others keep their rows.
    author = grown.builder.items.author
    np.testing.assert_array_equal(author[: serving_world.ITEMS], recommender.builder.items.author)
    np.testing.assert_array_equal(author[serving_world.ITEMS :], 0)


def test_catalogues_that_do_not_fit(copied, tmp_path):
    run = Run.open(copied)
    data, ids = serving_world.grow(tmp_path / "a", run, codebooks=run.ids.codebooks + 1)
    with pytest.raises(InputError, match="has other codebooks"):
        publish(copied, data, ids)
    data, ids = serving_world.grow(tmp_path / "b", run)
    with pytest.raises(InputError, match="no semantic IDs of the items"):
        publish(copied, run.config["data"]["folder"], ids)
    publish(copied, data, ids)
    changed = json.loads((copied / "catalogue.json").read_text())
    changed["data"]["fingerprint"] = "0" * 16
    (copied / "catalogue.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="changed since it was published"):
        open_for_serving(copied)
    (copied / "catalogue.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        open_for_serving(copied)


def test_newer_weights_take_over_what_is_compiled(copied):
    first = Recommender.load(copied)
    asked = {"histories": [1, [], 2, 3], "n": 3, "beam_width": WIDTH}
    before = first.recommend(**asked)
    compiled = first.generator._search._cache_size()
    assert Recommender.load(copied, like=first) is first
    serving_world.save_checkpoint(Run.open(copied), 4, seed=1)
    second = Recommender.load(copied, like=first)
    assert (first.step, second.step) == (3, 4)
    after = second.recommend(**asked)
    assert pairs(after[0]) != pairs(before[0])
    assert second.generator._search is first.generator._search
    assert second.generator._search._cache_size() == compiled  # one shape, one program
    again = first.recommend(**asked)  # still there for its queries
    assert [pairs(listed) for listed in again] == [pairs(listed) for listed in before]
