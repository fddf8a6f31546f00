"""gallery/personalization/README.md, from the numbers alone."""

from typing import Any


def spanned(row: dict[str, Any]) -> str:
    """A number with its interval."""
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def page(report: dict[str, Any]) -> str:
    """The whole."""
    chosen = report["chosen"]
    return f"""# Your taste from a few pairs

Made by `{report["command"]}` from the JSON in benchmarks/results; not written by hand.

![four pairs of each of some users, and what is drawn for them](sheet.png)

{chosen["users"]} simulated users whose choices no training saw, {chosen["prompts"]} concepts no preference was trained
on. A user is known by pairs on *other* concepts, made with the world's noise. A user's true utility judges; base,
impersonal LoRA and personal pictures share prompt and seed. The rows above are users {rows_shown(chosen)}, not the
best ones. Intervals: 95 %, bootstrap over users and prompts, variances combined.{report.get("note", "")}

{goals(report)}

## How often are the pictures liked better?

**Bound**: an exact Bayesian, who knows how users are made, sees the same pairs, and picks the best out of every picture
that any of the models drew at that prompt and seed for anybody.

{wins(report)}

*Wrong* are pictures drawn after another user's pairs: the mean over all {chosen["users"] // 4 - 1} or so others that
share the user's seeds. Rows have {counted(chosen["prompts_of"])} prompts; only the differences at the end of this page
compare them on the same ones. The impersonal LoRA itself: {spanned(report["impersonal"])} over the base, so that most
of a win rate over the base is everybody's taste. The personal model without a user:
{spanned(report["nobody"]["over base"])} over the base, {spanned(report["nobody"]["over impersonal"])} over the
impersonal LoRA.

![win rates by number of pairs, and the way between two users](curves.png)

## Who is it?

{identity(report)}

{extras(report)}

## Differences

On the prompts of both, user by user:

| | win rate over base | over impersonal |
|---|---|---|
{differences(report)}

Hardware: {report["environment"]["hardware"]}, shared with other work. Drawing: {drawing(report["drawing"])}.
"""


def counted(prompts_of: dict[str, int]) -> str:
    """Prompts by number of pairs."""
    return ", ".join(f"{count} ({n})" for n, count in sorted(prompts_of.items(), key=lambda one: order(one[0])))


def goals(report: dict[str, Any]) -> str:
    """What was wanted before anything was measured, and what became of it; the parts that were measured."""
    wins, rows = report["win_rates"]["4"], []
    base, impersonal, wrong = (wins.get(name) for name in ("over base", "over impersonal", "wrong over impersonal"))
    rows.append(("over the base ≥ 0.76, above 0.70 for certain", base, base["value"] >= 0.76 and base["low"] > 0.7))
    rows.append(("over the impersonal LoRA above 0.55 for certain", impersonal, impersonal["low"] > 0.55))
    if wrong:
        less = wins["right - wrong over impersonal"]
        rows.append(("right less wrong users > 0 for certain, user by user, over the LoRA", less, less["low"] > 0))
        rows.append(("wrong users' interval wholly below the right ones'", wrong, wrong["high"] < impersonal["low"]))
        rows.append(("wrong users not above the impersonal LoRA", wrong, wrong["value"] <= 0.5))
    for more in ("16 - 4", "4 - 1"):
        if row := report["differences"].get(more):
            row = row["over impersonal"]
            rows.append((f"{more} pairs ≥ 0, over the impersonal LoRA", row, row["value"] >= 0))
    if "interpolation" in report:
        rho = report["interpolation"]["spearman"]
        rows.append(("between two users: Spearman's ρ ≥ 0.9, picture by picture", rho, rho["value"] >= 0.9))
    kept = report["concept_recognition"]["4"]["personal - impersonal"]
    rows.append(("concept recognised falls by less than 3 points", kept, kept["value"] > -0.03))
    table = [f"| {name} | {spanned(row)} | {'yes' if met else '**no**'} |" for name, row, met in rows]
    return lines(["| goal, after 4 pairs | found | met |", "|---|---|---|", *table])


WRONG = "right - wrong over"


def differences(report: dict[str, Any]) -> str:
    """Lines of the last table."""
    rows = [(f"{name} pairs", row, "over") for name, row in report["differences"].items()]
    wins = {n: report["win_rates"][n] for n in sorted(report["win_rates"], key=order)}
    rows += [(f"right less wrong, {n} pairs", row, WRONG) for n, row in wins.items() if n.isdigit()]
    made = []
    for name, row, what in rows:
        cells = [spanned(row[key]) for rival in RIVALS if (key := f"{what} {rival}") in row]
        made.append(f"| {name} | {' | '.join(cells)} |")
    return lines(made)


RIVALS = ("base", "impersonal")


def lines(rows: Any) -> str:
    return "\n".join(rows)


def rows_shown(chosen: dict[str, Any]) -> str:
    """Every so-manieth."""
    return ", ".join(map(str, chosen.get("sheet", [])))


def drawing(how: dict[str, Any]) -> str:
    """In words."""
    return f"{how['steps']} steps, guidance {how['guidance']}{', bfloat16' * how['bf16']}"


def wins(report: dict[str, Any]) -> str:
    """The main table."""
    names = ("over base", "over impersonal", "right over wrong", "wrong over base", "wrong over impersonal")
    columns = ("pairs", "over base", "bound", "over impersonal", "bound", *names[2:])
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for n in sorted(report["win_rates"], key=order):
        row, bound = report["win_rates"][n], report["bound"][n]
        cells = [spanned(row[name]) if name in row else "" for name in names]
        limits = [f"{bound[f'drawn: {name}']['value']:.2f}" for name in names[:2]]
        rows.append(f"| {n} | {cells[0]} | {limits[0]} | {cells[1]} | {limits[1]} | {' | '.join(cells[2:])} |")
    return lines(rows)


def order(n: str) -> int:
    """Numbers of pairs, the oracle last."""
    return int(n) if n.isdigit() else 1_000


def identity(report: dict[str, Any]) -> str:
    """Predictions and retrieval, each beside the bound."""
    bound = report["bound"]
    rows = ["| pairs | predicts their choices on held-out concepts | bound |", "|---|---|---|"]
    rows += [f"| {n} | {spanned(row)} | {bound[n]['accuracy']['value']:.3f} |" for n, row in report["accuracy"].items()]
    rows += ["", "Found among all new users by a second, disjoint set of as many pairs:", ""]
    rows += ["| pairs | | top 1 | top 5 | top 16 |", "|---|---|---|---|---|"]
    for n, found in report["retrieval"].items():
        for who in ("encoder", "bound"):
            cells = " | ".join(spanned(found[who][f"top {k}"]) for k in (1, 5, 16))
            rows.append(f"| {n} | {who} | {cells} |")
    chance = report["retrieval"]["4"]["encoder"]["chance"]
    return lines([*rows, "| | chance | " + " | ".join(f"{chance[f'top {k}']:.2f}" for k in (1, 5, 16)) + " |"])


def extras(report: dict[str, Any]) -> str:
    """What else was measured, as far as it was."""
    parts = [part(report[name]) for name, part in EXTRAS.items() if name in report]
    return "\n\n".join(parts)


def between(found: dict[str, Any]) -> str:
    """Interpolation."""
    count, amounts = len(found["couples"]), ", ".join(f"{a:g}" for a in found["amounts"])
    return f"""## Between two users

{count} couples whose tastes differ most, from the one's direction to the other's, at {amounts}. Spearman's ρ of the
amount with the second user's utility less the first's: {spanned(found["spearman"])} picture by picture,
{spanned(found["spearman_of_couples_means"])} on each couple's mean over prompts. It rises at every step in
{spanned(found["monotone"])} of the rows."""


def around(found: dict[str, Any]) -> str:
    """RPS."""
    rows = ["| | win rate |", "|---|---|"]
    names = [name for name in found if " over " in name]
    rows += [f"| {name} | {spanned(found[name])} |" for name in names]
    return f"""## The neighbourhood's best

{found["k"]} pictures drawn, the one kept that the user's own scorer likes best: RPS draws for users within 30° of this
one, best of k for this one alone. {found["RPS over best of k"]["n"]} pictures each, after 4 pairs.

{lines(rows)}"""


def fidelity(found: dict[str, Any]) -> str:
    """Recognition."""
    row = found["4"]
    return f"""## What stays

Concept recognised: {spanned(row["personal"])} after 4 pairs, {spanned(row["impersonal"])} of the impersonal LoRA's
pictures, {spanned(row["base"])} of the base's; difference to the LoRA {spanned(row["personal - impersonal"])}."""


def spread(found: dict[str, Any]) -> str:
    """Diversity."""
    return f"""Distance between {found["seeds"]} seeds' pictures of a prompt (root mean square over pixels):
{spanned(found["personal / impersonal"])} times the impersonal LoRA's, {spanned(found["personal / base"])} times the
base's."""


EXTRAS = {"concept_recognition": fidelity, "diversity": spread, "interpolation": between, "rps": around}
