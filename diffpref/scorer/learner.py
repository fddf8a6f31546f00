"""Batches of an optimiser step -> gradients of a scorer."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffpref.batch import PreferenceBatch, Structure
from diffpref.data.groups import number_of
from diffpref.journal import Journal
from diffpref.objectives.total import weighted_mean
from diffpref.scorer.config import ScorerConfig
from diffpref.scorer.heads.contract import Judged
from diffpref.scorer.losses import total
from diffpref.scorer.trainee import Trainee, contrast

UNKNOWN = -1  # the number of a user whom the head does not know


class Learner:
    """Everything between the batches and the gradients.

    Args:
        accelerator: accelerate's engine.
        policy: What accelerate made of the trainee.
        trainee: Towers and head.
        config: loss and contrast_weight.
        users: Names of the users that the head knows, in the order of its table.
    """

    def __init__(
        self, accelerator: Accelerator, policy: nn.Module, trainee: Trainee, config: ScorerConfig, users: list
    ):
        self.accelerator, self.policy, self.trainee, self.config = accelerator, policy, trainee, config
        numbers = torch.tensor([number_of(str(user)) for user in users], dtype=torch.long)
        self.users, self.order = numbers.sort()

    def learn(self, batches: Iterable[PreferenceBatch], journal: Journal) -> None:
        """Accumulate the gradient of one optimiser step, and note its numbers."""
        self.accelerator.step = 0
        for batch in batches:
            with self.accelerator.accumulate(self.policy):
                judged, image, text, structure, words = self.look(batch)
                loss, losses = total(self.trainee.head, judged, structure, self.config.loss)
                numbers = {"loss": losses} | self.numbers(judged, structure)
                if self.config.contrast_weight:
                    apart = self.contrast(image, text, structure, words)
                    loss = loss + self.config.contrast_weight * apart
                    numbers["contrast"] = apart.detach()[None]
                self.accelerator.backward(loss)
                journal.add(numbers)

    def look(self, batch: PreferenceBatch) -> tuple[Judged, Tensor, Tensor, Structure, Tensor]:
        """What the policy says of a batch, the unit vectors [N,D] of its items' pictures and prompts, its structure,
        and which of the batch's different prompts each item has, [N]."""
        device = self.accelerator.device
        structure = self.numbered(batch.structure).to(device)
        pictures = batch.images if batch.images is not None else batch.moments
        prompts, words = self.words(batch)
        inputs = (pictures.to(device), prompts.to(device), batch.picture.to(device), words.to(device))
        judged, image, text = self.policy(*inputs, structure.user)
        return judged, image, text, structure, inputs[3]

    def words(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The different prompts of a batch, tokens [U,L] or unit vectors [U,D], and which of them each item has."""
        different = list(dict.fromkeys(batch.prompts))
        number = {prompt: place for place, prompt in enumerate(different)}
        which = torch.tensor([number[prompt] for prompt in batch.prompts])
        if batch.conditioning is None:
            return self.trainee.towers.tokenize(different), which
        first = [batch.prompts.index(prompt) for prompt in different]
        return batch.conditioning["text"][first], which

    def numbered(self, structure: Structure) -> Structure:
        """The same with users by their numbers in the head's table."""
        if structure.user is None or not len(self.users):
            return structure
        place = torch.searchsorted(self.users, structure.user).clamp(max=len(self.users) - 1)  # those below 0 to 0
        known = self.users[place] == structure.user
        return replace(structure, user=torch.where(known, self.order[place], UNKNOWN))

    def numbers(self, judged: Judged, structure: Structure) -> dict[str, Tensor]:
        """What the log has of a batch beside the loss: pairs' accuracy and log-odds, the head's scale."""
        logit = self.trainee.head.logit(judged, structure.chosen, structure.rejected).detach()
        found = {"accuracy": (0.5 * (1 + logit.sign())), "margin": logit}
        scale = getattr(self.trainee.head, "logit_scale", None)
        return found if scale is None else found | {"scale": scale.detach().exp()[None]}

    def contrast(self, image: Tensor, text: Tensor, structure: Structure, words: Tensor) -> Tensor:
        """The contrast of every winner with the prompts of the batch, reduced as losses are."""
        different = torch.stack([text[words == word][0] for word in words.unique()])  # words are 0..U-1
        winners = structure.chosen
        losses = contrast(image[winners], different, words[winners], self.trainee.head.logit_scale.exp())
        return weighted_mean(losses, structure.group[winners], structure.weight)
