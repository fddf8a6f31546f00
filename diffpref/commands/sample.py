"""diffpref sample: pictures of several pipelines, to be scored and ranked."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffpref.commands.arguments import Parser, positive
from diffpref.synpic.plan import NAME, PERSONAL, Plan, Source, read_prompts, read_seeds

Named = tuple[str, Any]  # a pipeline's name, or none for all of them; a value

EXAMPLE = """example, two processes on two GPUs:
  accelerate launch --num_processes 2 -m diffpref.cli sample --prompts prompts.txt --seeds 4 --out pictures \\
      --pipeline base=stable-diffusion-v1-5/stable-diffusion-v1-5 tuned=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --lora tuned=runs/my-taste --steps 30 --guidance 7.5 tuned=6 --dtype bfloat16

What is there is not drawn again, so a command that was stopped is simply given again."""


def parser() -> Parser:
    """Options of diffpref sample."""
    options = Parser(
        "diffpref sample",
        description="Draw one picture of each pipeline for each prompt and seed, into parquet shards.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--pipeline", **of_each(str), required=True, metavar="NAME=PATH", help="folder or hub id; one for each name")
    add("--lora", **of_each(str), metavar="NAME=PATH", help="folder, file or hub id of a LoRA on a pipeline")
    whose = "user's embedding (diffpref user embed), whose taste a pipeline draws for"
    add("--user", **of_each(str), metavar="NAME=FILE", help=whose)
    add("--user-adapter", **of_each(str), metavar="NAME=PATH", help="what reads users: file, run's folder or hub id")
    add("--user-scale", **of_each(float), metavar="S", help="how much users count, 0 for not at all (default: 1)")
    of_k = "draw for the user and K - 1 tastes nearby, keep what the user's own scorer likes best"
    add("--consensus", **of_each(positive), metavar="K", help=of_k)
    add("--prompts", nargs="+", required=True, metavar="TEXT|FILE", help="prompts, or text files with one a line")
    add("--seeds", nargs="+", default=["1"], metavar="N", help="how many (default: 1), or which: 3 8 11-13")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    own = "for all, or NAME=N for one (default: the pipeline's own)"
    add("--images", action="store_true", help="also write each as a PNG file, into the folder images there")
    add("--steps", **of_each(positive), metavar="N", help=f"denoising steps, {own}")
    add("--guidance", **of_each(float), metavar="S", help=f"classifier-free guidance, {own}")
    add("--height", **of_each(positive), metavar="PIXELS", help=own)
    add("--width", **of_each(positive), metavar="PIXELS", help=own)
    add("--dtype", **of_each(dtype), metavar="DTYPE", help="float32, bfloat16 or float16, for all or NAME=DTYPE")
    add("--variant", **of_each(str), metavar="VARIANT", help="of the weights' files, such as fp16")
    add("--batch-size", type=positive, default=8, metavar="N", help="pictures drawn at once (default: 8)")
    add("--shard-size", type=positive, default=64, metavar="N", help="pictures in a file (default: 64)")
    add("--device", help="such as cuda:1 or cpu (default: each process takes an accelerator, if there is one)")
    return options


def of_each(kind: Callable[[str], Any]) -> dict[str, Any]:
    """An option that holds for all pipelines, or for the one that it names; it can be given several times."""

    def read(text: str) -> Named:
        first, sign, rest = text.partition("=")
        return (first, kind(rest)) if sign else ("", kind(text))

    read.__name__ = kind.__name__  # argparse names it where a value is none
    return {"type": read, "nargs": "+", "action": "extend", "default": []}


def dtype(text: str) -> str:
    """Of the weights."""
    if text not in ("float32", "bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"must be float32, bfloat16 or float16, got {text!r}")
    return text


def sources(args: argparse.Namespace) -> tuple[Source, ...]:
    """The pipelines. Raises ValueError for names that are missing, unfit, said twice or not those of pipelines."""
    paths = by_name("pipeline", args.pipeline)
    for name in paths:
        if not NAME.fullmatch(name):
            raise ValueError(f"--pipeline {name or paths[name]}: say NAME=PATH, the name of letters, digits and _ . -")
    given = {key: by_name(key.replace("_", "-"), getattr(args, key), paths) for key in SETTINGS}
    chosen = {name: {key: values.get(name, values.get("")) for key, values in given.items()} for name in paths}
    return tuple(
        Source(name, path, **{key: value for key, value in chosen[name].items() if value is not None})
        for name, path in paths.items()
    )


# of Source; each an option
SETTINGS = ("lora", "steps", "guidance", "height", "width", "dtype", "variant", *PERSONAL)


def by_name(option: str, given: Sequence[Named], names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Pairs -> a dict. Raises ValueError for a name that is there twice, or not among the names."""
    for name, _ in given:
        if name and names is not None and name not in names:
            raise ValueError(f"--{option}: no pipeline is called {name!r}; there are {', '.join(names)}")
        if sum(name == other for other, _ in given) > 1:
            raise ValueError(f"--{option} is given twice for {name or 'all pipelines'}")
    return dict(given)


def run(arguments: Sequence[str]) -> None:
    """Draw pictures; with accelerate launch each process draws its share of the shards."""
    args = parser().parse_args(arguments)
    plan = Plan(sources(args), read_prompts(args.prompts), read_seeds(args.seeds), args.shard_size)
    import torch

    from diffpref.cache.team import Team
    from diffpref.engines import silence
    from diffpref.synpic.draw import draw
    from diffpref.synpic.images import write_images

    silence()  # one bar is enough
    team = Team(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    device = torch.device(args.device or default_device())
    drawn = draw(plan, args.out, batch_size=args.batch_size, device=device, team=team)
    mine = sum(len(shard.pictures) for shard in team.share(plan.shards()))
    whose = "" if team.world == 1 else f"process {team.rank}: "
    where = write_images(team.share(plan.shards()), args.out) if args.images else args.out
    print(f"{whose}{drawn} pictures drawn, {mine - drawn} were there; they are in {where}", flush=True)


def default_device() -> str:
    """The accelerator of this process, or the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    place = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    return f"{torch.accelerator.current_accelerator()}:{place}"
