"""Parts of a traced step, and peaks of chips."""

import types

import pytest

from onerec_jax.training.profile import Kernel, by_part, peak_flops

ENCODER = "jit(train_step)/transpose(jvp(OneRec))/OneRec.encode/encoder"


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("", "unnamed"),
        ("jit(train_step)/add", "optimizer"),
        (f"{ENCODER}/features/scatter-add", "feature lookups"),
        (f"{ENCODER}/lifelong/w_in/dot_general", "pathway MLPs"),
        (f"{ENCODER}/qformer/qformer/k/dot_general", "lifelong QFormer"),
        (f"{ENCODER}/layers/block_0/ff/mul", "encoder"),
        ("jit(train_step)/jvp(OneRec)/decoder/layers/block_0/experts/sort", "experts"),
        ("jit(train_step)/jvp(OneRec)/decoder/layers/block_0/q/dot_general", "decoder"),
        ("jit(train_step)/jvp(OneRec)/OneRec.level_logits/dot_general", "heads and loss"),
    ],
)
def test_parts_by_the_names_of_modules(source, part):
    total = by_part([Kernel(2.0, "", "", source, "")] * 2)
    assert {name for name, milliseconds in total.items() if milliseconds} == {part}
    assert total[part] == 4.0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
