"""Training of an encoder of users: the loop of the library, around persons instead of pictures."""

import time
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from diffpref import engines
from diffpref.cache.team import Team
from diffpref.checkpoint import refuse_no_numbers
from diffpref.data import check, load_preferences
from diffpref.data.groups import number_of
from diffpref.journal import Journal
from diffpref.loop import Loop, check_trackers, in_folder
from diffpref.report import environment, write_report
from diffpref.run_folder import checkpoint_to_resume
from diffpref.scorer.features import towers_fingerprint
from diffpref.scorer.preference import PreferenceScorer
from diffpref.users.choices import Choices, open_choices
from diffpref.users.encoder import UserEncoder
from diffpref.users.eyes import Eyes
from diffpref.users.files import ENCODER
from diffpref.users.meta.config import EpisodeConfig, UserEncoderConfig
from diffpref.users.meta.episodes import EpisodeStream
from diffpref.users.meta.learner import Learner, Task, log_odds
from diffpref.winrate import WinRate, win_rate

SHOWN = (0, 1, 2, 4, 8, 16)  # choices of a person, in the report
ROUNDS = 8  # supports and queries that each held-out person is measured with


def split_persons(choices: Choices, share: float) -> tuple[list[str], list[str]]:
    """Those with two choices and more on different prompts: to train on, and held out. Raises ValueError for less than
    two."""
    able = [user for user, rows in choices.of.items() if len({choices.prompts[row] for row in rows.tolist()}) > 1]
    out = [user for user in able if number_of(f"held out {user}") % 10_000 < 10_000 * share]
    kept = [user for user in able if user not in set(out)]
    if len(kept) < 2:
        raise ValueError(
            f"data.path: {len(kept)} users with choices on two prompts or more are left to train on"
            f" ({len(choices.of)} are named, {len(out)} held out); an encoder learns from many people"
        )
    return kept, out


class UserEncoderTrainer:
    """One run, from configuration to report. Everything it makes is in `config.run_dir`."""

    def __init__(self, config: UserEncoderConfig):
        self.config, self.train = config, config.train
        self.checkpoint = checkpoint_to_resume(config)
        check_trackers(self.train.report_to)
        self.accelerator = engines.make_accelerator(config)
        self.main, self.rank = self.accelerator.is_main_process, self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.rows = check(load_preferences(config.data), config.data, self.rank, self.world, engines.gather).rows
        set_seed(self.train.seed, device_specific=True)
        found = PreferenceScorer.from_pretrained(config.encoder.towers, device="cpu")
        self.eyes = Eyes(found.towers, config.encoder.levels).eval().requires_grad_(False).to(self.accelerator.device)
        torch.manual_seed(self.train.seed)  # the same in every process
        self.encoder = UserEncoder(
            self.eyes.width,
            found.towers.width,
            config.encoder.rank,
            config.encoder.towers,
            config.encoder.levels,
            towers_fingerprint(self.eyes),
        ).to(self.accelerator.device)
        task = Task(self.encoder, config.episodes)
        self.loop = Loop(config, self.accelerator, task, Journal(config, self.accelerator), self.export)

    def export(self, folder: Any) -> None:
        """The encoder as it is now."""
        with self.loop.average.applied():
            if self.main:
                self.encoder.__dict__.pop("id", None)  # it stands for other weights now
                self.encoder.save_pretrained(folder / ENCODER)

    def run(self) -> dict[str, Any]:
        """Train, measure, write; returns the report."""
        return in_folder(self.config, self.checkpoint, self.accelerator, self.run_in_folder)

    def run_in_folder(self) -> dict[str, Any]:
        """`run`, once the folder is ours."""
        started = time.perf_counter()
        team = Team(self.rank, self.world, self.loop.patience.wait, engines.gather)
        choices = open_choices(self.rows, self.config, self.eyes, team)
        persons, held_out = split_persons(choices, self.config.episodes.held_out)
        self.standardise(choices, persons)
        start, _ = self.loop.resume(self.checkpoint)
        each = self.train.gradient_accumulation_steps
        stream = EpisodeStream(
            choices,
            persons,
            self.config.episodes,
            seed=self.train.seed,
            size=self.train.train_batch_size,
            batches=range(start * each, self.train.max_train_steps * each),
            rank=self.rank,
        )
        last = self.loop.run(start, stream, Learner(self.accelerator, self.loop.policy).learn, lambda step: None, 0)
        refuse_no_numbers("the weights at the end", self.encoder.state_dict())
        self.export(self.config.run_dir)
        with self.loop.average.applied():  # what was written is what is measured
            report = self.report(choices, persons, held_out, last, started) if self.main else {}
        self.loop.patience.wait()
        engines.end(self.accelerator)
        return report

    def standardise(self, choices: Choices, persons: list[str]) -> None:
        """Mean and deviation of pictures' features, over those of the persons who train; a feature that is the same in
        all of them keeps its unit."""
        rows = np.concatenate([choices.of[person] for person in persons])
        seen = choices.table[torch.from_numpy(np.unique(choices.index[rows, 1:]))]
        self.encoder.mean.copy_(seen.mean(0))
        deviation = seen.std(0)
        self.encoder.deviation.copy_(deviation.where(deviation > 1e-6, 1.0))

    def report(self, choices: Choices, persons: list[str], held_out: list[str], last: int, started: float) -> dict:
        """Accuracy on people it was not trained on, by how many of their choices it sees; written and said."""
        measured = {str(n): accuracy(self.encoder, choices, held_out, n) for n in SHOWN} if held_out else {}
        report = {
            "name": self.config.name,
            "steps": last,
            "users": len(persons),
            "users_held_out": len(held_out),
            "choices": len(choices.user),
            "accuracy_by_choices_seen": measured,
            "encoder": self.encoder.id,
            "seconds": round(time.perf_counter() - started, 2),
            "environment": environment(),
        }
        write_report(self.config.run_dir / "report.json", report)
        for seen, found in measured.items():
            print(f"seen {seen:>2} choices of a new user: right in {WinRate(**found)}")
        print(f"encoder: {self.config.run_dir / ENCODER}", flush=True)
        return report


@torch.no_grad()
def accuracy(encoder: UserEncoder, choices: Choices, persons: list[str], seen: int) -> dict:
    """Share of other choices of new people that the encoder tells, having seen so many of theirs; clustered by
    person."""
    encoder, config = encoder.cpu(), EpisodeConfig(support=(seen, max(SHOWN)))
    stream = EpisodeStream(choices, persons, config, seed=1, size=len(persons), batches=range(ROUNDS), exactly=True)
    right, whose = [], []
    for episodes in stream:
        logit = log_odds(encoder, encoder(episodes.support, episodes.mask), episodes.query)
        right.append(np.sign(logit[episodes.asked].numpy()))
        whose += episodes.asked.nonzero()[:, 0].tolist()
    found = np.concatenate(right)
    return win_rate(found, np.zeros_like(found), [str(person) for person in whose]).as_dict()
