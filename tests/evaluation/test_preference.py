"""What a preference score is measured by: against labels, scipy and a world."""

import dataclasses

import helpers
import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from onerec_jax.data.world.response import Response, satisfaction
from onerec_jax.evaluation import preference


def test_spearman_against_scipy():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, 50)
    b = a + rng.integers(0, 9, 50)
    assert preference.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert np.isnan(preference.spearman(a, np.ones(50)))


def test_unknown_labels_count_nowhere():
    rng = np.random.default_rng(1)
    user, label, probability = rng.integers(0, 5, 90), rng.integers(-1, 2, 90), rng.random(90)
    p, known = rng.random((90, 2)), label >= 0
    found = preference.objective_metrics(user, label, probability, p[:, 0])
    assert found["exposures"] == known.sum()
    assert found["rate"] == label[known].mean()
    assert found["auc"] == pytest.approx(roc_auc_score(label[known], probability[known]))
    assert found["p_auc"] == pytest.approx(roc_auc_score(label[known], p[known, 0]))
    labels = np.stack([label, np.where(label == 1, 1, -1)], 1)
    auc = preference.auc_by_weights(labels, p)
    expected = [roc_auc_score(label[known], x[known]) for x in p.T]
    np.testing.assert_allclose(auc[:, 0], expected)
    assert np.isnan(auc[:, 1]).all()  # one kind of label


def test_correlations_over_all_pairs_and_within_users():
    """Within each user in order, between the users in reverse."""
    truth = {"ctr": np.array([[1.0, 2, 3], [4, 5, 6]]), "satisfaction": np.array([[1, 2, 3]] * 2)}
    scores = {"ctr": np.array([[7.0, 8, 9], [1, 2, 3]]), "p": np.array([[3, 2, 1], [1, 2, 3]])}
    flat = [{k: v.ravel() for k, v in x.items()} for x in (truth, scores)]
    assert preference.against_world(*flat)["ctr"] < 0
    found = preference.within_users(truth, scores)
    assert found["ctr"] == pytest.approx(1)
    assert found["p, satisfaction"] == pytest.approx(0)  # one user right, one wrong


def test_item_rates_by_hand():
    """Ten exposures of a mean of 1/2 come on top; an unknown label is none."""
    found = preference.item_rates([0, 0, 1, 1, 2], [1, 1, 0, 0, -1], 4, prior=10)
    np.testing.assert_allclose(found, [7 / 12, 5 / 12, 0.5, 0.5])


def test_unexposed_items():
    data = helpers.full_dataset(users=3, items=12)
    found = preference.unexposed_items(data, [0, 2], 4, seed=0)
    for user, items in zip([0, 2], found, strict=True):
        shown = data.item_rows[data.offsets[user] : data.offsets[user + 1]]
        assert not set(items) & set(shown)
    np.testing.assert_array_equal(found, preference.unexposed_items(data, [0, 2], 4, seed=0))


def test_the_world_is_asked_in_the_situation_of_the_row():
    data, asked = helpers.full_dataset(), []
    n = data.interactions.height
    columns = {name: np.arange(n) + 100 * i for i, name in enumerate(("session", "slot"))}
    rows = data.interactions.with_columns(**{k: helpers.pl.Series(v) for k, v in columns.items()})
    # Somebody was dropped: the rows of the table are not the world's.
    users = data.users.with_columns(user_id=data.users["user_id"] + 10)
    data = dataclasses.replace(data, interactions=rows, users=users)

    class Stub:
        def expected(self, *arguments):
            asked.append(arguments)
            return Response(*np.arange(20.0).reshape(10, 2))

    found = preference.world_expectations(
        data, Stub(), np.array([0, 3]), np.array([5, 1]), np.array([7, 2])
    )
    times = data.column("time_s")[[7, 2]]
    for mine, expected in zip(asked[0], ([10, 13], [5, 1], [7, 2], [107, 102], times), strict=True):
        np.testing.assert_array_equal(mine, expected)
    answer = Response(*np.arange(20.0).reshape(10, 2))
    np.testing.assert_array_equal(found["lvtr"], answer.long_view)
    np.testing.assert_array_equal(found["satisfaction"], satisfaction(answer))
    assert set(found) == {"ctr", "lvtr", "ltr", "wtr", "cmtr", "satisfaction"}
    asked.clear()
    blind = preference.world_expectations(
        data, Stub(), np.array([0, 3]), np.array([5, 1]), np.array([7, 2]), moods=3
    )
    sessions = np.array([call[2] for call in asked])
    assert len(np.unique(sessions)) == 6  # of other sessions, all different
    assert sessions.min() > n
    np.testing.assert_array_equal(blind["lvtr"], answer.long_view)
