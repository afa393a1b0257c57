"""What is rewarded: the preference score, one objective, or a hand-weighted sum of several.

OneRec Technical Report (arXiv 2506.13695), section 2.4.1: the learned score replaces the weighted
sum of predicted rates that rankers were tuned by; that sum is here to compare with.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onerec_jax.errors import InputError


def parse_objective(text: str, known: Sequence[str], owner: object = "the reward") -> dict:
    """Weights by name of an objective in words.

    Args:
      text: a name such as `p` or `vtr`, or weights such as `ctr=1,lvtr=2,ltr=5`.
      known: names that there are scores of.
      owner: whose names they are, for messages.

    Returns:
      Weights, float by name; 1 for a bare name.

    Raises:
      InputError: an unknown or repeated name, a weight that is no number above 0, or several names
        without weights.
    """
    parts = [part.strip() for part in text.split(",")]
    weights = {}
    for part in parts:
        name, sign, number = (word.strip() for word in part.partition("="))
        if name not in known:
            raise InputError(
                f"--objective {text}: {owner} knows {', '.join(known)}, not {name!r}: give one, or "
                "weights such as ctr=1,ltr=5"
            )
        if name in weights:
            raise InputError(f"--objective {text}: {name} is there twice: give it one weight")
        if not sign and len(parts) > 1:
            raise InputError(f"--objective {text}: {name} has no weight: write {name}=1")
        weights[name] = _weight(number, text, name) if sign else 1.0
    return weights


def _weight(number: str, text: str, name: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    # Above 0: the industrial reward multiplies rewards that must not change sign.
    if not 0 < value < math.inf:
        raise InputError(
            f"--objective {text}: the weight of {name} is {number!r}: give a number above 0"
        )
    return value


def weighted_score(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The weighted sum of scores by name, float32 `[B, G]`; NaN where there is no item.

    Raises:
      KeyError: a name without a score.
    """
    return sum(np.float32(weight) * scores[name] for name, weight in weights.items())
