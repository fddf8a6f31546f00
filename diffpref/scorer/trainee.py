"""Towers and head as the one model that a loop trains."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffpref.scorer.config import ScorerConfig, TowersConfig
from diffpref.scorer.folder import head_name
from diffpref.scorer.heads.config import HeadConfig, make_head, options, takes_users
from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.cosine import Cosine
from diffpref.scorer.heads.table import HEADS
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.towers import Towers


class Trainee(nn.Module):
    """M pictures and U prompts, as towers take them or embedded already, and which of them each item has -> what the
    head says, and the unit vectors it was told, [N,D] each."""

    def __init__(self, towers: Towers, head: Head):
        super().__init__()
        self.towers, self.head = towers, head

    def train(self, mode: bool = True) -> "Trainee":
        """As of any module, but statistics of batches stay as they are: a score must not depend on its neighbours."""
        super().train(mode)
        for module in self.towers.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self, pictures: Tensor, prompts: Tensor, picture: Tensor, prompt: Tensor, user: Tensor | None
    ) -> tuple[Judged, Tensor, Tensor]:
        """pictures [M,3,S,S] or [M,D], prompts [U,L] tokens or [U,D]; picture, prompt, user [N]."""
        image = pictures if pictures.ndim == 2 else self.towers.images(pictures)
        text = prompts if prompts.is_floating_point() else self.towers.texts(prompts)
        image, text = image[picture], text[prompt]
        with torch.autocast(image.device.type, enabled=False):  # rounded to bf16, near scores would be equal
            return self.head(image, text, user), image, text


def lock(towers: Towers, config: TowersConfig) -> None:
    """Let only the last layers train, as many as the configuration says. Raises ValueError where the towers cannot be
    divided like that."""
    model = towers.model.float().requires_grad_(True)
    model.logit_scale.requires_grad_(False)  # the head has its own
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)
    try:
        if config.image_groups >= 0:
            model.lock_image_tower(unlocked_groups=config.image_groups)
        if config.text_layers >= 0:
            model.lock_text_tower(unlocked_layers=config.text_layers)
    except AssertionError as error:
        raise ValueError(
            f"model.image_groups, model.text_layers: these towers train whole (-1) or not at all (0): {error}"
        ) from error


def noted(trainee: Trainee) -> dict[str, Tensor]:
    """What the head notes of the batches it sees, by name; the towers' notes stay as they are."""
    return {f"head.{name}": value for name, value in trainee.head.named_buffers()}


def frozen(towers: Towers) -> bool:
    """Whether neither tower trains."""
    return not any(parameter.requires_grad for parameter in towers.parameters())


def head_of(scorer: PreferenceScorer, config: ScorerConfig, users: list[Any]) -> Head:
    """The scorer's own head where it is of the configured kind, its temperature taken into its scale, and with the
    users it knows under their names; else a new one, at the scale of the scorer's."""
    own, wanted = scorer.head, config.head
    if not continues(own, wanted):
        if type(own) is not Cosine:
            print(f"head: a new {wanted.name}; the {head_name(own)} that {scorer.name} has is left behind", flush=True)
        return make_head(wanted, scorer.towers.width, len(users), scale=scale_of(scorer))
    own.warm(scorer.temperature)
    if wanted.logit_scale is not None:
        nn.init.constant_(own.logit_scale, wanted.logit_scale)
    if takes_users(wanted.name) and list(scorer.users or []) != users:
        own = with_users(own, wanted, list(scorer.users or []), users)
    return own.requires_grad_(True)


def continues(own: Head, wanted: HeadConfig) -> bool:
    """Whether training can go on from a head: it is of the kind and has the settings that are wanted."""
    shaping = options(wanted.name) - {"logit_scale"}
    return type(own) is HEADS[wanted.name] and all(own.settings[name] == getattr(wanted, name) for name in shaping)


def scale_of(scorer: PreferenceScorer) -> float | None:
    """Logarithm of the factor by which the scorer's cosines are log-odds; None of a head that has no cosine."""
    scale = getattr(scorer.head, "logit_scale", None)
    return None if scale is None else float(scale.detach().mean()) - math.log(scorer.temperature)


def with_users(own: Head, wanted: HeadConfig, known: list[Any], users: list[Any]) -> Head:
    """The same tastes for other users: those that both have keep their shares, new ones begin with the mean's."""
    head = make_head(wanted, own.settings["width"], len(users))
    old, mean = own.users.weight.detach(), own.users.weight.detach().mean(0)
    table = torch.stack([old[known.index(user)] if user in known else mean for user in users])
    head.load_state_dict(own.state_dict() | {"users.weight": table})
    print(f"users: {sum(user in known for user in users)} of {len(users)} are known from before", flush=True)
    return head


# Radford et al. 2021 (arXiv 2103.00020), one way: −log exp(s<f_i, t_i>) / Σ_u exp(s<f_i, t_u>), over the U prompts of
# the batch.
def contrast(image: Tensor, text: Tensor, prompt: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy [W] of each of W pictures' own prompt among all prompts of the batch.

    Args:
        image: Unit vectors [W,D] of winners.
        text: Unit vectors [U,D] of the different prompts.
        prompt: Which of them is each winner's, [W].
        scale: s, the head's.
    """
    return nn.functional.cross_entropy(scale * image @ text.T, prompt, reduction="none")
