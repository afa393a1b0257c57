"""A run folder of the session reward, and how alignment scores with it."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import objective_labels
from onerec_jax.data.session_windows import (
    Lists,
    SessionLabelRule,
    Windows,
    make_windows,
    padded_lists,
    window_labels,
)
from onerec_jax.errors import InputError
from onerec_jax.files import read_json, write_text
from onerec_jax.models.session_reward import SessionReward, SessionRewardConfig
from onerec_jax.reward_run import CandidateScorer, ExposureRun
from onerec_jax.rewards.session import Scale, scalar_reward
from onerec_jax.run import Run


class SessionRewardRun(ExposureRun):
    """An opened run folder of `experiments.train_session_reward`."""

    stage = "train_session_reward"
    stages = (stage,)

    @functools.cached_property
    def model_config(self) -> SessionRewardConfig:
        return SessionRewardConfig(**self.config["settings"]["model"])

    @property
    def length(self) -> int:
        """Items of a session, S."""
        return self.config["settings"]["items"]

    def windows(self, part: str) -> Windows:
        """All lists of a part; of the training part those of this run's share."""
        return self.share_of(
            part, make_windows(self.dataset, *getattr(self.parts, part), self.length)
        )

    def lists(self, part: str) -> Lists:
        """The lists of a part with the labels of every head, and of their items."""
        values, windows = self.config["settings"], self.windows(part)
        rule = SessionLabelRule(**values["labels"])
        heads = window_labels(self.dataset, windows, rule, values["watch_s"], self.objectives)
        items, named = {}, values["item_objectives"]
        if named:
            items = objective_labels(self.dataset, rule, named)
        item_label = np.zeros((len(self.dataset.item_rows), len(named)), np.int8)
        for i, name in enumerate(named):
            item_label[:, i] = items[name]
        return Lists(
            windows, np.stack([heads[name] for name in self.objectives], axis=1), item_label
        )

    @property
    def training_rows(self) -> np.ndarray:
        return self.windows("train").rows(self.dataset.offsets).ravel()

    @property
    def example(self):
        """A batch of one, for shapes."""
        return self.lists("train")[:1].batch(self.builder)

    def model(self, *, train: bool = False) -> SessionReward:
        return SessionReward(
            self.model_config,
            self.spec,
            self.objectives,
            self.ids.codebooks,
            self.length,
            tuple(self.config["settings"]["item_objectives"]),
            train,
        )

    @property
    def scale(self) -> Scale:
        """What the heads' rates are measured by.

        Raises:
          InputError: training has not come to its end.
        """
        path = self.folder / "scale.json"
        if not path.exists():
            raise self.unfinished()
        found = read_json(path)
        return Scale(*(np.array([found[k][name] for name in self.objectives]) for k in found))

    def keep_scale(self, scale: Scale) -> None:
        """Records mean and deviation of every head."""
        values = {
            field.name: dict(zip(self.objectives, getattr(scale, field.name).tolist(), strict=True))
            for field in dataclasses.fields(scale)
        }
        write_text(self.folder / "scale.json", json.dumps(values, indent=1))

    def predictor(self, batch_size: int):
        """`predict(variables, lists)`: logits of every list, float32 `[n, O]`."""
        apply = jax.jit(self.model().apply)

        def predict(variables, lists: Lists):
            found = []
            for batch, real in padded_lists(self.builder, lists, batch_size):
                logit_bwo, _ = jax.device_get(apply({"params": variables["params"]}, batch))
                found.append(logit_bwo[:real, 0])
            return np.concatenate(found)

        return predict

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuses weights of other heads than the run's, and such that say nothing."""
        if weights and len(weights) != len(self.objectives):
            raise InputError(
                f"--head-weights has {len(weights)} numbers for the {len(self.objectives)} heads "
                f"{', '.join(self.objectives)} of {self.folder}: give one each"
            )
        if weights and not any(weights):
            raise InputError("--head-weights are all 0: all sessions would be alike")

    def scorer(self, *, users: int = 32, weights: Sequence[float] = ()) -> "SessionScorer":
        """The best checkpoint, ready to score.

        Args:
          weights: of the heads in the scalar reward, in their order; none: 1 each.

        Raises:
          InputError: as `check_weights`; training has not come to its end.
        """
        self.check_weights(weights)
        weight_o = np.array(weights or [1.0] * len(self.objectives))
        model, variables = self.model(), self.load_best()
        return SessionScorer(
            model, variables, self.builder, users, self.objectives, self.scale, weight_o
        )


@dataclasses.dataclass(frozen=True, eq=False)
class SessionScorer(CandidateScorer):
    """Scores sessions: `scorer(examples, item_rows)`."""

    heads: tuple[str, ...]
    scale: Scale
    weight_o: np.ndarray

    def __call__(
        self, examples: Examples, item_bws: np.ndarray, request_time_s=None
    ) -> dict[str, np.ndarray]:
        """Rates of B users and W sessions each; arguments as `judged`, items int `[B, W, S]`.

        Returns:
          `reward`, the scalar, and every head: float32 `[B, W]`, NaN where a session lacks an item.
        """
        item_bws = np.asarray(item_bws)
        rate_bwo = self.judged(examples, item_bws.reshape(len(item_bws), -1), request_time_s)
        rate_bwo[(item_bws < 0).any(-1)] = np.nan
        reward = scalar_reward(rate_bwo, self.scale, self.weight_o)
        return {"reward": reward} | {name: rate_bwo[..., i] for i, name in enumerate(self.heads)}

    def rates(self, variables, batch):
        session_bwo, _ = self.model.apply(variables, batch)
        return jax.nn.sigmoid(session_bwo)


def open_session_reward(folder: pathlib.Path, run: Run) -> SessionRewardRun:
    """A session reward that judges the items of `run`.

    Raises:
      InputError: as `SessionRewardRun.open` and `ExposureRun.check_items`.
    """
    reward = SessionRewardRun.open(folder)
    reward.check_items(run)
    return reward
