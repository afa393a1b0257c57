"""SASRec (Kang & McAuley, ICDM 2018) trained with cross-entropy over the whole catalogue.

With full softmax cross-entropy in place of the paper's one sampled negative, SASRec is a strong
baseline on the public benchmarks (Klenitskiy & Vasilev, RecSys 2023; Petrov & Macdonald, RecSys
2023). The rest follows the paper, but blocks are pre-norm and positions count from the oldest item.

Sequences are packed: windows of several users stand side by side in one row of `max_length` places
and attend only within themselves. Every place of a batch then carries a prediction, where one
padded row a user would be nine tenths padding on Amazon Beauty. A training sequence longer than a
row is cut into consecutive windows, so that all its actions are used.

Shapes: B rows, T places in a row, D model width, I items, P predictions, U users.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from onerec_jax.evaluation.baselines import ScoreFn, evaluate_baseline, item_popularity
from onerec_jax.evaluation.ranking import ranking_metrics, tie_order

PART_SIZE = 128
"""Predictions whose logits [P, I] are held at once: few enough for a CPU's cache to help."""


@dataclasses.dataclass(frozen=True)
class SASRecConfig:
    """Architecture, optimizer and budget. Without `time_budget_s` no clock decides anything."""

    d_model: int = 128
    layers: int = 2
    heads: int = 2
    max_length: int = 50  # places in a row; a longer history keeps its last items
    dropout: float = 0.5  # of embeddings, attention weights and block outputs
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    batch_size: int = 16  # packed rows a step
    max_epochs: int = 50
    patience: int = 3  # epochs without a better validation NDCG@10 before the stop
    time_budget_s: float | None = None  # no epoch begins that would likely end after it
    seed: int = 0


def default_config(train_end: np.ndarray, **changes) -> SASRecConfig:
    """The defaults for a data set, with `changes` to single fields.

    Where users are long (50 training actions or more in the mean), dropout is 0.2 instead of 0.5,
    as in the paper's experiments, and the model half as wide: on MovieLens latest-small validation
    told widths 64 and 128 apart by less than its noise.

    Args:
        train_end: int32 [U], actions in each user's training part.
    """
    long_users = {"dropout": 0.2, "d_model": 64} if train_end.mean() >= 50 else {}
    return SASRecConfig(**{**long_users, **changes})


@dataclasses.dataclass(frozen=True)
class SASRecResult:
    """The parameters of the best validation epoch and how the run went."""

    params: dict
    score: ScoreFn
    history: list[dict[str, float]]  # an epoch each: epoch, loss, recall@10, ndcg@10, seconds
    epochs: int  # epochs run
    best_epoch: int  # counted from 1
    seconds: float
    stopped_by: str  # 'patience', 'max_epochs' or 'time_budget'

    @property
    def still_rising(self) -> bool:
        """True where the last epoch was the best: a larger budget may give a better model."""
        return self.best_epoch == self.epochs


class SASRec(nn.Module):
    """Causal self-attention over packed item rows -> hidden states [B, T, D].

    Scores of the next item are hidden states times the item table, params['item']['embedding'],
    which has one row an item and none for padding: padding cannot be predicted.
    """

    cfg: SASRecConfig
    num_items: int

    @nn.compact
    def __call__(
        self, items_bt: jax.Array, segments_bt: jax.Array, train: bool = False
    ) -> jax.Array:
        """items_bt int32 item rows; segments_bt int32, one number a window of a row, 0 is free."""
        cfg = self.cfg
        drop = nn.Dropout(cfg.dropout, deterministic=not train)
        init = nn.initializers.normal(cfg.d_model**-0.5)
        places = jnp.arange(items_bt.shape[1])
        same_btt = segments_bt[:, :, None] == segments_bt[:, None, :]
        mask_btt = same_btt & (places[:, None] >= places[None, :])
        positions_bt = mask_btt.sum(axis=-1) - 1  # earlier places of the same window

        x = nn.Embed(self.num_items, cfg.d_model, embedding_init=init, name="item")(items_bt)
        x = x * math.sqrt(cfg.d_model)
        x = x + nn.Embed(cfg.max_length, cfg.d_model, name="position")(positions_bt)
        x = drop(x)
        for i in range(cfg.layers):
            h = nn.LayerNorm(name=f"attention_norm_{i}")(x)
            h = nn.MultiHeadDotProductAttention(
                cfg.heads,
                dropout_rate=cfg.dropout,
                broadcast_dropout=False,  # else one mask serves all rows and heads
                deterministic=not train,
                name=f"attention_{i}",
            )(h, mask=mask_btt[:, None])
            x = x + drop(h)
            h = nn.LayerNorm(name=f"ffn_norm_{i}")(x)
            h = drop(nn.relu(nn.Dense(cfg.d_model, name=f"ffn_in_{i}")(h)))
            x = x + drop(nn.Dense(cfg.d_model, name=f"ffn_out_{i}")(h))
        return nn.LayerNorm(name="norm")(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def full_softmax_loss(
    hidden_pd: jax.Array,
    table_id: jax.Array,
    targets_p: jax.Array,
    weights_p: jax.Array,
    part_size: int = PART_SIZE,
) -> jax.Array:
    """Mean of -log softmax(hidden @ table^T)[target] over the predictions of weight 1.

    At least one must have weight 1; padding has weight 0. Predictions are taken in parts of
    `part_size`. Each part yields its loss and its gradients while its logits are at hand, so that
    none are kept and none are computed twice. No gradient flows to targets or weights.
    """
    return _loss_and_grads(hidden_pd, table_id, targets_p, weights_p, part_size)[0]


def _loss_and_grads(hidden_pd, table_id, targets_p, weights_p, part_size):
    """Loss [], gradient of hidden states [P, D], gradient of the table [I, D]."""
    num_predictions = len(targets_p)
    num_parts = -(-num_predictions // part_size)

    def split(x):
        fill = [(0, num_parts * part_size - num_predictions)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, fill).reshape(num_parts, part_size, *x.shape[1:])

    def part_loss(hidden, table, targets, weights):
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, targets)
        return (losses * weights).sum()

    def add_part(totals, part):
        hidden, targets, weights = part
        value, (grad_hidden, grad_table) = jax.value_and_grad(part_loss, argnums=(0, 1))(
            hidden, table_id, targets, weights
        )
        return (totals[0] + value, totals[1] + grad_table), grad_hidden

    parts = (split(hidden_pd), split(targets_p), split(weights_p / weights_p.sum()))
    (loss, grad_table), grad_hidden = jax.lax.scan(
        add_part, (jnp.zeros(()), jnp.zeros_like(table_id)), parts
    )
    return loss, grad_hidden.reshape(-1, hidden_pd.shape[-1])[:num_predictions], grad_table


def _loss_fwd(hidden_pd, table_id, targets_p, weights_p, part_size):
    loss, *grads = _loss_and_grads(hidden_pd, table_id, targets_p, weights_p, part_size)
    return loss, grads


def _loss_bwd(part_size, grads, cotangent):
    return cotangent * grads[0], cotangent * grads[1], None, None


full_softmax_loss.defvjp(_loss_fwd, _loss_bwd)


def pack(
    starts: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Lays windows into rows in the given order, a new row where the next does not fit.

    Args:
        starts: int [W], first action of each window in a flat array of actions.
        lengths: int [W], 1 to `row_length`.
        row_length: T.

    Returns:
        `actions` [P] flat places in the array of actions, `places` [P] flat places in rows
        [num_rows, T], `segments` int32 [P] window numbers from 1, and num_rows.
    """
    row_starts = np.empty(len(lengths), np.int64)
    row, used = 0, 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > row_length:
            row, used = row + 1, 0
        row_starts[i] = row * row_length + used
        used += length
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    actions = np.repeat(starts, lengths) + within
    return actions, np.repeat(row_starts, lengths) + within, segments, row + 1


def training_windows(
    offsets: np.ndarray, train_end: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of all predictions within training parts: starts and lengths of windows, int64 [W].

    A training part of n actions has n - 1 inputs. They are cut from the end, so that the window
    that is short for want of actions is the first one, as it is when a user is new.
    """
    starts, lengths = [], []
    for first, n in zip(offsets[:-1].tolist(), (train_end - 1).tolist(), strict=True):
        for end in range(n, 0, -max_length):
            start = max(0, end - max_length)
            starts.append(first + start)
            lengths.append(end - start)
    return np.array(starts, np.int64), np.array(lengths, np.int64)


def _grid(places: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int32 of the given shape: values at flat places, 0 elsewhere."""
    out = np.zeros(shape, np.int32)
    out.reshape(-1)[places] = values
    return out


@jax.jit(static_argnames="model")
def _encode(model: SASRec, params: dict, items_bt: jax.Array, segments_bt: jax.Array) -> jax.Array:
    return model.apply({"params": params}, items_bt, segments_bt)


@jax.jit
def _item_scores(params: dict, hidden_ud: jax.Array) -> jax.Array:
    return hidden_ud @ params["item"]["embedding"].T


def make_score_fn(model: SASRec, params: dict) -> ScoreFn:
    """Scores histories, their last `max_length` items, by trained parameters: float32 [U, I].

    An empty history scores 0 throughout, which the tie rule turns into popularity.
    """
    cfg = model.cfg

    def score(histories: Sequence[np.ndarray]) -> jax.Array:
        kept = [history[-cfg.max_length :] for history in histories]
        lengths = np.array([len(history) for history in kept], np.int64)
        known = lengths > 0
        ends = np.cumsum(lengths)
        actions, places, segments, num_rows = pack(
            (ends - lengths)[known], lengths[known], cfg.max_length
        )
        # Rows are encoded in groups of one fixed size, so that one shape is compiled.
        shape = (-(-num_rows // cfg.batch_size), cfg.batch_size, cfg.max_length)
        items = _grid(places, np.concatenate(kept)[actions], shape)
        windows = _grid(places, segments, shape)
        hidden = np.stack(
            [_encode(model, params, items[g], windows[g]) for g in range(len(items))]
        ).reshape(-1, cfg.d_model)
        last = np.zeros((len(kept), cfg.d_model), np.float32)
        last[known] = hidden[places[ends[known] - 1]]
        return _item_scores(params, last)

    return score


def _optimizer(cfg: SASRecConfig) -> optax.GradientTransformation:
    return optax.adamw(cfg.learning_rate, b2=0.98, weight_decay=cfg.weight_decay)


@jax.jit(static_argnames="model", donate_argnames="state")
def _train_step(
    model: SASRec,
    state: tuple,
    items_bt: jax.Array,
    segments_bt: jax.Array,
    targets_bt: jax.Array,
    dropout_key: jax.Array,
) -> tuple[tuple, jax.Array]:
    """One step on packed rows: state (parameters, optimizer state, step), next state and loss."""
    params, opt_state, step = state
    rngs = {"dropout": jax.random.fold_in(dropout_key, step)}

    def loss_fn(params):
        hidden_btd = model.apply({"params": params}, items_bt, segments_bt, train=True, rngs=rngs)
        return full_softmax_loss(
            hidden_btd.reshape(-1, hidden_btd.shape[-1]),
            params["item"]["embedding"],
            targets_bt.reshape(-1),
            (segments_bt > 0).reshape(-1).astype(jnp.float32),
        )

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = _optimizer(model.cfg).update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, step + 1), loss


def fit_sasrec(
    offsets: np.ndarray,
    item_rows: np.ndarray,
    train_end: np.ndarray,
    valid_at: np.ndarray,
    num_items: int,
    config: SASRecConfig,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SASRecResult:
    """Trains on the training part and keeps the epoch of the best validation NDCG@10.

    The same seed gives the same parameters on a CPU. On a GPU the gradients of the embeddings are
    summed in no fixed order, and runs agree only nearly.

    Args:
        offsets, item_rows, train_end, valid_at: see `evaluation.baselines`.
        num_items: I, items in the catalogue.
        config: architecture, optimizer and budget.
        on_epoch: called with each entry of `SASRecResult.history` when it is known.

    Raises:
        ValueError: no user has two training actions, or none has a validation target.
    """
    began = time.monotonic()
    starts, lengths = training_windows(offsets, train_end, config.max_length)
    if len(starts) == 0 or not (valid_at >= 0).any():
        raise ValueError("SASRec needs users with two training actions and a validation target")
    order = tie_order(item_popularity(offsets, item_rows, train_end, num_items))
    model = SASRec(config, num_items)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    blank = jnp.zeros((config.batch_size, config.max_length), jnp.int32)
    params = jax.jit(model.init)(init_key, blank, blank)["params"]
    state = (params, _optimizer(config).init(params), jnp.zeros((), jnp.int32))

    rng = np.random.default_rng(config.seed)
    history: list[dict[str, float]] = []
    best_params, best_epoch, stopped_by = params, 0, "max_epochs"
    for epoch in range(1, config.max_epochs + 1):
        epoch_began = time.monotonic()
        shuffled = rng.permutation(len(starts))
        actions, places, segments, num_rows = pack(
            starts[shuffled], lengths[shuffled], config.max_length
        )
        num_steps = -(-num_rows // config.batch_size)
        shape = (num_steps, config.batch_size, config.max_length)
        items = _grid(places, item_rows[actions], shape)
        targets = _grid(places, item_rows[actions + 1], shape)
        windows = _grid(places, segments, shape)
        losses = []
        for step in range(num_steps):
            state, loss = _train_step(
                model, state, items[step], windows[step], targets[step], dropout_key
            )
            losses.append(loss)

        params = state[0]
        ranks = evaluate_baseline(make_score_fn(model, params), offsets, item_rows, valid_at, order)
        means = {name: float(v.mean()) for name, v in ranking_metrics(ranks, (10,)).items()}
        now = time.monotonic()
        loss = float(np.mean(losses))
        history.append({"epoch": epoch, "loss": loss, **means, "seconds": now - began})
        if on_epoch:
            on_epoch(history[-1])
        if best_epoch == 0 or means["ndcg@10"] > history[best_epoch - 1]["ndcg@10"]:
            best_params, best_epoch = jax.tree.map(jnp.copy, params), epoch  # `state` is donated
        if epoch - best_epoch >= config.patience:
            stopped_by = "patience"
            break
        next_end = now + (now - epoch_began)
        if config.time_budget_s is not None and next_end - began > config.time_budget_s:
            stopped_by = "time_budget"
            break
    return SASRecResult(
        params=best_params,
        score=make_score_fn(model, best_params),
        history=history,
        epochs=len(history),
        best_epoch=best_epoch,
        seconds=time.monotonic() - began,
        stopped_by=stopped_by,
    )
