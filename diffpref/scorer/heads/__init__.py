"""Heads by name: embeddings of pictures and prompts in, scores out."""

from diffpref.scorer.heads.affine import Affine
from diffpref.scorer.heads.contract import Head
from diffpref.scorer.heads.cosine import Cosine

HEADS: dict[str, type[Head]] = {"affine": Affine, "cosine": Cosine}
