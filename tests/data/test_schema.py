"""Building, saving and loading data sets."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest

from onerec_jax.data.schema import (
    FILES,
    build_dataset,
    drop_short_users,
    load_dataset,
    save_dataset,
)
from onerec_jax.errors import InputError

META = {"origin": "a test", "licence": "none"}


def build(interactions, items=None, **options):
    items = pl.DataFrame({"item_id": [10, 9, 2]}) if items is None else items
    return build_dataset(
        "toy", items, None, pl.DataFrame(interactions), meta=META, split="leave-one-out", **options
    )


def toy():
    """User 1 acts on 2, 10, 9 (by time), user 20 on 9 and 9."""
    return build(
        {
            "user_id": [20, 1, 1, 20, 1],
            "item_id": [9, 9, 2, 9, 10],
            "time_s": [5, 30, 10, 4, 20],
            "rating": [1.0, 2.0, 3.0, None, 5.0],
        }
    )


def test_rows_are_sorted_numbered_and_typed():
    dataset = toy()
    assert dataset.items["item_id"].to_list() == [2, 9, 10]  # by value, not by digits
    assert dataset.users["user_id"].to_list() == [1, 20]
    assert dataset.offsets.tolist() == [0, 3, 5]
    assert dataset.item_rows.tolist() == [0, 2, 1, 1, 1]
    assert dataset.column("position").tolist() == [0, 1, 2, 0, 1]
    assert dataset.column("time_s").tolist() == [10, 20, 30, 4, 5]
    assert dataset.column("click") is None
    np.testing.assert_array_equal(dataset.column("rating"), [3, 5, 2, np.nan, 1])
    types = {"position": np.int32, "user_row": np.int32, "item_row": np.int32, "time_s": np.int64}
    for name, dtype in types.items():
        assert dataset.column(name).dtype == dtype
    assert dataset.offsets.dtype == np.int64
    assert dataset.item_rows.dtype == np.int32


def test_without_time_the_source_order_counts():
    dataset = build({"user_id": [1, 1, 1], "item_id": [10, 2, 9]})
    assert dataset.item_rows.tolist() == [2, 0, 1]
    assert "time_s" not in dataset.interactions.columns
    assert dataset.meta["order"] == "source order"


@pytest.mark.parametrize(("by_item", "order"), [(False, [10, 2, 9]), (True, [2, 10, 9])])
def test_ties_in_time(by_item, order):
    items = pl.Series("item_id", [10, 2, 9])
    rows = {"user_id": [1, 1, 1], "item_id": items, "time_s": [7, 7, 8]}
    dataset = build(rows, ties=items if by_item else None)
    assert dataset.interactions["item_id"].to_list() == order


def test_string_ids_sort_as_strings():
    dataset = build(
        {"user_id": ["b", "a"], "item_id": ["x10", "x9"]},
        items=pl.DataFrame({"item_id": ["x9", "x10"]}),
    )
    assert dataset.items["item_id"].to_list() == ["x10", "x9"]
    assert dataset.item_rows.tolist() == [1, 0]


def test_fingerprint_follows_everything_that_is_computed_from():
    """Stages reuse what they made for a data set only if nothing of it has changed."""
    rows = {"user_id": [1, 1, 1], "item_id": [10, 2, 9]}
    assert build(rows).fingerprint == build(rows).fingerprint
    texts = pl.DataFrame({"item_id": [2, 9, 10], "text": ["a", "b", "c"]})
    datasets = [
        build(rows),
        build({**rows, "rating": [1.0, 2.0, 3.0]}),
        build({**rows, "rating": [1.0, 2.0, 4.0]}),
        build({**rows, "time_s": [1, 2, 3]}),
        build({**rows, "item_id": [2, 10, 9]}),
        build({**rows, "user_id": [1, 1, 2]}),
        build({**rows, "user_id": [2, 2, 2]}),
        build(rows, items=pl.DataFrame({"item_id": [2, 9, 10, 11]})),
        build(rows, items=texts),
        build(rows, items=texts.with_columns(text=pl.Series(["a", "b", "d"]))),
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets)
    other_split = dataclasses.replace(build(rows), meta={**build(rows).meta, "split": "time"})
    assert other_split.fingerprint != build(rows).fingerprint


def test_save_and_load_agree(tmp_path):
    dataset = toy()
    save_dataset(dataset, tmp_path / "new" / "toy")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"toy"}
    assert {path.name for path in (tmp_path / "new" / "toy").iterdir()} == FILES
    loaded = load_dataset(tmp_path / "new" / "toy")
    assert loaded.items.equals(dataset.items)
    assert loaded.users.equals(dataset.users)
    assert loaded.interactions.equals(dataset.interactions)
    assert loaded.fingerprint == dataset.fingerprint
    assert loaded.name == "toy"
    assert loaded.meta["counts"]["interactions"] == 5
    assert loaded.meta["columns"]["interactions"]["time_s"] == "int64, Unix time in seconds"
    on_disk = pl.read_parquet(tmp_path / "new" / "toy" / "interactions.parquet")
    assert "user_row" not in on_disk.columns


def test_saving_replaces_only_when_asked(tmp_path):
    folder = tmp_path / "toy"
    save_dataset(toy(), folder)
    with pytest.raises(InputError, match="--overwrite"):
        save_dataset(toy(), folder)
    other = build({"user_id": [1], "item_id": [2]})
    save_dataset(other, folder, overwrite=True)
    assert load_dataset(folder).fingerprint == other.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_saving_never_touches_what_is_not_ours(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InputError, match="choose another folder"):
            save_dataset(toy(), target, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_data_set(tmp_path, monkeypatch):
    folder = tmp_path / "toy"
    save_dataset(toy(), folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(InputError, match="No space left"):
        save_dataset(build({"user_id": [1], "item_id": [2]}), folder, overwrite=True)
    assert load_dataset(folder).fingerprint == toy().fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_drop_short_users_keeps_the_catalogue():
    dataset = drop_short_users(toy(), 3)
    assert dataset.users["user_id"].to_list() == [1]
    assert dataset.num_items == 3
    assert dataset.offsets.tolist() == [0, 3]
    assert dataset.meta["users_dropped"] == 1
    with pytest.raises(InputError, match="the longest has 3"):
        drop_short_users(toy(), 4)


GOOD = {"user_id": [1, 1], "item_id": [2, 9]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": [2, 77]}, "interactions, row 2, item 77 has no row in items"),
        ({"item_id": [None, 2]}, "row 1, column item_id: an empty value"),
        ({"item_id": ["2", "9"]}, "column item_id: ids are String, but Int64 in items"),
        ({"item_id": [2.0, 9.0]}, "ids must be integers or strings, not Float64"),
        ({"user_id": [1, None]}, "row 2, column user_id: an empty value"),
        ({"time_s": [1, -2]}, "row 2, column time_s: -2 is no whole Unix time"),
        ({"time_s": [1.5, 2.0]}, "row 1, column time_s: 1.5 "),
        ({"time_s": [1.0, float("nan")]}, "row 2, column time_s: nan "),
        ({"time_s": [float("inf"), 1.0]}, "row 1, column time_s: inf "),
        ({"time_s": [None, 1]}, "row 1, column time_s: an empty value"),
        ({"time_s": ["x", "y"]}, r"row 1, column time_s: 'x' .* \(and 1 more rows\)"),
    ],
)
def test_bad_interactions_name_their_row(change, message):
    with pytest.raises(InputError, match=message):
        build({**GOOD, **change})


def test_empty_and_duplicate_tables_are_refused():
    with pytest.raises(InputError, match="no interactions"):
        build({"user_id": [], "item_id": []})
    with pytest.raises(InputError, match="holds no rows"):
        build(GOOD, items=pl.DataFrame({"item_id": []}))
    with pytest.raises(InputError, match="items, row 3, item_id 2 is a duplicate"):
        build(GOOD, items=pl.DataFrame({"item_id": [2, 9, 2]}))


def _edit_json(folder, change):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "users.parquet").unlink(), "users.parquet: no such file"),
        (lambda f: (f / "items.parquet").write_bytes(b"PAR1"), "items.parquet: unreadable Parquet"),
        (lambda f: (f / "dataset.json").write_text("{"), "dataset.json: unreadable"),
        (lambda f: _edit_json(f, {"format": "2"}), "not in the format"),
        (lambda f: _edit_json(f, {"fingerprint": "0"}), "not those that dataset.json names"),
        (
            lambda f: pl.DataFrame({"user_id": [1]}).write_parquet(f / "interactions.parquet"),
            "interactions.parquet: column item_id is missing",
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    save_dataset(toy(), tmp_path / "toy")
    damage(tmp_path / "toy")
    with pytest.raises(InputError, match=message):
        load_dataset(tmp_path / "toy")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder; make it with"):
        load_dataset(tmp_path / "nowhere")
