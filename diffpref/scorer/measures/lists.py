"""Does the scorer rank lists as people do? One number a list, then the mean over lists.

A list is (scores, truth), k numbers each, higher is better in both. Lists in which people ranked nothing, all of them
equally good or one picture alone, are left out. Where the scorer gives all pictures one score it says nothing of their
order: its correlations are 0 and its inversion accuracy one half.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

from diffpref.data.kinds import beaten
from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, mean
from diffpref.scorer.measures.measured import Measured, counted
from diffpref.scorer.measures.pairs import chosen

Lists = Sequence[tuple[np.ndarray, np.ndarray]]


def constant(values: np.ndarray) -> bool:
    """Whether all are equal."""
    return bool(np.ptp(values) == 0)


def tau_b(scores: np.ndarray, truth: np.ndarray) -> float:
    """Kendall's tau-b; 0 where all scores are equal."""
    return 0.0 if constant(scores) else float(stats.kendalltau(scores, truth, variant="b").statistic)


def spearman(scores: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rho, tied ranks averaged; 0 where all scores are equal."""
    return 0.0 if constant(scores) else float(stats.spearmanr(scores, truth).statistic)


def ndcg(scores: np.ndarray, truth: np.ndarray) -> float:
    """NDCG. A picture's gain is the share of the others that people put below it: scores of any scale and sign have
    the same one."""
    places = stats.rankdata(scores, method="dense")  # torchmetrics would round scores to fp32, and make ties
    return float(retrieval_normalized_dcg(torch.tensor(places).float(), torch.tensor(beaten(truth.tolist()))))


def inversions(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of the pairs that people ranked in which the scorer agrees, ties of the scorer counted half."""
    said, known = (np.sign(x[:, None] - x[None, :]) for x in (scores, truth))
    return float((0.5 * (1 + said * known))[known > 0].mean())


# name -> what is computed of a list, the least it can be, what becomes of ties
MEASURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], float, str]] = {
    "Kendall tau-b": (tau_b, -1.0, "ties on both sides lower it as tau-b does"),
    "Spearman": (spearman, -1.0, "tied ranks averaged"),
    "NDCG": (ndcg, 0.0, "gain: share of the list that people put below; ties of the scorer averaged"),
    "inversion accuracy": (inversions, 0.0, "ties of people left out, ties of the scorer counted half"),
}


def list_measures(lists: Lists, clusters: Clusters, resampling: Resampling = DEFAULT) -> dict[str, Measured]:
    """Every measure of MEASURES, the mean over lists; clusters have a name for each list.

    Raises:
        ValueError: no list is ranked by people, scores that are not finite, scores and truth of other lengths.
    """
    lists = [checked_list(scores, truth) for scores, truth in lists]
    ranked = np.array([len(truth) > 1 and not constant(truth) for _, truth in lists], dtype=bool)
    if not ranked.any():
        raise ValueError(f"none of the {len(lists)} lists is ranked: each has one picture or people's scores all equal")
    kept, names = [one for one, good in zip(lists, ranked, strict=True) if good], chosen(ranked, clusters)
    silent, how = sum(constant(scores) for scores, _ in kept), described(names, len(kept), resampling.confidence)
    found = {}
    for name, (function, least, ties) in MEASURES.items():
        values = np.array([function(scores, truth) for scores, truth in kept])
        policy = (
            f"mean over lists; {ties}; {counted(len(lists) - len(kept), 'list')} without an order of people left out, "
            f"{silent} with all scores equal count {'as they are' if name == 'NDCG' else f'{function(*SILENT):g}'}"
        )
        found[name] = Measured(*mean(values, names, resampling, limits=(least, 1.0)), len(values), policy, how)
    return found


SILENT = np.zeros(2), np.arange(2.0)  # a list of which the scorer says nothing


def checked_list(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [k], or ValueError."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if scores.shape != truth.shape or scores.ndim != 1:
        raise ValueError(f"a list needs a score for each of its {len(truth)} pictures, got {scores.shape}")
    if not (np.isfinite(scores).all() and np.isfinite(truth).all()):
        raise ValueError("a list has scores that are NaN or infinite")
    return scores, truth
