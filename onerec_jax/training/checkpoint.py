"""Checkpoints: the only file that touches Orbax.

A checkpoint holds the model (`params`, `router`), the optimizer, in post-training the policy that
items are drawn with, and a JSON note (early stopping). Each is an item of its own, so that
evaluation and serving read the model alone. The data position is the step itself: batch k is a
function of the seed and k. Orbax makes a step visible only once it is whole.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from onerec_jax.errors import InputError
from onerec_jax.training.step import TrainState

_training = ocp.training


class Checkpoints:
    """Checkpoints of one run: the latest to resume from, the best to serve."""

    def __init__(self, folder: pathlib.Path, *, metric: str = "score", cleanup: bool = True):
        """Opens `folder`; of all steps the latest and the one with the highest `metric` stay.

        Args:
          cleanup: remove what killed saves left. A reader must not: it may be a save in progress.
        """
        self.folder = pathlib.Path(folder)
        policies = _training.preservation_policies
        self._checkpointer = _training.Checkpointer(
            self.folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(1),
                    # Of equal scores the earliest, as `Progress.best_step` has it.
                    policies.BestN(get_metric_fn=lambda m: (m[metric], -m["step"]), n=1),
                ]
            ),
            cleanup_tmp_directories=cleanup,
        )
        self._writing = None

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, None if there is none."""
        self.wait()
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, note: dict[str, Any], score: float) -> None:
        """Takes a copy of one step and writes it while the caller goes on; see `wait`.

        Args:
          note: JSON, returned by `load_note`.
          score: higher is better.
        """
        self.wait()
        self._writing = self._checkpointer.save_checkpointables_async(
            int(state.step),
            _items(state),
            force=True,
            overwrite=True,
            metrics={"score": score, "step": int(state.step)},
            custom_metadata=note,
        )

    def wait(self) -> None:
        """Until the last save is whole; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_note(self, step: int | None = None) -> dict[str, Any]:
        """The note of a step (None: the latest)."""
        self.wait()
        try:
            return self._checkpointer.metadata(step).custom_metadata
        except Exception as error:  # as in `_load`
            raise self._unreadable(step, error) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """State of a step (None: the latest), onto the shardings of `abstract`.

        Raises:
          InputError: the checkpoint belongs to another model.
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
            _check_shapes(self, step, abstract["model"])
            return self._checkpointer.load_checkpointables(step, abstract)
        except InputError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever a damaged file meets
            raise self._unreadable(step, error) from error

    def _unreadable(self, step, error: Exception) -> InputError:
        which = f"step {self.latest if step is None else step}"
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return InputError(
            f"checkpoint {which} in {self.folder} cannot be read ({line}): delete its folder to "
            "go on from an earlier one, or take another run"
        )

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()


def _items(state: TrainState) -> dict:
    """What is saved, by name."""
    items = {"model": state.variables, "optimizer": state.opt_state}
    return items | ({"sampler": state.sampler} if state.sampler else {})


def _check_shapes(checkpoints: Checkpoints, step, abstract_variables) -> None:
    """Orbax's own message on a mismatch names neither the leaf nor the remedy."""
    stored = checkpoints._checkpointer.checkpointables_metadata(step).metadata["model"]

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
                f"the checkpoint in {checkpoints.folder} is of another model or codebook "
                f"({name}: {have.get(name)} stored, {want.get(name)} expected): "
                "use the flags it was made with or another --run"
            )
