"""A stock pipeline with a user adapter, drawing for one user or for several, or for nobody.

Stock pipelines alone do three things that this does not: without an embedding they raise a TypeError, of several users
in one call they make a mixture in silence (huggingface/diffusers#9813), and each family wants its arguments otherwise.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from diffpref.users.adapter import (
    family_name,
    has_user_adapter,
    load_into,
    read_user_adapter,
    set_user_scale,
    user_adapter_off,
    user_parameters,
)
from diffpref.users.embedding import UserEmbedding, described, layout
from diffpref.users.files import ADAPTER, ENCODER

PER_PROMPT = frozenset(
    f"{sign}prompt{number}" for sign in ("", "negative_") for number in ("", "_2", "_3", "_embeds")
) | {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"}
PER_PROMPT |= {"image", "mask_image", "control_image"}  # of pipelines that begin with pictures
PER_PICTURE = frozenset(("generator", "latents"))


def load_user_adapter(pipe: DiffusionPipeline, path: str | PathLike[str]) -> "PersonalizedPipeline":
    """Put a user adapter into a stock pipeline, before or after a LoRA.

    Args:
        pipe: A pipeline of a family that FORMATS holds; its denoiser gets the adapter, in place of one it may have.
        path: The adapter's file, the folder of the run that tuned it, or a hub id of such a folder.

    Raises:
        FileNotFoundError: It is neither here nor to be had.
        ValueError: It is damaged, no user adapter, or for another family or other sizes.
    """
    place = found_here(path)
    state, facts = read_user_adapter(place)
    load_into(denoiser_of(pipe), state, facts)
    return PersonalizedPipeline(pipe, facts, place if place.is_dir() else place.parent)


def found_here(path: str | PathLike[str]) -> Path:
    """The file or folder; of a hub id, the adapter and its encoder are fetched. Raises FileNotFoundError."""
    place = Path(path)
    if place.exists() or str(path).count("/") != 1 or place.suffix:
        return place  # what is not there is said by its reader
    try:
        return Path(snapshot_download(str(path), allow_patterns=[ADAPTER, f"{ENCODER}/*"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no user adapter at {path}: no file or folder here, nor what the hub gives ({error})"
        ) from error


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The UNet or the transformer. Raises ValueError for a pipeline that has neither."""
    for name in ("unet", "transformer"):
        if name in pipe.components:
            return pipe.components[name]
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to hold a user adapter")


# --- what a family's call takes ---------------------------------------------------------------------------------------


def unet_arguments(own: Tensor, nobody: Tensor, guided: bool) -> dict[str, Any]:
    """Both halves of the batch in one tensor, in a list with a place for each adapter."""
    return {"ip_adapter_image_embeds": [torch.cat([nobody, own]) if guided else own]}


def sd3_arguments(own: Tensor, nobody: Tensor, guided: bool) -> dict[str, Any]:
    """The same, without the list."""
    return {"ip_adapter_image_embeds": torch.cat([nobody, own]) if guided else own}


def flux_arguments(own: Tensor, nobody: Tensor, guided: bool) -> dict[str, Any]:
    """Two arguments. The second is also needed where no negative prompt is run: FLUX would make it out of a black
    picture, with an image encoder that is not there."""
    return {"ip_adapter_image_embeds": [own], "negative_ip_adapter_image_embeds": [nobody]}


ARGUMENTS: dict[str, Callable[[Tensor, Tensor, bool], dict[str, Any]]] = {  # by denoiser, as FORMATS
    "UNet2DConditionModel": unet_arguments,
    "SD3Transformer2DModel": sd3_arguments,
    "FluxTransformer2DModel": flux_arguments,
}


def is_guided(pipe: DiffusionPipeline, options: dict[str, Any]) -> bool:
    """Whether this call will run an unconditional half, as the pipeline itself says."""
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        return False  # FLUX, which takes the two halves apart
    own = inspect.signature(pipe.__call__).parameters["guidance_scale"]
    pipe._guidance_scale = options.get("guidance_scale", own.default)  # as its call will set it, before it asks
    return pipe.do_classifier_free_guidance


# --- the pipeline -----------------------------------------------------------------------------------------------------


class PersonalizedPipeline:
    """A pipeline whose denoiser holds a user adapter: `personal(prompt, user=me, scale=0.8)`.

    pipe: the stock pipeline.  facts: of the adapter's file; width, sequence, and encoder where it has one.  folder: in
    which the file lies.
    """

    def __init__(self, pipe: DiffusionPipeline, facts: dict[str, Any], folder: Path | None = None) -> None:
        self.pipe, self.facts, self.folder = pipe, facts, folder

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        user: UserEmbedding | Sequence[UserEmbedding | None] | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> Any:
        """What the stock pipeline returns.

        Args:
            prompt: As the stock pipeline takes it, or prompt_embeds.
            user: Whose pictures; a sequence has one user for each prompt. None is nobody: the pictures are those of
                the pipeline without adapter.
            scale: How much a user counts; 0 is nobody, 1 what was tuned. The scale that was set before comes back.
            options: As the stock pipeline takes them. Each user is a call of it, so callbacks hear of each.

        Raises:
            ValueError: A user of another width, shape or encoder than the adapter's; a scale that is not finite;
                unequal numbers of users, prompts and what goes with these; one generator for several users.
        """
        count = number_of_prompts(prompt, options)
        check_kind(user, scale)
        users = [user] * count if user is None or isinstance(user, UserEmbedding) else list(user)
        if len(users) != count:
            raise ValueError(f"{len(users)} users for {count} prompts: give one user, or one for each prompt")
        for one in users:
            self.check(one)
        with self.at_scale(scale):
            return self.draw(users, {"prompt": prompt} | options)

    def draw(self, users: list[UserEmbedding | None], options: dict[str, Any]) -> Any:
        """One stock call for each user, and the pictures put back in order."""
        alike = {id(one): [i for i, other in enumerate(users) if other is one] for one in users}
        if len(alike) == 1:
            return self.draw_for(users[0], options)
        each = options.get("num_images_per_prompt") or 1
        check_lengths(options, len(users), each)
        rows = list(alike.values())
        outputs = [self.draw_for(users[some[0]], taken(options, some, each) | {"return_dict": True}) for some in rows]
        order = pictures_of([prompt for some in rows for prompt in some], each)
        return together(outputs, order, options.get("return_dict", True))

    def draw_for(self, user: UserEmbedding | None, options: dict[str, Any]) -> Any:
        """One stock call."""
        if options.get("joint_attention_kwargs") is not None:  # the stock call writes the user into it
            options = options | {"joint_attention_kwargs": dict(options["joint_attention_kwargs"])}
        return self.pipe(**options, **self.arguments(user, is_guided(self.pipe, options)))

    def arguments(self, user: UserEmbedding | None, guided: bool) -> dict[str, Any]:
        """What the stock call is given for a user: half of a guided batch is nobody's."""
        denoiser = denoiser_of(self.pipe)
        states = torch.zeros(1, self.facts["width"]) if user is None else user.states
        dtype = next(iter(user_parameters(denoiser).values())).dtype
        own = layout(states, self.facts["sequence"]).to(dtype)
        return ARGUMENTS[family_name(denoiser)](own, torch.zeros_like(own), guided)

    def check(self, user: UserEmbedding | None) -> None:
        """Raise ValueError for a user that this adapter was not tuned for."""
        if user is not None:
            check_user(user, self.facts)

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """Users count so much, inside. Raises ValueError unless it is finite, and where the adapter was unloaded."""
        denoiser = denoiser_of(self.pipe)
        if not has_user_adapter(denoiser):
            raise ValueError("the pipeline holds no user adapter any more: load it again with load_user_adapter")
        with user_adapter_off(denoiser):  # which puts the scales back that were there
            set_user_scale(denoiser, scale)
            yield

    def bound(self, user: UserEmbedding | None, scale: float = 1.0) -> "Bound":
        """The pipeline of one user, which `diffpref.sample.sample` takes as it takes a stock one. Raises ValueError for
        a user that this adapter was not tuned for."""
        self.check(user)
        return Bound(self, user, scale)


class Bound:
    """The pipeline of one user at one scale: called, it draws for them; all else is the stock pipeline's own."""

    def __init__(self, personal: PersonalizedPipeline, user: UserEmbedding | None, scale: float = 1.0) -> None:
        self.personal, self.user, self.scale = personal, user, scale

    def __call__(self, prompt: Any = None, **options: Any) -> Any:
        """As the stock pipeline."""
        return self.personal(prompt, user=self.user, scale=self.scale, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "personal":  # not set yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.personal.pipe, name)

    @property
    def scheduler(self) -> Any:
        """The stock pipeline's; `sample` puts another in its place for a while."""
        return self.personal.pipe.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.personal.pipe.scheduler = scheduler


def check_user(user: UserEmbedding, facts: dict[str, Any]) -> None:
    """Raise ValueError for a user of another width, shape or encoder than the adapter's."""
    whose = facts.get("encoder")
    if user.width != facts["width"]:
        raise ValueError(f"{described(user)} does not fit the adapter, which takes vectors of width {facts['width']}")
    if user.sequence and not facts["sequence"]:
        raise ValueError(f"{described(user)} does not fit the adapter, which takes one vector")
    if whose is not None and whose != user.encoder:
        raise ValueError(
            f"{described(user)} does not fit the adapter, which was tuned with the encoder {whose}:"
            " make the embedding anew with that one"
        )


# --- several users in one call ----------------------------------------------------------------------------------------


def number_of_prompts(prompt: str | list[str] | None, options: dict[str, Any]) -> int:
    """Of a call. Raises ValueError where there is none."""
    if prompt is None and options.get("prompt_embeds") is None:
        raise ValueError("give a prompt, a list of prompts, or prompt_embeds")
    count = 1 if isinstance(prompt, str) else len(options["prompt_embeds"] if prompt is None else prompt)
    if not count:
        raise ValueError("there is no prompt in the list")
    return count


def check_kind(user: Any, scale: Any) -> None:
    """Raise TypeError for what is no user, such as a path, and for a scale that is no number."""
    some = user if isinstance(user, list | tuple) else [user]
    strange = [one for one in some if one is not None and not isinstance(one, UserEmbedding)]
    if strange:
        raise TypeError(
            f"user is to be a UserEmbedding, or a list with one for each prompt, not {type(strange[0]).__name__};"
            " UserEmbedding.load reads a file"
        )
    if not isinstance(scale, int | float):
        raise TypeError(f"scale is to be a number, got {scale!r}")


def is_each(value: Any) -> bool:
    """Whether a value has a part for each prompt or picture; one text or one generator is for all."""
    return isinstance(value, list | tuple | Tensor)


def check_lengths(options: dict[str, Any], prompts: int, each: int) -> None:
    """Raise ValueError for what cannot be dealt out to several users."""
    for name, value in options.items():
        needed = prompts if name in PER_PROMPT else prompts * each if name in PER_PICTURE else None
        if needed is not None and is_each(value) and len(value) != needed:
            raise ValueError(f"{name} has {len(value)} parts, and there are to be {needed}")
    if isinstance(options.get("generator"), torch.Generator):
        raise ValueError(
            "one generator for several users: a picture would depend on whose are drawn before;"
            " give a list, a generator for each picture"
        )


def pictures_of(prompts: list[int], each: int) -> list[int]:
    """Numbers of the pictures of some prompts."""
    return [prompt * each + number for prompt in prompts for number in range(each)]


def taken(options: dict[str, Any], prompts: list[int], each: int) -> dict[str, Any]:
    """The part of a call that is about some of its prompts."""
    rows = dict.fromkeys(PER_PROMPT, prompts) | dict.fromkeys(PER_PICTURE, pictures_of(prompts, each))
    return {
        name: parts(value, rows[name]) if name in rows and is_each(value) else value for name, value in options.items()
    }


def parts(value: Any, rows: list[int]) -> Any:
    """Some of a list, an array or a tensor."""
    return [value[row] for row in rows] if isinstance(value, list | tuple) else value[rows]


def together(outputs: list[Any], pictures: list[int], return_dict: bool) -> Any:
    """What one call would have returned. pictures: which ones the outputs hold, one output after the other."""
    order = sorted(range(len(pictures)), key=pictures.__getitem__)
    fields = {
        one.name: joined([getattr(output, one.name) for output in outputs], order)
        for one in dataclasses.fields(outputs[0])
    }
    return type(outputs[0])(**fields) if return_dict else tuple(fields.values())


def joined(values: list[Any], order: list[int]) -> Any:
    """Lists, arrays or tensors one after the other, put in order; None stays."""
    if values[0] is None:
        return None
    if isinstance(values[0], Tensor):
        return torch.cat(values)[order]
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)[order]
    return parts([one for value in values for one in value], order)
