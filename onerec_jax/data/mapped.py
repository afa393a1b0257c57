"""The log on disk, for worker processes: one .npy an array, gathered from as memory maps.

Workers share the maps through the page cache, so that a process more costs no copy of the log, and
only the pages that a batch needs are read. (One ArrayRecord record a user was ten times slower: the
whole life is read for the few actions of it that an example holds.)
"""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from onerec_jax.config import ModelConfig
from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.features import ActionLog, ItemFeatures, LifelongLog
from onerec_jax.files import atomic_folder, write_text
from onerec_jax.inputs import Batch

PARTS = {"log": ActionLog, "items": ItemFeatures, "lives": LifelongLog}
CONTENTS = "contents.json"


def write_mapped(folder: pathlib.Path, builder: BatchBuilder) -> None:
    """Writes the folder that `MappedBatches` reads; it appears whole or not at all."""
    contents = {}
    with atomic_folder(folder) as new:
        for part in PARTS:
            if (arrays := getattr(builder, part)) is None:
                continue
            contents[part] = []
            for field in dataclasses.fields(arrays):
                if (values := getattr(arrays, field.name)) is not None:
                    np.save(new / f"{part}.{field.name}.npy", values)
                    contents[part].append(field.name)
        write_text(new / CONTENTS, json.dumps(contents, indent=1))


@dataclasses.dataclass(frozen=True)
class MappedBatches:
    """A `BatchBuilder` of a folder of `write_mapped`, in any process; pickles as its path."""

    folder: pathlib.Path
    cfg: ModelConfig

    def __reduce__(self):
        return MappedBatches, (self.folder, self.cfg)

    @functools.cached_property
    def _builder(self) -> BatchBuilder:
        parts = dict.fromkeys(PARTS)
        for part, names in json.loads((self.folder / CONTENTS).read_text()).items():
            arrays = dict.fromkeys(field.name for field in dataclasses.fields(PARTS[part]))
            for name in names:
                arrays[name] = np.load(self.folder / f"{part}.{name}.npy", mmap_mode="r")
            parts[part] = PARTS[part](**arrays)
        return BatchBuilder(parts["log"], parts["items"], self.cfg, parts["lives"])

    def __call__(self, user, position, **options) -> Batch:
        """As `BatchBuilder`."""
        return self._builder(user, position, **options)
