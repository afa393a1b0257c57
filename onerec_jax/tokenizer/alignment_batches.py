"""Batches of item alignment, made on the host: which items, their tokens, their captions.

Axes: I items, B entries of a batch, N items of one entry (2 for a pair, else 1), T tokens,
D width of a token, S caption positions.
"""

import collections
import re

import numpy as np

from onerec_jax.errors import InputError

PADDING, UNKNOWN, BOS, EOS = range(4)
"""Numbers of the caption words that are none."""


def caption_words(texts, fit_rows, vocabulary: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Item texts as word numbers, the vocabulary counted on the training items.

    Args:
      texts: text of every item, None or "" for none.
      fit_rows: int `[n]`, training items.
      vocabulary: size, the four special words included.
      most: words of a text that are kept, S.

    Returns:
      int32 `[I, S]`, each text ended by `EOS` where it fits, then `PADDING`; and the
      int32 number of words of each item `[I]`, 0 without a text.

    Raises:
      InputError: no training item has a word.
    """
    words = [re.findall(r"\w+", (text or "").lower()) for text in texts]
    counts = collections.Counter(word for row in fit_rows for word in words[row])
    if not counts:
        raise InputError(
            "column 'text' of the training items holds no word, and captions need some: "
            "switch them off by --tokenizer.alignment.no-captions"
        )
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    known = ranked[: vocabulary - EOS - 1]
    number = {word: i for i, word in enumerate(known, EOS + 1)}
    caption = np.full((len(words), most), PADDING, np.int32)
    length = np.zeros(len(words), np.int32)
    for row, its_words in enumerate(words):
        if its_words:
            numbers = [number.get(word, UNKNOWN) for word in its_words[:most]]
            numbers = (numbers + [EOS])[:most]
            length[row] = len(numbers)
            caption[row, : len(numbers)] = numbers
    return caption, length


def token_slots(longest: int, most: int) -> int:
    """Token slots of a batch: 16, 24, 32, 48, 64, … up to `most`, so that few shapes compile.

    All are even, as cuDNN's backward pass wants it.
    """
    size = 16
    while size < longest:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most + most % 2)


def gather(tokens, rows, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of some items, `[*rows, slots, D]`, and their int32 lengths `[*rows]`."""
    most = tokens.values.shape[1]
    cap = min(max_tokens or most, most)
    length = np.minimum(tokens.lengths[rows], cap).astype(np.int32)
    slots = token_slots(int(length.max(initial=0)), cap)
    values = tokens.values[rows, :slots]
    if (missing := slots - values.shape[-2]) > 0:
        values = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, missing), (0, 0)])
    return values, length


def endless(entries: np.ndarray, batch_size: int, rng: np.random.Generator):
    """Batches `[batch_size, …]` of `entries`, each epoch in an order of its own."""
    waiting = entries[:0]
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(entries)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def false_negatives(rows_bn: np.ndarray, pairs) -> np.ndarray:
    """bool `[B, B]`: second j is no negative of first i. int `[B, 2]` rows of the batch's pairs.

    So where the two pairs share an item or where first i and second j are a known pair as well.
    """
    first, second = rows_bn[:, :1], rows_bn[:, 1]
    same = (first == second) | (rows_bn[:, 1:] == second) | (first == rows_bn[:, 0])
    return same | np.asarray(pairs.contains(first, second[None, :]), bool)


def training_rows(tokens, fit_rows) -> np.ndarray:
    """Training items that have content, int64 `[n]`, ascending.

    Raises:
      InputError: there is none.
    """
    rows = np.asarray(fit_rows)
    rows = np.flatnonzero(rows) if rows.dtype == bool else np.unique(rows)
    rows = rows[tokens.lengths[rows] > 0]
    if not rows.size:
        raise InputError("no training item has a content token: give the items text or vectors")
    return rows


def training_pairs(pairs, rows: np.ndarray, num_items: int) -> np.ndarray:
    """Pairs of two different training items, int64 `[P, 2]`.

    Raises:
      InputError: there is none.
    """
    usable = np.zeros(num_items, bool)
    usable[rows] = True
    pair = np.stack([pairs.first, pairs.second], axis=1).astype(np.int64)
    kept = pair[usable[pair].all(1) & (pair[:, 0] != pair[:, 1])]
    if not len(kept):
        raise InputError(
            f"none of the {len(pair)} item pairs joins two training items with content: mine pairs "
            "on the training part, or switch them off by --tokenizer.alignment.no-pairs"
        )
    return kept
