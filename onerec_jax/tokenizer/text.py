"""Item vectors from item text."""

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from onerec_jax.errors import InputError


def tfidf_vectors(texts, fit_rows, *, dim=256, seed=0) -> np.ndarray:
    """TF-IDF of words, reduced by truncated SVD, unit length.

    Args:
      texts: text of every item.
      fit_rows: int `[n]`, items whose text may shape the vocabulary and the axes (training items).
      dim: width of the result, fewer if the vocabulary is smaller.

    Returns:
      Float32 `[items, dim]`; a zero row where no word of the text is known.

    Raises:
      InputError: the texts of the training items hold no usable word.
    """
    texts = [text or "" for text in texts]
    fit_texts = [texts[i] for i in fit_rows]
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=200_000)
    try:
        counts = tfidf.fit_transform(fit_texts)
    except ValueError as error:
        raise InputError(
            "column 'text' of the items holds no word that two training items share: "
            "give item vectors by --vectors file.npy"
        ) from error
    dim = min(dim, min(counts.shape) - 1)
    if dim < 1:
        raise InputError("too few distinct words in the item texts: give --vectors file.npy")
    svd = TruncatedSVD(dim, random_state=seed).fit(counts)
    return normalize(svd.transform(tfidf.transform(texts))).astype(np.float32)
