"""Metrics as JSON lines, one row a logged step."""

import json
import math
import pathlib
import warnings

import jax
import numpy as np

from onerec_jax.files import write_text


def _plain(value):
    """Device or NumPy values as JSON numbers, seven digits (float32 holds no more)."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        return value
    if array.ndim:
        return [_plain(x) for x in array]
    if array.dtype.kind == "f" and np.isnan(array):
        return None  # NaN is no JSON
    return float(f"{float(array):.7g}") if array.dtype.kind == "f" else int(array)


class MetricsLog:
    """Append-only `metrics.jsonl`; every row is a flat object with a `step`."""

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)

    def write(self, row: dict) -> None:
        if jax.process_index():  # one process writes for all
            return
        with self.path.open("a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")

    def read(self) -> list[dict]:
        """All whole rows; a last line torn by a crash is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut_after(self, step: int) -> None:
        """Drops rows past `step`: a resumed run writes them again."""
        if self.path.exists() and not jax.process_index():
            kept = [row for row in self.read() if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def mean_rows(rows: list[dict]) -> dict:
    """Mean of each metric over the steps that have it (not NaN); arrays keep their shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no step has it: NaN it stays
        return {key: np.nanmean([np.asarray(row[key]) for row in rows], axis=0) for key in rows[0]}


def late_mean(rows: list[dict], name: str, share: float = 0.2) -> float:
    """Mean of a metric over the last part of the logged rows that have it; NaN without any."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return math.nan
    return float(np.mean(values[-max(round(share * len(values)), 1) :]))


def first_non_finite(rows: list[dict]) -> tuple[int, str] | None:
    """Index and name of the first metric that is NaN or infinite."""
    for i, row in enumerate(rows):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(row[name])):
                return i, name
    return None
