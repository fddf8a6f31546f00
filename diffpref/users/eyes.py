"""What an encoder of users sees of a picture: its embedding, and the averages of the image tower's first layers.

An embedding says what a picture shows; contrastive training lets it forget what makes one warm, thin or colourful. The
means over space of the first layers have not forgotten yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpref.scorer.towers import Towers


class Eyes(Towers):
    """The towers of a scorer, the same weights, that see more.

    Args:
        towers: Whose weights these are.
        levels: Of the image tower's intermediate features (open_clip's), so many from the first on are averaged.

    Raises ValueError for a tower that does not give them.
    """

    def __init__(self, towers: Towers, levels: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(towers.__dict__)  # no copy of gigabytes
        self.levels, self.seen = levels, towers.width
        tower = getattr(self.model.visual, "trunk", self.model.visual)  # timm's lie within one of open_clip's
        if levels and not hasattr(tower, "forward_intermediates"):
            raise ValueError(f"the image tower {type(tower).__name__} gives no intermediate features: set levels to 0")
        with torch.inference_mode():
            side = self.preprocess_cfg["size"]
            height, width = (side, side) if isinstance(side, int) else side
            self.seen = self.images(torch.zeros(1, 3, height, width)).shape[1]

    @property
    def width(self) -> int:
        """D, of all that is seen."""
        return self.seen

    def facts(self) -> tuple:
        """What its features depend on beside weights."""
        return (*super().facts(), self.levels)

    def images(self, pixels: Tensor) -> Tensor:
        """Prepared pictures [N,3,S,S] -> [N,D]: the unit vector, then the levels' means over space; fp32."""
        if not self.levels:
            return super().images(pixels)
        with self.autocast():
            given = self.model.visual.forward_intermediates(pixels.to(self.device), indices=None)
        found = given["image_intermediates"]
        if len(found) < self.levels:
            raise ValueError(
                f"the image tower has {len(found)} levels of features, not {self.levels}: set levels to less"
            )
        means = [level.float().mean(dim=(2, 3)) for level in found[: self.levels]]
        return torch.cat([F.normalize(given["image_features"].float(), dim=-1), *means], dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """Tokens [N,L] -> [N,D]: the unit vector, then zeros."""
        words = super().texts(tokens)
        return F.pad(words, (0, self.seen - words.shape[1]))
