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
    assert set(found) == {"ctr", "lvtr", "ltr", "wtr", "cmtr", "satisfaction", "watch_s"}
    asked.clear()
    blind = preference.world_expectations(
        data, Stub(), np.array([0, 3]), np.array([5, 1]), np.array([7, 2]), moods=3
    )
    sessions = np.array([call[2] for call in asked])
    assert len(np.unique(sessions)) == 6  # of other sessions, all different
    assert sessions.min() > n
    np.testing.assert_array_equal(blind["lvtr"], answer.long_view)


def test_what_is_expected_of_whole_lists(monkeypatch):
    """Two lists of two items: seconds add up, and at least one like is asked for."""
    rates = {
        "watch_s": [10, 20, 5, 5],
        "ltr": [0.5, 0.5, 0.1, 0.0],
        "wtr": [0.0, 0.2, 0.0, 0.0],
        "satisfaction": [1.0, 0.0, 0.5, 0.7],
    }
    asked = []

    def answer(dataset, world, user, item, row, moods):
        asked.append((user.tolist(), item.tolist(), row.tolist(), moods))
        return {name: np.array(x, np.float32) for name, x in rates.items()}

    monkeypatch.setattr(preference, "world_expectations", answer)
    items, rows = np.array([[1, 2], [3, 4]]), np.array([[7, 8], [5, 6]])
    found = preference.session_expectations(None, None, np.array([9, 0]), items, rows, moods=2)
    assert asked == [([9, 9, 0, 0], [1, 2, 3, 4], [7, 8, 5, 6], 2)]
    np.testing.assert_allclose(found["swt"], [30, 10])
    np.testing.assert_allclose(found["ltr"], [0.75, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found["wtr"], [0.2, 0], atol=1e-7)
    np.testing.assert_allclose(found["satisfaction"], [0.5, 0.6], rtol=1e-6)


def test_validation_metrics_by_hand():
    """An objective of one kind of label has a loss and no AUC; an unknown label counts nowhere."""
    label = np.array([[1, 0], [0, 0], [-1, 0]])
    logit = np.array([[0.0, 0.0], [0.0, 0.0], [99.0, 0.0]])
    found = preference.validation_metrics(("a", "b"), label, logit, {"auc_p": np.arange(3)[::-1]})
    assert found["loss"] == pytest.approx(2 * np.log(2))
    assert found["score"] == -found["loss"]
    assert (found["auc_a"], found["auc_p_a"]) == (0.5, 1)
    assert "auc_b" not in found


def test_what_items_say_of_lists_without_the_user():
    """Item 0 was in a good list, item 1 in a bad one; a mean over the items tells lists apart."""
    labels = {"ltr": np.array([1, 0, -1])}
    scores = {"ltr": np.array([0.9, 0.2, 0.5]), "reward": np.array([0.0, 1.0, 2.0])}
    history = np.array([[0, 2], [1, 2]]), np.array([[1], [0]])
    found = preference.held_out_metrics(
        np.zeros(3, int), [[0, 2], [1, 2], [1, 1]], labels, scores, history, 3, "reward"
    )["ltr"]
    assert (found["auc"], found["p_auc"], found["item_rate_auc"]) == (1, 0, 1)
    assert found["exposures"] == 2
