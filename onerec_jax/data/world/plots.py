"""Does a log look like a log? Four plots and a table of rates, beside a real log if given."""

import pathlib

import numpy as np
import polars as pl

from onerec_jax.data.schema import FEEDBACK, Dataset

DURATION_EDGES_S = (0, 7, 12, 18, 30, 45, 60, 90, 120, 180, 300, np.inf)
SESSION_GAP_S = 1800
"""A pause of half an hour ends a session where the source does not say."""


def rates(dataset: Dataset) -> dict[str, float]:
    """Means over exposures of the feedback columns, `is_rand`, seconds watched and watch ratio.

    What the source lacks is left out; the ratio counts exposures of known, positive duration.
    """
    names = [*FEEDBACK, "is_rand", "playtime_s"]
    columns = {name: dataset.column(name) for name in names}
    result = {name: float(np.nanmean(v)) for name, v in columns.items() if v is not None}
    durations, playtime = _durations(dataset), columns["playtime_s"]
    if durations is not None and playtime is not None:
        known = durations > 0
        result["watch_ratio"] = float(np.nanmean(playtime[known] / durations[known]))
    return result


def world_plots(
    dataset: Dataset, path: pathlib.Path, real: Dataset | None = None
) -> dict[str, dict[str, float]]:
    """Writes one PNG of four plots and returns the rates of each data set by name.

    Popularity by rank, watch time by duration, rates of feedback, and lengths of sessions; curves
    whose columns are missing are left out.

    Args:
      dataset: of a world, or any other.
      path: PNG to write.
      real: a real log to show beside it.
    """
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend

    shown = [dataset] if real is None else [dataset, real]
    signals = [name for name in FEEDBACK if any(d.column(name) is not None for d in shown)]
    figure = Figure(figsize=(11, 8))
    axes = figure.subplots(2, 2)
    popularity, watch, bars, sessions = axes.ravel()
    for number, data in enumerate(shown):
        counts = np.sort(np.bincount(data.item_rows, minlength=data.num_items))[::-1]
        counts = counts[counts > 0]
        popularity.loglog(np.arange(1, len(counts) + 1), counts, label=data.name)
        _plot_watch(watch, data)
        lengths = _session_lengths(data)
        if lengths is not None:
            edges = np.unique(np.geomspace(1, 201, 30).astype(int))
            shown_lengths = np.minimum(lengths, 200)
            sessions.hist(shown_lengths, edges, density=True, histtype="step", label=data.name)
        values = {k: v for k, v in rates(data).items() if k in signals}
        place = [signals.index(name) + 0.4 * number for name in values]
        bars.bar(place, list(values.values()), width=0.4, label=data.name)
    popularity.set(title="popularity", xlabel="rank of item", ylabel="exposures")
    watch.set(title="watch time", xlabel="duration, s", ylabel="mean watched, s", xscale="log")
    bars.set(title="feedback", ylabel="share of exposures", yscale="log")
    bars.set_xticks(np.arange(len(signals)), signals, rotation=45, ha="right")
    sessions.set(title="sessions", xlabel="exposures", ylabel="density", xscale="log")
    for axis in axes.ravel():
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return {data.name: rates(data) for data in shown}


def _durations(dataset: Dataset) -> np.ndarray | None:
    """Float64 [N], seconds of the item of every exposure, NaN where unknown."""
    if "duration_s" in dataset.interactions.columns:
        logged = dataset.interactions["duration_s"]
    elif "duration_s" in dataset.items.columns:
        logged = dataset.items["duration_s"][dataset.item_rows]
    else:
        return None
    return logged.cast(pl.Float64).fill_null(np.nan).to_numpy()


def _plot_watch(axis, dataset: Dataset) -> None:
    """Mean seconds watched by bucket of duration."""
    durations, playtime = _durations(dataset), dataset.column("playtime_s")
    if durations is None or playtime is None:
        return
    good = (durations > 0) & ~np.isnan(playtime)
    durations, playtime = durations[good], playtime[good]
    bucket = np.digitize(durations, DURATION_EDGES_S)
    rows = [bucket == b for b in np.unique(bucket)]
    axis.plot(
        [np.exp(np.log(durations[r]).mean()) for r in rows],
        [playtime[r].mean() for r in rows],
        marker="o",
        label=dataset.name,
    )


def _session_lengths(dataset: Dataset) -> np.ndarray | None:
    """Exposures of every session, int64 `[sessions]`; by pauses where the source has no session."""
    user, session = dataset.column("user_row"), dataset.column("session")
    if session is None:
        time_s = dataset.column("time_s")
        if time_s is None:
            return None
        session = np.cumsum(np.diff(time_s, prepend=time_s[0]) > SESSION_GAP_S)
    new = (np.diff(user) != 0) | (np.diff(session) != 0)
    return np.diff(np.concatenate([[0], np.flatnonzero(new) + 1, [len(user)]]))
