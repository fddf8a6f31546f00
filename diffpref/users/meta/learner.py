"""Episodes -> gradients of the encoder."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from diffpref.journal import Journal
from diffpref.users.encoder import UserEncoder
from diffpref.users.meta.config import EpisodeConfig
from diffpref.users.meta.episodes import Episodes


class Task(nn.Module):
    """What trains: the encoder, and the loss of episodes through it."""

    def __init__(self, encoder: UserEncoder, config: EpisodeConfig):
        super().__init__()
        self.encoder, self.config = encoder, config

    # L = mean over asked choices of -log σ(s_u(chosen) - s_u(rejected)) + λ·InfoNCE
    def forward(self, episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and numbers for the log."""
        user = self.encoder(episodes.support, episodes.mask)
        logit = log_odds(self.encoder, user, episodes.query)[episodes.asked]
        losses = -F.logsigmoid(logit)
        numbers = {"loss": losses.detach(), "accuracy": 0.5 * (1 + logit.detach().sign()), "margin": logit.detach()}
        if not self.config.dispersion:
            return losses.mean(), numbers
        other = self.encoder(episodes.other, episodes.other_mask)
        apart = dispersion(user, other, self.config.temperature)
        return losses.mean() + self.config.dispersion * apart, numbers | {"dispersion": apart.detach()[None]}


def log_odds(encoder: UserEncoder, user: Tensor, choices: Tensor) -> Tensor:
    """Of users [G,U] for choices [G,Q,3,D] -> [G,Q]."""
    prompt, chosen, rejected = choices.flatten(0, 1).unbind(1)
    each = user.repeat_interleave(choices.shape[1], dim=0)
    difference = encoder.scores(each, chosen, prompt) - encoder.scores(each, rejected, prompt)
    return difference.unflatten(0, choices.shape[:2])


# InfoNCE over the users of a batch, the dispersion loss of Premier (2603.20725):
#   L = mean_i -log exp(u_i·v_i / T) / Σ_j exp(u_i·v_j / T)
def dispersion(user: Tensor, other: Tensor, temperature: float) -> Tensor:
    """user, other [G,U]: of two supports of each person; small where a person's two are nearer than others'."""
    return F.cross_entropy(user @ other.mT / temperature, torch.arange(len(user), device=user.device))


class Learner:
    """Everything between the batches and the gradients."""

    def __init__(self, accelerator: Accelerator, policy: nn.Module):
        self.accelerator, self.policy = accelerator, policy

    def learn(self, batches: Iterable[Episodes], journal: Journal) -> None:
        """Accumulate the gradient of one optimiser step, and note its numbers."""
        self.accelerator.step = 0
        for episodes in batches:
            here = Episodes(*(v.to(self.accelerator.device) for v in list(vars(episodes).values())[:-1]))
            with self.accelerator.accumulate(self.policy):
                loss, numbers = self.policy(here)
                self.accelerator.backward(loss)
                journal.add(numbers)
