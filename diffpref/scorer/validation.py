"""Preferences kept out of a scorer's training: what they say of it, and which of its states was best."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from diffpref import engines
from diffpref.cache.store import write_atomically
from diffpref.data import Loader, PreferenceGroups, kind_of
from diffpref.data.groups import Decode
from diffpref.scorer.calibration import TemperatureBound, fit_temperature, loss
from diffpref.scorer.config import ScorerConfig
from diffpref.scorer.features import view_of
from diffpref.scorer.learner import Learner


@dataclass(frozen=True)
class Margins:
    """Held-out pairs: margin [P], the log-odds of the chosen one at temperature 1; probability [P] that it is
    preferred, where the data say, else 1; prompts and users, P names each."""

    margin: np.ndarray
    probability: np.ndarray
    prompts: list[str]
    users: list[Any] | None

    @property
    def accuracy(self) -> float:
        """Share of pairs ranked right, exact ties half."""
        return float((0.5 * (1 + np.sign(self.margin))).mean())

    @property
    def log_loss(self) -> float:
        """Mean negative log-likelihood in nats, at temperature 1."""
        return loss(1.0, self.margin, self.probability, np.ones_like(self.margin))

    def temperature(self) -> tuple[float, str]:
        """That makes the log-loss least, and on what it was fitted; 1 where the pairs cannot tell, and why."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", TemperatureBound)
                return fit_temperature(self.margin, self.probability), "the held-out pairs themselves"
        except (TemperatureBound, ValueError) as reason:
            return 1.0, f"nothing: {reason}"

    def numbers(self) -> dict[str, float]:
        """What the log has of them."""
        return {"validation/accuracy": self.accuracy, "validation/log_loss": self.log_loss}


class HeldOut:
    """Rows that are not trained on, looked at again and again.

    Args:
        rows: As `check` leaves them.
        config: data and train.
        learner: Asks the scorer.
        decode: Prepares a picture.
        cache: Embeddings, of towers that do not train.
    """

    def __init__(self, rows: Dataset, config: ScorerConfig, learner: Learner, decode: Decode, cache: Any):
        data = replace(config.data, random_flip=False)
        kind, size = kind_of(rows.column_names, data), view_of(learner.trainee.towers).size
        groups = PreferenceGroups(rows, kind, data, size, 0, cache, decode)
        step = config.train.train_batch_size
        batches = [[(i, i) for i in range(first, min(first + step, len(rows)))] for first in range(0, len(rows), step)]
        self.loader, self.learner, self.count = Loader(groups, batches, config), learner, len(batches)
        self.names = (
            {i: row["user_id"] for i, row in enumerate(rows.select_columns(["user_id"]))}
            if ("user_id" in rows.column_names)
            else None
        )

    def measure(self) -> Margins:
        """Every pair's margin under the scorer as it is now. Every process looks at all of them: where the weights are
        sharded, none can look alone."""
        policy = self.learner.policy
        training = policy.training
        policy.eval()
        try:
            with torch.no_grad():
                found = list(self.looks())
        finally:
            policy.train(training)
        margin, probability = (np.concatenate([one[i] for one in found]) for i in range(2))
        users = [user for one in found for user in one[3]] if self.names is not None else None
        return Margins(margin, probability, [prompt for one in found for prompt in one[2]], users)

    def looks(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[str], list[Any]]]:
        """Of each batch: margins and probabilities of its pairs, their prompts and users."""
        silent, head = not self.learner.accelerator.is_main_process, self.learner.trainee.head
        for batch in tqdm(self.loader, "held-out pairs", self.count, leave=False, delay=3, disable=silent):
            judged, _, _, structure, _ = self.learner.look(batch)
            logit = head.logit(judged, structure.chosen, structure.rejected).double().cpu().numpy()
            known, chosen = batch.structure.probability, batch.structure.chosen
            rows = [batch.keys[group] for group in batch.structure.group[chosen].tolist()]
            yield (
                logit,
                np.ones_like(logit) if known is None else known.double().numpy(),
                [batch.prompts[item] for item in chosen.tolist()],
                [self.names[row] for row in rows] if self.names is not None else [],
            )


class Best:
    """The weights with the least held-out loss so far, in one file of the run's folder, written whole or not at all.
    Every process must call the same methods.

    Args:
        folder: The run's.
        weights: That training changes, parameters and buffers.
        main: Whether this process writes.
    """

    def __init__(self, folder: Path, weights: dict[str, Tensor], main: bool):
        self.path, self.weights, self.main = folder / "best.safetensors", weights, main
        self.step, self.log_loss = -1, float("inf")

    def resume(self, step: int) -> None:
        """Go on from a step: what was found after it is found again."""
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            found = json.loads(file.metadata()["best"])
        if found["step"] <= step:
            self.step, self.log_loss = found["step"], found["log_loss"]

    def offer(self, step: int, margins: Margins) -> None:
        """Keep these weights if they are better than all before."""
        if margins.log_loss >= self.log_loss:
            return
        self.step, self.log_loss = step, margins.log_loss
        weights = {name: engines.full(value) for name, value in self.weights.items()}
        if self.main:
            metadata = {"best": json.dumps({"step": step, "log_loss": self.log_loss})}
            write_atomically(self.path, save(weights, metadata))

    def apply(self) -> None:
        """Put the best weights in the place of the present ones."""
        stored = load_file(self.path)
        for name, value in self.weights.items():
            value.data.copy_(engines.like(stored[name], value.data))
