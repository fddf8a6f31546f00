"""Measures by hand, against brute force, and intervals that cover what they promise."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit
from torchmetrics.functional.classification import binary_calibration_error

from diffpref.scorer.measures import (
    Measured,
    Resampling,
    Threshold,
    accuracy,
    against_truth,
    brier,
    by_aspect,
    by_split,
    calibration_error,
    correlation,
    cyclic_accuracy,
    cyclic_triples,
    difference,
    edges,
    list_measures,
    log_loss,
    macro_accuracy,
    per_user,
    pickscore_threshold,
    preference_for,
    reliability,
    target_of,
    three_way,
    tie_calibration,
    with_half_points,
    worst_users,
)
from diffpref.scorer.measures.bootstrap import mean, share
from diffpref.winrate import win_rate

QUICK = Resampling(resamples=200)
PROMPTS = {"prompt": list("aabb")}


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# --- intervals --------------------------------------------------------------------------------------------------------


def crossed(rng: np.random.Generator, effect: float) -> tuple[np.ndarray, dict[str, list]]:
    """600 choices, right in 0.7 of all: 30 prompts and 30 users, each easier or harder than the others."""
    prompt, user = rng.integers(30, size=600), rng.integers(30, size=600)
    p = 0.7 + effect * (rng.choice([-1, 1], 30)[prompt] + rng.choice([-1, 1], 30)[user])
    return (rng.random(600) < p).astype(float), {"prompt": prompt.tolist(), "user": user.tolist()}


def coverage(effect: float, *names: str) -> float:
    """Share of 200 simulations whose interval holds the true 0.7."""
    hits = 0
    for seed in range(200):
        values, clusters = crossed(np.random.default_rng(seed), effect)
        _, low, high = share(values, {n: clusters[n] for n in names}, Resampling(resamples=200, seed=seed))
        hits += low <= 0.7 <= high
    return hits / 200


def test_the_interval_covers_prompts_and_users_at_once():
    """Each clustering alone is too narrow where both matter, and both together are not too wide where neither does."""
    both = coverage(0.12, "prompt", "user")
    assert 0.9 <= both <= 0.985
    assert coverage(0.12, "prompt") < both - 0.03 and coverage(0.12, "user") < both - 0.03
    assert 0.9 <= coverage(0.0, "prompt", "user") <= 0.985


def test_one_clustering_is_the_bootstrap_of_win_rates():
    rng = np.random.default_rng(3)
    after, prompts = rng.standard_normal(80) + 0.3, [f"p{i % 16}" for i in range(80)]
    rate = win_rate(after, np.zeros(80), prompts, resamples=10_000)
    found = accuracy(after, np.ones(80), {"prompt": prompts}, Resampling(resamples=10_000))
    assert found.value == rate.value
    assert (found.low, found.high) == (pytest.approx(rate.low, abs=0.01), pytest.approx(rate.high, abs=0.01))


def test_variances_add_and_the_cells_are_taken_off():
    """V = V_prompt + V_user − V_cell against the sandwich formula of the mean, by hand."""
    values, clusters = crossed(np.random.default_rng(5), 0.12)
    centred, names = values - values.mean(), np.array([clusters["prompt"], clusters["user"]])

    def variance(index: np.ndarray) -> float:
        return float(sum(centred[index == one].sum() ** 2 for one in set(index.tolist()))) / len(values) ** 2

    expected = variance(names[0]) + variance(names[1]) - variance(names[0] * 30 + names[1])
    _, low, high = mean(values, clusters, Resampling(resamples=4000))
    assert (high - low) / 2 / 1.96 == pytest.approx(expected**0.5, rel=0.06)


def test_all_right_is_not_certainty():
    """Two users and four prompts, all right: the exact bound of the fewer, (1/40)^(1/2)."""
    _, low, high = share(np.ones(8), {"prompt": list("aabbccdd"), "user": list("xyxyxyxy")})
    assert (low, high) == (pytest.approx(0.025**0.5), 1.0)


def test_no_name_is_a_cluster_by_itself():
    """Eight choices of nobody we know are eight clusters; of one user without a second there is no clustering."""
    assert share(np.ones(8), {"user": [None] * 8})[1] == pytest.approx(0.025 ** (1 / 8))
    found = accuracy(np.ones(4), np.ones(4), {"prompt": ["a"] * 4, "user": ["x"] * 4})
    assert "bootstrap of single choices, for there are not two prompts or two users" in found.interval


def test_same_seed_same_interval():
    values, clusters = crossed(np.random.default_rng(0), 0.1)
    assert mean(values, clusters, QUICK) == mean(values, clusters, QUICK)
    assert mean(values, clusters, QUICK) != mean(values, clusters, Resampling(resamples=200, seed=1))


@pytest.mark.parametrize(
    ("values", "clusters", "weight", "message"),
    [
        ([], {"prompt": []}, None, "nothing to measure"),
        ([1.0, 0.0], {"prompt": ["a"]}, None, "1 names of the clustering by prompt, but 2 values"),
        ([1.0, 0.0], {"prompt": ["a", "b"]}, [0.0, 0.0], "all weights are 0"),
    ],
)
def test_intervals_that_cannot_be(values, clusters, weight, message):
    with pytest.raises(ValueError, match=message):
        mean(np.array(values), clusters, weight=None if weight is None else np.array(weight))


def test_how_it_reads():
    assert str(Measured(0.7391, 0.7, 0.78, 9, "x", "y")) == "0.739 [0.700, 0.780]"
    assert Measured(0.5, 0.4, 0.6, 9, "x", "y", {"ties": 2}).as_dict() == {
        "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "policy": "x", "interval": "y", "ties": 2,
    }  # fmt: skip


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    """Right, wrong, a tie of people (out), an exact tie of the scorer (half), right the other way round."""
    found = accuracy(array(1, -2, 3, 0, -1), array(1, 1, 0, 1, -1), {"prompt": list("aabbb")}, QUICK)
    assert (found.value, found.n) == (2.5 / 4, 4)
    assert found.policy == "1 tie of people left out, 1 exact tie of the scorer counted half"
    assert found.interval == "95 % interval: bootstrap of whole prompts"
    assert found.more == {"ties_dropped": 1, "exact_ties": 1}


def test_weights_make_prompts_count_alike():
    """Prompt a: 3 of 3 right; prompt b: 0 of 1. Pairs alike: 3/4, prompts alike: 1/2."""
    margin, clusters = array(1, 1, 1, -1), {"prompt": list("aaab")}
    assert accuracy(margin, np.ones(4), clusters, QUICK).value == 0.75
    weighted = accuracy(margin, np.ones(4), clusters, QUICK, weight=array(1 / 3, 1 / 3, 1 / 3, 1))
    assert weighted.value == pytest.approx(0.5)


def test_nothing_to_be_accurate_about():
    with pytest.raises(ValueError, match="none of the 2 pairs has a winner"):
        accuracy(array(1, 2), array(0, np.nan), {"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="1 of 2 margins are NaN or infinite"):
        accuracy(array(1, np.inf), array(1, 1), {"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="one number for each pair"):
        accuracy(array(1, 2), array(1), {"prompt": ["a", "b"]})


def test_difference_is_paired():
    """Two scorers that disagree in one pair of forty: the interval is far narrower than either accuracy's."""
    rng = np.random.default_rng(0)
    margin, clusters = rng.choice([-1.0, 1.0], 40), {"prompt": list(range(40))}
    other = margin.copy()
    other[np.flatnonzero(margin > 0)[0]] = -1
    found = difference(margin, other, np.ones(40), clusters)
    assert found.value == pytest.approx(1 / 40) and found.low == 0
    one = accuracy(margin, np.ones(40), clusters)
    assert found.high - found.low < 0.4 * (one.high - one.low)
    with pytest.raises(ValueError, match="1 of 40 margins"):
        difference(margin, np.where(np.arange(40) == 3, np.nan, other), np.ones(40), clusters)


def test_against_known_probabilities():
    """Expected: (0.8 + 0.4 + 0.5)/3 for right, wrong, tied; bound (0.8 + 0.6 + 0.9)/3. The unknown one is left out."""
    found = against_truth(array(1, 2, 0, 5), array(0.8, 0.4, 0.9, np.nan), {"prompt": list("abcd")}, QUICK)
    assert found["expected accuracy"].value == pytest.approx(1.7 / 3)
    assert found["Bayes bound"].value == pytest.approx(2.3 / 3)
    assert found["short of bound"].value == pytest.approx(0.2)
    assert found["Bayes bound"].n == 3
    with pytest.raises(ValueError, match=r"\[0, 1\], got 0.8 to 1.4"):
        against_truth(array(1, 2), array(0.8, 1.4), {"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="no pair has a known probability"):
        against_truth(array(1, 2), array(np.nan, np.nan), {"prompt": ["a", "b"]})


def test_accuracy_by_aspect():
    labels = {"beauty": array(1, -1, 0, np.nan), "fit": array(0, np.nan, np.nan, 0)}
    found = by_aspect(array(1, 1, 1, 1), labels, PROMPTS, QUICK)
    assert list(found) == ["beauty"] and (found["beauty"].value, found["beauty"].n) == (0.5, 2)
    own = by_aspect({"beauty": array(1, -1, 1, 1)}, {"beauty": labels["beauty"]}, PROMPTS, QUICK)
    assert own["beauty"].value == 1


# --- ties -------------------------------------------------------------------------------------------------------------


def test_points_for_ties_by_hand():
    """At |p − (1−p)| ≤ 0.1: agreement 1, tie against winner ½ both ways, wrong winner 0, tie and tie 1."""
    margin, label = array(2, 0.1, 2, -2, 0.1), array(1, 1, 0, 1, 0)
    found = with_half_points(margin, label, Threshold(0.1, "other.parquet"), {"prompt": list("abcde")}, QUICK)
    assert found.value == pytest.approx((1 + 0.5 + 0.5 + 0 + 1) / 5)
    assert found.policy.startswith("2 ties of people kept; half a point") and "chosen on other.parquet" in found.policy
    assert found.more == {"threshold": 0.1, "ties": 2, "called_ties": 2}


def test_three_ways_by_hand():
    found = three_way(array(2, 0.1, 2, -2, 0.1), array(1, 1, 0, 1, 0), Threshold(0.5), {"prompt": list("abcde")}, QUICK)
    assert found.value == pytest.approx(2 / 5)
    assert "in-sample" in found.policy


def test_tie_calibration_is_the_best_threshold():
    """Against all thresholds tried one by one, with margins that occur more than once."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        label = rng.choice([-1.0, 0.0, 1.0], 40)
        margin = np.round(label + rng.standard_normal(40), 1)
        agree = lambda t, m=margin, y=label: (np.where(np.abs(m) <= t, 0, np.sign(m)) == y).mean()  # noqa: E731
        best = max(agree(t) for t in [0.0, *np.abs(margin)])
        found = tie_calibration(margin, label)
        assert agree(found.value) == best
        assert all(agree(t) < best for t in [0.0, *np.abs(margin)] if t < found.value)  # the smallest of the best


def test_thresholds_follow_the_data():
    """No ties of people: none are called. Small margins where people tied: those are."""
    assert tie_calibration(array(1, 2, -0.1), array(1, 1, 1)).value == 0
    assert tie_calibration(array(0.1, -0.2, 3, -4), array(0, 0, 1, -1)).value == 0.2
    margin = 2 * np.arctanh(array(0.15, -0.05, 0.5, 0.9))
    assert pickscore_threshold(margin, array(0, 0, 1, 1)).value == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no pair has a label"):
        tie_calibration(array(1), array(np.nan))


# --- calibration ------------------------------------------------------------------------------------------------------


def simulated(count: int, factor: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, list]]:
    """(margins, labels) of a scorer whose log-odds are `factor` times the true ones; clusters of four."""
    rng = np.random.default_rng(seed)
    logit = 1.5 * rng.standard_normal(count)
    label = np.where(rng.random(count) < expit(logit), 1.0, -1.0)
    return factor * logit, label, {"prompt": (np.arange(count) // 4).tolist()}


def test_calibrated_predictions_have_no_error_whoever_stands_first():
    """Winner first, where torchmetrics alone gives 0.3, and in random order alike."""
    margin, label, clusters = simulated(8000)
    first = calibration_error(margin * label, np.ones(8000), clusters, QUICK)
    random = calibration_error(margin, 0.5 * (1 + label), clusters, QUICK)
    assert first.value < 0.015 and first.value == pytest.approx(random.value, abs=1e-12)
    plain = binary_calibration_error(torch.tensor(expit(margin * label)), torch.ones(8000, dtype=torch.long), 15)
    assert plain > 0.25
    assert first.value < 2 * first.more["by_chance"] and first.low < 0.005


def test_overconfidence_is_seen():
    margin, label, clusters = simulated(8000, factor=3.0)
    found = calibration_error(margin, 0.5 * (1 + label), clusters, QUICK)
    assert found.value > 0.1 and found.low > 0.08 and found.more["by_chance"] < 0.015


def test_error_is_that_of_torchmetrics_on_both_orders():
    margin, label, clusters = simulated(500, factor=2.0)
    y = 0.5 * (1 + label)
    p = torch.tensor(np.concatenate([expit(margin), expit(-margin)]))
    both = torch.tensor(np.concatenate([y, 1 - y])).long()
    found = calibration_error(margin, y, clusters, QUICK)
    assert found.value == pytest.approx(float(binary_calibration_error(p, both, n_bins=15)), abs=1e-9)


def test_probabilities_as_targets():
    """Predictions that are the probabilities have no error at all; always one half is off by E|q − ½|."""
    margin, _, clusters = simulated(400)
    exact = calibration_error(margin, expit(margin), clusters, QUICK)
    assert exact.value < 1e-12 and "probabilities" in exact.policy and not exact.more
    assert log_loss(margin, expit(margin), clusters, QUICK).value == pytest.approx(
        float(stats.entropy([expit(margin), expit(-margin)]).mean())
    )


def test_the_table_of_the_plot():
    """p = 3/4 three times, right twice: its bin and that of 1/4 mirror each other; all others are empty."""
    table = reliability(np.full(3, np.log(3)), array(1, 1, 0), bins=10)
    assert table.share.tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0.5, 0, 0]
    assert table.predicted[[2, 7]].tolist() == pytest.approx([0.25, 0.75])
    assert table.observed[[2, 7]].tolist() == pytest.approx([1 / 3, 2 / 3]) and np.isnan(table.observed[4])
    assert table.as_dict()["observed"][4] is None and table.as_dict()["bins"] == 10


def test_losses_by_hand():
    """p = 0.9 and 0.2 of what happened: −(ln 0.9 + ln 0.2)/2, and (0.1² + 0.8²)/2; enormous margins stay finite."""
    margin = array(np.log(9), np.log(4))
    target = array(1, 0)
    clusters = {"prompt": ["a", "b"]}
    assert log_loss(margin, target, clusters, QUICK).value == pytest.approx(-np.log(0.9 * 0.2) / 2)
    assert brier(margin, target, clusters, QUICK).value == pytest.approx((0.01 + 0.64) / 2)
    assert log_loss(array(-1e4, 1), array(1, 1), clusters, QUICK).value == pytest.approx(5e3, rel=1e-3)


def test_targets_of_labels_and_probabilities():
    """A tie has no target of its own; a probability has, also of one half."""
    target, known = target_of(array(1, -1, 0, np.nan))
    assert target[:2].tolist() == [1, 0] and known.tolist() == [True, True, False, False]
    target, known = target_of(array(1, 0, 1), array(0.7, 0.5, np.nan))
    assert target[:2].tolist() == [0.7, 0.5] and known.tolist() == [True, True, False]
    for bad, message in (([1.5], "in \\[0, 1\\]"), ([], "there is none")):
        with pytest.raises(ValueError, match=message):
            calibration_error(np.zeros(len(bad)), np.array(bad), {"prompt": ["a"] * len(bad)})


# --- lists ------------------------------------------------------------------------------------------------------------


def brute_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    concordance = sum(a * b for a, b in signs)
    return concordance / np.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def brute_ndcg(scores: np.ndarray, truth: np.ndarray) -> float:
    """The mean over all orders in which equal scores can stand."""
    gain = [sum((t > u) + 0.5 * (t == u) for u in truth) - 0.5 for t in truth]
    value = lambda order: sum(gain[i] / np.log2(place + 2) for place, i in enumerate(order))  # noqa: E731
    orders = [o for o in permutations(range(len(truth))) if all(np.diff(scores[list(o)]) <= 0)]
    return float(np.mean([value(o) for o in orders])) / value(np.argsort(-np.array(gain)))


def test_lists_against_brute_force():
    rng = np.random.default_rng(0)
    lists = [(rng.integers(0, 4, k).astype(float), rng.integers(0, 3, k).astype(float)) for k in (2, 3, 4, 5, 5, 6)]
    lists = [(s, t) for s, t in lists if np.ptp(s) and np.ptp(t)]
    assert len(lists) >= 4
    found = list_measures(lists, {"prompt": list(range(len(lists)))}, QUICK)
    assert found["Kendall tau-b"].value == pytest.approx(np.mean([brute_tau_b(s, t) for s, t in lists]))
    assert found["NDCG"].value == pytest.approx(np.mean([brute_ndcg(s, t) for s, t in lists]), abs=1e-6)
    rho = [np.corrcoef(stats.rankdata(s), stats.rankdata(t))[0, 1] for s, t in lists]
    assert found["Spearman"].value == pytest.approx(np.mean(rho))


def test_lists_without_an_order():
    """A picture alone and equal ranks of people are left out; equal scores of the scorer count as nothing said."""
    equal, alone = (array(1, 2), array(3, 3)), (array(1), array(1))
    lists = [(array(1, 2, 3), array(1, 2, 3)), (array(5, 5), array(1, 2)), alone, equal]
    found = list_measures(lists, {"prompt": list("abcd")}, QUICK)
    assert {name: measured.n for name, measured in found.items()} == dict.fromkeys(found, 2)
    assert found["Kendall tau-b"].value == found["Spearman"].value == 0.5
    assert found["inversion accuracy"].value == 0.75
    assert "2 lists without an order of people left out, 1 with all scores equal count 0" in found["Spearman"].policy
    assert "1 with all scores equal count 0.5" in found["inversion accuracy"].policy


def test_scores_that_single_precision_would_tie():
    """1 and 1 + 1e-9 are two scores."""
    found = list_measures([(array(1, 1 + 1e-9), array(0, 1))] * 2, {"prompt": ["a", "b"]}, QUICK)
    assert found["NDCG"].value == pytest.approx(1) and found["inversion accuracy"].value == 1


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "none of the 0 lists is ranked"),
        ([([1.0, 2.0], [3.0, 3.0])], "none of the 1 lists is ranked"),
        ([([1.0, 2.0, 3.0], [1.0, 2.0])], "a score for each of its 2 pictures"),
        ([([1.0, np.nan], [1.0, 2.0])], "NaN or infinite"),
    ],
)
def test_lists_that_cannot_be_measured(lists, message):
    with pytest.raises(ValueError, match=message):
        list_measures(lists, {"prompt": ["a"] * len(lists)})


# --- users ------------------------------------------------------------------------------------------------------------


def test_users_count_alike():
    """x: 3 of 3, y: 0 of 1, and a pair of nobody."""
    margin, label = array(1, 1, 1, -1, -1), np.ones(5)
    clusters = {"prompt": list("abcde"), "user": ["x", "x", "x", "y", None]}
    found = macro_accuracy(margin, label, clusters, QUICK)
    assert (found.value, found.n) == (0.5, 2)
    assert "mean over 2 users" in found.policy and "1 pair without a user left out" in found.policy
    users = per_user(margin, label, clusters["user"])
    assert users.rows() == [{"user": "y", "value": 0.0, "n": 1}, {"user": "x", "value": 1.0, "n": 3}]
    with pytest.raises(ValueError, match="no pair with a winner has a user"):
        per_user(margin, label, [None] * 5)


def test_the_worst_tenth_of_users():
    """Twenty users with accuracies 0, 1/19, …: the two worst. Were all alike, chance alone would set some apart."""
    margin = np.concatenate([np.repeat([1.0, -1.0], [i, 19 - i]) for i in range(20)])
    users = per_user(margin, np.ones(380), np.repeat(np.arange(20), 19).tolist())
    found = worst_users(users, QUICK)
    assert (found.value, found.n) == (pytest.approx(0.5 / 19), 2)
    assert found.low <= found.value <= found.high and 0.2 < found.more["by_chance"] < 0.4
    assert worst_users(per_user(margin[:19], np.ones(19), [1] * 19), QUICK).n == 1


def test_the_worst_users_who_all_agree_are_not_certain():
    """Ten of twenty users are always wrong, and so are the two worst of each resample: 0 of 2."""
    users = per_user(np.repeat([1.0, -1.0], 30), np.ones(60), np.repeat(np.arange(20), 3).tolist())
    found = worst_users(users, QUICK)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(1 - 0.025**0.5)  # (1 − high)² = 0.025
    assert "exact, 2 users as trials" in found.interval


# --- cycles -----------------------------------------------------------------------------------------------------------


def test_cycles_are_found_once():
    """0>1>2>0 and 1>2>3>1 are circles; 0>1>3>0 is none, for nobody compared 0 with 3."""
    pairs = np.array([[0, 1], [1, 2], [2, 0], [2, 3], [3, 1]])
    assert cyclic_triples(edges(pairs, np.ones(5))) == [(0, 1, 2), (1, 2, 3)]


def test_cycles_against_brute_force():
    rng = np.random.default_rng(0)
    pairs = np.array([p for p in combinations(range(9), 2) if rng.random() < 0.9])
    said = edges(pairs, rng.choice([-1, 0, 1], len(pairs), p=[0.45, 0.1, 0.45]))
    over = lambda i, j: said.get((i, j), 0) > 0  # noqa: E731
    brute = {
        (a, b, c)
        for a, b, c in permutations(range(9), 3)
        if a == min(a, b, c) and over(a, b) and over(b, c) and over(c, a)
    }
    found = cyclic_triples(said)
    assert len(brute) > 3 and set(found) == brute and len(found) == len(brute)


def test_majorities_make_the_cycle():
    """Two of three say 0 over 1, whichever way round it was asked; 2 against 0 is undecided: no circle."""
    pairs = np.array([[0, 1], [1, 0], [0, 1], [1, 2], [2, 0], [0, 2]])
    said = edges(pairs, array(1, 1, 1, 1, 1, 1))
    assert said[0, 1] == pytest.approx(1 / 3) == -said[1, 0] and said[2, 0] == 0
    assert cyclic_triples(said) == []
    assert cyclic_triples(edges(pairs, array(1, 1, 1, 1, 1, np.nan))) == [(0, 1, 2)]


def test_only_a_circle_of_margins_gets_a_circle():
    pairs, scores = np.array([[0, 1], [1, 2], [2, 0]]), array(3, 2, 1)
    triples = cyclic_triples(edges(pairs, np.ones(3)))
    line = edges(pairs, scores[pairs[:, 0]] - scores[pairs[:, 1]])
    assert cyclic_accuracy(triples, line, {"prompt": ["a"]}).value == 0
    assert cyclic_accuracy(triples, edges(pairs, array(0.1, 2, 3)), {"prompt": ["a"]}).value == 1
    assert cyclic_accuracy(triples, edges(pairs, array(0, 2, 3)), {"prompt": ["a"]}).value == 0
    with pytest.raises(ValueError, match="no cyclic triple"):
        cyclic_accuracy([], line, {"prompt": []})


# --- bias -------------------------------------------------------------------------------------------------------------


def test_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    scores, pixels = rng.standard_normal(60), rng.integers(1, 5, 60).astype(float)
    found = correlation(scores, pixels, {"prompt": [i // 2 for i in range(60)]})
    assert found.value == pytest.approx(stats.spearmanr(scores, pixels).statistic)
    assert found.low < found.value < found.high
    same = correlation(pixels * 3, pixels, {"prompt": list(range(60))})
    assert same.value == pytest.approx(1)
    assert correlation(np.ones(60), pixels, {"prompt": list(range(60))}) is None


def test_preference_for_the_larger():
    """The larger won in 1 of 4 (people), the scorer takes it in 3 and ties in 1; a pair of one size is left out."""
    more, label, margin = array(1, 1, -1, -1, 0), array(1, -1, 1, 1, 1), array(1, 1, -1, 0, 1)
    found = preference_for(margin, label, more, {"prompt": list("abcde")}, QUICK)
    assert found.more == {"scorer": 3.5 / 4, "people": 1 / 4} and found.value == pytest.approx(2.5 / 4)
    assert preference_for(margin, label, np.zeros(5), {"prompt": list("abcde")}) is None


def test_accuracy_in_parts():
    rows = {"small": np.array([True, True, False, False]), "large": np.array([False, False, True, True])}
    found = by_split(array(1, 1, -1, 1), array(1, 1, 1, 0), rows, PROMPTS, QUICK)
    assert (found["small"].value, found["large"].value, found["large"].n) == (1, 0, 1)
    assert list(by_split(array(1, 1, -1, 1), array(1, 1, 0, 0), rows, PROMPTS, QUICK)) == ["small"]
