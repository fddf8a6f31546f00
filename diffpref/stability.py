"""What keeps a run from going wrong without anybody noticing: averaged weights, skipped spikes, an alarm for drift."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffpref.engines import full, like

Moments = tuple[float, float, int]  # mean, standard error of the mean, count


class Average:
    """Exponential moving average of the weights that train, by diffusers' EMAModel; or nothing, without a decay.

    The decay ramps up as (1 + step) / (10 + step), so that the average leaves the untrained start behind.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float | None):
        self.parameters = parameters
        self.model = EMAModel(parameters.values(), decay=decay) if decay is not None else None

    @property
    def steps(self) -> int:
        """How many steps it averages."""
        return self.model.optimization_step if self.model else 0

    def step(self) -> None:
        """Take the weights as they are now into the average."""
        if self.model:
            self.model.step(self.parameters.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside; its own again at the end, to the bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()} if self.model else {}
        if self.model:
            self.model.copy_to(self.parameters.values())
        try:
            yield
        finally:
            for name, value in own.items():
                self.parameters[name].data.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name, whole, on the CPU; empty without an average."""
        return dict(zip(self.parameters, map(full, self.model.shadow_params), strict=True)) if self.model else {}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Go on from stored weights and the number of steps they average."""
        if self.model:
            shadows = zip(self.parameters, self.model.shadow_params, strict=True)
            self.model.shadow_params = [like(tensors[name], shadow) for name, shadow in shadows]
            self.model.optimization_step = steps


class Spikes:
    """Tells gradient norms that are out of all proportion: one bad batch then costs a step and not the run.

    The yardstick is a running average of the norms that passed. It is judged by from `warm_up` steps on.
    """

    def __init__(self, factor: float | None, decay: float = 0.95, warm_up: int = 10):
        self.factor, self.decay, self.warm_up = factor, decay, warm_up
        self.average, self.passed, self.skipped = 0.0, 0, 0

    def is_spike(self, norm: float) -> bool:
        """Whether to leave this step out; otherwise its norm joins the average."""
        if self.factor is None:
            return False
        usual = self.average / (1 - self.decay**self.passed) if self.passed else norm
        if not math.isfinite(norm) or (self.passed >= self.warm_up and norm > self.factor * usual):
            self.skipped += 1
            return True
        self.average, self.passed = self.decay * self.average + (1 - self.decay) * norm, self.passed + 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"average": self.average, "passed": self.passed, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.__dict__.update(state)


def winners_of(window: dict[str, Moments]) -> tuple[Moments, float] | None:
    """Drift of the winners, or of the liked, and the mean margin by which their rewards lead; None without a
    reference, and for windows that had only one side."""
    if "drift/chosen" in window:
        return window["drift/chosen"], window["rewards/margins"][0]
    if "drift/liked" in window and "rewards/disliked" in window:
        return window["drift/liked"], window["rewards/liked"][0] - window["rewards/disliked"][0]
    return None


class DriftAlarm:
    """Watches for the known failure of margin losses: the margin grows while the winners' own error rises.

    Speaks when, over the last `memory` windows together, the winners' drift e_θ − e_ref lies `threshold` standard
    errors above zero and the mean margin is positive; then again only after the drift has come down. `stops`: whether
    the run is to end then.
    """

    def __init__(self, threshold: float, stops: bool = False, memory: int = 5):
        self.threshold, self.stops, self.memory = threshold, stops, memory
        self.windows: list[list[float]] = []  # drift, its standard error, margin
        self.raised = False
        self.steps: list[int] = []

    def update(self, step: int, window: dict[str, Moments]) -> str | None:
        """One window of the log in; what to tell the user out, or None."""
        found = winners_of(window)
        if found is None:
            return None
        (drift, error, _), gain = found
        self.windows = [*self.windows, [drift, error, gain]][-self.memory :]
        mean, spread, margin = self.pooled()
        bad = len(self.windows) == self.memory and margin > 0 and mean > self.threshold * spread
        speak, self.raised = bad and not self.raised, bad
        if not speak:
            return None
        self.steps.append(step)
        return (
            f"step {step}: the winners' own error is rising (drift {mean:+.2e} ± {spread:.0e}) while the margin grows:"
            " the policy unlearns losers faster than it learns winners, and pictures may break. Lower"
            " train.learning_rate, set objective.margin_cap, stop earlier (checkpoints are kept), or check the"
            " validation pictures."
        )

    def pooled(self) -> tuple[float, float, float]:
        """Mean drift over the remembered windows, its standard error, mean margin."""
        count = len(self.windows)
        drifts, errors, margins = zip(*self.windows, strict=True)
        return sum(drifts) / count, math.sqrt(sum(e * e for e in errors)) / count, sum(margins) / count

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"windows": self.windows, "raised": self.raised, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.__dict__.update(state)
