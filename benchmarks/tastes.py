"""What the heads for cycles and for users are good for, on the emoji world's simulated people:

    python benchmarks/tastes.py --scorer bundled

1. Three groups of voters whose majority goes round in a circle (line art over warm over cold over line art): how many
   circles of held-out concepts' pictures a head gets right. A score per picture gets none. On frozen embeddings.
2. The 200 users one may train on: do PAL and MiCRo know them better than a head with a single taste? Each head with an
   image tower of its own, trained along from the scorer's on the same choices.
3. The 56 users nobody trained on: how soon are they known, from choices on training concepts, towers frozen again?

Accuracies are on the comparisons of held_out.parquet, whose concepts no preference was trained on, each by its
expectation over the user's noise. Two bounds stand beside them: one who knows the users, and one who knows the world's
population and the same choices, and draws Bayes' conclusion.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import about, machine, say
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import expit, logit
from torch import Tensor
from voters import (
    Choices,
    Pictures,
    ask,
    chances,
    choices,
    embedded,
    entropy,
    hits,
    log_odds,
    ordered,
    pictures,
    population_log_odds,
    train,
    tune,
    weights_after,
)

from diffpref.emoji_world.users import FLIP, TRAIN, make_population, population
from diffpref.engines import silence
from diffpref.figures import CHOSEN, FAINT, INK, NOISE_LEVELS, REJECTED, SOFT
from diffpref.report import write_report
from diffpref.scorer import load_scorer
from diffpref.scorer.heads import Head, HeadConfig, make_head
from diffpref.scorer.heads.micro import Micro, context, weighed
from diffpref.scorer.heads.pal import Pal, fit_user
from diffpref.scorer.losses import LossConfig
from diffpref.scorer.measures import cyclic_accuracy, edges
from diffpref.scorer.measures.bootstrap import mean

ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))  # of looks, by the three groups of voters, best first
GAP = 2.0  # log-odds between neighbours in a group's order
CYCLE_CHOICES, CYCLE_STEPS, TRIPLES = 96_000, 600, 3000
EACH = 480  # choices of each training user, 96 000: four times what the bundled scorer was trained on
KNOWN = (1, 4, 8, 16)  # choices of a new user
CANDIDATES = 600  # comparisons among which those that tell most are chosen
DRAWN = 2000  # users for which the population stands in Bayes' conclusion
TELLING = "PAL, telling choices"
TEMPER = 4.0  # by which a new choice counts less than the head says; chosen for MiCRo, on training concepts
SCALE = math.log(10)  # where the heads' logit_scale begins
BRADLEY_TERRY = LossConfig()
ONE = HeadConfig(name="pal", prototypes=1, logit_scale=SCALE)


# --- 1. circles -------------------------------------------------------------------------------------------------------


def majority_chances() -> np.ndarray:
    """[3,3]: probability that a voter of a random group chooses the row's look over the column's."""
    places = np.array([[order.index(look) for look in range(3)] for order in ORDERS])
    gaps = GAP * (places[:, None, :] - places[:, :, None])
    return (FLIP + (1 - 2 * FLIP) * expit(gaps)).mean(0)


def votes(of: Pictures, count: int, rng) -> Choices:
    """Single voters' choices between pictures of different looks."""
    looks = of.looks()
    clear = np.flatnonzero(looks >= 0)
    pairs = rng.choice(clear, (3 * count, 2))
    pairs = pairs[looks[pairs[:, 0]] != looks[pairs[:, 1]]][:count]
    chance = majority_chances()[looks[pairs[:, 0]], looks[pairs[:, 1]]]
    number = np.arange(len(pairs))
    return choices(chance[None], pairs, np.zeros_like(number), number, rng)


def circles(head: Head, of: Pictures, rng) -> dict[str, Any]:
    """How a head does on circles of held-out pictures, one of each look."""
    looks = of.looks()
    triples = np.stack([rng.choice(np.flatnonzero(looks == look), TRIPLES) for look in range(3)], axis=1)
    sides = np.concatenate([triples[:, [0, 1]], triples[:, [1, 2]], triples[:, [2, 0]]])
    with torch.no_grad():
        found = log_odds(head, of, torch.from_numpy(sides)).numpy()
    margins = edges(sides, found)
    names = {"prompt": of.prompts[triples[:, 0]]}
    measured = cyclic_accuracy([tuple(t) for t in triples.tolist()], margins, names)
    right = (found > 0).reshape(3, -1).sum(0)
    return {"triples": spread(measured.value, measured.low, measured.high), "edges_right": (right / 3).mean().item()}


def cycles(training: Pictures, held: Pictures, rng) -> dict[str, Any]:
    """GPM and Bradley–Terry on the voters' circle."""
    said, width = votes(training, CYCLE_CHOICES, rng), training.image.shape[1]
    heads = {"gpm": (HeadConfig(name="gpm"), LossConfig(name="gpm")), "bradley_terry": (ONE, BRADLEY_TERRY)}
    found = {
        name: circles(train(make_head(head, width), training, said, loss, CYCLE_STEPS), held, rng)
        for name, (head, loss) in heads.items()
    }
    looks = [np.bincount(of.looks()[of.looks() >= 0]).tolist() for of in (training, held)]
    majority = majority_chances()[0, 1].item()
    return {"heads": found, "majority": majority, "choices": len(said.who), "pictures_by_look": looks}


# --- 2. users one knows -----------------------------------------------------------------------------------------------


def spread(value: float, low: float, high: float) -> dict[str, float]:
    """A number and its interval."""
    return {"value": float(value), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Judge:
    """A trained head, and the pictures as its own tower embeds them."""

    head: Head
    training: Pictures
    held: Pictures


def judges(scorer, training: Pictures, held: Pictures, said: Choices, steps: int) -> dict[str, Judge]:
    """One with a single taste, PAL and MiCRo."""
    shared, found = LossConfig(name="mixture", one_taste="user", entropy_weight=0.0), {}
    micro = HeadConfig(name="micro", tastes=16, logit_scale=SCALE)
    pal = HeadConfig(name="pal", prototypes=12, logit_scale=SCALE)
    recipes = {"one taste": (ONE, BRADLEY_TERRY), "PAL": (pal, BRADLEY_TERRY), "MiCRo": (micro, shared)}
    for name, (config, loss) in recipes.items():
        start = time.perf_counter()
        head = make_head(config, training.image.shape[1], TRAIN)
        towers, head = tune(scorer.towers, head, training, said, loss, steps)
        seen = [replace(of, image=embedded(towers, of.pixels)) for of in (training, held)]
        found[name] = Judge(head, *seen)
        print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    return found


def of_users(head: Head, of: Pictures, users: int) -> np.ndarray:
    """A head's log-odds [U,P] for the users in its table."""
    pairs = torch.from_numpy(of.pairs)
    with torch.no_grad():
        return np.stack([log_odds(head, of, pairs, user).numpy() for user in range(users)])


def of_weights(head: Micro, of: Pictures, weights: list[Tensor]) -> np.ndarray:
    """Log-odds [U,P] for users with these weights [K] of the tastes."""
    first, second = torch.from_numpy(of.pairs).T
    with torch.no_grad():
        parts = head(of.image, of.text).components
        found = [head.logit(weighed(parts, w.expand_as(parts)), first, second) for w in weights]
    return torch.stack(found).numpy()


def weights_of(head: Micro, of: Pictures, pairs: Tensor) -> Tensor:
    """Weights [K] of the user who made these choices [n,2]."""
    with torch.no_grad():
        return context(head(of.image, of.text), pairs, temperature=TEMPER)


def beside(right: np.ndarray, of: Pictures, **bases: np.ndarray) -> dict[str, Any]:
    """Accuracy [U,P], and its difference to others', with intervals by users and concepts and, of the differences, by
    users alone."""
    prompts, users = np.tile(of.prompts[of.pairs[:, 0]], len(right)), np.repeat(np.arange(len(right)), right.shape[1])
    found = {"accuracy": spread(*mean(right.ravel(), {"user": users, "prompt": prompts}))}
    for name, base in bases.items():
        more = (right - base).ravel()
        found[name] = spread(*mean(more, {"user": users, "prompt": prompts}))
        found[f"{name}_by_users"] = spread(*mean(more, {"user": users}))
    return found


def known_users(found: dict[str, Judge], said: Choices) -> dict[str, Any]:
    """Training users on held-out concepts."""
    one, pal, micro = found["one taste"], found["PAL"], found["MiCRo"]
    chance = chances(population()[:TRAIN], one.held)
    weights = [weights_of(micro.head, micro.training, said.pairs[said.who == u]) for u in range(TRAIN)]
    base = hits(population_log_odds(one.head, one.held), chance)
    right = {
        "one taste": base,
        "PAL": hits(of_users(pal.head, pal.held, TRAIN), chance),
        "MiCRo": hits(of_weights(micro.head, micro.held, weights), chance),
        "who knows the population": hits(logit(drawn_chances(one.held).mean(0)), chance),
        "who knows the user": hits(logit(chance), chance),
    }
    return {name: beside(values, one.held, over_one_taste=base) for name, values in right.items()}


# --- 3. users who are new ---------------------------------------------------------------------------------------------


def drawn_chances(of: Pictures) -> np.ndarray:
    """[H,P] of users as the world could have had them."""
    return chances(make_population(seed=1, train=DRAWN, unseen=0), of)


def by_pal(judge: Judge, pairs: Tensor) -> np.ndarray:
    """PAL's log-odds [P] for the user who made these choices [n,2]."""
    head, items, places = judge.head, pairs.reshape(-1), torch.arange(pairs.numel()).reshape(-1, 2)
    assert isinstance(head, Pal)
    w = fit_user(head, judge.training.image[items], judge.training.text[items], places, strength=TEMPER).float()
    with torch.no_grad():
        shares = w.softmax(-1).expand(len(judge.held.image), -1)
        scores = head.judge(judge.held.image, judge.held.text, shares).scores.numpy()
    return scores[judge.held.pairs[:, 0]] - scores[judge.held.pairs[:, 1]]


def by_micro(judge: Judge, pairs: Tensor) -> np.ndarray:
    """MiCRo's log-odds [P] for the user who made these choices [n,2]."""
    assert isinstance(judge.head, Micro)
    return of_weights(judge.head, judge.held, [weights_of(judge.head, judge.training, pairs)])[0]


def most_telling(known: np.ndarray, chance: np.ndarray, count: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the comparisons asked, whether the first was chosen) of a user with chance [C] who is asked, each
    time, what tells most about which of the known users [U,C] they are like.

        information = H(Σ_u w_u p_u) − Σ_u w_u H(p_u), w the posterior after what was said
    """
    weights, asked, answers = np.full(len(known), 1 / len(known)), [], []
    apart = entropy(known)
    for _ in range(count):
        information = entropy(weights @ known) - weights @ apart
        information[asked] = -np.inf
        asked.append(int(information.argmax()))
        answers.append(rng.random() < chance[asked[-1]])
        p = known[:, asked[-1]]
        weights = weights_after(weights, np.log(p if answers[-1] else 1 - p))
    return np.array(asked), np.array(answers)


def new_users(found: dict[str, Judge], draws: int, rng) -> dict[str, Any]:
    """Unseen users after 1, 4, 8, 16 choices, random ones and telling ones; accuracies are means over draws."""
    one, pal, micro = found["one taste"], found["PAL"], found["MiCRo"]
    people, pairs = population()[TRAIN:], one.training.pairs
    asked, chance = chances(people, one.training), chances(people, one.held)
    few = np.sort(rng.choice(len(pairs), CANDIDATES, replace=False))
    known = of_users(pal.head, replace(pal.training, pairs=pairs[few]), TRAIN)
    known = np.clip(expit(known), 1e-6, 1 - 1e-6)
    drawn, answers = drawn_chances(one.training), drawn_chances(one.held)
    ways: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "PAL": lambda which, first: by_pal(pal, ordered(pairs[which], first)),
        "MiCRo": lambda which, first: by_micro(micro, ordered(pairs[which], first)),
        "Bayes": lambda which, first: logit(posterior(drawn[:, which], first) @ answers),
    }
    plain = {way: hits(predict(np.empty(0, int), np.empty(0, bool)), chance) for way, predict in ways.items()}
    right = {(way, n): np.zeros_like(chance) for way in (*ways, TELLING) for n in KNOWN}
    for u in range(len(people)):
        for _ in range(draws):
            which = rng.choice(len(pairs), KNOWN[-1], replace=False)
            first = rng.random(KNOWN[-1]) < asked[u, which]
            told, said = most_telling(known, asked[u, few], KNOWN[-1], rng)
            for n in KNOWN:
                for way, predict in ways.items():
                    right[way, n][u] += hits(predict(which[:n], first[:n]), chance[u]) / draws
                right[TELLING, n][u] += hits(ways["PAL"](few[told[:n]], said[:n]), chance[u]) / draws
    base = hits(population_log_odds(one.head, one.held), chance)
    report: dict[str, Any] = {"one taste": {"0": beside(base, one.held)}}
    for way in (*ways, TELLING):
        none = plain[way.split(",")[0]]
        rows = {0: none} | {n: right[way, n] for n in KNOWN}
        report[way] = {
            str(n): beside(values, one.held, over_one_taste=base, over_no_choice=none) for n, values in rows.items()
        }
    knows = beside(hits(logit(chance), chance), one.held, over_one_taste=base)
    return report | {"who knows the user": {"all": knows}}


def posterior(chance: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Weights [H] of users, chance [H,n], after what was said [n]."""
    return weights_after(np.full(len(chance), 1 / len(chance)), np.log(np.where(first, chance, 1 - chance)).sum(1))


# --- what is written --------------------------------------------------------------------------------------------------


def figure(report: dict[str, Any], path: Path) -> None:
    """How much better than with one taste: the known users, and new ones by the number of their choices."""
    drawing = Figure(figsize=(10.5, 4), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2, width_ratios=(1, 1.6))
    draw_known(left, report["known_users"])
    draw_new(right, report["new_users"])
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=SOFT)
    title = "Accuracy above a head with one taste, in points: held-out concepts, 95 % intervals over users and concepts"
    drawing.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    drawing.savefig(path, dpi=110)


def points(found: dict[str, Any]) -> tuple[float, float, float]:
    """Of the difference: (value, low, high) in points."""
    row = found["over_one_taste"]
    return 100 * row["value"], 100 * row["low"], 100 * row["high"]


def draw_known(axis: Axes, known: dict[str, Any]) -> None:
    """Bars."""
    names = ["who knows the population", "MiCRo", "PAL"]
    for place, name in enumerate(names):
        value, low, high = points(known[name])
        axis.barh(place, value, color=FAINT if name.startswith("who") else CHOSEN, height=0.6)
        axis.plot([low, high], [place, place], color=INK, linewidth=1.5)
    axis.axvline(0, color=SOFT, linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_title("200 users one has trained on", loc="left", fontsize=10, color=INK)


def draw_new(axis: Axes, new: dict[str, Any]) -> None:
    """Curves; the one who knows the world would lie far above them."""
    for way, colour in {TELLING: CHOSEN, "PAL": NOISE_LEVELS[1], "MiCRo": REJECTED}.items():
        numbers = [int(n) for n in new[way]]
        value, low, high = np.array([points(row) for row in new[way].values()]).T
        name = f"{way}, random choices" if way != TELLING else way
        axis.plot(numbers, value, color=colour, marker="o", markersize=4, label=name)
        axis.fill_between(numbers, low, high, color=colour, alpha=0.13, linewidth=0)
    axis.axhline(0, color=SOFT, linewidth=1)
    axis.set_xticks([0, *KNOWN])
    axis.set_xlabel("choices of the user, on training concepts", fontsize=8, color=SOFT)
    axis.set_title("56 new users", loc="left", fontsize=10, color=INK)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")


def percent(found: dict[str, float]) -> str:
    """In points, with the interval."""
    return f"{100 * found['value']:.2f} [{100 * found['low']:.2f}, {100 * found['high']:.2f}]"


def tell(report: dict[str, Any]) -> None:
    """The tables."""
    say("| circles | all three right | comparisons right |\n|---|---|---|")
    for name, found in report["cycles"]["heads"].items():
        print(f"| {name} | {percent(found['triples'])} | {100 * found['edges_right']:.1f} |")
    say("| 200 training users | accuracy | above one taste |\n|---|---|---|")
    for name, found in report["known_users"].items():
        print(f"| {name} | {percent(found['accuracy'])} | {percent(found['over_one_taste'])} |")
    say("| 56 new users, choices | accuracy | above one taste | above no choice |\n|---|---|---|---|")
    for way, rows in report["new_users"].items():
        for n, row in rows.items():
            more = [percent(row[key]) if key in row else "" for key in ("over_one_taste", "over_no_choice")]
            print(f"| {way}, {n} | {percent(row['accuracy'])} | {more[0]} | {more[1]} |")


def main() -> None:
    """Measure, write, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scorer", default="bundled", help="whose embeddings: a name or a folder")
    parser.add_argument("--steps", type=int, default=300, help="of each head with its tower")
    parser.add_argument("--draws", type=int, default=4, help="sets of choices of each new user")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/tastes-<machine>.json if none")
    parser.add_argument("--figure", type=Path, help="PNG file; beside the JSON file if none")
    args = parser.parse_args()
    silence()
    torch.manual_seed(0)
    rng, scorer = np.random.default_rng(0), load_scorer(args.scorer)
    report = about(False, 1) | {
        "command": f"python benchmarks/tastes.py --scorer {args.scorer}",
        "draws": args.draws,
        "steps": args.steps,
        "choices": TRAIN * EACH,
    }
    training, held = pictures(scorer, "pairs.parquet"), pictures(scorer, "held_out.parquet")
    report["cycles"] = cycles(training, held, rng)
    asked = ask(chances(population()[:TRAIN], training), training.pairs, EACH, rng)
    found = judges(scorer, training, held, asked, args.steps)
    report["known_users"] = known_users(found, asked)
    report["new_users"] = new_users(found, args.draws, rng)
    out = args.out or Path(__file__).parent / "results" / f"tastes-{machine()}.json"
    write_report(out, report)
    figure(report, args.figure or out.with_suffix(".png"))
    tell(report)


if __name__ == "__main__":
    main()
