"""Towers and head as the one model that a loop trains."""

import torch
from torch import Tensor, nn

from diffpref.scorer.config import ScorerConfig, TowersConfig
from diffpref.scorer.heads.config import make_head, options
from diffpref.scorer.heads.contract import Head, Judged
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


def frozen(towers: Towers) -> bool:
    """Whether neither tower trains."""
    return not any(parameter.requires_grad for parameter in towers.parameters())


def head_of(scorer: PreferenceScorer, config: ScorerConfig, users: int) -> Head:
    """The scorer's own head, its temperature made part of its scale, where it is of the configured kind; else a new
    one."""
    own, wanted = scorer.head, config.head
    free = {"width", "users", "logit_scale"}
    same = type(own) is HEADS[wanted.name] and all(
        own.settings.get(name) == getattr(wanted, name) for name in options(wanted.name) - free
    )
    if not same or own.settings.get("users", 0) != (users if "users" in own.settings else 0):
        return make_head(wanted, scorer.towers.width, users)
    with torch.no_grad():
        if hasattr(own, "logit_scale"):
            own.logit_scale.sub_(torch.tensor(scorer.temperature).log())
            own.clamp()
    return own.requires_grad_(True)


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
