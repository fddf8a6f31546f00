"""A head with a score for each aspect (prompt following, aesthetics, fidelity, harmlessness or whatever data name)."""

import torch
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.cosine import LARGEST
from diffpref.scorer.heads.queries import Queries

SLOWEST = 0.01  # share of a batch in the running mean and variance, once there have been a hundred


# s_a = exp(τ_a)·⟨f, q_a(t)⟩,   s = Σ_a w_a·(s_a − μ_a)/σ_a: VideoReward (Liu et al. 2025, arXiv 2501.13918)
class Aspects(Head):
    """Settings: width D; names of the A aspects, in the order of the data's; weights w of the overall score, equal if
    None; learned_weights, whether training changes them; logit_scale, all τ_a at the start; prompt_rank, of the
    queries' maps.

    μ_a, σ_a: running mean and deviation over the batches of training, kept as buffers. Before training every aspect is
    the cosine, and so is the ranking.
    """

    gives = frozenset({"scores", "aspects"})

    def __init__(
        self,
        width: int,
        names: list[str],
        weights: list[float] | None = None,
        learned_weights: bool = False,
        logit_scale: float = LARGEST,
        prompt_rank: int = 0,
    ) -> None:
        super().__init__()
        check_names(names, weights)
        weights = [1 / len(names)] * len(names) if weights is None else list(weights)
        self.settings = {
            "width": width,
            "names": list(names),
            "weights": weights,
            "learned_weights": learned_weights,
            "logit_scale": logit_scale,
            "prompt_rank": prompt_rank,
        }
        self.queries = Queries(width, len(names), rank=prompt_rank, apart=False, gated=True)
        self.logit_scale = nn.Parameter(torch.full((len(names),), float(logit_scale)))
        self.weights = nn.Parameter(torch.tensor(weights), requires_grad=learned_weights)
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("variance", torch.ones(len(names)))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N], aspects [N,A]."""
        aspects = self.logit_scale.exp() * self.queries.cosines(image, text)
        if self.training and len(image) > 1:
            self.watch(aspects.detach())
        standard = (aspects - self.mean) / self.variance.sqrt()
        return Judged(scores=standard @ self.weights, aspects=aspects)

    @torch.no_grad()
    def warm(self, temperature: float) -> None:
        """Of standardised scores, the weights are the scale."""
        self.weights.div_(temperature)

    @torch.no_grad()
    def watch(self, aspects: Tensor) -> None:
        """Take a batch [N,A] into the running mean and variance; the first ones count alike."""
        self.batches += 1
        share = (1 / self.batches).clamp(min=SLOWEST)
        off = aspects.mean(0) - self.mean
        spread = aspects.var(0, correction=0) + (1 - share) * off.square()
        self.variance.lerp_(spread, share)
        self.mean += share * off

    @torch.no_grad()
    def clamp(self) -> None:
        """Factors of at most 100."""
        self.logit_scale.clamp_(max=LARGEST)


def check_names(names: list[str], weights: list[float] | None) -> None:
    """Raise ValueError unless there are names, all different, and as many weights if any."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"head.names must be different names of aspects, got {list(names)}")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"head.weights must be one for each of the {len(names)} aspects, got {len(weights)}")
