"""A run folder of the preference score, and how later stages score with it."""

import dataclasses
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.exposures import (
    BLOCK,
    Blocks,
    LabelRule,
    Parts,
    RewardBatchBuilder,
    exposure_parts,
    make_blocks,
    objective_labels,
    padded_blocks,
    share_of,
)
from onerec_jax.data.features import action_log, item_features
from onerec_jax.errors import InputError
from onerec_jax.files import read_json, write_text
from onerec_jax.models.reward import PScore, RewardConfig
from onerec_jax.run import Run


class ExposureRun(Run):
    """What the runs of rewards, of items and of sessions, have in common."""

    flag = "--out"

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.config["settings"]["objectives"])

    @functools.cached_property
    def parts(self) -> Parts:
        """Bounds of training, validation and test exposures."""
        values = self.config["settings"]
        return exposure_parts(
            self.dataset, self.split, values["valid_fraction"], values["test_fraction"]
        )

    def share_of(self, part: str, whole):
        """Blocks or windows of a part; of the training part those of this run's share."""
        values = self.config["settings"]
        return share_of(whole, values["share"], values["judge_share"]) if part == "train" else whole

    @property
    def training_rows(self) -> np.ndarray:
        """Rows of the log that the run trains on, int64 `[n]`."""
        raise NotImplementedError

    @functools.cached_property
    def known_item(self) -> np.ndarray:
        """Which items the training exposures have shown, bool `[I]`."""
        known = np.zeros(self.dataset.num_items, bool)
        known[self.dataset.item_rows[self.training_rows]] = True
        return known

    @functools.cached_property
    def builder(self) -> RewardBatchBuilder:
        """Builds batches from the run's own log."""
        return RewardBatchBuilder(
            action_log(self.dataset, self.spec),
            item_features(self.dataset, self.split, self.ids, self.spec),
            self.model_config,
            self.known_item,
        )

    def check_items(self, run: Run) -> None:
        """Refuses to judge items of another table than a policy's.

        Raises:
          InputError: another data set or other semantic IDs.
        """
        for part, name in (("data", "item table"), ("semantic_ids", "semantic IDs")):
            if self.config[part]["fingerprint"] != run.config[part]["fingerprint"]:
                raise InputError(
                    f"{self.folder} judges items of {self.config[part]['folder']}, {run.folder} "
                    f"has {run.config[part]['folder']}, another {name}: train the reward with "
                    f"--run {run.folder}"
                )

    def unfinished(self) -> InputError:
        return InputError(
            f"{self.folder} is not trained to its end: run `{self.config['command']}` on"
        )


class RewardRun(ExposureRun):
    """An opened run folder of `experiments.train_reward`."""

    stage = "train_reward"
    stages = (stage,)

    @functools.cached_property
    def model_config(self) -> RewardConfig:
        return RewardConfig(**self.config["settings"]["model"])

    @functools.cached_property
    def weight_no(self) -> np.ndarray:
        """Label weights of every fusion, float64 `[N, O]`; the first are those asked for."""
        return np.array(self.config["settings"]["weights"], float)

    @functools.cached_property
    def labels_no(self) -> np.ndarray:
        """Labels of every action, int8 `[N, O]`; -1: unknown."""
        rule = LabelRule(**self.config["settings"]["labels"])
        labels = objective_labels(self.dataset, rule, self.objectives)
        return np.stack([labels[name] for name in self.objectives], axis=1)

    def blocks(self, part: str) -> Blocks:
        """All blocks of a part; of the training part those of this run's share."""
        return self.share_of(part, make_blocks(*getattr(self.parts, part)))

    @property
    def training_rows(self) -> np.ndarray:
        return self.blocks("train").rows(self.dataset.offsets)

    @property
    def example(self):
        """A batch of one, for shapes."""
        return self.builder.exposures(self.blocks("train")[:1], self.labels_no)

    def model(self, *, train: bool = False) -> PScore:
        return PScore(
            self.model_config,
            self.spec,
            self.objectives,
            self.ids.codebooks,
            len(self.weight_no),
            train,
        )

    @property
    def fusion(self) -> int:
        """Number of the label weights that the search settled on.

        Raises:
          InputError: there was no search yet.
        """
        path = self.folder / "weights.json"
        if not path.exists():
            raise self.unfinished()
        return read_json(path)["fusion"]

    def choose(self, fusion: int) -> None:
        """Records the label weights to score with."""
        chosen = dict(zip(self.objectives, self.weight_no[fusion].tolist(), strict=True))
        write_text(
            self.folder / "weights.json",
            json.dumps({"fusion": fusion, "weights": chosen}, indent=1),
        )

    def predictor(self, batch_size: int):
        """`predict(variables, blocks)`: logits of every exposure of the blocks.

        It returns their log rows int64 `[n]`, the towers' logits float32 `[n, O]` and those of p
        `[n, N]`.
        """
        apply, offsets = jax.jit(self.model().apply), self.dataset.offsets

        def predict(variables, blocks: Blocks):
            towers, fused = [], []
            for batch, real in padded_blocks(self.builder, blocks, self.labels_no, batch_size):
                # One fetch of all: what is made in between would wait for the device.
                tower_bmo, p_bmn = jax.device_get(apply({"params": variables["params"]}, batch))
                towers.append(tower_bmo[:real])
                fused.append(p_bmn[:real])
            valid = np.arange(BLOCK) < blocks.count[:, None]
            return (
                blocks.rows(offsets),
                np.concatenate(towers)[valid],
                np.concatenate(fused)[valid],
            )

        return predict

    def scorer(self, *, users: int = 32, log=None) -> "Scorer":
        """The best checkpoint, ready to score; see `Scorer`."""
        builder = self.builder
        if log is not None:
            builder = RewardBatchBuilder(log, builder.items, self.model_config, self.known_item)
        variables = self.load_best()
        fusions, kept = variables["params"]["fusion"], self.fusion
        fusion = jax.tree.map(lambda x: x[kept : kept + 1], fusions)
        variables = {**variables, "params": {**variables["params"], "fusion": fusion}}
        model = self.model().clone(fusions=1)
        return Scorer(model, variables, builder, users, self.objectives)


@dataclasses.dataclass(frozen=True, eq=False)
class CandidateScorer:
    """Scores candidates for requests.

    One compiled shape for each number of candidates: users go through `users` at a time, and what a
    user gets does not depend on who else is there.
    """

    model: nn.Module
    variables: dict
    builder: RewardBatchBuilder
    users: int

    def judged(self, examples: Examples, item_rows: np.ndarray, request_time_s=None) -> np.ndarray:
        """What `rates` gives of B users and G candidates each, in parts of `users`.

        Args:
          examples: of B users; each is asked at a position, with the history before it.
          item_rows: int `[B, G]`; -1 is no item.
          request_time_s: int `[B]`; None: when the action at the position happened.
        """
        parts = []
        for start in range(0, len(examples), self.users):
            index = np.arange(start, min(start + self.users, len(examples)))
            full = np.concatenate([index, np.full(self.users - len(index), start)])
            batch = self.builder.candidates(
                examples.user[full],
                examples.position[full],
                np.maximum(item_rows[full], 0),
                None if request_time_s is None else np.asarray(request_time_s)[full],
            )
            parts.append(jax.device_get(self._apply(self.variables, batch))[: len(index)])
        return np.concatenate(parts)

    def rates(self, variables, batch):
        """Probabilities of a batch, float32 `[B, …]`."""
        raise NotImplementedError

    def over(self, log, *, users: int | None = None) -> "CandidateScorer":
        """The same over another `ActionLog` of the same users, so many at a time.

        Nothing compiles anew but another number of users at a time, once.
        """
        old = self.builder
        builder = RewardBatchBuilder(log, old.items, old.cfg, old.item_index > 0)
        other = dataclasses.replace(self, builder=builder, users=users or self.users)
        other.__dict__["_apply"] = self._apply
        return other

    @functools.cached_property
    def _apply(self):
        return jax.jit(self.rates)


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer(CandidateScorer):
    """Scores items: `scorer(examples, item_rows)`. Its model has the one fusion that is read."""

    objectives: tuple[str, ...]

    def __call__(
        self, examples: Examples, item_rows: np.ndarray, request_time_s=None
    ) -> dict[str, np.ndarray]:
        """Probabilities of B users and G candidates each; arguments as `judged`.

        Returns:
          `p` and every objective: float32 `[B, G]`, NaN where there is no item.
        """
        item_rows = np.asarray(item_rows)
        found = self.judged(examples, item_rows, request_time_s)
        found[item_rows < 0] = np.nan
        return {name: found[..., i] for i, name in enumerate(("p", *self.objectives))}

    def rates(self, variables, batch):
        tower_bmo, p_bm1 = self.model.apply(variables, batch)
        return jax.nn.sigmoid(jnp.concatenate([p_bm1, tower_bmo], axis=-1))


def open_reward(folder: pathlib.Path, run: Run) -> RewardRun:
    """A finished reward run that judges the items of `run`.

    Raises:
      InputError: as `RewardRun.open` and `RewardRun.check_items`.
    """
    reward = RewardRun.open(folder)
    reward.check_items(run)
    return reward
