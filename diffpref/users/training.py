"""A run whose policy is conditioned on users: where they come from, the adapter that reads them, what is written."""

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from torch import nn

from diffpref.cache.team import Team
from diffpref.config import Config
from diffpref.data import Asked
from diffpref.users.adapter import FORMAT, add_user_adapter, save_user_adapter
from diffpref.users.embedding import UserEmbedding
from diffpref.users.personalized import ENCODER, Bound, PersonalizedPipeline
from diffpref.users.sources import SOURCES
from diffpref.users.sources.table import UserTable

ENCODED = ("encoder", "tastes")  # sources whose users an encoder makes of pairs
Draws = DiffusionPipeline | Bound  # what `sample` takes


def copy_encoder(path: str, folder: Path) -> None:
    """The encoder beside the adapter that knows its vectors."""
    from diffpref.users.few_shot import load_encoder

    load_encoder(path).save_pretrained(folder)


class Personal:
    """What a run has of users.

    Args:
        config: users, train.seed, sample.user.
        rows: The training rows.
        team: All processes; every one must make this.

    Raises ValueError or FileNotFoundError for users that cannot be had of these rows.
    """

    def __init__(self, config: Config, rows: Dataset | IterableDataset, team: Team):
        self.config, self.team, self.source = config, team, SOURCES[config.users.source](config, rows, team)
        self.module = self.source.module()
        self.user = UserEmbedding.load(config.sample.user) if config.sample.user else None
        if self.user is not None:
            self.pipeline(None).check(self.user)

    def install(self, denoiser: nn.Module) -> None:
        """The adapter into the denoiser; and what is learned of users beside it."""
        add_user_adapter(denoiser, self.source.width, sequence=self.source.sequence, seed=self.config.train.seed)
        self.module.to(denoiser.device)
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            denoiser.add_module("users", self.module)  # trained, checkpointed and reduced with it

    def asked(self) -> Asked:
        """Whom groups are trained for."""
        return Asked(self.source, self.config.users.dropout)

    def held_out(self, rows: Dataset, config: Config) -> Asked:
        """Whom held-out rows are of; none of them is dropped."""
        return Asked(self.source.for_rows(rows, config, self.team))

    def facts(self) -> dict[str, Any]:
        """What the adapter's file says of its users."""
        return {"encoder": self.module.id}

    def export(self, denoiser: nn.Module, folder: Path, main: bool) -> None:
        """The adapter, and with it what a user's embedding is made with: the encoder, or the table."""
        save_user_adapter(denoiser, folder, self.facts(), main)
        if main and self.config.users.source in ENCODED:
            copy_encoder(str(self.config.users.path), folder / ENCODER)
        if main and isinstance(self.module, UserTable):
            self.module.save(folder)

    def pipeline(self, pipe: DiffusionPipeline | None) -> PersonalizedPipeline:
        """The pipeline, which holds the adapter."""
        shape = {"format": FORMAT, "width": self.source.width, "sequence": self.source.sequence}
        return PersonalizedPipeline(pipe, shape | self.facts())

    def drawing(self, pipe: DiffusionPipeline) -> Bound:
        """Draws for sample.user, or for nobody."""
        return self.pipeline(pipe).bound(self.user)
