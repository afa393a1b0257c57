"""Collaborative-aware item representations: content tokens compressed so that paired items meet.

OneRec Technical Report (arXiv 2506.13695), section 2.1.1: a QFormer compresses the tokens of an
item to four vectors, trained by a contrastive loss over collaboratively similar items and by a
caption loss that keeps the content in them. The report's captions come from LLaMA3; a small decoder
over the words of the training items stands in, and is discarded when training ends.

The result is what residual k-means quantises in place of the bare content vectors.

Batches are made in `alignment_batches.py`, the compiled step is in `alignment_step.py`.

Axes: I items, T tokens, D width of a token, B items of a batch.
"""

import dataclasses
import functools
import json
import pathlib
import time
import zipfile
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import atomic_folder, read_json
from onerec_jax.losses.contrastive import unit_rows
from onerec_jax.models.item import ItemAligner
from onerec_jax.sharding import make_mesh, put_batch
from onerec_jax.tokenizer.alignment_batches import (
    EOS,
    caption_words,
    endless,
    false_negatives,
    gather,
    training_pairs,
    training_rows,
)
from onerec_jax.tokenizer.alignment_step import COLDEST, aligner_module, compiled
from onerec_jax.training.metrics import first_non_finite, mean_rows

FORMAT = "onerec_jax item aligner, version 1"


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """Settings of the compressor, its two losses and their training.

    The report gives layers, queries and width; the rest is ours.
    """

    layers: int = 4
    """Blocks of the QFormer."""
    queries: int = 4
    """Vectors that an item is compressed to."""
    width: int = 512
    """Width of each; the representation of an item has `queries * width` numbers."""
    heads: int = 8
    """Attention heads, of the compressor and of the caption decoder."""
    ff_dim: int = 2048
    """Hidden width of a feed-forward layer."""
    max_tokens: int = 0
    """Content tokens read of each item, from its beginning; 0 reads all."""

    pairs: bool = True
    """Train by the contrastive loss over item pairs."""
    temperature: float = 0.07
    """Of the contrastive softmax."""
    learn_temperature: bool = False
    """Start at `temperature` and train it, within 0.01 and 1."""
    symmetric: bool = True
    """Find the first of a pair from the second too."""

    captions: bool = True
    """Train by the caption loss over item texts."""
    caption_weight: float = 1.0
    """Of the caption loss in nats a word; the report's sum over words would drown the pairs."""
    caption_layers: int = 2
    """Blocks of the caption decoder."""
    caption_width: int = 256
    caption_vocabulary: int = 8192
    """Words, the most frequent of the training items, with the four special ones."""
    caption_length: int = 32
    """Words of a text that are kept."""

    batch_size: int = 512
    """Pairs a step; items a step where there are only captions."""
    steps: int = 5000
    learning_rate: float = 5e-4
    """Peak of AdamW's, after the warm-up; a cosine leads to a tenth of it."""
    warmup_steps: int = 200
    weight_decay: float = 0.01
    dropout: float = 0.1
    """On the projected tokens and after each sublayer."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """auto: cuDNN for 16-bit types on a GPU, XLA elsewhere."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPU and TPU, float32 on CPU. Weights and losses are always float32."""
    seed: int = 0
    log_every: int = 50
    """Steps between lines of progress."""

    def __post_init__(self):
        sizes = ("layers", "queries", "width", "heads", "ff_dim", "steps", "log_every")
        caption = ("caption_layers", "caption_width", "caption_length")
        zeros = ("max_tokens", "caption_weight", "learning_rate", "warmup_steps", "weight_decay")
        at_least = functools.partial(require_at_least, self, "tokenizer.alignment.")
        at_least(**dict.fromkeys(sizes + caption, 1), **dict.fromkeys(zeros, 0))
        # A pair needs another one beside it; a vocabulary a word beside the four special ones.
        at_least(batch_size=2, caption_vocabulary=EOS + 2, temperature=COLDEST, dropout=0, seed=0)
        if not self.dropout < 1:
            raise InputError(f"--tokenizer.alignment.dropout {self.dropout} must be below 1")
        for name in ("width", "caption_width"):
            if getattr(self, name) % self.heads:
                flag = f"--tokenizer.alignment.{name}".replace("_", "-")
                raise InputError(
                    f"{flag} {getattr(self, name)} is no multiple of --tokenizer.alignment.heads "
                    f"{self.heads}: change one of them"
                )

    @property
    def representation_dim(self) -> int:
        """Numbers in the representation of one item."""
        return self.queries * self.width


ALIGNMENT_PRESETS: dict[str, AlignmentConfig] = {
    "paper": AlignmentConfig(),
    # A catalogue of about ten thousand items: a GPU, or a CPU and patience.
    "small": AlignmentConfig(
        layers=2,
        width=128,
        heads=4,
        ff_dim=512,
        caption_layers=1,
        caption_width=128,
        caption_vocabulary=4096,
        caption_length=24,
        batch_size=256,
        steps=2000,
        learning_rate=1e-3,
        warmup_steps=100,
    ),
    # Two CPU cores, a minute or two. Captions would double the time of a step, and in one run on
    # Amazon Beauty (width 64) moved the hit rate of next items by less than its sampling error.
    "tiny": AlignmentConfig(
        layers=1,
        width=128,
        heads=2,
        ff_dim=256,
        max_tokens=32,
        captions=False,
        caption_layers=1,
        caption_width=64,
        caption_vocabulary=2048,
        caption_length=16,
        batch_size=128,
        steps=500,
        learning_rate=2e-3,
        warmup_steps=50,
        dropout=0.0,
    ),
}


def align(
    tokens,
    fit_rows,
    cfg: AlignmentConfig,
    *,
    pairs=None,
    texts=None,
    mesh=None,
    say: Callable[[str], None] = print,
) -> "Aligner":
    """Trains the compressor; nothing is written.

    Token arrays stay on the host; batches are gathered from them as they are needed.

    Args:
      tokens: `ItemTokens`: `values` float `[I, T, D]`, `lengths` int32 `[I]`.
      fit_rows: bool `[I]` or int `[n]`, items of the training part; others are not touched.
      pairs: `ItemPairs` mined on the training part; only with `cfg.pairs`.
      texts: text of every item; only with `cfg.captions`.
      mesh: devices to spread a batch over (`sharding.make_mesh`); default all of this machine.
      say: prints one line of progress every `cfg.log_every` steps.

    Raises:
      InputError: nothing to train on; a batch that the mesh does not divide; a loss that is not
        finite; more than one process.
    """
    if not (cfg.pairs or cfg.captions):
        raise InputError(
            "--tokenizer.alignment.no-pairs and --tokenizer.alignment.no-captions leave nothing "
            "to learn: drop one"
        )
    for name, given in (("pairs", pairs), ("captions", texts)):
        if getattr(cfg, name) and given is None:
            raise InputError(
                f"--tokenizer.alignment.{name} is on, but there are none: give them or switch it "
                f"off by --tokenizer.alignment.no-{name}"
            )
    if jax.process_count() > 1:
        raise InputError("alignment runs on the devices of one process: start it on one machine")
    mesh = mesh or make_mesh()
    devices = mesh.devices.size
    if cfg.batch_size % devices:
        raise InputError(
            f"--tokenizer.alignment.batch-size {cfg.batch_size} is no multiple of the {devices} "
            f"devices of the mesh: use {-(-cfg.batch_size // devices) * devices}"
        )
    num_items, _, input_dim = tokens.values.shape
    rows = training_rows(tokens, fit_rows)
    if cfg.captions:
        caption = caption_words(texts, rows, cfg.caption_vocabulary, cfg.caption_length)
    rng = np.random.default_rng(cfg.seed)
    entries = training_pairs(pairs, rows, num_items) if cfg.pairs else rows[:, None]
    stream = endless(entries, cfg.batch_size, rng)

    def next_batch():
        rows_bn = next(stream)
        if cfg.pairs:  # either item of a pair may be the one that is captioned
            turn = rng.random(len(rows_bn)) < 0.5
            rows_bn = np.where(turn[:, None], rows_bn[:, ::-1], rows_bn)
        values, length = gather(tokens, rows_bn, cfg.max_tokens)
        batch = {"tokens": values, "length": length}
        if cfg.pairs:
            batch["exclude"] = false_negatives(rows_bn, pairs)
        if cfg.captions:
            batch["caption"], batch["caption_length"] = (x[rows_bn[:, 0]] for x in caption)
        return batch

    # Seed and log_every do not shape the program.
    init, train = compiled(dataclasses.replace(cfg, seed=0, log_every=1), mesh, input_dim)
    batch, state = next_batch(), init(cfg.seed)
    log, pending, begun = [], [], None
    for step in range(1, cfg.steps + 1):
        state, metrics = train(state, put_batch(batch, mesh))
        pending.append(metrics)
        if step < cfg.steps:
            batch = next_batch()  # while the device computes
        if len(pending) > 2:
            jax.block_until_ready(pending[-2])  # else the host would pile up batches
        if begun is None:  # the first step compiles
            jax.block_until_ready(metrics)
            begun = time.perf_counter()
        if step % cfg.log_every == 0 or step == cfg.steps:
            fetched = jax.device_get(pending)
            pending.clear()
            if bad := first_non_finite(fetched):
                raise _not_finite(bad[1], step - len(fetched) + 1 + bad[0])
            row = {name: float(value) for name, value in mean_rows(fetched).items()}
            rate = (step - 1) * entries.shape[1] * cfg.batch_size
            rate /= max(time.perf_counter() - begun, 1e-9)
            log.append({"step": step, **row, "items_per_second": rate})
            say(_progress_line(log[-1], cfg, entries.shape[1]))
    params = jax.device_get(state.params["compressor"])
    # The last update may have spoilt the weights after a finite loss.
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise _not_finite("a weight", cfg.steps)
    return Aligner(cfg, params, input_dim, tuple(log))


def _not_finite(name, step) -> InputError:
    return InputError(
        f"alignment: {name} is not finite at step {step}: lower "
        "--tokenizer.alignment.learning-rate or look at the item tokens"
    )


def _progress_line(row, cfg: AlignmentConfig, per_entry: int) -> str:
    parts = [f"{name} {row[name]:.3f}" for name in ("contrastive", "caption") if name in row]
    line = f"align {row['step']:>6}/{cfg.steps}  loss {row['loss']:.4f} ({', '.join(parts)})"
    if "accuracy" in row:
        line += f"  accuracy {row['accuracy']:.1%}"
    rate = row["items_per_second"]
    if not rate:  # a single step: only compilation was seen
        return line
    left = int((cfg.steps - row["step"]) * cfg.batch_size * per_entry / rate)
    return line + f"  {rate:,.0f} items/s  left {left // 60}:{left % 60:02d}"


@functools.partial(jax.jit, static_argnames="module")
def _compress(params, tokens_btd, length_b, *, module: ItemAligner):
    """Float32 `[B, queries, width]`, each item of unit length as a whole."""
    z = module.apply({"params": params}, tokens_btd, length_b)
    return unit_rows(z).reshape(z.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Aligner:
    """A trained compressor."""

    config: AlignmentConfig
    params: dict[str, Any]
    """Float32 NumPy arrays; the caption decoder is not among them."""
    input_dim: int
    """D of the content tokens it was trained on."""
    log: tuple[dict[str, float], ...] = ()
    """One row a line of progress, means since the row before."""

    def encode(self, tokens, batch_size: int = 512) -> np.ndarray:
        """Representations of all items, those outside the training part too.

        On a GPU "auto" computes in bfloat16, on a CPU in float32: they agree to two digits or so.

        Args:
          tokens: `ItemTokens`: `values` float `[I, T, D]`, `lengths` int32 `[I]`.
          batch_size: items computed at once.

        Returns:
          Float32 `[I, queries, width]`. The whole block of an item has length 1, so that Euclidean
          k-means sees the cosines that were trained; zeros for an item without a token.

        Raises:
          InputError: tokens of another width; a token that is not finite.
        """
        num_items, _, dim = tokens.values.shape
        if dim != self.input_dim:
            raise InputError(
                f"the item tokens are {dim} wide, but the aligner was trained on tokens "
                f"{self.input_dim} wide: encode with the same text encoder or align anew"
            )
        module = aligner_module(self.config)
        out = np.zeros((num_items, self.config.queries, self.config.width), np.float32)
        params = jax.device_put(self.params)
        # Items of like length share a batch: less padding.
        order = np.argsort(tokens.lengths, kind="stable")
        order = order[tokens.lengths[order] > 0]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            filled = np.resize(rows, batch_size)  # one batch size, one compilation a length
            values, length = gather(tokens, filled, self.config.max_tokens)
            z = _compress(params, values, length, module=module)
            out[rows] = jax.device_get(z)[: len(rows)]
        if not np.isfinite(out).all():
            row = int(np.flatnonzero(~np.isfinite(out).all((1, 2)))[0])
            raise InputError(f"the content tokens of item row {row} are not finite: encode it anew")
        return out

    def save(self, folder) -> None:
        """Writes `config.json` and `params.npz`; the folder appears whole or not at all."""
        note = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "input_dim": self.input_dim,
            "log": list(self.log),
        }
        with atomic_folder(folder) as tmp:
            (tmp / "config.json").write_text(json.dumps(note, indent=1) + "\n")
            np.savez(tmp / "params.npz", **flatten_dict(self.params, sep="/"))

    @classmethod
    def load(cls, folder) -> "Aligner":
        """Reads what `save` wrote.

        Raises:
          InputError: missing, damaged, or of another format.
        """
        folder = pathlib.Path(folder)
        note = read_json(folder / "config.json")
        if note.get("format") != FORMAT:
            raise InputError(f"{folder} holds no '{FORMAT}': align again")
        try:
            cfg, input_dim = AlignmentConfig(**note["config"]), int(note["input_dim"])
            with np.load(folder / "params.npz", allow_pickle=False) as file:
                params = unflatten_dict(dict(file), sep="/")
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{folder} is damaged ({error}): align again") from error
        example = (jnp.zeros((1, 2, input_dim)), jnp.zeros(1, jnp.int32))
        init = functools.partial(aligner_module(cfg).init, jax.random.key(0))
        expected = nn.unbox(jax.eval_shape(init, *example))["params"]
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, expected)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{folder}: weights do not fit config.json: align again")
        return cls(cfg, params, input_dim, tuple(note.get("log", ())))
