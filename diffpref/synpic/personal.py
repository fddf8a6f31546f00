"""Pictures of a user, as `diffpref sample --user` draws them."""

import math
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffpref.synpic.plan import Source
from diffpref.users.adapter import read_user_adapter
from diffpref.users.consensus import Neighbourhood, own_taste
from diffpref.users.embedding import UserEmbedding
from diffpref.users.few_shot import load_encoder
from diffpref.users.personalized import Bound, check_user, found_here, load_user_adapter


def check_personal(source: Source, config: dict[str, Any]) -> None:
    """Raise ValueError or FileNotFoundError for a user that cannot be drawn for. config: the pipeline's, which names
    the classes of its parts."""
    check_options(source)
    if source.user_adapter is None:
        return
    facts = read_user_adapter(found_here(source.user_adapter))[1]
    classes = [part[1] for part in config.values() if isinstance(part, list | tuple) and len(part) == 2]
    if facts["family"] not in classes:
        raise ValueError(f"{source.user_adapter} is for a {facts['family']}, which the pipeline does not have")
    if source.user is not None:
        check_user(UserEmbedding.load(source.user), facts)
    if source.consensus is not None:
        load_encoder(found_here(source.user_adapter))


def check_options(source: Source) -> None:
    """Raise ValueError for options that mean nothing without another, and for a scale that is no number."""
    needs = {"user": "user_adapter", "user_scale": "user_adapter", "consensus": "user"}
    for name, other in needs.items():
        if getattr(source, name) is not None and getattr(source, other) is None:
            raise ValueError(f"--{name} needs --{other}".replace("_", "-"))
    if not math.isfinite(source.scale):
        raise ValueError(f"--user-scale is {source.user_scale}; it must be a finite number")


def for_user(pipe: DiffusionPipeline, source: Source) -> DiffusionPipeline | Bound:
    """The pipeline as it draws for the source's user, or for nobody, where only an adapter is there. Raises ValueError,
    naming it, for an adapter of other sizes."""
    if source.user_adapter is None:
        return pipe
    try:
        personal = load_user_adapter(pipe, source.user_adapter)
    except ValueError as error:
        raise ValueError(f"pipeline {source.name}: {error}") from error
    user = None if source.user is None else UserEmbedding.load(source.user)
    if user is None or source.consensus is None:
        return personal.bound(user, source.scale)
    likes = own_taste(load_encoder(personal.folder or Path()), user)
    return Neighbourhood(personal, user, likes, k=source.consensus, scale=source.scale)
