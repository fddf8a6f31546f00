"""RPS against best of k at the same cost: k pictures drawn within 30° of the user, or all k for the user, with the same
seeds; the user's own scorer, which is the encoder's, keeps one."""

from typing import Any

import numpy as np
from tqdm import tqdm

from diffpref.scorer.measures.bootstrap import mean
from diffpref.users.consensus import best_of_neighbours, own_taste
from personal.conditions import Plan, spaced
from personal.draw import Drawn
from personal.known import Known, Reader
from personal.outcomes import Grid, judged, won

ANGLES = {"best of k": 0.0, "RPS": 30.0}


def drawn(plan: Plan, reader: Reader) -> dict[str, list[Drawn]]:
    """The kept pictures of some users for some prompts, by method."""
    users, prompts = plan.scale.around
    some = spaced(len(plan.prompts), prompts)
    bar = tqdm(plan.people[:users], "around", unit="user")
    made = [{name: best(plan, reader, one, some, angle) for name, angle in ANGLES.items()} for one in bar]
    return {name: [row[name] for row in made] for name in ANGLES}


def best(plan: Plan, reader: Reader, one: Known, some: list[int], angle: float) -> Drawn:
    """Of one user after 4 pairs."""
    model, user, names = plan.studio.models["personal"], one.after("4"), plan.named(some)
    seeds, k = plan.seeds(some, plan.turn(one.user)), plan.scale.candidates

    def draw() -> list:
        taste, options = own_taste(reader.encoder, user), model.how.options | {"scale": model.scale}
        return best_of_neighbours(model.pipe, user, taste, names, seeds, k=k, max_angle=angle, **options)

    return plan.studio.kept("personal", f"around-{k}-{angle:g}/{one.user.user_id}", names, seeds, user, draw)


def outcome(plan: Plan, kept: dict[str, list[Drawn]], single: list[Drawn], base: list[Drawn]) -> dict[str, Any]:
    """Both against the base and against each other, by the user's own true utility and by their own scorer's choice;
    single: right pictures after 4 pairs, of which each method's first candidate is one."""
    some = spaced(len(plan.prompts), plan.scale.around[1])
    people = plan.people[: len(kept["RPS"])]
    own = {name: np.array([judged(k.user, d) for k, d in zip(people, of, strict=True)]) for name, of in kept.items()}
    own["single"] = np.array([judged(k.user, d, some) for k, d in zip(people, single, strict=False)])
    nobody = np.array([judged(k.user, base[plan.turn(k.user)], some) for k in people])
    users, names = [one.user.user_id for one in people], plan.named(some)
    pairs = {f"{name} over base": won(values, nobody) for name, values in own.items()}
    pairs |= {f"{name} over single": won(own[name], own["single"]) for name in ANGLES}
    pairs["RPS over best of k"] = won(own["RPS"], own["best of k"])
    rows: dict[str, Any] = {name: Grid(values, users, names).measured() for name, values in pairs.items()}
    gain = Grid(own["RPS"] - own["best of k"], users, names).measured(mean)
    return rows | {"utility, RPS - best of k": gain, "k": plan.scale.candidates, "angles": ANGLES}
