"""How often a policy says an ID that exists, when nothing keeps it to those that do.

OneRec Technical Report (arXiv 2506.13695), section 2.4.2: over all that is generated for a user,
repetitions included. Beams are the most probable IDs, draws are what the policy is like throughout.

Axes: U users, G IDs a user, S levels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax.data.batches import BatchBuilder, padded_batches
from onerec_jax.data.examples import Examples
from onerec_jax.generation.beam import beam_search
from onerec_jax.generation.sampling import sample
from onerec_jax.models.onerec import OneRec
from onerec_jax.rewards.format import legal_prefixes
from onerec_jax.sharding import on_mesh, put_batch
from onerec_jax.tokenizer.semantic_ids import SemanticIds


def legality_by_level(
    model: OneRec,
    variables: dict,
    ids: SemanticIds,
    builder: BatchBuilder,
    examples: Examples,
    mesh,
    *,
    method: str,
    count: int,
    batch_size: int,
    seed: int = 0,
) -> np.ndarray:
    """Share of each user's G generated IDs that begin as the ID of some item, float64 `[U, S]`.

    The last level is the legality of whole IDs.

    Args:
      model: a `OneRec` with `train=False`.
      method: `beam` or `sample`, independent draws from all codes at temperature 1.
      count: G.
      batch_size: users at once.
      seed: of the draws, which belong to (seed, user).
    """

    def generate(variables, batch, users):
        if method == "beam":
            return beam_search(model, variables, batch, width=count).sid
        key = jax.random.key(seed)
        keys = jax.vmap(lambda user: jax.random.fold_in(key, user))(users)
        return sample(model, variables, batch, keys, count=count).sid

    generate, shares, done = jax.jit(on_mesh(generate, mesh)), [], 0
    for batch, real in padded_batches(builder, examples, batch_size):
        users = np.resize(examples.user[done : done + real], batch_size)
        sid = np.asarray(generate(variables, put_batch(batch, mesh), jnp.asarray(users)))[:real]
        alive = (sid[..., 0] >= 0)[..., None]
        legal = legal_prefixes(np.maximum(sid, 0), ids) & alive
        shares.append(legal.sum(1) / alive.sum(1))
        done += real
    return np.concatenate(shares)
