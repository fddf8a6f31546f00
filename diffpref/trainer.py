"""The loop: a batch travels data → encode → noise → predict → errors → objective → optimiser."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from diffpref import engines
from diffpref.adapters import add_lora, save_lora, save_pipeline
from diffpref.batch import PreferenceBatch
from diffpref.cache import DiskCache, open_cache
from diffpref.checkpoint import Checkpoints, read_state, refuse_no_numbers, trainable
from diffpref.config import Config, computed, to_dict
from diffpref.data import check, check_data_options, load_preferences, pair_sizes, training_loader
from diffpref.encode import Encoder, release_encoders
from diffpref.families import family_of, load_pipeline
from diffpref.heldout import HeldOut, Ranks, check_gradient_noise, held_out_batches, held_out_rows
from diffpref.interrupt import Interrupt, Stopped
from diffpref.journal import Journal
from diffpref.learner import Learner, runs_twice
from diffpref.needs import check_needs, check_validation, compares
from diffpref.noise import check_strategy, parameterization
from diffpref.objectives import OBJECTIVES
from diffpref.optimizers import make_optimizer
from diffpref.predict import REFERENCES, Models
from diffpref.run_folder import RunFolder, checkpoint_to_resume
from diffpref.stability import Average, Spikes
from diffpref.verdict import Verdict, read_prompts


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker that is not installed: accelerate would go on without it and say nothing."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"train.report_to: {name} is not to be had here; installed trackers: {', '.join(available) or 'none'}"
            )


class Trainer:
    """One run, from configuration to report. Everything it makes is in `config.run_dir`."""

    def __init__(self, config: Config):
        self.config, self.train = config, config.train
        self.prompts = read_prompts(config.sample)  # data and prompts first: their faults should not wait for a model
        if config.judge.judge and len(set(self.prompts)) < 2:
            raise ValueError("judge.judge needs two or more prompts: the win rate's interval is clustered by prompt")
        self.checkpoint = checkpoint_to_resume(config)
        check_trackers(self.train.report_to)
        self.accelerator = engines.make_accelerator(config)
        self.main, self.patience = self.accelerator.is_main_process, engines.Patience(self.accelerator)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        runs_twice(config, self.accelerator)  # raises what would else be said after the model is loaded
        check_gradient_noise(config, self.accelerator)
        self.rows = load_preferences(config.data)
        check_data_options(self.rows.column_names, config.data)
        check_needs(config, self.rows)
        self.held_out_rows = held_out_rows(config.data)
        if self.held_out_rows:
            check_validation(config, self.held_out_rows.rows)
        self.checked = check(self.rows, config.data, self.rank, self.world, engines.gather)
        set_seed(self.train.seed, device_specific=True)  # dropout: the one thing that draws from a global generator
        self.prepare_model()
        self.prepare_training()

    # --- before the loop --------------------------------------------------------------------------------------------

    def prepare_model(self) -> None:
        """The pipeline, its denoiser with what trains in fp32, and the reference."""
        self.pipe = load_pipeline(self.config.model).to(self.accelerator.device)
        self.family = family_of(self.pipe)
        self.parameterization = parameterization(self.pipe.scheduler)
        check_strategy(self.config.noise, self.parameterization, self.config.objective.error_space)
        features = OBJECTIVES[self.config.objective.name].features
        self.encoder = Encoder(self.pipe, self.train.seed, features=features)
        self.cache: DiskCache | None = None
        self.dropped: dict[str, int] = {}
        self.denoiser = getattr(self.pipe, self.family.denoiser)
        self.dtype = self.prepare_weights()
        self.reference = REFERENCES[self.config.reference.kind](self.denoiser) if compares(self.config) else None
        self.sizes = pair_sizes(self.config.data, self.native_resolution(), self.multiple(), self.checked.sizes)

    def prepare_weights(self) -> torch.dtype:
        """Make the weights that train, in fp32; returns the precision of the denoiser's inputs."""
        if self.config.model.tuning == "lora":
            add_lora(self.denoiser, self.family, self.config.lora, self.train.seed)
            return getattr(torch, self.config.model.dtype)
        self.denoiser.float().requires_grad_(True)
        return torch.float32

    def prepare_training(self) -> None:
        """Optimiser, schedule, engine, and all that a checkpoint keeps."""
        train, accelerator = self.train, self.accelerator
        if train.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        optimizer = make_optimizer(trainable(self.denoiser).values(), train)
        self.policy, self.optimizer = accelerator.prepare(self.denoiser, optimizer)
        self.schedule = get_scheduler(
            train.lr_scheduler,
            optimizer,
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=train.max_train_steps,
        )
        models = Models(self.family, self.policy, self.reference, self.dtype, accelerator.autocast)
        self.learner = Learner(
            accelerator, models, self.encoder, self.parameterization, self.config, self.groups_per_step()
        )
        self.held_out = self.prepare_held_out()
        self.journal, self.spikes = Journal(self.config, accelerator), Spikes(train.skip_grad_norm)
        self.average = Average(trainable(self.denoiser), train.ema_decay)
        self.checkpoints = Checkpoints(
            accelerator,
            self.config.run_dir,
            self.denoiser,
            self.policy,
            self.optimizer,
            self.average,
            train.checkpoints_total_limit,
            self.export,
        )

    def prepare_held_out(self) -> HeldOut | None:
        """The held-out preferences, encoded, if there are any."""
        if self.held_out_rows is None:
            return None
        place = (self.native_resolution(), self.multiple(), self.train.train_batch_size)
        batches = held_out_batches(self.held_out_rows, *place)
        return HeldOut(self.learner, batches, self.config.data.validation_draws, self.train.gradient_noise_draws)

    def native_resolution(self) -> int:
        """The picture side that the pipeline draws by itself."""
        size = self.denoiser.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor

    def multiple(self) -> int:
        """What the sides of a picture must be multiples of: the VAE's factor, times the patch of a transformer."""
        return self.pipe.vae_scale_factor * getattr(self.denoiser.config, "patch_size", 1)

    def resume(self) -> tuple[int, dict | None]:
        """Load the checkpoint that was asked for -> (step to go on from, position in the data).

        Raises ValueError when that would be another run.
        """
        if self.checkpoint is None:
            if self.train.resume_from_checkpoint:
                self.accelerator.print("no checkpoint yet: starting at step 0")
            return 0, None
        state = read_state(self.checkpoint)
        if state["groups_per_step"] != self.groups_per_step():
            raise ValueError(
                f"{self.checkpoint} was made with {state['groups_per_step']} pairs or lists a step, this run has"
                f" {self.groups_per_step()} (processes x train_batch_size x gradient_accumulation_steps)"
            )
        self.checkpoints.load(self.checkpoint)
        self.schedule.load_state_dict(state["schedule"])
        self.journal.load_state_dict(state["journal"])
        self.spikes.load_state_dict(state["spikes"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.print(f"resuming from {self.checkpoint}")
        return state["step"], state["data"]

    def groups_per_step(self) -> int:
        """Groups (pairs, lists, …) that an optimiser step sees, over all processes."""
        return self.train.train_batch_size * self.train.gradient_accumulation_steps * self.world

    def fill_cache(self) -> None:
        """Encode what is not on disk yet, then let encoders go that are no longer needed."""
        settings = self.config.cache
        if not (settings.latents or settings.text):
            return
        everyone = {"rank": self.rank, "world": self.world, "wait": self.patience.wait, "gather": engines.gather}
        self.cache = open_cache(self.checked.rows, self.sizes, self.config, self.pipe, **everyone)
        release_encoders(self.pipe, settings.latents, settings.text)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def optimize(self, batches: Iterable[PreferenceBatch]) -> None:
        """Gradients of as many batches as are accumulated, then a step."""
        self.learner.learn(batches, self.journal)
        self.step()

    def step(self) -> None:
        """One optimiser step, unless the gradient is out of all proportion."""
        clipped = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.train.max_grad_norm)
        norm = engines.whole_norm(clipped, self.accelerator.device)
        self.journal.add({"grad_norm": norm})
        spike = self.train.skip_grad_norm is not None and self.spikes.is_spike(norm.item())
        if not spike:
            self.optimizer.step()
            self.average.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()

    def loop(self, start: int, position: dict | None, verdict: Verdict | None) -> int:
        """Train from step `start` to the end, or to where the drift alarm stops; returns the last step.

        Raises Stopped, after a checkpoint, when a signal asked for it.
        """
        step, journal = start, self.journal  # a run that is complete has no more steps
        loader = training_loader(
            self.checked.rows,
            self.sizes,
            self.config,
            start=start,
            rank=self.rank,
            world=self.world,
            seed=self.train.seed,
            cache=self.cache,
            state=position,
        )
        journal.begin(start)
        self.policy.train()
        batches = iter(loader)
        with journal.bar, Interrupt() as interrupt:
            for step in range(start + 1, self.train.max_train_steps + 1):
                self.optimize(self.accumulated(batches, step))
                journal.bar.update()
                asked = self.patience.any(bool(interrupt))
                if not (asked or self.closes(step)):
                    continue
                journal.close(step, self.schedule.get_last_lr()[0])
                if asked or journal.stopped_by_drift or self.saves(step):
                    self.checkpoints.save(step, self.state(loader.state_dict()))
                if asked:
                    raise Stopped(step, interrupt.signum or signal.SIGTERM)
                if journal.stopped_by_drift:
                    break
                if self.previews(step):
                    self.validate(step)
                    if verdict and self.prompts:
                        verdict.preview(step)
                    self.patience.wait()
        self.dropped = loader.dropped
        return step

    def accumulated(self, batches: Iterator[PreferenceBatch], step: int) -> Iterator[PreferenceBatch]:
        """The batches of one optimiser step, their faults named."""
        for batch in islice(batches, self.train.gradient_accumulation_steps):
            self.journal.name_faults(step, batch.faults)
            yield batch

    def validate(self, step: int) -> Ranks | None:
        """Measure the held-out preferences, if there are any, and note it in the log."""
        if self.held_out is None:
            return None
        with self.average.applied():
            ranks = self.held_out.measure()
        numbers = ranks.numbers(self.config.objective.beta) | self.held_out.gradient_noise()
        self.journal.note(step, numbers)
        return ranks

    def every(self, steps: int, step: int) -> bool:
        """Whether something that is done every so many steps (0: never) is due."""
        return steps > 0 and step % steps == 0

    def previews(self, step: int) -> bool:
        """Whether validation pictures are due."""
        return self.every(self.config.sample.validation_steps, step) and step < self.train.max_train_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due: every so many steps, and at the end, from where a run can be made longer."""
        every = self.train.checkpointing_steps
        return self.every(every, step) or (every > 0 and step == self.train.max_train_steps)

    def closes(self, step: int) -> bool:
        """Whether the log's window closes here. It does at every checkpoint, so that none is kept of a loss that is no
        number."""
        return self.every(self.train.logging_steps, step) or self.saves(step) or step == self.train.max_train_steps

    def state(self, position: dict) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors, as JSON values."""
        scaler = self.accelerator.scaler
        return {
            "computed": computed(self.config),
            "groups_per_step": self.groups_per_step(),
            "schedule": self.schedule.state_dict(),
            "journal": self.journal.state_dict(),
            "spikes": self.spikes.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": position,
        }

    # --- the whole --------------------------------------------------------------------------------------------------

    @contextmanager
    def drawing(self) -> Iterator[DiffusionPipeline]:
        """The pipeline with the policy as it is now, averaged if so configured, and encoders, loaded again if a cache
        has let them go."""
        with self.average.applied():
            if self.cache is None:
                yield self.pipe
            else:
                yield load_pipeline(self.config.model, **{self.family.denoiser: self.denoiser}).to(
                    self.accelerator.device
                )

    def run(self) -> dict:
        """Pictures of the base, training, pictures of the policy, verdict; returns the report."""
        folder = RunFolder(self.config, self.checkpoint) if self.main else None
        self.accelerator.wait_for_everyone()
        try:
            return self.run_in_folder()
        finally:
            if folder:
                folder.close()

    def run_in_folder(self) -> dict:
        """`run`, once the folder is ours."""
        started = time.perf_counter()
        if self.train.report_to:
            self.accelerator.init_trackers("diffpref", config={k: str(v) for k, v in to_dict(self.config).items()})
        # Where the weights are sharded, one process cannot draw alone: all do, and the first one keeps the pictures.
        draws = self.main or engines.sharded(self.policy)
        verdict = Verdict(self.config, self.drawing, self.prompts, self.main) if draws else None
        if verdict:
            verdict.draw_base()
        self.patience.wait()
        drawn = time.perf_counter()
        self.fill_cache()
        start, position = self.resume()
        encoded = time.perf_counter()
        last = self.loop(start, position, verdict)
        trained = time.perf_counter()
        ranks = self.validate(last)
        self.save()
        seconds = {"before": drawn - started, "cache": encoded - drawn, "train": trained - encoded}
        report = verdict.conclude(self.facts(start, last, ranks), seconds, started) if verdict else {}
        self.patience.wait()
        engines.end(self.accelerator)
        return report

    def export(self, folder: Path) -> None:
        """The adapter as stock diffusers loads it, averaged if so configured. Full weights are only exported at the
        end."""
        if self.config.model.tuning == "lora":
            with self.average.applied():
                save_lora(self.pipe, self.denoiser, folder, self.main)

    def save(self) -> None:
        """The result, in a format that stock diffusers loads: a LoRA file, or a whole pipeline. Raises
        FloatingPointError when its weights are no numbers."""
        refuse_no_numbers(
            "the weights at the end", {k: engines.full(p) for k, p in self.checkpoints.parameters.items()}
        )
        self.export(self.config.run_dir)
        if self.config.model.tuning == "full":
            with self.drawing() as pipe:
                save_pipeline(pipe, self.config.run_dir / "pipeline", self.main)

    def facts(self, start: int, last: int, ranks: Ranks | None) -> dict:
        """What the report says about the training itself."""
        return (ranks.report(self.config) if ranks else {}) | {
            "steps": last,
            "stopped_by_drift_alarm": self.journal.stopped_by_drift,
            "resumed_from_step": start,
            "groups_seen": last * self.groups_per_step(),
            "groups_in_set": None if self.config.data.streaming else len(self.checked.rows),
            "groups_left_out": self.checked.dropped | self.dropped,
            "groups_replaced": self.journal.faults,
            "steps_skipped": self.spikes.skipped,
            "drift_alarms": self.journal.alarm.steps,
        }
