"""A run folder: what a stage left behind, and how the next one opens it.

config.json       settings, and the data set and semantic IDs they were used with
features.json     the feature specification (vocabularies)
metrics.jsonl     one row a logged step
sessions.json     of a run on session lists: what each criterion kept
checkpoints/      latest and best
report.json/.md   results; plots beside them
"""

import copy
import dataclasses
import functools
import hashlib
import json
import pathlib

import flax.linen as nn
import jax
import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.features import action_log, item_features, lifelong_log, positive_actions
from onerec_jax.data.lifelong import Snapshots
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.data.session_lists import Part, SessionExamples, SessionRule, session_examples
from onerec_jax.data.splits import Split, item_popularity, make_split
from onerec_jax.errors import InputError
from onerec_jax.evaluation.ranking import tie_order
from onerec_jax.files import read_json, write_text
from onerec_jax.generation.generator import Generator
from onerec_jax.inputs import FeatureSpec
from onerec_jax.models.onerec import OneRec
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.checkpoint import Checkpoints
from onerec_jax.training.metrics import MetricsLog


def settings_hash(settings: dict) -> str:
    """Six hex digits that name a set of settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """An opened run folder with its data set and semantic IDs."""

    folder: pathlib.Path
    config: dict
    dataset: Dataset
    ids: SemanticIds
    spec: FeatureSpec
    snapshots: Snapshots | None = None
    """Compressed lives, if the run uses them."""
    trained_on: Dataset | None = None
    """The data set of the training, where `dataset` is a newer one to serve."""
    training: bool = False
    """Whether this process may write checkpoints; others only read them."""

    stage = "pretrain"
    """The experiment that makes such runs."""
    stages = ("pretrain", "posttrain", "align")
    """Those whose runs open as this: a post-trained model is as any other."""
    flag = "--run"
    """Its flag for the folder."""

    @classmethod
    def create(
        cls,
        folder: pathlib.Path,
        *,
        settings: dict,
        command: str,
        data_folder: pathlib.Path,
        ids_folder: pathlib.Path,
        dataset: Dataset,
        ids: SemanticIds,
        spec: FeatureSpec,
        lifelong_folder: pathlib.Path | None = None,
        snapshots: Snapshots | None = None,
    ) -> "Run":
        """Starts a run, or continues one that has the same settings.

        Args:
          settings: JSON; everything that the result depends on.
          lifelong_folder, snapshots: compressed lives, if `spec.clustered`.

        Raises:
          InputError: the folder holds a run with other settings, data or semantic IDs, or cannot be
            written.
        """
        config = {
            "command": command,
            "data": {"folder": str(data_folder.resolve()), "fingerprint": dataset.fingerprint},
            "semantic_ids": {"folder": str(ids_folder.resolve()), "fingerprint": ids.fingerprint},
            "lifelong": None,
            "settings": settings,
        }
        if snapshots is not None:
            config["lifelong"] = {
                "folder": str(lifelong_folder.resolve()),
                "fingerprint": snapshots.fingerprint,
            }
        path = folder / "config.json"
        if path.exists():
            if other := difference(read_json(path), json.loads(json.dumps(config))):
                raise InputError(
                    f"{folder} holds a run with other settings ({other}): give another {cls.flag}"
                )
        elif folder.exists() and not _only_begun(folder):
            raise InputError(f"{cls.flag} {folder} exists and is no run folder: give another one")
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "features.json", spec.to_json())
                write_text(path, json.dumps(config, indent=1))
            except OSError as error:
                raise InputError(
                    f"{cls.flag} {folder} cannot be written ({error.strerror}): choose another"
                ) from error
        return cls(folder, config, dataset, ids, spec, snapshots, training=True)

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Run":
        """Opens a run that the experiment of this `stage` has made.

        Raises:
          InputError: no such run there, or its data set or semantic IDs have changed since.
        """
        folder = pathlib.Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            data_folder = pathlib.Path(config["data"]["folder"])
            ids_folder = pathlib.Path(config["semantic_ids"]["folder"])
            spec = FeatureSpec.from_json((folder / "features.json").read_text())
            stage = config["settings"].get("stage", "pretrain")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{folder} is no run folder ({reason}): make one with "
                f"`python -m experiments.{cls.stage}`"
            ) from error
        if stage not in cls.stages:
            raise InputError(
                f"{folder} is a run of experiments.{stage}: give one of experiments.{cls.stage}"
            )
        dataset = load_dataset(data_folder)
        ids = SemanticIds.load(ids_folder)
        found = {"data": dataset.fingerprint, "semantic_ids": ids.fingerprint}
        snapshots = None
        if config.get("lifelong"):
            snapshots = Snapshots.load(pathlib.Path(config["lifelong"]["folder"]))
            found["lifelong"] = snapshots.fingerprint
        for part, fingerprint in found.items():
            if fingerprint != config[part]["fingerprint"]:
                raise InputError(
                    f"{config[part]['folder']} has changed since {folder} was trained on it: "
                    "restore it or train again"
                )
        return cls(folder, config, dataset, ids, spec, snapshots)

    def again(self) -> "Run":
        """The same run with its checkpoints looked at anew; the tables stay as they are."""
        run = copy.copy(self)
        for name in ("checkpoints", "best_step"):
            run.__dict__.pop(name, None)
        return run

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.config["settings"]["model"])

    @functools.cached_property
    def eligible(self) -> np.ndarray | None:
        """Which actions may be targets, bool `[N]`; None: all."""
        if self.config["settings"].get("targets", "all") != "positive":
            return None
        return positive_actions(self.dataset, self.spec.positive)

    @functools.cached_property
    def split(self) -> Split:
        return make_split(self.dataset, self.eligible)

    @functools.cached_property
    def session_rule(self) -> SessionRule | None:
        """Which sessions give the lists that the run trains on; None: it trains on items."""
        settings = self.config["settings"]
        if settings.get("targets") != "sessions":
            return None
        return SessionRule(**settings["sessions"])

    def session_lists(self, part: Part) -> SessionExamples:
        """Lists of a part of the data set; of a run with a `session_rule`."""
        return session_examples(self.dataset, self.split, self.session_rule, part)

    @functools.cached_property
    def popularity(self) -> np.ndarray:
        """Training actions on each item, int64 `[I]`."""
        return item_popularity(self.dataset, self.split)

    @functools.cached_property
    def tie_order(self) -> np.ndarray:
        """Order of items with equal scores: popularity, then lower row. Int32 `[I]`."""
        return tie_order(self.popularity)

    @property
    def popular(self) -> np.ndarray:
        """Item rows, the most popular first, int32 `[I]`."""
        return np.argsort(self.tie_order).astype(np.int32)

    @functools.cached_property
    def builder(self) -> BatchBuilder:
        """Builds batches from the run's own log."""
        items = item_features(self.dataset, self.split, self.ids, self.spec, self.trained_on)
        lives = None if self.snapshots is None else lifelong_log(self.snapshots, self.spec)
        return BatchBuilder(action_log(self.dataset, self.spec), items, self.model_config, lives)

    def model(self, *, train: bool = False) -> OneRec:
        return OneRec(self.model_config, self.spec, train=train)

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.folder / "metrics.jsonl")

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints of the run; the folder is made with the first."""
        return Checkpoints(self.folder / "checkpoints", cleanup=self.training)

    @property
    def _latest(self) -> int | None:
        """Step of the latest checkpoint; looks without making the folder."""
        return self.checkpoints.latest if (self.folder / "checkpoints").is_dir() else None

    @property
    def finished(self) -> bool:
        """Whether training has reached its last step or stopped early."""
        latest, loop = self._latest, self.config["settings"]["train"]
        if latest is None:
            return False
        waited = self.checkpoints.load_note()["progress"]["waited"]
        return latest >= loop["steps"] or 0 < loop["patience"] <= waited

    @functools.cached_property
    def best_step(self) -> int:
        """Step of the best validation, the one to evaluate and serve.

        Raises:
          InputError: training has not reached its first validation.
        """
        latest = self._latest
        progress = self.checkpoints.load_note()["progress"] if latest is not None else {}
        if not progress.get("best_step"):
            raise InputError(
                f"{self.folder} has no validated checkpoint yet: run `{self.config['command']}` on"
            )
        return progress["best_step"]

    @property
    def example(self):
        """A batch of one, for shapes."""
        one = np.zeros(1, np.int32)
        return self.builder(one, one)

    def load_best(self) -> dict:
        """Variables (`params`, `router`) of the best step, on the default device."""
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = nn.unbox(jax.eval_shape(self.model().init, jax.random.key(0), self.example))
        abstract = {
            name: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                abstract.get(name, {}),
            )
            for name in ("params", "router")
        }
        return self.checkpoints.restore_model(abstract, self.best_step)

    def generator(self, mesh, *, beam_width: int, batch_size: int) -> Generator:
        return Generator(
            self.model(),
            self.ids,
            self.tie_order,
            mesh,
            beam_width=beam_width,
            batch_size=batch_size,
        )


def _only_begun(folder: pathlib.Path) -> bool:
    """Whether a folder is empty, or what a kill before `config.json` leaves of a new run."""
    begun = {"features.json", ".features.json.tmp", ".config.json.tmp"}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= begun


def difference(old: dict, new: dict) -> str | None:
    """The first setting, beyond the command, in which two configurations differ."""

    def flat(value, name=""):
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
        return {name.removeprefix(".settings.").removeprefix("."): value}

    before, now = flat(old | {"command": ""}), flat(new | {"command": ""})
    for name in before | now:  # data and IDs first: lives change with them
        if before.get(name) != now.get(name) and not name.endswith(".folder"):
            return f"{name}: {before.get(name)} there, {now.get(name)} now"
    return None
