"""What to do with items that residual k-means gives the same codes.

The papers name no rule. Three are here: `keep` them and let serving choose among the items of an
ID; `append` a further code that counts them, as TIGER does (arXiv 2305.05065, section 3.1);
`spread` them over the nearest IDs that are free.

Axes: N items, D width, L levels of codebooks, K codes a level.
"""

import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.semantic_ids import sid_keys

FREE_BRANCHES = 32
"""Codes of the level before the last that `spread` tries for an item whose own branch is full."""


def resolve(policy: str, x_nd, codes_nl, codebooks_lkd, priority_n, fixed_n=None) -> np.ndarray:
    """IDs of all items under a policy.

    Args:
      policy: "keep", "append" or "spread".
      x_nd: float32 `[N, D]`, the vectors that were coded.
      codes_nl: int32 `[N, L]`, nearest codes. Rows of fixed items hold their IDs, which may have
        one column more under `append`.
      priority_n: `[N]`, lower chooses first; popular items should come first.
      fixed_n: bool `[N]`, items that keep their ID whatever happens; default: none.

    Returns:
      int32 `[N, L]`, with `append` `[N, L + 1]`.

    Raises:
      InputError: `append` would need more numbers than a codebook has codes.
    """
    if fixed_n is None:
        fixed_n = np.zeros(len(codes_nl), bool)
    order = np.lexsort((priority_n, ~fixed_n))  # the fixed first
    if policy == "append":
        return append_code(codes_nl, len(codebooks_lkd), codebooks_lkd.shape[1], order, fixed_n)
    if policy == "spread":
        return spread(x_nd, codes_nl, codebooks_lkd, order, fixed_n)
    return codes_nl


def append_code(codes_nl, levels: int, codebook_size: int, order, fixed_n) -> np.ndarray:
    """Appends the place of an item among those with its codes, in `order`, from 0."""
    prefix_n = sid_keys(codes_nl[:, :levels], codebook_size)
    last_n = np.zeros(len(codes_nl), np.int32)
    next_number: dict[int, int] = {}  # prefix -> the number to give
    for row in order:
        prefix = int(prefix_n[row])
        number = codes_nl[row, levels] if fixed_n[row] else next_number.get(prefix, 0)
        last_n[row] = number
        next_number[prefix] = max(number + 1, next_number.get(prefix, 0))
    if last_n.max() >= codebook_size:
        raise InputError(
            f"{last_n.max() + 1} items share one ID, more than the {codebook_size} codes of a "
            "level: use --tokenizer.collisions spread, or a larger --tokenizer.codebook-size"
        )
    return np.concatenate([codes_nl[:, :levels], last_n[:, None]], axis=1).astype(np.int32)


def spread(x_nd, codes_nl, codebooks_lkd, order, fixed_n) -> np.ndarray:
    """Gives items that share an ID the nearest free IDs.

    Usually the prefix stays, so that items keep their neighbourhood, and the finest distinction
    moves to the next nearest centre. Within a prefix items choose in `order`. Where a prefix has
    more items than codes, the rest look among the `FREE_BRANCHES` nearest codes of the level before
    as well; if all of that is taken they stay where they were.
    """
    codes = np.array(codes_nl, np.int32)
    levels, size = codebooks_lkd.shape[:2]
    place_n = np.empty(len(codes), np.int64)  # of every item in the order
    place_n[order] = np.arange(len(codes))
    _, id_n, count = np.unique(sid_keys(codes, size), return_inverse=True, return_counts=True)
    group_n = sid_keys(codes[:, :-1], size)
    crowded = np.unique(group_n[count[id_n] > 1])
    by_group = np.lexsort((place_n, group_n))
    begin = np.searchsorted(group_n[by_group], crowded)
    end = np.searchsorted(group_n[by_group], crowded, side="right")
    last_kd, homeless = codebooks_lkd[-1], []
    last_norm_k = (last_kd**2).sum(-1)
    for group in range(len(crowded)):
        rows = by_group[begin[group] : end[group]]
        prefix = codes[rows[0]]
        rest_nd = x_nd[rows] - sum(codebooks_lkd[i][prefix[i]] for i in range(levels - 1))
        distance_nk = last_norm_k - 2 * rest_nd @ last_kd.T
        free = np.ones(size, bool)
        for row, nearest in zip(rows, np.argsort(distance_nk, axis=1), strict=True):
            if fixed_n[row]:
                free[codes[row, -1]] = False
                continue
            choice = nearest[free[nearest]]
            if len(choice):
                codes[row, -1] = choice[0]
                free[choice[0]] = False
            else:
                homeless.append(row)
    if homeless and levels > 1:
        taken = set(sid_keys(codes, size).tolist())
        for row in sorted(homeless, key=place_n.__getitem__):
            _move_to_free_branch(row, x_nd[row], codes, codebooks_lkd, taken)
    return codes


def _move_to_free_branch(row, x_d, codes, codebooks_lkd, taken: set) -> None:
    """The nearest free ID under other codes of the last but one level; in place."""
    levels = len(codebooks_lkd)
    rest_d = x_d - sum(codebooks_lkd[i][codes[row, i]] for i in range(levels - 2))
    branch_kd, last_kd = codebooks_lkd[-2:]
    branches = np.argsort(((rest_d - branch_kd) ** 2).sum(-1))[:FREE_BRANCHES]
    rest_bd = rest_d - branch_kd[branches]
    distance_bk = (rest_bd**2).sum(-1)[:, None] + (last_kd**2).sum(-1) - 2 * rest_bd @ last_kd.T
    for flat in np.argsort(distance_bk, axis=None):
        branch, last = divmod(int(flat), len(last_kd))
        sid = np.array([*codes[row, : levels - 2], branches[branch], last])
        key = int(sid_keys(sid, len(last_kd)))
        if key not in taken:
            codes[row] = sid
            taken.add(key)
            return
