"""One number of a session from the rates of its heads.

OneRec V0 (arXiv 2502.18965) ranks sessions by a reward and does not say how its four heads become
one: here a weighted sum, each head measured by its own mean and deviation.

Axes: O heads.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """What each head's rates are measured by, float64 `[O]` each."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, rate_no: np.ndarray) -> "Scale":
        """Of rates `[n, O]`, such as those of validation sessions."""
        rate_no = np.asarray(rate_no, np.float64)
        return cls(rate_no.mean(0), rate_no.std(0))


def scalar_reward(rate: np.ndarray, scale: Scale, weight_o: np.ndarray) -> np.ndarray:
    """`sum_o w_o (r_o - mean_o) / deviation_o`, float32 `[...]`.

    A head that said the same of all sessions tells none apart and counts nothing.

    Args:
      rate: float `[..., O]`; NaN stays NaN.
      weight_o: float `[O]`.
    """
    told = scale.deviation > 0
    unit = (np.asarray(rate, np.float64) - scale.mean) / np.where(told, scale.deviation, 1)
    return (unit * np.where(told, weight_o, 0)).sum(-1).astype(np.float32)
