"""Heads by name: embeddings of pictures and prompts in, scores out.

cosine.py    CLIP, PickScore, HPS            affine.py    of the picture alone
aspects.py   one score an aspect             gaussian.py  a score and how sure it is
gpm.py       preferences with cycles         pal.py       users as mixtures of prototypes
micro.py     tastes weighed by the context   config.py    the settings
"""

from diffpref.scorer.heads.config import HeadConfig, check_head, make_head
from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.table import HEADS

__all__ = ["HEADS", "Head", "HeadConfig", "Judged", "check_head", "make_head"]
