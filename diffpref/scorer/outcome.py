"""What `diffpref scorer eval` shows and writes: a table with every measure's policy, JSON, a reliability plot."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffpref.figures import CHOSEN, INK, SOFT
from diffpref.report import environment, write_report
from diffpref.scorer.evaluation import Judgement, Result
from diffpref.scorer.evidence import Evidence
from diffpref.scorer.measures import Measured, Resampling
from diffpref.scorer.measures.measured import counted
from diffpref.scorer.sections import KNOWN

LIBRARIES = ("open_clip_torch", "torchmetrics", "scipy")
WIDE, TEXT = 24, 116  # columns of a value with its interval, and of text
SIZES = "area of a dot: pairs in its bin, each both ways round"
WORST = 10  # users shown of each scorer


@dataclass(frozen=True)
class Outcome:
    """All that was found. data: what was measured on, and how."""

    data: dict[str, Any]
    evidence: Evidence
    judgements: Sequence[Judgement]
    results: Sequence[Result]
    gaps: Sequence[tuple[str, str, Measured]]
    resampling: Resampling


# --- the table --------------------------------------------------------------------------------------------------------


def table(outcome: Outcome, *, by_user: bool = False) -> str:
    """Lines for a terminal: a line for each measure, and under it its policy."""
    results, common = outcome.results, usual_interval(outcome.results)
    names = list(dict.fromkeys(name for one in results for name in one.measures))
    wide = max(WIDE, *(len(one.name) for one in results))
    first = max(map(len, [*names, *(f"{a} − {b}" for a, b, _ in outcome.gaps)])) + 2
    lines = [*heading(outcome), "", " " * first + "".join(f"{one.name:<{wide}}  " for one in results).rstrip()]
    for name in names:
        found = [one.measures.get(name) for one in results]
        n = next(measured.n for measured in found if measured)
        lines.append(f"{name:<{first}}" + "".join(f"{str(m or ''):<{wide}}  " for m in found) + f"n={n}")
        lines += policies({one.name: m for one, m in zip(results, found, strict=True) if m}, common)
    for a, b, gap in outcome.gaps:
        lines.append(f"{f'{a} − {b}':<{first}}{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]  n={gap.n}")
        lines += policies({"": gap}, common)
    lines += ["", *wrapped(common, ""), *absent(results)] + [line for one in results for line in about(one)]
    return "\n".join(lines + ([line for one in results for line in users(one)] if by_user else []))


def heading(outcome: Outcome) -> list[str]:
    """What was measured on, and what was left out."""
    e = outcome.evidence
    named = {user for user in e.users if user is not None}
    parts = [counted(len(e.pairs), "pair"), *([counted(len(e.lists), "list")] if e.lists else [])]
    parts += [counted(e.pictures, "picture"), counted(len(set(e.prompts)), "prompt"), counted(len(named), "user")]
    lines = [f"{outcome.data['data']}: {', '.join(parts)}"]
    without = sum(user is None for user in e.users)
    if named and without:
        lines.append(f"{counted(without, 'pair')} without a user")
    if e.left_out:
        reasons = ", ".join(f"{reason} {number}" for reason, number in e.left_out.items())
        lines.append(f"{counted(sum(e.left_out.values()), 'row')} left out: {reasons}")
    for one in outcome.judgements:
        if one.faults:
            fault = next(iter(one.faults.values()))
            lines.append(f"{counted(len(one.faults), 'picture')} {one.name} cannot score, among them: {fault}")
    return lines


def usual_interval(results: Sequence[Result]) -> str:
    """How most intervals were drawn: said once, at the end."""
    return Counter(m.interval for one in results for m in one.measures.values()).most_common(1)[0][0]


def policies(found: dict[str, Measured], common: str) -> list[str]:
    """What became of ties and of what was left out; once where all scorers have the same."""
    texts = {name: m.policy + (f"; {m.interval}" if m.interval != common else "") for name, m in found.items()}
    if len(set(texts.values())) == 1:
        return wrapped(next(iter(texts.values())), "    ")
    return [line for name, text in texts.items() for line in wrapped(f"{name}: {text}", "    ")]


def absent(results: Sequence[Result]) -> list[str]:
    """What could not be measured, and why; once where all scorers have the same."""
    texts = {one.name: ", ".join(f"{name} ({why})" for name, why in one.not_measured.items()) for one in results}
    if len(set(texts.values())) == 1:
        texts = {"": next(iter(texts.values()))}
    named = {f"{name}: " if name else "": text for name, text in texts.items() if text}
    return [line for name, text in named.items() for line in wrapped(f"{name}not measured: {text}", "")]


def wrapped(text: str, indent: str) -> list[str]:
    """In lines of a terminal."""
    return textwrap.wrap(text, TEXT, initial_indent=indent, subsequent_indent=indent)


def about(result: Result) -> list[str]:
    """Which temperature the probabilities of a scorer have, and whom it did not know."""
    lines = wrapped(f"{result.name}: temperature {result.temperature:.4g}, {result.temperature_from}", "")
    if result.strangers:
        lines.append(f"{result.name}: does not know {counted(result.strangers, 'user')}, judged as the population")
    return lines


def users(result: Result) -> list[str]:
    """The users whose accuracy is least."""
    lines = [f"    {row['user']!s:<12} {row['value']:.3f}  n={row['n']}" for row in result.users[:WORST]]
    return ["", f"{result.name}: {len(lines)} of {counted(len(result.users), 'user')}, least accuracy first", *lines]


# --- files ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, outcome: Outcome) -> None:
    """Everything, with versions and seeds."""
    e = outcome.evidence
    faults = {item: text for one in outcome.judgements for item, text in one.faults.items()}
    unreadable = [{"row": e.rows[e.items[i].row]["row"], "fault": text} for i, text in sorted(faults.items())]
    counts = {"pairs": len(e.pairs), "lists": len(e.lists), "pictures": e.pictures, "prompts": len(set(e.prompts))}
    counts |= {"items": len(e.items), "users": len({user for user in e.users if user is not None})}
    gaps = [{"first": a, "second": b} | gap.as_dict() for a, b, gap in outcome.gaps]
    libraries = {name: version(name) for name in LIBRARIES}
    write_report(
        path,
        outcome.data
        | counts
        | {"left_out": e.left_out, "unreadable": unreadable, "models": list(map(as_dict, outcome.results))}
        | {"differences": gaps, "resampling": vars(outcome.resampling), "environment": environment() | libraries},
    )


def as_dict(result: Result) -> dict[str, Any]:
    """A scorer's part of the JSON. Numbers that are not finite, as the loss of a certain mistake, are null."""
    values = vars(result) | {
        "measures": {name: finite(one.as_dict()) for name, one in result.measures.items()},
        "reliability": result.reliability and result.reliability.as_dict(),
    }
    return values


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same, None where there is no finite number."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot(path: Path, results: Sequence[Result]) -> None:
    """Predicted probability against how often it came true, or against the known probability, a panel for each scorer.
    Raises ValueError where there is nothing to draw."""
    drawn = [one for one in results if one.reliability]
    if not drawn:
        raise ValueError("no pair has a winner or a probability: there is no reliability to draw")
    columns = min(4, len(drawn))
    deep = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(4.2 * columns, 5 * deep), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(deep, columns, squeeze=False).flat
    for ax, one in zip(axes, [*drawn, *[None] * (deep * columns - len(drawn))], strict=True):
        draw(ax, one) if one else ax.remove()
    figure.supxlabel(SIZES, fontsize=8, color=SOFT)
    figure.savefig(path, dpi=120, bbox_inches="tight")  # long names are not cut


def draw(ax: Axes, result: Result) -> None:
    """One panel; a point's area is the share of pairs in its bin."""
    table, known = result.reliability, result.reliability_against == KNOWN
    error = result.measures[f"calibration error, {KNOWN}" if known else "calibration error"]
    ax.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    there = ~np.isnan(table.observed)
    ax.plot(table.predicted[there], table.observed[there], color=CHOSEN, linewidth=1, alpha=0.5)
    ax.scatter(table.predicted[there], table.observed[there], s=8 + 400 * table.share[there], color=CHOSEN)
    said = f"{result.name}\ncalibration error {error.value:.3f}, n={error.n}\nagainst {result.reliability_against}"
    ax.set_title(said, loc="left", fontsize=9, color=INK)
    ax.set_xlabel("predicted probability", fontsize=8, color=SOFT)
    ax.set_ylabel("known probability" if known else "observed share", fontsize=8, color=SOFT)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=SOFT)
