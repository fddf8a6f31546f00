"""Pictures that a neighbourhood of a user's taste agrees on (RPS, arXiv 2510.20498).

    u_1 = u,  u_j within 30° of u        x_j drawn for u_j        keep the x_j that u's own scorer likes best

k pictures are drawn and judged, as in best of k, which is the same with an angle of 0. Directions beside the user's own
may be ones that the model has learned better: the more so, the more unusual the user is.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL.Image import Image
from torch import Tensor

from diffpref.noise.keys import generator as keyed
from diffpref.sample import sample
from diffpref.users.embedding import UserEmbedding, described
from diffpref.users.encoder import UserEncoder
from diffpref.users.personalized import Bound, PersonalizedPipeline

Likes = Callable[[list[Image], list[str]], Tensor]  # pictures and their prompts -> how much a user likes each, [N]
KINDS = ("pil", "np")


def own_taste(encoder: UserEncoder, user: UserEmbedding) -> Likes:
    """What the encoder says that this user likes. Raises ValueError for a user of another encoder."""
    if user.encoder != encoder.id or user.sequence:
        raise ValueError(f"{described(user)} has no scorer in the encoder {encoder.id}; give one, as a function")
    scorer, place = encoder.scorer(), next(encoder.parameters()).device

    def likes(images: list[Image], prompts: list[str]) -> Tensor:
        seen = scorer.embed(images=images, prompts=prompts, progress=False)
        with torch.inference_mode():
            whose = user.states.to(place).expand(len(images), -1)
            return encoder.scores(whose, seen.images.to(place), seen.prompts.to(place)).float().cpu()

    return likes


def best_of_neighbours(
    personal: PersonalizedPipeline,
    user: UserEmbedding,
    likes: Likes,
    prompts: list[str],
    seeds: list[int],
    *,
    k: int = 5,
    max_angle: float = 30.0,
    scale: float = 1.0,
    **options: Any,
) -> list[Image]:
    """One picture for each (prompts[i], seeds[i]): of k that are drawn, the one that the user likes best.

    Args:
        user: Whose taste; k − 1 others within max_angle degrees of it are drawn for, too.
        likes: The user's own scorer, such as `own_taste(encoder, user)`.
        options: Those of `diffpref.sample.sample`; batch_size pictures are drawn at once, k times.

    The first of the k is the picture that `sample` draws for the user with this seed. Raises as `sample`, and
    ValueError for k below 1, an angle outside [0, 90], a user that the adapter was not tuned for, and scores that are
    no numbers.
    """
    return sample(
        Neighbourhood(personal, user, likes, k=k, max_angle=max_angle, scale=scale), prompts, seeds, **options
    )


class Neighbourhood(Bound):
    """A pipeline that draws k pictures for every prompt and returns the one that the user likes best; `sample` takes
    it as it takes a stock one. Arguments are those of `best_of_neighbours`."""

    def __init__(
        self,
        personal: PersonalizedPipeline,
        user: UserEmbedding,
        likes: Likes,
        *,
        k: int = 5,
        max_angle: float = 30.0,
        scale: float = 1.0,
    ) -> None:
        personal.check(user)
        super().__init__(personal, user, scale)
        self.likes, self.around = likes, user.neighbours(k, max_angle)

    def __call__(
        self,
        prompt: Any = None,
        *,
        generator: torch.Generator | list[torch.Generator],
        output_type: str = "pil",
        **options: Any,
    ) -> ImagePipelineOutput:
        """The stock pipeline's call, one picture for each prompt, each with its generator. Raises ValueError for other
        output types and for several pictures of a prompt."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        generators = generator if isinstance(generator, list) else [generator]
        if output_type not in KINDS or options.get("num_images_per_prompt", 1) != 1 or len(generators) != len(prompts):
            raise ValueError(
                f"the best of some pictures is one for each prompt, each with its generator, as {' or '.join(KINDS)}"
            )
        best = self.best(prompts, generators, options)
        return ImagePipelineOutput(images=best if output_type == "np" else self.numpy_to_pil(best))

    def best(self, prompts: list[str], generators: list[torch.Generator], options: dict[str, Any]) -> np.ndarray:
        """Pictures [N,H,W,3] in [0,1]; of equally good ones the first, NaN where none is sound."""
        kept, most = np.array(np.nan, np.float32), torch.full((len(prompts),), -torch.inf)
        for number, near in enumerate(self.around):
            noise = [g if number == 0 else keyed(g.initial_seed(), number) for g in generators]
            drawn = self.personal(
                prompts, user=near, scale=self.scale, generator=noise, output_type="np", **options
            ).images
            scores = self.judged(drawn, prompts)
            kept = np.where((scores > most).numpy()[:, None, None, None], drawn, kept)
            most = torch.maximum(scores, most)
        return kept

    def judged(self, pixels: np.ndarray, prompts: list[str]) -> Tensor:
        """Scores [N]; -inf for pictures that are NaN. Raises ValueError for scores that are no numbers."""
        sound = np.isfinite(pixels).all(axis=(1, 2, 3))
        scores = torch.full((len(prompts),), -torch.inf)
        if sound.any():
            judged = self.likes(
                self.numpy_to_pil(pixels[sound]), [p for p, fine in zip(prompts, sound, strict=True) if fine]
            )
            if not judged.isfinite().all():
                raise ValueError("the user's scorer gave NaN or infinite scores")
            scores[torch.from_numpy(sound)] = judged.float()
        return scores
