"""HEADS: every head by name."""

from diffpref.scorer.heads.affine import Affine
from diffpref.scorer.heads.aspects import Aspects
from diffpref.scorer.heads.contract import Head
from diffpref.scorer.heads.cosine import Cosine
from diffpref.scorer.heads.gaussian import Gaussian
from diffpref.scorer.heads.gpm import Gpm
from diffpref.scorer.heads.micro import Micro
from diffpref.scorer.heads.pal import Pal
from diffpref.scorer.heads.taste import Taste

HEADS: dict[str, type[Head]] = {
    "affine": Affine,
    "aspects": Aspects,
    "cosine": Cosine,
    "gaussian": Gaussian,
    "gpm": Gpm,
    "micro": Micro,
    "pal": Pal,
    "taste": Taste,
}
