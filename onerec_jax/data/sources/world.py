"""A simulated short-video platform, for learning and for testing what no log can tell.

The only source where it is known what a user would have done: `World.from_meta(dataset.meta)`
builds the world again. Its numbers say nothing about a real platform.
"""

from onerec_jax.data.schema import Dataset, build_dataset
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.data.world.content import item_table, user_table
from onerec_jax.data.world.loop import Loop
from onerec_jax.data.world.policy import LoggingPolicy
from onerec_jax.data.world.response import World


def read_world(config: WorldConfig, *, split: str = "time") -> Dataset:
    """The log of a world under its logging policy, from its first day to everybody's quota.

    Items have title, text, tags, author_id, duration_s and viral_farm; users gender, age_band and
    city_tier; interactions time_s, playtime_s, click, like, follow, comment, forward, hate,
    long_view, session, slot and is_rand. Ids are row numbers. No latent is in any table;
    `meta["world"]` has the settings and the fingerprint of the world.

    Args:
      config: size, seed and law of the world.
      split: "leave-one-out" or "time".

    Raises:
      InputError: a world that cannot be, or an unknown split.
    """
    world = World(config)
    log = Loop(world, LoggingPolicy(world)).run()
    return build_dataset(
        f"world-{config.name}",
        item_table(world),
        user_table(world),
        log.frame(),
        meta={
            "source": "world",
            "origin": f"simulated by onerec_jax, world {config.name}, seed {config.seed}",
            "licence": "simulated; Apache-2.0, as the code",
            "world": world.meta,
        },
        split=split,
    )
