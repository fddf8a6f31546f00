"""What passes between the stages: one small frozen dataclass each.

N items (one image with one prompt, one timestep, one noise), P comparisons between items, G groups of items; a pair
is a group of two. C,h,w latent channels and sides; L text tokens, D their width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """How the N items of a batch belong together, and what is known about them.

    group [N]: each item's group, numbered 0..G-1.  pairs [P,2]: (chosen, rejected) item indices.  weight [G]: of each
    group.
    scores [N]: higher is better.  labels [N]: +1 liked, -1 not.  probability [P]: that the chosen one is preferred.
    prompt [N]: equal numbers where prompts are equal.  features [N,D]: a unit vector for each prompt, near for prompts
    that are alike.  user [N]: equal numbers for items of one user.  aspects [P,A]: by aspect, +1 where the chosen one
    is better, -1 where the rejected one is, 0 for a tie, NaN where nobody said.  None where the data do not say, or
    nobody asks.
    """

    group: Tensor
    pairs: Tensor
    weight: Tensor
    scores: Tensor | None = None
    labels: Tensor | None = None
    probability: Tensor | None = None
    prompt: Tensor | None = None
    features: Tensor | None = None
    user: Tensor | None = None
    aspects: Tensor | None = None

    @property
    def chosen(self) -> Tensor:
        """Item indices of the winners, [P]."""
        return self.pairs[:, 0]

    @property
    def rejected(self) -> Tensor:
        """Item indices of the losers, [P]."""
        return self.pairs[:, 1]

    def to(self, device: torch.device) -> "Structure":
        """The same structure on another device; the host does not wait for the copies."""
        there = (None if value is None else value.to(device, non_blocking=True) for value in vars(self).values())
        return Structure(*there)


USERS = "users/"  # what is known of users, among the conditioning: not for the denoiser as it stands
Conditioning = dict[str, Tensor]  # whatever a family's denoiser takes beside x_t and t; each [N, ...]


@dataclass(frozen=True)
class PreferenceBatch:
    """prompts, N strings; M pictures as images [M,3,H,W] in [-1,1], or as moments [M,C',h,w], what the VAE made of
    them (from the cache); picture [N], which of them each item shows (items of one picture differ in the prompt); size
    (H, W) of the training pictures; original_size [N,2] (height, width) and crop_top_left [N,2] in pixels; keys, one
    int per group that identifies its random draws; how the items belong together in `structure`; conditioning [N,...],
    what the text encoders made of the prompts, when it comes from the cache; users, what is known of each group's user
    by name, each [G,...], None where nobody is asked; faults, a line for each row that could not be used and was
    replaced."""

    prompts: list[str]
    size: tuple[int, int]
    original_size: Tensor
    crop_top_left: Tensor
    keys: list[int]
    structure: Structure
    picture: Tensor
    images: Tensor | None = None
    moments: Tensor | None = None
    conditioning: Conditioning | None = None
    users: dict[str, Tensor] | None = None
    faults: tuple[str, ...] = ()

    def pin_memory(self) -> "PreferenceBatch":
        """The same batch in memory from which copies to a GPU run beside the computation; the loader calls this."""
        pictures = {"images": self.images, "moments": self.moments}
        pinned: dict = {name: value.pin_memory() for name, value in pictures.items() if value is not None}
        if self.conditioning is not None:
            pinned["conditioning"] = {key: value.pin_memory() for key, value in self.conditioning.items()}
        return replace(self, **pinned)


@dataclass(frozen=True)
class Encoded:
    """latents [N,C,h,w] in the denoiser's scale, fp32; conditioning per item; keys and structure of the batch."""

    latents: Tensor
    conditioning: Conditioning
    keys: list[int]
    structure: Structure


@dataclass(frozen=True)
class Noised:
    """x_t, target [N,C,h,w] fp32, so that x_t = a_t·x0 + s_t·ε; t [N] as the denoiser takes it; level [N] in [0,1),
    the position in the schedule, 0 = clean; weight [N], w_t: what the errors of this timestep count; reference_error
    [N], the reference's mean squared error without w_t, where the reference need not be asked; None where it must."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    level: Tensor
    weight: Tensor
    reference_error: Tensor | None = None


@dataclass(frozen=True)
class Errors:
    """policy [N] = w_t·e_θ, mean squared error over all elements times the timestep's weight, fp32, with graph.
    advantage [N] = w_t·(e_ref − e_θ): positive where the policy fits the item better than the reference; None without
    a reference.  drift [N] = w_t·mean (p − r)², how far the two predictions lie apart; None unless asked for.
    overlap [P] = w_t·mean (p − y)_chosen·(p − y)_rejected, without graph; None unless asked for."""

    policy: Tensor
    advantage: Tensor | None = None
    drift: Tensor | None = None
    overlap: Tensor | None = None

    def to(self, device: torch.device) -> "Errors":
        """The same numbers on another device."""
        return Errors(*(None if value is None else value.to(device) for value in vars(self).values()))

    def detach(self) -> "Errors":
        """The same numbers without the graph, for metrics."""
        return Errors(*(None if value is None else value.detach() for value in vars(self).values()))
