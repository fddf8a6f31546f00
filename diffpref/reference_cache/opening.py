"""From a run's parts to its table."""

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from diffpref.cache import DiskCache
from diffpref.cache.digests import picture_digests
from diffpref.cache.room import folder_of
from diffpref.cache.team import Team
from diffpref.config import Config
from diffpref.data import kind_of
from diffpref.noise import Parameterization
from diffpref.reference_cache.identity import path_facts, rows_facts, table_fingerprint
from diffpref.reference_cache.table import ReferenceTable, open_table


def reference_table(
    config: Config,
    rows: Dataset,
    sizes: tuple[int, int] | np.ndarray,
    pipe: DiffusionPipeline,
    cache: DiskCache | None,
    weights: list,
    parameters: Parameterization,
    precision: torch.dtype,
    team: Team,
) -> ReferenceTable | None:
    """The table of a run, None without reference.draws. Every process must call this.

    Args:
        config: Of the run.
        rows: As `check` leaves them.
        sizes: That they are cut to.
        pipe: With the encoders that a cache has left.
        cache: Of latents and text.
        weights: Facts of the reference's denoiser; the first process's are enough.
        parameters: Its noise schedule.
        precision: Of its inputs.
        team: All processes.
    """
    if config.reference.draws is None:
        return None
    digests, names = picture_contents(config, rows, cache, team), []
    if team.main:
        known, computed = rows_facts(rows, digests, sizes), path_facts(config, precision, pipe.device)
        names = [table_fingerprint(weights, parameters, config, pipe, cache, known, computed)]
    name, *_ = team.together(names)
    width = max(2, digests.shape[1])  # two items also of captions, whose rows have one picture
    return open_table(folder_of(config), name, len(rows) * config.reference.draws, width, team, pipe.device)


def picture_contents(config: Config, rows: Dataset, cache: DiskCache | None, team: Team) -> np.ndarray:
    """Digests of all pictures [rows,K,32]: the cache's, or read here, and remembered beside it."""
    if cache is not None and cache.pictures is not None:
        return cache.digests
    kind = kind_of(rows.column_names, config.data)
    digests, _ = picture_digests(rows, kind, folder_of(config), config.data.num_workers, team)
    return digests
