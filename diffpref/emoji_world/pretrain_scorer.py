"""Train the towers of the world's scorer from scratch: which picture shows what, in which style.

    python -m diffpref.emoji_world.pretrain_scorer --out runs/scorer-towers

A small CLIP of open_clip's, on the captions of the artwork and of the pictures in pairs.parquet; nobody's preference is
read. What becomes a scorer of it is the ordinary command, with configs/scorer_emoji.yaml. Pictures are moved and bent,
but their colours are left alone: people will have tastes in colours.
"""

import argparse
import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffpref.emoji_world.artwork import Artwork, load_artwork
from diffpref.emoji_world.classifier import bend
from diffpref.scorer.heads import HEADS
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.towers import Towers

PAIRS = Path(__file__).parent / "data" / "preferences" / "pairs.parquet"
ARCHITECTURE = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": [2, 2, 2, 2], "width": 24},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
STYLED = 0.6  # share of the drawings whose caption names their style
DRAWN = 2 / 3  # share of a batch that are drawings


def sampled_pictures() -> tuple[Tensor, list[str]]:
    """The different pictures of pairs.parquet [N,3,32,32] in [-1,1], and their prompts."""
    prompts: dict[bytes, str] = {}
    for row in pq.read_table(PAIRS, columns=["prompt", "chosen", "rejected"]).to_pylist():
        prompts |= {row[side]["bytes"]: row["prompt"] for side in ("chosen", "rejected")}
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in prompts])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1), list(prompts.values())


class Captioned:
    """Pictures under their captions, drawings and samples in fixed shares."""

    def __init__(self, art: Artwork, seed: int):
        self.art, self.g = art, torch.Generator().manual_seed(seed)
        self.pictures, self.prompts = sampled_pictures()

    def draw(self, count: int) -> tuple[Tensor, list[str]]:
        """[count,3,32,32], bent, and captions."""
        i = torch.randint(len(self.art.images), (round(count * DRAWN),), generator=self.g)
        j = torch.randint(len(self.prompts), (count - len(i),), generator=self.g)
        styled = (torch.rand(len(i), generator=self.g) < STYLED).tolist()
        captions = [self.art.caption(n, styled=named) for n, named in zip(i.tolist(), styled, strict=True)]
        pictures = torch.cat([self.art.images[i], self.pictures[j]])
        return bend(pictures, self.g).clamp(-1, 1), captions + [self.prompts[n] for n in j.tolist()]


# Radford et al. 2021 (arXiv 2103.00020); a caption that several pictures of the batch have is there once, and shares
# its probability among them.
def contrast(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of B pictures [B,D] and U different captions [U,D]; caption [B] says whose is whose."""
    logits = scale * image @ text.T
    own = F.one_hot(caption, len(text)).T.float()  # [U,B]
    back = -(logits.T.log_softmax(1) * own).sum(1) / own.sum(1)
    return (F.cross_entropy(logits, caption) + back.mean()) / 2


def train(towers: Towers, data: Captioned, args: argparse.Namespace) -> Tensor:
    """One cycle of AdamW; returns the logarithm of the scale."""
    log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    wide = [p for p in towers.model.parameters() if p.ndim > 1]
    narrow = [p for p in towers.model.parameters() if p.ndim <= 1] + [log_scale]
    groups = [{"params": wide, "weight_decay": args.weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)
    bar = tqdm(range(args.steps), "towers")
    for _ in bar:
        pictures, captions = data.draw(args.batch_size)
        different = sorted(set(captions))
        caption = torch.tensor([different.index(one) for one in captions])
        image, text = towers.images(pictures), towers.texts(towers.tokenize(different))
        loss = contrast(image, text, caption, log_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*wide, *narrow], 1.0)
        optimizer.step()
        schedule.step()
        log_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return log_scale.detach()


@torch.no_grad()
def recognition(towers: Towers, pictures: Tensor, names: list[str], among: list[str]) -> float:
    """Share of the pictures whose own name is the nearest of all names."""
    image = torch.cat([towers.images(part) for part in pictures.split(256)])
    nearest = (image @ towers.texts(towers.tokenize(among)).T).argmax(1).tolist()
    return float(np.mean([among[n] == name for n, name in zip(nearest, names, strict=True)]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the scorer to")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the highest of the cycle")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    art, towers = load_artwork(), Towers(ARCHITECTURE, PREPROCESSING)
    data = Captioned(art, args.seed)
    scale = train(towers, data, args)
    towers.eval()
    names = [art.caption(i, styled=False) for i in range(len(art.images))]
    print(f"drawings named: {recognition(towers, art.images, names, list(art.concepts)):.3f}")
    print(f"samples named: {recognition(towers, data.pictures, data.prompts, list(art.concepts)):.3f}")
    head = HEADS["cosine"](width=towers.width, logit_scale=float(scale))
    scorer = PreferenceScorer(
        towers,
        head,
        name="emoji-towers",
        description="a small CLIP of the emoji world; it has seen no preference",
        trained_on="captions of the emoji world's artwork and samples",
    )
    scorer.save_pretrained(args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
