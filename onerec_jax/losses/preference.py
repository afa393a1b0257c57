"""Preference losses: one generated session is to be more probable than another.

OneRec V0 (arXiv 2502.18965) aligns with DPO against the model of the iteration before (IPA,
Algorithm 2) and compares six other losses (Table 1). All are functions of log-probabilities of
whole sessions: sums over their m * L codes, BOS excluded. With

    h = log pi(S_w) / ref(S_w) - log pi(S_l) / ref(S_l),

S_w the chosen session, S_l the rejected one, pi the policy and ref the frozen reference, each loss
is that of one pair. CPO and simPO know no reference.

Axes: B pairs, K rejected sessions beside each chosen one (1 but for S-DPO).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from onerec_jax.errors import InputError, require_at_least

LossName = Literal["dpo", "ipo", "cdpo", "rdpo", "cpo", "simpo", "s-dpo"]
BETA = {"dpo": 0.1, "ipo": 0.1, "cdpo": 0.1, "rdpo": 0.1, "cpo": 0.1, "simpo": 2.0, "s-dpo": 1.0}
"""Each loss's own paper's usual beta; OneRec prints none."""


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Which preference loss, and its constants."""

    loss: LossName = "dpo"
    beta: float | None = None
    """How far the policy may go for a preference, tau of IPO; default: 0.1, 2 for simPO and 1 for
    S-DPO, as in the papers of the losses."""
    epsilon: float = 0.1
    """Share of pairs taken to be the wrong way round; cDPO and rDPO."""
    gamma: float = 1.0
    """Margin that simPO asks for."""
    nll: float = 1.0
    """Weight of the chosen session's own log-likelihood in CPO."""
    rejected: int = 1
    """Rejected sessions K beside each chosen one; more than 1 is of S-DPO, and those of the lowest
    rewards."""

    def __post_init__(self):
        require_at_least(self, "", nll=0, gamma=0, rejected=1)
        if self.beta is not None and not self.beta > 0:
            raise InputError(f"--beta {self.beta} must be above 0")
        if not 0 <= self.epsilon < 0.5:
            raise InputError(
                f"--epsilon {self.epsilon} must be from 0 to below 0.5: from there on "
                "the pairs say nothing"
            )
        if self.rejected > 1 and self.loss != "s-dpo":
            raise InputError(f"--rejected {self.rejected} is of --loss s-dpo: {self.loss} takes 1")

    @property
    def resolved_beta(self) -> float:
        return BETA[self.loss] if self.beta is None else self.beta


def dpo(h_b, beta: float):
    """`-log sigmoid(beta h)`: direct preference optimisation (arXiv 2305.18290)."""
    return jax.nn.softplus(-beta * h_b)


def ipo(h_b, beta: float):
    """`(h - 1 / (2 beta))^2`: identity preference optimisation (arXiv 2310.12036, equation 17).

    The optimum is at a finite h, where DPO would have it grow without end.
    """
    return (h_b - 1 / (2 * beta)) ** 2


def cdpo(h_b, beta: float, epsilon: float):
    """`-(1 - epsilon) log sigmoid(beta h) - epsilon log sigmoid(-beta h)`: conservative DPO
    (Mitchell, "A note on DPO with noisy preferences", 2023)."""
    return (1 - epsilon) * dpo(h_b, beta) + epsilon * dpo(-h_b, beta)


def rdpo(h_b, beta: float, epsilon: float):
    """`(-(1 - epsilon) log sigmoid(beta h) + epsilon log sigmoid(-beta h)) / (1 - 2 epsilon)`:
    robust DPO (arXiv 2403.00409), unbiased where a share epsilon of the pairs is turned round."""
    return ((1 - epsilon) * dpo(h_b, beta) - epsilon * dpo(-h_b, beta)) / (1 - 2 * epsilon)


def cpo(chosen_b, rejected_b, beta: float, nll: float):
    """`-log sigmoid(beta (log pi(S_w) - log pi(S_l))) - nll log pi(S_w)`: contrastive preference
    optimisation (arXiv 2401.08417; nll is 1 there)."""
    return dpo(chosen_b - rejected_b, beta) - nll * chosen_b


def simpo(chosen_b, rejected_b, beta: float, gamma: float, codes: int):
    """`-log sigmoid(beta / |S| (log pi(S_w) - log pi(S_l)) - gamma)`: simPO (arXiv 2405.14734).

    Args:
      codes: |S| = m * L, codes of a session; those of a pair are equally long.
    """
    return jax.nn.softplus(gamma - beta / codes * (chosen_b - rejected_b))


def s_dpo(h_bk, beta: float):
    """`-log sigmoid(-log sum_k exp(-beta h_k))`: softmax DPO (arXiv 2406.09215).

    One chosen against K rejected sessions; DPO where K is 1.

    Args:
      h_bk: float32 `[B, K]`, h of the chosen and each rejected session.
    """
    return jax.nn.softplus(jax.nn.logsumexp(-beta * h_bk, axis=-1))


def preference_loss(
    chosen_b, rejected_bk, ref_chosen_b, ref_rejected_bk, valid_b, cfg: PreferenceConfig, *, codes
):
    """Mean of a preference loss over the pairs that count.

    Args:
      chosen_b, rejected_bk: float32 `[B]`, `[B, K]`, log-probabilities of sessions under the
        policy, in nats: sums over codes.
      ref_chosen_b, ref_rejected_bk: the same under the reference, M_t of IPA.
      valid_b: bool `[B]`; other pairs may hold anything.
      codes: codes of a session, m * L.

    Returns:
      Float32 loss, 0 without a pair; and statistics over the pairs that count, NaN without one:
      `margin` (h, a mean over rejected sessions), `preferred` (share with h above 0),
      `chosen_change` and `rejected_change` (log pi / ref, nats a session), `pairs` (their number).
    """
    # Outside, for 0 * inf of a pair that does not count would be NaN all the same.
    chosen = jnp.where(valid_b, chosen_b.astype(jnp.float32), 0)
    rejected = jnp.where(valid_b[:, None], rejected_bk.astype(jnp.float32), 0)
    ref_chosen, ref_rejected = jax.lax.stop_gradient(
        (
            jnp.where(valid_b, ref_chosen_b.astype(jnp.float32), 0),
            jnp.where(valid_b[:, None], ref_rejected_bk.astype(jnp.float32), 0),
        )
    )
    up, down = chosen - ref_chosen, rejected - ref_rejected
    h_bk, beta = up[:, None] - down, cfg.resolved_beta
    losses = {
        "dpo": lambda: dpo(h_bk[:, 0], beta),
        "ipo": lambda: ipo(h_bk[:, 0], beta),
        "cdpo": lambda: cdpo(h_bk[:, 0], beta, cfg.epsilon),
        "rdpo": lambda: rdpo(h_bk[:, 0], beta, cfg.epsilon),
        "cpo": lambda: cpo(chosen, rejected[:, 0], beta, cfg.nll),
        "simpo": lambda: simpo(chosen, rejected[:, 0], beta, cfg.gamma, codes),
        "s-dpo": lambda: s_dpo(h_bk, beta),
    }
    loss_b = losses[cfg.loss]()
    loss = jnp.where(valid_b, loss_b, 0).sum() / jnp.maximum(valid_b.sum(), 1)

    def mean(of):
        return jnp.mean(of, where=valid_b)

    h_bk, up, down = jax.lax.stop_gradient((h_bk, up, down))
    return loss, {
        "margin": mean(h_bk.mean(-1)),
        "preferred": mean((h_bk > 0).mean(-1)),
        "chosen_change": mean(up),
        "rejected_change": mean(down.mean(-1)),
        "pairs": valid_b.sum(),
    }
