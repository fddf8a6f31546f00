"""The two pictures of a run: what changed (before_after.png), and how training went (curves.png)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

INK, SOFT, FAINT, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
CHOSEN, REJECTED, PLAIN = "#0969da", "#bc4c00", "#3b434b"
NOISE_LEVELS = ("#8ecae6", "#3a9bd0", "#1f5fa8", "#0b2545")  # light to dark: low to high noise

# --- before and after -------------------------------------------------------------------------------------------------

MARGIN, GAP, BETWEEN, LABEL, LINE = 28, 9, 26, 132, 19  # pixels; LABEL: width of a row's prompt, LINE: its line height
BETTER, WORSE, TIED = (1, CHOSEN, "better"), (-1, REJECTED, "worse"), (0, "#afb8c1", "tied")
LEGEND = 270  # pixels that the frames' legend takes
MARKS = {sign: colour for sign, colour, _ in (BETTER, WORSE, TIED)}


@dataclass(frozen=True)
class Row:
    """One prompt: its pictures before and after, seed by seed, and who won: +1 the tuned, -1 the base, 0 neither."""

    prompt: str
    before: list[Image.Image]
    after: list[Image.Image]
    marks: list[int]  # empty without scores


def before_after(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    prompts: Sequence[str],
    path: str | Path,
    *,
    scores: tuple[np.ndarray, np.ndarray] | None = None,
    title: str = "",
    subtitle: str = "",
    labels: tuple[str, str] = ("base", "tuned"),
    max_prompts: int = 12,
    max_seeds: int = 4,
) -> None:
    """A sheet with a row for each prompt: left the pictures before, right those after, seeds in the same order.

    Args:
        before, after, prompts: N each; before[i] and after[i] share prompt and seed.
        scores: (before [N], after [N]); pictures on the right then bear a frame that says better, worse or tied.
        title, subtitle: Above the sheet; the subtitle is the place for the win rate.
        labels: Names of the two sides.
        max_prompts, max_seeds: What is beyond them is left out in order, never by score, and the sheet's foot says so.
    """
    if not len(before) == len(after) == len(prompts) > 0:
        raise ValueError(f"got {len(before)} pictures before, {len(after)} after and {len(prompts)} prompts")
    rows = grouped(before, after, prompts, scores)[:max_prompts]
    rows = [Row(r.prompt, r.before[:max_seeds], r.after[:max_seeds], r.marks[:max_seeds]) for r in rows]
    shown = sum(len(row.before) for row in rows)
    foot = "Left and right share prompt and seed, place by place."
    if shown < len(prompts):
        foot += f" The first {shown} of {len(prompts)} pairs."
    draw_sheet(rows, title, subtitle, labels, foot).save(path, optimize=True)


def grouped(before, after, prompts, scores) -> list[Row]:
    """Rows in the order in which their prompts first come."""
    marks = [] if scores is None else np.sign(np.asarray(scores[1]) - np.asarray(scores[0])).astype(int).tolist()
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    return [
        Row(prompt, [before[i] for i in at], [after[i] for i in at], [marks[i] for i in at] if marks else [])
        for prompt, at in places.items()
    ]


def draw_sheet(rows: list[Row], title: str, subtitle: str, labels: tuple[str, str], foot: str) -> Image.Image:
    """Rows in as many columns as make the sheet about square."""
    seeds = max(len(row.before) for row in rows)
    cell = cell_size(rows[0].before[0].size, seeds)
    block = seeds * (cell[0] + GAP) - GAP
    width, height = LABEL + 2 * block + BETWEEN, cell[1] + 2 * GAP
    columns = min(range(1, 5), key=lambda c: abs(math.log(c * width / (math.ceil(len(rows) / c) * height))))
    deep = math.ceil(len(rows) / columns)
    top = MARGIN + 38 * bool(title) + 28 * bool(subtitle) + 34
    texts = font(25, bold=True).getlength(title), font(18).getlength(subtitle), font(15).getlength(foot) + LEGEND
    right = 2 * MARGIN + max(columns * (width + 2 * BETWEEN) - 2 * BETWEEN, *(math.ceil(text) for text in texts))
    sheet = Image.new("RGB", (right, top + deep * height + MARGIN + 30), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, font(25, bold=True))
    draw.text((MARGIN, MARGIN - 6 + 38 * bool(title)), subtitle, SOFT, font(18))
    for column in range(columns):
        x = MARGIN + column * (width + 2 * BETWEEN)
        for side, label in enumerate(labels):
            centre = x + LABEL + side * (block + BETWEEN) + block / 2
            draw.text((centre, top - 8), label, INK, font(18, bold=True), anchor="ms")
        for i, row in enumerate(rows[column * deep : (column + 1) * deep]):
            draw_row(sheet, row, (x, top + i * height), cell, block)
    draw_foot(draw, foot, sheet.size, any(row.marks for row in rows))
    return sheet


def cell_size(size: tuple[int, int], seeds: int) -> tuple[int, int]:
    """Small pictures grow by a whole factor, to about 100 pixels; large ones shrink to what the sheet has room for."""
    wide, high = size
    factor = max(1, min(128, 400 // seeds) // wide) if wide <= 128 else min(wide, 256, max(128, 640 // seeds)) / wide
    return round(wide * factor), round(high * factor)


def draw_row(sheet: Image.Image, row: Row, corner: tuple[int, int], cell: tuple[int, int], block: int) -> None:
    """The prompt, the pictures before, the pictures after with their marks."""
    draw, (x, y) = ImageDraw.Draw(sheet), (corner[0] + LABEL, corner[1])
    lines = wrapped(row.prompt or "(empty prompt)", LABEL - 14, lines=max(1, min(5, cell[1] // LINE)))
    start = y + (cell[1] - LINE * len(lines)) / 2
    for i, line in enumerate(lines):
        draw.text((x - 14, start + i * LINE), line, INK, font(15), anchor="ra")
    for i, (left, right) in enumerate(zip(row.before, row.after, strict=True)):
        at = x + i * (cell[0] + GAP)
        sheet.paste(resized(left, cell), (at, y))
        at += block + BETWEEN
        sheet.paste(resized(right, cell), (at, y))
        frame = (MARKS[row.marks[i]], 3) if row.marks else (FAINT, 1)
        for box, (colour, line) in (((at - block - BETWEEN, y), (FAINT, 1)), ((at, y), frame)):
            draw.rectangle(
                (box[0] - line, box[1] - line, box[0] + cell[0] + line - 1, box[1] + cell[1] + line - 1),
                outline=colour,
                width=line,
            )


def draw_foot(draw: ImageDraw.ImageDraw, foot: str, size: tuple[int, int], marks: bool) -> None:
    """What the sheet shows, and on the right what the frames mean."""
    y, x = size[1] - MARGIN - 2, size[0] - MARGIN
    draw.text((MARGIN, y), foot, SOFT, font(15), anchor="lm")
    for _, colour, name in (TIED, WORSE, BETTER) if marks else ():
        draw.text((x, y), name, SOFT, font(15), anchor="rm")
        x -= font(15).getlength(name) + 22
        draw.rectangle((x, y - 7, x + 14, y + 7), outline=colour, width=3)
        x -= 18


def resized(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """Enlarged pixels stay pixels; shrunk ones are filtered."""
    method = Image.Resampling.NEAREST if cell[0] >= image.width else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(cell, method)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: the same on every machine, and with letters beyond Latin."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """Words in at most so many lines of at most so many pixels; a dot-dot-dot where text is left out."""
    fits, done, line = (lambda s: font(15).getlength(s) <= width), [], ""
    for word in text.split():
        if line and not fits(f"{line} {word}"):
            done, line = [*done, line], word
        else:
            line = f"{line} {word}".strip()
    done.append(line)
    cut = len(done) > lines
    return [shortened(s, fits, cut and i == lines - 1) for i, s in enumerate(done[:lines])]


def shortened(line: str, fits, cut: bool) -> str:
    """The line, without the end that does not fit."""
    if fits(line + "…" * cut):
        return line + "…" * cut
    while line and not fits(line + "…"):
        line = line[:-1]
    return line.rstrip() + "…"


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One small plot: series as (key of metrics.jsonl, name, colour), a level to compare with, and the axis' limits."""

    title: str
    series: tuple[tuple[str, str, str], ...]
    level: float | None = None
    limits: tuple[float, float] | None = None
    smooth: bool = True


def sides(quantity: str) -> tuple[tuple[str, str, str], ...]:
    """Series of both sides: of pairs, or where there are none, of likes."""
    names = (("chosen", CHOSEN), ("rejected", REJECTED), ("liked", CHOSEN), ("disliked", REJECTED))
    return tuple((f"{quantity}/{side}", side, colour) for side, colour in names)


PANELS = (
    Panel("loss", (("loss", "", PLAIN),)),
    Panel(
        "accuracy of the implicit reward",
        (("rewards/accuracies", "", PLAIN), ("validation/accuracies", "held out", CHOSEN)),
        0.5,
        (0, 1),
    ),
    Panel(
        "accuracy by noise level",
        tuple((f"accuracies/t{q}", ("low noise", "", "", "high noise")[q], NOISE_LEVELS[q]) for q in range(4)),
        0.5,
        (0, 1),
    ),
    Panel("reward margin", (("rewards/margins", "", PLAIN),), 0.0),
    Panel("rewards", sides("rewards"), 0.0),
    Panel("error against the reference (below 0: learned)", sides("drift"), 0.0),
    Panel("error", sides("errors")),
    Panel("accuracy", (("accuracy", "", PLAIN), ("validation/accuracy", "held out", CHOSEN)), 0.5, (0, 1)),
    Panel("log-odds of the chosen one", (("margin", "", PLAIN),), 0.0),
    Panel("held-out log-loss", (("validation/log_loss", "", CHOSEN),), math.log(2)),
    Panel("contrast with other prompts", (("contrast", "", PLAIN),)),
    Panel("scale", (("scale", "", PLAIN),), smooth=False),
    Panel("gradient norm", (("grad_norm", "", PLAIN),)),
    Panel("learning rate", (("learning_rate", "", PLAIN),), smooth=False),
)


def curves(metrics_jsonl: str | Path, path: str | Path, title: str = "") -> None:
    """Small plots of whatever metrics.jsonl holds: each line of it faint, the running mean strong."""
    with Path(metrics_jsonl).open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    panels = [p for p in PANELS if any(key in line for key, _, _ in p.series for line in lines)]
    if not panels:
        raise ValueError(f"{metrics_jsonl} holds no metrics to draw")
    columns = min(3, len(panels))
    deep = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * deep + 0.4 * bool(title)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(deep, columns, squeeze=False).flat
    for i, ax in enumerate(axes):
        if i < len(panels):
            draw_panel(ax, panels[i], lines)
        else:
            ax.remove()
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold")
    figure.savefig(path, dpi=100)


def draw_panel(ax: Axes, panel: Panel, lines: list[dict]) -> None:
    """One small plot; steps at which a key is absent are skipped."""
    ax.set_title(panel.title, loc="left", fontsize=10, color=INK)
    if panel.level is not None:
        ax.axhline(panel.level, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    for key, name, colour in panel.series:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            draw_series(ax, np.array(points, dtype=float), name, colour, panel.smooth)
    if panel.limits:
        ax.set_ylim(*panel.limits)
    if any(name for _, name, _ in panel.series) and ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=SOFT)
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.set_xlabel("step", fontsize=8, color=SOFT)


def draw_series(ax: Axes, points: np.ndarray, name: str, colour: str, smooth: bool) -> None:
    """points [M,2] of (step, value): as they are, and for long series their running mean over a twelfth of the run."""
    step, value = points.T
    window = smooth * len(value) // 12
    if window < 2:
        ax.plot(step, value, color=colour, linewidth=1.6, label=name or None, marker="." if len(value) < 3 else "")
        return
    ones = np.ones(2 * (window // 2) + 1)
    mean = np.convolve(value, ones, "same") / np.convolve(np.ones_like(value), ones, "same")
    ax.plot(step, value, color=colour, linewidth=0.7, alpha=0.3)
    ax.plot(step, mean, color=colour, linewidth=1.8, label=name or None)
