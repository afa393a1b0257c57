"""Item vectors from text: who may shape them, and what they are like."""

import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.text import tfidf_vectors

TEXTS = ["red war film", "red love film", "war space film", "love space red", "space war red"]
FIT = [0, 1, 2, 3, 4]


def test_unit_length_float32_and_similar_texts_are_near():
    vectors = tfidf_vectors([*TEXTS, "red war film"], FIT, dim=3)
    assert vectors.dtype == np.float32
    assert vectors.shape == (6, 3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[5], vectors[0], atol=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[3]  # two words in common, and one


def test_other_items_do_not_shape_the_vocabulary():
    """Whatever an item outside `fit_rows` says, the vectors of the others stay."""
    plain = tfidf_vectors([*TEXTS, "red", "war"], FIT, dim=3)
    strange = tfidf_vectors([*TEXTS, "zebra zebra red", "zebra zebra"], FIT, dim=3)
    np.testing.assert_array_equal(plain[:5], strange[:5])
    np.testing.assert_allclose(strange[5], plain[5], atol=1e-6)  # "zebra" is no word
    np.testing.assert_array_equal(strange[6], 0)  # not a word of it is known


def test_missing_text_is_a_zero_row():
    np.testing.assert_array_equal(tfidf_vectors([*TEXTS, None, ""], FIT, dim=2)[5:], 0)


def test_width_shrinks_with_the_vocabulary():
    assert tfidf_vectors(TEXTS, FIT, dim=256).shape == (5, 4)


def test_same_seed_same_vectors():
    first = tfidf_vectors(TEXTS, FIT, dim=2, seed=1)
    np.testing.assert_array_equal(first, tfidf_vectors(TEXTS, FIT, dim=2, seed=1))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["one", "two", "three"], "no word that two training items share"),
        (["", None, ""], "no word that two training items share"),
        (["same", "same", "other"], "too few distinct words"),
    ],
)
def test_unusable_text(texts, message):
    with pytest.raises(InputError, match=message) as caught:
        tfidf_vectors(texts, [0, 1, 2])
    assert "--vectors" in str(caught.value)
    assert "\n" not in str(caught.value)
