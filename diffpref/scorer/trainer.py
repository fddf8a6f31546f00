"""A scorer's training: the loop of the library, around towers and a head instead of a diffusion model."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset

from diffpref import engines
from diffpref.cache.team import Team
from diffpref.checkpoint import refuse_no_numbers, trainable
from diffpref.data import Checked, check, check_data_options, fields, load_preferences, training_loader
from diffpref.data.groups import number_of
from diffpref.journal import Journal
from diffpref.loop import Loop, check_trackers, in_folder
from diffpref.run_folder import checkpoint_to_resume
from diffpref.scorer.config import ScorerConfig
from diffpref.scorer.features import open_features, prepare, view_of
from diffpref.scorer.heads.config import check_head, takes_users
from diffpref.scorer.learner import Learner
from diffpref.scorer.losses import check_loss, needs_fields
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.report import conclude
from diffpref.scorer.trainee import Trainee, frozen, head_of, lock, noted
from diffpref.scorer.validation import Best, HeldOut, Margins

SCORER = "scorer"  # folder of the result, within the run's


def check_needs(config: ScorerConfig, rows: Dataset | IterableDataset) -> None:
    """Raise ValueError for a head or a loss that is set in a way it does not use, or data that lack what it needs."""
    check_head(config.head)
    check_loss(config.loss, config.head.name)
    given = fields(rows.column_names, config.data)
    needed = needs_fields(config.loss) | {"pairs"}
    if missing := sorted(needed - given):
        raise ValueError(
            f"loss.name {config.loss.name} needs {', '.join(missing)} of the data; {config.data.path} gives"
            f" {', '.join(sorted(given))}"
        )


def hold_out(checked: Checked, share: float) -> tuple[Checked, Dataset]:
    """The rows to train on, and those of about this share of the prompts, each prompt on one side with all its rows.
    Raises ValueError when one side would be empty."""
    out = np.array([number_of(f"held out {prompt}") % 10_000 < 10_000 * share for prompt in checked.rows["prompt"]])
    if out.all() or not out.any():
        left = "nothing to train on" if out.all() else "none held out"
        raise ValueError(
            f"validation.share: {share:g} of the prompts leaves {left}"
            f" ({len(set(checked.rows['prompt']))} different prompts); give data.validation, or another share"
        )
    kept = checked.rows.select(np.flatnonzero(~out))
    return replace(checked, rows=kept, sizes=None), checked.rows.select(np.flatnonzero(out))


class ScorerTrainer:
    """One run, from configuration to report. Everything it makes is in `config.run_dir`."""

    def __init__(self, config: ScorerConfig):
        self.config, self.train = config, config.train
        self.checkpoint = checkpoint_to_resume(config)
        check_trackers(self.train.report_to)
        self.accelerator = engines.make_accelerator(config)
        self.main, self.rank = self.accelerator.is_main_process, self.accelerator.process_index
        self.world = self.accelerator.num_processes
        rows = load_preferences(config.data)
        check_data_options(rows.column_names, config.data)
        check_needs(config, rows)
        self.checked = check(rows, config.data, self.rank, self.world, engines.gather)
        self.held_rows = self.held_out_rows()
        set_seed(self.train.seed, device_specific=True)
        self.prepare_model()
        self.prepare_training()

    # --- before the loop --------------------------------------------------------------------------------------------

    def held_out_rows(self) -> Dataset:
        """Of data.validation; without it, of some of the prompts, which are then not trained on."""
        if self.config.data.validation is None:
            self.checked, held = hold_out(self.checked, self.config.validation.share)
            return held
        data = replace(self.config.data, path=self.config.data.validation, streaming=False, max_pairs=None)
        try:
            rows = check(load_preferences(data), data).rows
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace("data.path", "data.validation", 1)) from error
        assert isinstance(rows, Dataset)  # it is not streamed
        return rows

    def prepare_model(self) -> None:
        """The scorer to begin with, what of it trains, and its head."""
        self.scorer = PreferenceScorer.from_pretrained(self.config.model.pretrained_model_name_or_path, device="cpu")
        if not self.scorer.needs_prompt:
            raise ValueError(
                f"model.pretrained_model_name_or_path: {self.scorer.name} judges pictures without their prompts and has"
                " no text tower; begin with another scorer"
            )
        lock(self.scorer.towers, self.config.model)
        self.users = self.known_users() if takes_users(self.config.head.name) else []
        torch.manual_seed(self.train.seed)  # a new head is the same in every process
        self.trainee = Trainee(self.scorer.towers, head_of(self.scorer, self.config, self.users))
        self.trainee.to(self.accelerator.device)
        if self.train.gradient_checkpointing:
            self.scorer.towers.model.set_grad_checkpointing()

    def known_users(self) -> list[Any]:
        """Users of the training rows, in order. Raises ValueError when the rows do not name them."""
        rows = self.checked.rows
        if isinstance(rows, IterableDataset) or "user_id" not in rows.column_names:
            raise ValueError(
                f"head.name {self.config.head.name} learns users, and {self.config.data.path} has no column user_id"
                " (a stream does not say beforehand whom it has)"
            )
        return sorted({user for user in rows["user_id"] if user is not None})

    def prepare_training(self) -> None:
        """The loop, its data, and what is held out."""
        journal = Journal(self.config, self.accelerator)
        head, buffers = self.trainee.head, noted(self.trainee)
        given = (self.config, self.accelerator, self.trainee, journal, lambda folder: None)
        self.loop = Loop(*given, after_step=head.clamp, buffers=buffers)
        self.learner = Learner(self.accelerator, self.loop.policy, self.trainee, self.config, self.users)
        self.best = Best(self.config.run_dir, {**trainable(self.trainee), **buffers}, self.main)

    def features(self, rows: Dataset) -> Any:
        """Embeddings of a set's rows, or None where the towers train."""
        if not frozen(self.scorer.towers):
            return None
        team = Team(self.rank, self.world, self.loop.patience.wait, engines.gather)
        return open_features(rows, self.config, self.scorer.towers, team)

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, measure, write the scorer; returns the report."""
        return in_folder(self.config, self.checkpoint, self.accelerator, self.run_in_folder)

    def run_in_folder(self) -> dict[str, Any]:
        """`run`, once the folder is ours."""
        started = time.perf_counter()
        cache, held_cache = self.features(self.checked.rows), self.features(self.held_rows)
        self.held_out = HeldOut(self.held_rows, self.config, self.learner, self.decode, held_cache)
        embedded = time.perf_counter()
        before = self.held_out.measure()
        start, position = self.loop.resume(self.checkpoint)
        self.best.resume(start)
        if start == 0:
            self.best.offer(0, before)
        loader = training_loader(
            self.checked.rows,
            view_of(self.scorer.towers).size,
            self.config,
            start=start,
            rank=self.rank,
            world=self.world,
            seed=self.train.seed,
            cache=cache,
            decode=self.decode,
            state=position,
        )
        last = self.loop.run(start, loader, self.learner.learn, self.preview, self.config.validation.steps)
        trained = time.perf_counter()
        after = self.finish(last)
        seconds = {"embed": embedded - started, "train": trained - embedded, "total": time.perf_counter() - started}
        report = self.write(before, after, last, seconds) if self.main else {}
        self.loop.patience.wait()
        engines.end(self.accelerator)
        return report

    def decode(self, name: str, picture: Any, view: Any) -> dict[str, Any]:
        """A picture as the towers take it."""
        return prepare(name, picture, view, self.scorer.towers)

    def preview(self, step: int) -> Margins:
        """Measure what is held out, note it in the log, and keep the weights if they are the best so far."""
        with self.loop.average.applied():
            margins = self.held_out.measure()
            self.best.offer(step, margins)
        self.loop.journal.note(step, margins.numbers())
        return margins

    def finish(self, last: int) -> Margins:
        """The last measure; then the weights that the result has, in place, and what they do with what is held out."""
        margins = self.preview(last)
        if self.config.validation.keep_best and self.best.step != last:
            self.best.apply()
            return self.held_out.measure()
        if self.loop.average.model:
            self.loop.average.model.copy_to(list(trainable(self.trainee).values()))
        return margins

    def write(self, before: Margins, after: Margins, last: int, seconds: dict[str, float]) -> dict[str, Any]:
        """The scorer with its temperature, and the report. Raises FloatingPointError when its weights are no
        numbers."""
        refuse_no_numbers("the weights at the end", {k: engines.full(p) for k, p in trainable(self.trainee).items()})
        kept = self.best.step if self.config.validation.keep_best else last
        facts = {
            "steps": last,
            "kept_step": kept,
            "groups_seen": last * self.loop.groups_per_step(),
            "groups_in_set": None if self.config.data.streaming else len(self.checked.rows),
            "groups_left_out": self.checked.dropped,
            "groups_replaced": self.loop.journal.faults,
            "steps_skipped": self.loop.spikes.skipped,
            "seconds": seconds,
        }
        report = conclude(self.config, before, after, facts)
        numbers = {key: report["after"][key]["value"] for key in ("accuracy", "calibration_error", "log_loss")}
        scorer = PreferenceScorer(
            self.scorer.towers,
            self.trainee.head,
            name=self.config.name,
            description=f"trained from {self.scorer.name} with {self.config.loss.name} on {self.config.data.path}",
            temperature=report["temperature"],
            users=self.users or None,
            trained_on=str(self.config.data.path),
            measured=numbers | {"held_out_pairs": len(after.margin)},
        )
        scorer.save_pretrained(self.config.run_dir / SCORER)
        if kept == 0:
            print("scorer: no state was better on held-out pairs than the start, which is kept", flush=True)
        print(f"scorer: {self.config.run_dir / SCORER}", flush=True)
        return report
