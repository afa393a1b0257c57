"""Checkpoints: the only file that touches Orbax.

A checkpoint holds the model (`params`, `router`), the optimizer, in post-training the policy that
items are drawn with, and a JSON note (early stopping). Each is an item of its own, so that
evaluation and serving read the model alone. The data position is the step itself: batch k is a
function of the seed and k. Orbax makes a step visible only once it is whole.

Orbax has checksums of its tables and none of the weights, so that a bit that flips on a disk would
go unnoticed: the note holds a digest of every leaf, made and checked on the device.
"""

import pathlib
import threading
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from onerec_jax.distributed import fetch
from onerec_jax.errors import InputError
from onerec_jax.training.quiet import first_cause, quiet
from onerec_jax.training.step import TrainState

_training = ocp.training

DIGESTS = "digests"
"""Of the note: by item, a number for each leaf."""


class Checkpoints:
    """Checkpoints of one run: the latest to resume from, the best to serve."""

    def __init__(self, folder: pathlib.Path, *, metric: str = "score", cleanup: bool = True):
        """Opens `folder`; of all steps the latest and the one with the highest `metric` stay.

        Args:
          cleanup: remove what killed saves left. A reader must not: it may be a save in progress.
        """
        self.folder = pathlib.Path(folder)
        policies = _training.preservation_policies
        kept = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                # Of equal scores the earliest, as `Progress.best_step` has it.
                policies.BestN(get_metric_fn=lambda m: (m[metric], -m["step"]), n=1),
            ]
        )
        try:
            with quiet():
                self._checkpointer = _training.Checkpointer(
                    self.folder.absolute(),
                    preservation_policy=kept,
                    cleanup_tmp_directories=cleanup,
                )
        except Exception as error:  # it reads the scores of all steps
            raise InputError(
                f"{self.folder} cannot be read ({_line(error)}): a step in it is damaged, delete "
                "that step's folder"
            ) from error
        self._writing = self._reserving = None
        self._pinned = _on_gpu()

    def reserve(self, state: TrainState) -> None:
        """Does on a GPU what the first save of `state` would keep the training waiting for.

        Compiles the digests and, in the background, pins the memory of the host that saves are
        copied to: the driver takes longer to pin pages than to fill them.
        """
        if not _on_gpu():
            return
        items = _items(state)
        for item in items.values():
            _digests(item)
        shards = [
            (shard.data.shape, leaf.dtype, shard.device)
            for leaf in jax.tree.leaves(items)
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        ]

        def pin():
            held = []  # all at once, then free for the first save
            try:
                for shape, dtype, device in shards:
                    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
                    held.append(jax.device_put(np.empty(shape, dtype), pinned))
                jax.block_until_ready(held)
            except jax.errors.JaxRuntimeError:  # more than may be pinned: saves take longer
                self._pinned = False

        self._reserving = threading.Thread(target=pin, daemon=True)
        self._reserving.start()

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, None if there is none."""
        self.wait()
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, note: dict[str, Any], score: float) -> None:
        """Takes a copy of one step and writes it while the caller goes on; see `wait`.

        Args:
          note: JSON, returned by `load_note`; must not hold "digests".
          score: higher is better.
        """
        self.wait()
        items = _items(state)
        digests = {name: _digests(item) for name, item in items.items()}
        if self._reserving is not None:
            self._reserving.join()
        with _context(self._pinned):
            self._writing = self._checkpointer.save_checkpointables_async(
                int(state.step),
                items,
                force=True,
                overwrite=True,
                metrics={"score": score, "step": int(state.step)},
                custom_metadata=note | {DIGESTS: digests},
            )

    def wait(self) -> None:
        """Until the last save is whole; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_note(self, step: int | None = None) -> dict[str, Any]:
        """The note of a step (None: the latest)."""
        self.wait()
        return {name: x for name, x in self._note(step).items() if name != DIGESTS}

    def _note(self, step) -> dict[str, Any]:
        try:
            with quiet():
                note = self._checkpointer.metadata(step).custom_metadata
                if not note:  # Orbax only logs what it cannot parse
                    raise ValueError("its metadata is missing or damaged")
                return note
        except Exception as error:  # as in `_load`
            raise self._unreadable(step, error) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """State of a step (None: the latest), onto the shardings of `abstract`.

        Raises:
          InputError: the checkpoint belongs to another model, or is damaged.
        """
        loaded = self._load(step, _items(abstract))
        model = loaded["model"]
        step_array = jax.device_put(jax.numpy.int32(step or self.latest), abstract.step.sharding)
        return TrainState(
            step_array,
            model["params"],
            model["router"],
            loaded["optimizer"],
            loaded.get("sampler", {}),
        )

    def restore_model(self, abstract_variables, step: int | None = None) -> dict:
        """Only `params` and `router` of a step."""
        return self._load(step, {"model": abstract_variables})["model"]

    def _load(self, step, abstract):
        self.wait()
        if self.latest is None:
            raise InputError(f"{self.folder} holds no checkpoint: run experiments.pretrain first")
        try:
            with quiet():
                stored = self._checkpointer.checkpointables_metadata(step).metadata["model"]
                _check_shapes(stored, self.folder, abstract["model"])
                loaded = self._checkpointer.load_checkpointables(step, abstract)
                _check_digests(loaded, self._note(step).get(DIGESTS, {}))
                return loaded
        except InputError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever a damaged file meets
            raise self._unreadable(step, error) from error

    def _unreadable(self, step, error: Exception) -> InputError:
        which = f"step {self.latest if step is None else step}"
        return InputError(
            f"checkpoint {which} in {self.folder} cannot be read ({_line(error)}): delete its "
            "folder to go on from an earlier one, or take another run"
        )

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()


def save_model(folder: pathlib.Path, variables: dict) -> None:
    """Writes `params` and `router` alone, for other processes; `folder` appears once whole."""
    with quiet(), _context(_on_gpu()):
        ocp.save_checkpointables(
            pathlib.Path(folder).absolute(),
            {"model": variables},
            overwrite=True,
            custom_metadata={DIGESTS: {"model": _digests(variables)}},
        )


def load_model(folder: pathlib.Path, abstract_variables) -> dict:
    """What `save_model` has written, onto the shardings of `abstract_variables`.

    Raises:
      InputError: it is of another model, or damaged.
    """
    path = pathlib.Path(folder).absolute()
    try:
        with quiet():
            stored = ocp.checkpointables_metadata(path)
            _check_shapes(stored.metadata["model"], folder, abstract_variables)
            loaded = ocp.load_checkpointables(path, {"model": abstract_variables})
            _check_digests(loaded, stored.custom_metadata[DIGESTS])
            return loaded["model"]
    except InputError:
        raise
    except Exception as error:  # as in `Checkpoints`
        raise InputError(
            f"the weights in {folder} cannot be read ({_line(error)}): delete the folder"
        ) from error


def digest(tree) -> int:
    """A number of 32 bits for the values of a tree; the same on every mesh."""
    return zlib.crc32(np.array(_digests(tree), "<u4").tobytes())


def _line(error: Exception) -> str:
    """What went wrong first, on one line."""
    cause = first_cause(error)
    return (str(cause).splitlines() or [type(cause).__name__])[0][:200]


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _context(pinned: bool) -> ocp.Context:
    """Options of a save: copies from a GPU through `pinned` memory are forty times as fast.

    Orbax says that this is its default there, and leaves it off (0.12.8).
    """
    context = ocp.Context()
    context.array.saving.enable_pinned_host_transfer = pinned
    return context


def _items(state: TrainState) -> dict:
    """What is saved, by name."""
    items = {"model": state.variables, "optimizer": state.opt_state}
    return items | ({"sampler": state.sampler} if state.sampler else {})


def _digests(tree) -> list[int]:
    """Of each leaf the sum of its bits, read as unsigned integers, modulo 2^32.

    The order of a sum of integers does not matter, so that every mesh finds the same; one flipped
    bit always changes it.
    """
    leaves = jax.tree.leaves(tree)
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        # Five times as fast as XLA, and nothing is copied.
        return [int(_sum_of_bits(np.asarray(x).reshape(-1), np.ndarray.view)) for x in leaves]
    return fetch(_on_device(leaves)).tolist()


@jax.jit
def _on_device(leaves):
    bitcast = jax.lax.bitcast_convert_type
    return jnp.stack([_sum_of_bits(jnp.asarray(x), bitcast) for x in leaves])


def _sum_of_bits(x, bitcast):
    x = x.astype(np.uint8) if x.dtype == bool else x
    return bitcast(x, np.dtype(f"uint{8 * x.dtype.itemsize}")).sum(dtype=np.uint32)


def _check_digests(loaded: dict, stored: dict) -> None:
    """Compares what was loaded; checkpoints without digests pass."""
    for item, tree in loaded.items():
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        if item not in stored:
            continue
        for (path, _), one, other in zip(leaves, _digests(tree), stored[item], strict=True):
            if one != other:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"{item}/{name} differs from what was saved")


def _check_shapes(stored, folder: pathlib.Path, abstract_variables) -> None:
    """Orbax's own message on a mismatch names neither the leaf nor the remedy."""

    def shapes(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in leaves
        }

    have, want = shapes(stored), shapes(abstract_variables)
    if not have:
        raise ValueError("its metadata is missing or damaged")
    for name in sorted(have | want):
        if have.get(name) != want.get(name):
            raise InputError(
                f"the checkpoint in {folder} is of another model or codebook "
                f"({name}: {have.get(name)} stored, {want.get(name)} expected): "
                "use the flags it was made with or another --run"
            )
