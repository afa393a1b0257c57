"""Sizes: what a configuration refuses, and that the presets are what they are called."""

import re

import flax.linen as nn
import helpers
import jax
import numpy as np
import pytest

from experiments.evaluate import EvaluationConfig
from experiments.pretrain import PretrainConfig
from onerec_jax.config import PRESETS, ModelConfig
from onerec_jax.errors import InputError
from onerec_jax.models.onerec import OneRec
from onerec_jax.tokenizer.config import TokenizerConfig
from onerec_jax.tokenizer.rq_kmeans import KMeansConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"d_model": 30, "num_heads": 4}, "--model.num-heads"),
        ({"num_experts": 4, "experts_per_token": 5}, "--model.experts-per-token"),
        ({"num_experts": 4, "experts_per_token": 0}, "--model.experts-per-token"),
    ],
)
def test_refused(changes, flag):
    with pytest.raises(InputError, match=flag) as caught:
        ModelConfig(**changes)
    assert "\n" not in str(caught.value)


def test_a_dense_model_ignores_experts_per_token():
    assert ModelConfig(num_experts=0, experts_per_token=9).head_dim == 32


def test_encoder_length():
    cfg = helpers.tiny_config()
    assert cfg.encoder_length == 1 + 4 + 3 + 2
    assert helpers.tiny_config(lifelong_length=0).encoder_length == 1 + 4 + 3
    assert hash(cfg) == hash(helpers.tiny_config())  # static argument of jit


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    """Shapes of the whole model at its published size, without allocating it."""
    cfg = PRESETS[name]
    spec = helpers.full_spec(codebook_size=8192)
    batch = helpers.random_batch(cfg, spec, 2)
    variables = jax.eval_shape(lambda: nn.unbox(OneRec(cfg, spec).init(jax.random.key(0), batch)))
    logits = jax.eval_shape(OneRec(cfg, spec).apply, variables, batch)
    assert logits.shape == (2, 1, 3, 8192)
    layers = variables["params"]["decoder"]["layers"]
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(layers))
    assert count % cfg.decoder_layers == 0
    assert ("router" in variables) == bool(cfg.num_experts)


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: ModelConfig(num_heads=0), "--model.num-heads 0"),
        (lambda: ModelConfig(dropout=-0.1), "--model.dropout -0.1"),
        (lambda: TokenizerConfig(levels=0), "--tokenizer.levels 0"),
        (lambda: TokenizerConfig(codebook_size=-3), "--tokenizer.codebook-size -3"),
        (lambda: KMeansConfig(iterations=0), "--tokenizer.kmeans.iterations 0"),
        (lambda: KMeansConfig(chunk=-1), "--tokenizer.kmeans.chunk -1"),
        (
            lambda: KMeansConfig(assignment="balanced", mini_batch=64),
            "--tokenizer.kmeans.mini-batch works with --tokenizer.kmeans.assignment plain",
        ),
        (
            lambda: KMeansConfig(assignment="sweep", restarts=2),
            "--tokenizer.kmeans.restarts works with --tokenizer.kmeans.assignment plain",
        ),
        (lambda: LoopConfig(log_every=0), "--train.log-every 0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "--optimizer.learning-rate nan"),
        (lambda: EvaluationConfig(beam_width=0), "--evaluation.beam-width 0"),
        (lambda: PretrainConfig(seed=-1), "--seed -1"),
    ],
)
def test_settings_below_their_minimum_name_the_flag(make, flag):
    """Each would otherwise end in a traceback far from its cause."""
    with pytest.raises(InputError, match=re.escape(flag)):
        make()
