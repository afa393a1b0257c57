"""KuaiRand: files in the published format, every kind of bad input, and the real samples."""

import gzip
import json

import polars as pl
import pytest

from experiments.prepare import PrepareConfig, main
from onerec_jax import cli
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.sources.kuairand import COUNTS, KuaiRandConfig, prepare_kuairand
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError

HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,"
    "is_rand,tab"
)
T = 1_650_000_000_000


def action(user, video, time, play=1500, duration=3000, rand=0, **other):
    """One row of a log; `other` replaces fields by name."""
    values = [
        user,
        video,
        20220415,
        1300,
        time,
        1,
        0,
        0,
        0,
        1,
        0,
        1,
        play,
        duration,
        250,
        0,
        1,
        rand,
    ]
    fields = dict(zip(HEADER.split(","), [*values, 4], strict=True)) | other
    return ",".join(map(str, fields.values()))


EARLY = [action(7, 20, T + 5), action(7, 10, T), action(7, 30, T + 1), action(3, 10, T + 2000)]
LATE = [action(3, 20, T + 9000, is_hate=1, play=9000), action(3, 40, T + 8000, play=0)]
RANDOM = [action(7, 40, T + 7000, rand=1)]
USERS = (
    "user_id,user_active_degree,is_live_streamer,follow_user_num,follow_user_num_range,onehot_feat4",
    '7,full_active,-124,5,"(0,10]",2.0',
    "9,UNKNOWN,0,0,0,",
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
    "server_height,music_id,music_type,tag",
    '10,5,NORMAL,2022-04-10,Web,0.0,3000.0,720.0,1280.0,9155697141,9.0,"12,65"',
    "20,5,AD,soon,UNKNOWN,0.0,,720.0,1280.0,0,,",
    "40,6,NORMAL,2022-04-11,Web,0.0,0.0,720.0,1280.0,1,4.0,3",
    "50,6,NORMAL,2022-04-11,Web,0.0,1000.0,720.0,1280.0,1,4.0,3",
)
STATISTICS = ("video_id,counts,show_cnt", "10,66,75.212", "50,3,1.5")


def put(path, *lines):
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def files(tmp_path):
    """KuaiRand-27K with all its files, some in parts, some packed."""
    data = tmp_path / "KuaiRand-27K" / "data"
    data.mkdir(parents=True)
    put(data / "log_standard_4_08_to_4_21_27k_part1.csv", HEADER, *EARLY[:2])
    put(data / "log_standard_4_08_to_4_21_27k_part2.csv.gz", HEADER, *EARLY[2:])
    put(data / "log_standard_4_22_to_5_08_27k_part1.csv", HEADER, *LATE)
    put(data / "log_random_4_22_to_5_08_27k.csv", HEADER, *RANDOM)
    put(data / "user_features_27k.csv", *USERS)
    put(data / "video_features_basic_27k.csv", *VIDEOS)
    put(data / "video_features_statistic_27k_part1.csv", *STATISTICS[:2])
    put(data / "video_features_statistic_27k_part2.csv", STATISTICS[0], STATISTICS[2])
    return data


def prepared(path, out, config=None, **options):
    """The data set, and the counts that are not 0."""
    prepare_kuairand(path, out, config, overwrite=True, **options)
    about = json.loads((out / "dataset.json").read_text())
    assert list(about["preparation"]) == list(COUNTS)
    return load_dataset(out), {name: n for name, n in about["preparation"].items() if n}


def one_log(tmp_path, *rows, header=HEADER):
    """A log of `rows` and three plain actions of user 1."""
    path = tmp_path / "log.csv"
    plain = [action(1, video, T + video * 10**6) for video in (1, 2, 3)]
    put(path, header, *plain, *rows)
    return path


@pytest.mark.parametrize(("block", "memory"), [(1, 1), (2**20, 2**20)])
def test_published_files(files, tmp_path, block, memory):
    sizes = {"block_bytes": block, "rows_in_memory": memory}
    dataset, counts = prepared(files.parent, tmp_path / "out", **sizes)
    log = dataset.table("interactions")
    assert log.select("user_id", "item_id", "position", "time_s").rows() == [
        (3, 10, 0, T // 1000 + 2),
        (3, 40, 1, T // 1000 + 8),
        (3, 20, 2, T // 1000 + 9),
        (7, 10, 0, T // 1000),
        (7, 30, 1, T // 1000),  # within a second by milliseconds
        (7, 20, 2, T // 1000),
        (7, 40, 3, T // 1000 + 7),
    ]
    assert log.row(2, named=True) == {
        **{"user_id": 3, "item_id": 20, "position": 2, "time_s": T // 1000 + 9},
        **{"click": 1, "like": 0, "follow": 0, "comment": 0, "forward": 1, "hate": 1},
        **{"long_view": 1, "profile_enter": 1, "is_rand": 0, "tab": 4},
        **{"playtime_s": 9, "profile_stay_s": 0.25, "comment_stay_s": 0, "duration_s": 3},
    }
    assert log["is_rand"].to_list() == [0, 0, 0, 0, 0, 0, 1]
    assert counts == {
        "rows_read": 7,
        "unreadable_upload_date": 1,
        "video_duration_not_positive": 1,
        "playtime_above_duration": 1,
        "out_of_time_order": 2,
        "videos_without_features": 1,
        "users_without_features": 1,
        "users_without_actions": 1,
    }
    assert dataset.users.to_dicts() == [
        {"user_id": 3, **dict.fromkeys(USERS[0].split(",")[1:])},
        {
            **{"user_id": 7, "user_active_degree": "full_active", "is_live_streamer": -124},
            **{"follow_user_num": 5, "follow_user_num_range": "(0,10]", "onehot_feat4": 2},
        },
    ]
    items = dataset.items
    assert items["item_id"].to_list() == [10, 20, 30, 40, 50]
    assert items["tags"].to_list() == [["12", "65"], [], None, ["3"], ["3"]]
    assert items["duration_s"].to_list() == [3, None, None, None, 1]
    assert items["author_id"].to_list() == [5, 5, None, 6, 6]
    assert items["upload_date"].cast(pl.String).to_list()[:2] == ["2022-04-10", None]
    assert items["music_type"].to_list() == [9, None, None, 4, 4]
    assert not {"text", "stat_counts"} & set(items.columns)
    assert dataset.name == "kuairand-27k"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_which_files_are_read(files, tmp_path):
    out = tmp_path / "out"
    whole, _ = prepared(files, out)  # the folder data itself
    config = KuaiRandConfig(logs="standard", statistic_features=True)
    standard, _ = prepared(files.parent, out, config)
    assert standard.interactions.height == 6
    assert standard.items["stat_counts"].to_list() == [66, None, None, None, 3]
    assert standard.items["stat_show_cnt"].to_list()[0] == pytest.approx(75.212)
    with pytest.raises(InputError, match="user 7 has 1"):
        prepared(files, out, KuaiRandConfig(logs="random"))

    again = (files / "log_standard_4_22_to_5_08_27k_part1.csv").read_bytes()
    (files / "log_standard_4_22_to_5_08_27k_part1.csv.gz").write_bytes(gzip.compress(again))
    assert prepared(files, out)[0].fingerprint == whole.fingerprint  # not read twice
    for kind in ("user_features_27k", "video_features_basic_27k"):
        (files / f"{kind}.csv").unlink()
    dataset, counts = prepared(files, out)
    assert dataset.items.columns == ["item_id"]
    assert dataset.users.columns == ["user_id"]
    assert "videos_without_features" not in counts


def test_a_log_without_some_columns(tmp_path):
    header = "user_id,video_id,time_ms,is_click"
    path = one_log(tmp_path)
    put(path, header, *(f"1,{v},{T + v},1" for v in (4, 5, 6)))
    dataset, counts = prepared(path, tmp_path / "out")
    first = ["user_id", "item_id", "position", "time_s", "click"]
    assert dataset.table("interactions").columns == first
    assert counts == {"rows_read": 3}
    assert "tab" in dataset.meta["columns_missing"]["log.csv"]

    data = tmp_path / "data"
    data.mkdir()
    put(data / "log_standard_4_08_to_4_21_1k.csv", header, *(f"1,{v},{T + v},1" for v in (4, 5)))
    put(data / "log_random_4_22_to_5_08_1k.csv", HEADER, action(1, 6, T + 9))
    dataset, _ = prepared(tmp_path, tmp_path / "out")
    assert dataset.interactions["tab"].to_list() == [None, None, 4]
    assert dataset.interactions["click"].to_list() == [1, 1, 1]


@pytest.mark.parametrize(
    ("row", "expected", "counted"),
    [
        (action(1, 9, T // 1000), {"time_s": T // 1000}, "times_in_seconds"),
        (action(1, 9, T * 1000 + 7), {"time_s": T // 1000}, "times_in_microseconds"),
        (action(1, 9, T, play=-1), {"playtime_s": None}, "negative_playtime"),
        (action(1, 9, T, profile_stay_time=-5), {"profile_stay_s": None}, "negative_profile_stay"),
        (action(1, 9, T, comment_stay_time=-5), {"comment_stay_s": None}, "negative_comment_stay"),
        (action(1, 9, T, duration=0), {"duration_s": None}, "duration_not_positive"),
        (action(1, 9, T, play=3001), {"playtime_s": 3.001}, "playtime_above_duration"),
        (action(1, 9, f"{T}.0"), {"time_s": T // 1000}, "integers_written_otherwise"),
        (action(1, 9, T, is_like=" 1"), {"like": 1}, "integers_written_otherwise"),
        (action(1, 9, T, is_like=""), {"like": None}, None),
        ("\n" + action(1, 9, T), {"like": 0}, "blank_lines"),
        (action(1, 9, T) + "\n1,9,2022", {"like": 0}, None),
    ],
)
def test_accepted_and_counted(tmp_path, row, expected, counted):
    path = one_log(tmp_path, row)
    if row.endswith("\n1,9,2022"):
        path.write_bytes(path.read_bytes()[:-1])  # no line end after the half line
        counted = "half_lines_dropped"
    dataset, counts = prepared(path, tmp_path / "out")
    disorder = {"out_of_time_order": 1}  # the row stands last and is the earliest
    assert counts == {"rows_read": 4, **disorder, **({counted: 1} if counted else {})}
    got = dataset.interactions.filter(pl.col("item_id") == 9).row(0, named=True)
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_marks_duplicates_and_long_users(tmp_path):
    path = one_log(tmp_path, action(1, 4, T), action(1, 4, T, hourmin=900), action(1, 5, T))
    plain, counts = prepared(path, tmp_path / "out")
    assert counts == {"rows_read": 6, "out_of_time_order": 1, "duplicates_dropped": 1}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    marked, counts = prepared(path, tmp_path / "out")
    assert marked.fingerprint == plain.fingerprint
    assert counts["files_with_bom"] == counts["files_with_crlf"] == 1
    config = KuaiRandConfig(max_user_actions=3)
    dataset, counts = prepared(path, tmp_path / "out", config)
    assert dataset.item_rows.size == 3
    assert dataset.interactions["item_id"].to_list() == [1, 2, 3]
    assert (counts["users_over_limit"], counts["actions_over_limit_dropped"]) == (1, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (action(1, "x", T), "row 4, column video_id: 'x' is no integer"),
        (action("", 2, T), "row 4, column user_id: an empty value is no user_id"),
        (action(1, 2, ""), "row 4, column time_ms: an empty value is no time_ms"),
        (action(1, 2, -5), "row 4, column time_ms: -5 is no Unix time"),
        (action(1, 2, 10**18), "is no Unix time in s, ms or µs"),
        (action(1, 2, T, is_like=2), "row 4, column is_like: 2 is neither 0 nor 1"),
        (action(1, 2, T, play=1.5), "row 4, column play_time_ms: '1.5' is no integer"),
        (action(1, 2, T, tab=1000), "row 4, column tab: 1000 is no page"),
        ("1,2,3", "row 4: has 3 fields, but the header 19"),
    ],
)
def test_refused_rows(tmp_path, row, message):
    with pytest.raises(InputError, match=r"log\.csv, .*" + message):
        prepared(one_log(tmp_path, row, action(1, 8, T)), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv"}


def test_refused_files(files, tmp_path):
    out = tmp_path / "out"
    for column in ("user_id", "video_id", "time_ms"):
        path = one_log(tmp_path, header=HEADER.replace(column, "other"))
        with pytest.raises(InputError, match=rf"log\.csv: no column '{column}' \(it has "):
            prepared(path, out)
    put(path, HEADER)
    with pytest.raises(InputError, match="holds no interactions"):
        prepared(path, out)
    with pytest.raises(InputError, match="no such file or folder"):
        prepared(tmp_path / "none", out)
    with pytest.raises(InputError, match="holds features and no log"):
        prepared(files / "user_features_27k.csv", out)
    put(files / "video_features_basic_pure.csv", *VIDEOS)
    with pytest.raises(InputError, match="mixes the editions 27k and pure"):
        prepared(files, out)
    (files / "video_features_basic_pure.csv").unlink()
    for name, lines, message in [
        ("video_features_basic_27k", (*VIDEOS, VIDEOS[1]), "video_id 10 is a duplicate"),
        ("video_features_basic_27k", VIDEOS[:1], "holds no rows"),
        ("video_features_basic_27k", ("video_id,author_id", "1,2.5"), "author_id: 2.5 is no int"),
        ("user_features_27k", ("user,x", "1,2"), "no column 'user_id'"),
    ]:
        put(files / f"{name}.csv", *lines)
        with pytest.raises(InputError, match=message):
            prepared(files, out)
        put(files / f"{name}.csv", *(USERS if name.startswith("user") else VIDEOS))
    for log in files.glob("log_*"):
        log.unlink()
    with pytest.raises(InputError, match=r"has no log_\*\.csv \(it has user_features_27k\.csv"):
        prepared(files, out)


def test_command_line(files, tmp_path, capsys):
    flags = ["--source", "kuairand", "--path", str(files), "--out", str(tmp_path / "out")]
    cli.run(main, PrepareConfig, argv=[*flags, "--min-user-actions", "4"])
    printed = capsys.readouterr().out
    assert "kuairand-27k, split leave-one-out" in printed
    assert "playtime above duration" in printed
    assert "peak memory" in printed
    assert load_dataset(tmp_path / "out").users["user_id"].to_list() == [7]
    for wrong in (
        ["--kuairand.max-user-actions", "-1"],
        ["--table.user", "who"],
        ["--split", "time", "--source", "movielens", "--kuairand.logs", "random", "--overwrite"],
    ):
        with pytest.raises(SystemExit):
            cli.run(main, PrepareConfig, argv=[*flags[2:], *flags[:2], *wrong])
        assert "error: --" in capsys.readouterr().err


def test_real_rows(real_data, tmp_path):
    folder = real_data / "kuairand"
    dataset, counts = prepared(folder, tmp_path / "out", rows_in_memory=3000)
    assert dataset.name == "kuairand-27k"
    assert dataset.interactions.height + counts["duplicates_dropped"] == 29_540
    assert (dataset.num_users, dataset.num_items) == (473, 6779)
    make_split(dataset)
    dataset, counts = prepared(folder / "KuaiRand-1K", tmp_path / "out", split="time")
    assert (dataset.interactions.height, dataset.num_users) == (124, 6)
    assert dataset.meta["columns_missing"] == {"log_random_4_22_to_5_08_1k.csv": []}
    with pytest.raises(InputError, match=r"KuaiRand-Pure: has no log_\*\.csv"):
        prepared(folder / "KuaiRand-Pure", tmp_path / "out")
    with pytest.raises(InputError, match="no column 'time_ms'"):
        prepared(folder / "kuairand_pure_merged_200.csv", tmp_path / "out")


def test_real_features(real_data, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    published = real_data / "kuairand" / "KuaiRand-Pure" / "data"
    for file in published.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    rows = [action(user, 100 * user + video, T + video) for user in (0, 1) for video in (1, 2, 3)]
    put(data / "log_standard_4_08_to_4_21_pure.csv", HEADER, *rows)
    dataset, counts = prepared(tmp_path, tmp_path / "out")
    assert dataset.num_items == 7583
    assert dataset.items["author_id"].n_unique() == 6510
    assert len(dataset.users.columns) == 31
    assert dataset.users["follow_user_num_range"].to_list() == ["500+", "(250,500]"]
    assert counts["users_without_actions"] == 27_285 - 2
