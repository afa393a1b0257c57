"""Serves what `experiments.export` wrote, without the code that trained it.

    model = Exported.load("exported")
    model.recommend([["318", "296"], [{"item_id": "593", "rating": 5.0}]], n=10)

Needs jax, numpy and flatbuffers; no Flax and no module of the model. The search comes as StableHLO
with the experts, the beams and the trie in it; what is here is the way from a history to its
arrays (the rules of `data/features.py` and `data/batches.py`; tests hold the two together) and from
leaves to items.

A folder holds `manifest.json` (format, settings, hashes), `weights.npz`, `trie.npz`, `items.npz`
and one `search-USERSxWIDTH.jaxexport` for each compiled shape.

Axes: B users, T history slots.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from onerec_jax.data.action_values import TIME, check_actions
from onerec_jax.errors import InputError, shown
from onerec_jax.generation.filter_nodes import FilterNodes
from onerec_jax.serving.questions import Ids, check_options, is_list

FORMAT = "onerec_jax export, version 1"
BUCKETS = 64


def log_bucket(seconds, per_octave=2.0) -> np.ndarray:
    """Logarithmic bucket of seconds, int32; NaN (unknown) is 0."""
    seconds = np.asarray(seconds, np.float64)
    bucket = 1 + np.floor(per_octave * np.log2(1 + np.maximum(seconds, 0)))
    return np.where(np.isnan(seconds), 0, np.minimum(bucket, BUCKETS - 1)).astype(np.int32)


def pack_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes of all texts and where each begins and ends; NumPy would pickle or pad them."""
    data = [text.encode("utf-8", "replace") for text in texts]
    offsets = np.cumsum([0, *map(len, data)])
    return np.frombuffer(b"".join(data), np.uint8), offsets


def unpack_text(packed, row: int) -> str:
    data, offsets = packed
    return data[offsets[row] : offsets[row + 1]].tobytes().decode()


class Exported:
    """An exported model with its catalogue."""

    def __init__(self, manifest: dict, weights: dict, trie: dict, items: dict, programs: dict):
        self.manifest, self.spec = manifest, manifest["spec"]
        self.items = items
        self._programs = {shape: jax.jit(program.call) for shape, program in programs.items()}
        dtypes = manifest["weights"]
        self._weights = {
            name: jax.numpy.asarray(x).astype(dtypes[name]) for name, x in weights.items()
        }
        self._trie = {name: jax.numpy.asarray(x) for name, x in trie.items()}
        levels = range(self.spec["levels"])
        self._nodes = FilterNodes(
            [trie[f"start/{level}"] for level in levels],
            [trie[f"code/{level}"] for level in levels],
            items["leaf"],
        )
        if "id" in items:
            ids = items["id"]
        else:
            packed = items["id_bytes"], items["id_offsets"]
            ids = [unpack_text(packed, row) for row in range(len(items["leaf"]))]
        self.ids = Ids(ids, "item")

    @classmethod
    def load(cls, folder) -> "Exported":
        """Reads a folder.

        Raises:
          InputError: missing, of another format, damaged, or not for this platform.
        """
        folder = pathlib.Path(folder)
        again = "make it with `python -m experiments.export`"
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise InputError(f"{folder} is of the format '{manifest['format']}': {again}")
            for name, digest in manifest["files"].items():
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise InputError(f"{folder / name} is damaged: {again}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder} holds no exported model ({error}): {again}") from error
        if (platform := _platform()) not in manifest["platforms"]:
            raise InputError(
                f"{folder} was exported for {', '.join(manifest['platforms'])}, and this is "
                f"{platform}: export it with --platforms {platform}"
            )
        try:
            from jax import export
        except ImportError as error:
            raise InputError(f"{folder}: pip install flatbuffers ({error})") from error
        tables = []
        for name in ("weights", "trie", "items"):
            with np.load(folder / f"{name}.npz") as file:
                tables.append(dict(file))
        programs = {
            tuple(shape): export.deserialize(bytearray((folder / name).read_bytes()))
            for name, shape in manifest["programs"].items()
        }
        return cls(manifest, *tables, programs)

    def recommend(
        self,
        histories: Sequence[Sequence],
        n: int = 10,
        *,
        beam_width: int = 1,
        exclude: Sequence = (),
        allowed: Sequence | None = None,
        include_seen: bool = False,
        request_time_s: int | None = None,
    ) -> list[list[dict]]:
        """At most `n` items for every history: dicts with item_id, title, semantic_id, logp.

        Args:
          histories: item ids, or dicts with `item_id` and what is known of the action (time_s,
            rating, playtime_s, duration_s, feedback), oldest first, as for `Recommender.query`.
          beam_width: the narrowest exported width that has it and n is taken.
          exclude, allowed: item ids.
          request_time_s: Unix time from which ages count; None: that of the last action.

        Raises:
          InputError: as of `Recommender.recommend`, or n or beam width beyond what was exported.
        """
        if not is_list(histories):
            raise InputError("histories is a list: a history for each list wanted")
        check_options(
            n=n,
            beam_width=beam_width,
            request_time_s=request_time_s,
            exclude=exclude,
            allowed=allowed,
        )
        shapes = sorted(self._programs)
        if max(n, beam_width) > max(width for _, width in shapes):
            raise InputError(
                f"n {n} or beam_width {beam_width} is more than was exported: widths "
                f"{sorted({width for _, width in shapes})} (export with --widths for more)"
            )
        width = min(width for _, width in shapes if width >= max(n, beam_width))
        most = max(users for users, other in shapes if other == width)
        asked = []
        for place, history in enumerate(histories):
            try:
                asked.append(self._checked(history))
            except InputError as error:
                raise type(error)(f"history {place}: {error}") from error
        excluded = self.ids.rows(exclude)
        subset = None if allowed is None else self.ids.rows(allowed)
        size = self.manifest["filter_size"]
        if subset is not None and len(subset) > size:
            raise InputError(f"allowed names {len(subset)} items: at most {size} were exported")
        lists = []
        for start in range(0, len(asked), most):
            part = [self._history(*one, request_time_s) for one in asked[start : start + most]]
            users = min(u for u, other in shapes if other == width and u >= len(part))
            left_out = [
                np.concatenate([excluded, () if include_seen else rows[::-1]]).astype(np.int64)
                for rows, _ in part
            ]
            left_out = [rows[np.sort(np.unique(rows, return_index=True)[1])] for rows in left_out]
            padding = users - len(part)
            nodes = self._nodes(
                [rows[:size] for rows in left_out] + [()] * padding,
                [subset] * len(part) + [None] * padding,
                size=size,
            )
            batch = [arrays for _, arrays in part] + [part[0][1]] * padding
            batch = {name: np.concatenate([x[name] for x in batch]) for name in batch[0]}
            beams = self._programs[users, width](
                self._weights,
                self._trie,
                {name: batch[name] for name in self.manifest["batch"]},
                dict(zip(("parent", "code", "keep"), nodes, strict=True)),
            )
            leaves, logps = np.asarray(beams["leaf"]), np.asarray(beams["logp"])
            for leaf, logp, out in zip(leaves, logps, left_out, strict=False):
                lists.append(self._list(leaf, logp, out, subset, n))
        return lists

    def _list(self, leaf, logp, out, subset, n) -> list[dict]:
        first, rows, logps = self.items["leaf_offsets"], [], []
        for place, value in zip(leaf[leaf >= 0], logp[leaf >= 0], strict=True):
            alike = self.items["by_leaf"][first[place] : first[place + 1]]
            rows.append(alike)
            logps.append(np.full(len(alike), value))
        rows = np.concatenate([np.zeros(0, int), *rows])
        kept = ~np.isin(rows, out)
        if subset is not None:
            kept &= np.isin(rows, subset)
        logps = np.concatenate([np.zeros(0), *logps])
        titles = self.items["title_bytes"], self.items["title_offsets"]
        return [
            {
                "item_id": self.ids[rows[place]],
                "title": unpack_text(titles, rows[place]),
                "semantic_id": self.items["sid"][rows[place]].tolist(),
                "logp": float(logps[place]),
            }
            for place in np.flatnonzero(kept)[:n]
        ]

    def _checked(self, history) -> tuple[np.ndarray, list]:
        """Item rows of a history, oldest first, and its actions."""
        if not is_list(history):
            raise InputError(
                f"a history is a list of items or actions, not {shown(history)}: users of a data "
                "set are not exported"
            )
        actions = [x if isinstance(x, Mapping) else {"item_id": x} for x in history]
        rows = self.ids.rows([action.get("item_id") for action in actions])
        timed = [TIME] if self.spec["has_time"] else []
        check_actions(actions, timed + self.manifest["action_columns"])
        return rows, actions

    def _history(self, rows, actions, request_time_s) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A checked history: its rows, and its arrays `[1, …]` by name of the batch."""
        spec, slots = self.spec, self.manifest["slots"]

        def column(name):
            values = [action.get(name) for action in actions]
            return np.array([np.nan if value is None else value for value in values], np.float32)

        times = [action.get("time_s") for action in actions]
        times = np.array([0 if time is None else time for time in times], np.int64)
        last = times[-1] if len(times) else 0
        now = last if request_time_s is None else request_time_s
        labels = [
            column("rating") == np.float32(name.removeprefix("rating="))
            if name.startswith("rating=")
            else column(name) > 0
            for name in spec["labels"]
        ]
        # What each action says, then what its item is; all by action, oldest first.
        known = {
            "sid": self.items["sid"][rows],
            "item": rows.astype(np.int32),
            "age": log_bucket(now - times),
            "playtime": log_bucket(column("playtime_s"), 4),
            "label": np.array(labels, np.uint8).reshape(len(labels), len(rows)).T,
            "count": np.full(len(rows), log_bucket(1)),
        } | {
            name: self.items[name][rows]
            for name in ("tags", "author", "duration")
            if name in self.items
        }
        positive = self._positive(rows, column)

        def pathway(chosen, size):
            latest = np.flatnonzero(chosen)[::-1][:size]
            filled = {}
            for name, values in known.items():
                filled[name] = np.zeros((1, size, *values.shape[1:]), values.dtype)
                filled[name][0, : len(latest)] = values[latest]
            return filled | {"length": np.array([len(latest)], np.int32)}

        everything = np.ones(len(rows), bool)
        arrays = {
            "static": np.zeros((1, len(spec["static"])), np.int32),
            "target": np.zeros((1, 1, spec["levels"]), np.int32),
            "target_count": np.ones(1, np.int32),
        }
        entries = {"short": everything, "positive": positive, "lifelong": everything}
        for name, chosen in entries.items():
            for field, values in pathway(chosen, slots[name]).items():
                arrays[f"{name}/{field}"] = values
        return rows, arrays

    def _positive(self, rows, column) -> np.ndarray:
        """Which actions count as positive: by the rule, or because nothing is said of them."""
        rule, given = self.spec["positive"], self.manifest["action_columns"]
        columns = {name: column(name) for name in given}
        silent = np.all([np.isnan(x) for x in columns.values()], axis=0)
        clauses = [columns[name] > 0 for name in rule["actions"] if name in columns]
        if "rating" in columns:
            clauses.append(columns["rating"] >= rule["min_rating"])
        duration = columns.get("duration_s")
        if "duration_s" in self.items:
            of_item = self.items["duration_s"][rows]
            duration = of_item if duration is None else np.where(duration > 0, duration, of_item)
        if "playtime_s" in columns and duration is not None:
            known = np.where(duration > 0, duration, np.nan)
            clauses.append(columns["playtime_s"] >= rule["min_watch_ratio"] * known)
        if not clauses:
            return np.ones(len(rows), bool)
        return np.logical_or.reduce(clauses) | silent


def _platform() -> str:
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
