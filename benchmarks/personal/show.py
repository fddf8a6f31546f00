"""The plots, the sheet and the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from diffpref.figures import BETTER, CHOSEN, FAINT, INK, NOISE_LEVELS, PAPER, REJECTED, SOFT, TIED, WORSE, font, resized
from personal.conditions import Plan
from personal.known import Known
from personal.outcomes import Contest, won

# --- curves -----------------------------------------------------------------------------------------------------------


def figure(report: dict[str, Any], path: Path) -> None:
    """Win rates by number of pairs beside the bound, and the way from one user to another."""
    drawing = Figure(figsize=(13.2, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    left, middle, right = drawing.subplots(1, 3)
    draw_wins(left, report, "base")
    draw_wins(middle, report, "impersonal")
    if "interpolation" in report:
        draw_way(right, report["interpolation"])
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=SOFT)
    drawing.savefig(path, dpi=110)


def draw_wins(axis: Axes, report: dict[str, Any], rival: str) -> None:
    """Right and wrong users' pictures against a rival, and what Bayes would pick out of all that was drawn."""
    rows = {n: row for n, row in report["win_rates"].items() if n.isdigit()}
    rows = dict(sorted(rows.items(), key=lambda one: int(one[0])))
    for who, colour in (("over", CHOSEN), ("wrong over", REJECTED)):
        line(axis, {n: row[key] for n, row in rows.items() if (key := f"{who} {rival}") in row}, colour, NAMES[who])
    bound = {n: row[f"drawn: over {rival}"] for n, row in report["bound"].items() if n.isdigit()}
    line(axis, bound, INK, "bound: Bayes, of all pictures drawn", band=False)
    if rival == "base":
        axis.axhline(report["impersonal"]["value"], color=SOFT, linestyle=(0, (4, 3)), linewidth=1, label="impersonal")
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks([0, 1, 2, 4, 8, 16], ["0", "1", "2", "4", "8", "16"])
    axis.set_xlabel("pairs of the new user", fontsize=8, color=SOFT)
    axis.set_title(f"win rate over the {rival} {'model' if rival == 'base' else 'LoRA'}", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)


NAMES = {"over": "their own pairs", "wrong over": "another user's pairs"}


def line(axis: Axes, rows: dict[str, dict], colour: str, name: str, band: bool = True) -> None:
    """A curve with its band."""
    if not rows:
        return
    numbers = [int(n) for n in rows]
    value, low, high = np.array([[row["value"], row["low"], row["high"]] for row in rows.values()]).T
    axis.plot(numbers, value, color=colour, marker="o", markersize=4, label=name, linestyle="-" if band else ":")
    if band:
        axis.fill_between(numbers, low, high, color=colour, alpha=0.13, linewidth=0)


def draw_way(axis: Axes, found: dict[str, Any]) -> None:
    """U_second - U_first along the way, couple by couple."""
    for number, one in enumerate(found["difference_by_couple"]):
        axis.plot(found["amounts"], one, color=FAINT, linewidth=1, label="couples of users" if number == 0 else None)
    axis.plot(found["amounts"], found["difference"], color=NOISE_LEVELS[2], marker="o", label="mean")
    axis.set_xticks(found["amounts"])
    axis.set_xlabel("amount of the second user", fontsize=8, color=SOFT)
    axis.set_title("second user's utility less the first's", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)


# --- the sheet --------------------------------------------------------------------------------------------------------

CELL, GAP, EDGE, HALF = 92, 8, 28, 42  # pixels; HALF: of a picture in a pair
LEAST = 960  # of the sheet, for its title
PAIRS_WIDTH, TOP, HEAD = 4 * (HALF + 6) + 18, 104, 120
FRAMES = {sign: colour for sign, colour, _ in (BETTER, WORSE, TIED)}


def sheet(plan: Plan, contest: Contest, path: Path, users: Sequence[int], prompts: Sequence[int]) -> None:
    """A prompt in each column, a user in each row with the four pairs that were all there was to know of them. Above,
    what the base and the impersonal model draw with the seeds of the first user."""
    width = max(2 * EDGE + HEAD + PAIRS_WIDTH + len(prompts) * (CELL + GAP), LEAST)
    image = Image.new("RGB", (width, TOP + (2 + len(users)) * (CELL + GAP) + 2 * EDGE), PAPER)
    draw = ImageDraw.Draw(image)
    heading(draw, plan.named(prompts))
    turn = plan.turn(plan.people[users[0]].user)
    for row, model in enumerate(("base", "impersonal")):
        pixels = contest.general[model][turn].pixels
        place(image, row, [Image.fromarray(pixels[p]) for p in prompts], [FAINT] * len(prompts))
        label(draw, row, model)
    for row, user in enumerate(users, 2):
        person(image, row, plan, contest, user, prompts)
    foot = image.height - EDGE
    draw.text((EDGE, foot), "Frames, by the user's true utility against the base at the same seed:", SOFT, font(15))
    x = EDGE + font(15).getlength("Frames, by the user's true utility against the base at the same seed:") + 16
    for _, colour, name in (BETTER, WORSE, TIED):
        draw.rectangle((x, foot + 2, x + 14, foot + 16), outline=colour, width=3)
        draw.text((x + 20, foot), name, SOFT, font(15))
        x += 44 + font(15).getlength(name)
    image.save(path, optimize=True)


def heading(draw: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
    """Titles of the sheet and of its columns."""
    draw.text(
        (EDGE, 20), "Four pairs of a user nobody trained on, and what is drawn for them", INK, font(22, bold=True)
    )
    draw.text((EDGE + HEAD, TOP - 44), "chosen, above\nrejected, below", SOFT, font(13))
    for column, name in enumerate(names):
        words = name.replace(" ", "\n", 1) if font(13).getlength(name) > CELL else name
        x = EDGE + HEAD + PAIRS_WIDTH + column * (CELL + GAP) + CELL / 2
        draw.multiline_text((x, TOP - 6), words, INK, font(13), anchor="md", align="center")


def label(draw: ImageDraw.ImageDraw, row: int, text: str) -> None:
    """Left of a row."""
    draw.text((EDGE, TOP + row * (CELL + GAP) + CELL / 2), text, INK, font(15, bold=True), anchor="lm")


def place(image: Image.Image, row: int, pictures: Sequence[Image.Image], frames: Sequence[str]) -> None:
    """A row of pictures."""
    draw, y = ImageDraw.Draw(image), TOP + row * (CELL + GAP)
    for column, (picture, colour) in enumerate(zip(pictures, frames, strict=True)):
        x, line = EDGE + HEAD + PAIRS_WIDTH + column * (CELL + GAP), 1 if colour == FAINT else 3
        image.paste(resized(picture, (CELL, CELL)), (x, y))
        draw.rectangle((x - line, y - line, x + CELL + line - 1, y + CELL + line - 1), outline=colour, width=line)


def person(image: Image.Image, row: int, plan: Plan, contest: Contest, user: int, prompts: Sequence[int]) -> None:
    """A user's row: their pairs, and what was drawn after them."""
    known, numbers = plan.people[user], plan.numbers("4")
    at = [numbers.index(p) for p in prompts]
    rates = won(contest.own("4")[user][at], contest.nobodys("base", prompts)[user])
    pixels = contest.right["4"][user].pixels
    place(image, row, [Image.fromarray(pixels[i]) for i in at], [FRAMES[round(2 * rate - 1)] for rate in rates])
    label(ImageDraw.Draw(image), row, f"user {known.user.user_id}")
    pairs(image, row, known)


def pairs(image: Image.Image, row: int, known: Known) -> None:
    """The first four choices."""
    y = TOP + row * (CELL + GAP)
    for column, said in enumerate(known.pairs[:4]):
        for level, picture in enumerate(said.images()):
            corner = EDGE + HEAD + column * (HALF + 6), y + level * (CELL - HALF)
            image.paste(resized(picture, (HALF, HALF)), corner)
            ImageDraw.Draw(image).rectangle(
                (corner[0] - 1, corner[1] - 1, corner[0] + HALF, corner[1] + HALF), outline=(CHOSEN, FAINT)[level]
            )
