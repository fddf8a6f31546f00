"""The loop: a batch travels data → encode → noise → predict → errors → objective → optimiser."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed

from diffpref import engines
from diffpref.adapters import add_lora, copy_base_lora, load_base_lora, save_lora, save_pipeline
from diffpref.cache import DiskCache, open_cache
from diffpref.cache.fingerprint import module_facts
from diffpref.cache.team import Team
from diffpref.checkpoint import refuse_no_numbers
from diffpref.config import Config
from diffpref.data import check, check_data_options, load_preferences, pair_sizes, training_loader
from diffpref.encode import Encoder, release_encoders
from diffpref.families import family_of, load_pipeline
from diffpref.gradient_cache import Item, split
from diffpref.heldout import HeldOut, Ranks, check_gradient_noise, held_out_batches, held_out_rows
from diffpref.journal import Journal
from diffpref.learner import Learner, draw_seed, runs_twice
from diffpref.loop import Loop, check_trackers, in_folder
from diffpref.needs import check_needs, check_validation, compares
from diffpref.noise import check_strategy, parameterization
from diffpref.objectives import OBJECTIVES
from diffpref.predict import REFERENCES, Models, others
from diffpref.reference_cache import check_draws, reference_table
from diffpref.run_folder import checkpoint_to_resume
from diffpref.speed import fitting
from diffpref.speed.attention import choose_attention
from diffpref.speed.casting import casting_once, compute_in_input_dtype
from diffpref.speed.compiling import compile_denoiser, eagerly
from diffpref.speed.fitting import decide, for_all, saved_bytes
from diffpref.speed.layout import channels_last
from diffpref.stability import DriftAlarm
from diffpref.users.training import Draws, Personal
from diffpref.verdict import Verdict, read_prompts


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
        self.main, self.rank = self.accelerator.is_main_process, self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.patience = engines.Patience(self.accelerator)
        runs_twice(config, self.accelerator)  # raises what would else be said after the model is loaded
        check_gradient_noise(config, self.accelerator)
        check_draws(config, self.accelerator)
        weighed = config.users.source == "rewards"  # by made-up users; otherwise scorers vote
        self.rows = load_preferences(config.data, numbers=weighed)
        check_data_options(self.rows.column_names, config.data)
        check_needs(config, self.rows)
        self.held_out_rows = held_out_rows(config.data, numbers=weighed)
        if self.held_out_rows:
            check_validation(config, self.held_out_rows.rows)
        self.checked = check(self.rows, config.data, self.rank, self.world, engines.gather)
        set_seed(self.train.seed, device_specific=True)  # dropout: the one thing that draws from a global generator
        self.prepare_model()
        self.prepare_training()

    # --- before the loop --------------------------------------------------------------------------------------------

    def prepare_model(self) -> None:
        """The pipeline, and its denoiser with what trains in fp32."""
        self.pipe = load_pipeline(self.config.model).to(self.accelerator.device)
        self.family = family_of(self.pipe)
        self.parameterization = parameterization(self.pipe.scheduler)
        check_strategy(self.config.noise, self.parameterization, self.config.objective.error_space)
        features = OBJECTIVES[self.config.objective.name].features
        self.encoder = Encoder(self.pipe, draw_seed(self.config), features=features)
        self.cache: DiskCache | None = None
        self.dropped: dict[str, int] = {}
        asked = self.config.users.source != "none"
        self.personal = Personal(self.config, self.checked.rows, self.team()) if asked else None
        self.denoiser = getattr(self.pipe, self.family.denoiser)
        # Before an adapter is in it: the reference's errors are those of these weights, whatever is trained beside.
        self.base_facts = module_facts(self.denoiser) if self.config.reference.draws and self.main else []
        self.dtype = self.prepare_weights()
        self.prepare_passes()
        self.sizes = pair_sizes(self.config.data, self.native_resolution(), self.multiple(), self.checked.sizes)

    def prepare_weights(self) -> torch.dtype:
        """Make the weights that train, in fp32; returns the precision of the denoiser's inputs."""
        if self.config.model.tuning == "lora":
            add_lora(self.denoiser, self.family, self.config.lora, self.train.seed)
        elif self.config.model.tuning == "full":
            self.denoiser.float().requires_grad_(True)
            return torch.float32
        else:
            load_base_lora(self.pipe, self.config.model.lora)
            self.denoiser.requires_grad_(False)
        if self.personal:
            self.personal.install(self.denoiser)
        return getattr(torch, self.config.model.dtype)

    def prepare_passes(self) -> None:
        """How forward passes are made; the result is the same but for rounding."""
        if self.train.gradient_checkpointing is True:
            self.denoiser.enable_gradient_checkpointing()
        light = self.config.lora.compute == "input" and engines.whole(self.accelerator)
        self.casts = compute_in_input_dtype(self.denoiser) if light else []
        self.layout = channels_last(self.denoiser) if self.train.channels_last else torch.preserve_format

    def fit(self, item: Item) -> None:
        """Recompute activations if those of as many items as this first batch has, at the largest size of the run, do
        not fit beside gradients and what the optimiser keeps."""
        own = replace(self.learner.models, denoiser=self.denoiser)  # an engine would wait for a backward pass

        def kept(count: int) -> int:
            encoded, noised = next(split(item, count))
            return saved_bytes(self.denoiser, lambda: own.policy(noised.x_t, noised.t, encoded.conditioning))

        count = min(len(item[1].t), self.train.gradient_cache or len(item[1].t))
        area = item[1].x_t[0, 0].numel() * self.pipe.vae_scale_factor**2
        needed = for_all(kept(1), kept(2) if count > 1 else 0, count, int(np.prod(self.sizes, axis=-1).max()) / area)
        free = fitting.free_bytes(self.accelerator.device) - fitting.still_to_come(self.denoiser)
        recompute, said = decide(needed, free, self.patience.any)
        self.accelerator.print(said)
        if recompute:
            self.denoiser.enable_gradient_checkpointing()

    def prepare_training(self) -> None:
        """The loop, and what stands between its batches and its gradients."""
        kernel = (self.config.model.attention, self.accelerator.device, self.dtype, self.accelerator.autocast)
        attention = choose_attention(self.denoiser, *kernel)
        reference = REFERENCES[self.config.reference.kind](self.denoiser) if compares(self.config) else None
        for model in [self.denoiser, *others(reference, self.denoiser)]:  # policy and reference must round alike
            compile_denoiser(model, self.family, self.train.compile)

        @contextmanager
        def around() -> Iterator[None]:
            with attention(), casting_once(self.casts):
                yield

        alarm = DriftAlarm(self.train.drift_alarm, self.train.on_drift == "stop")
        journal = Journal(self.config, self.accelerator, alarm)
        self.loop = Loop(self.config, self.accelerator, self.denoiser, journal, self.export)
        users = self.personal.module if self.personal else None
        own = (self.dtype, self.accelerator.autocast, users, self.layout)
        models = Models(self.family, self.loop.policy, reference, *own)
        place = (self.accelerator, models, self.encoder, self.parameterization)
        auto = self.train.gradient_checkpointing == "auto" and engines.whole(self.accelerator)
        fit = self.fit if auto else None
        self.learner = Learner(*place, self.config, self.loop.groups_per_step(), around, fit)
        self.held_out = self.prepare_held_out()

    def prepare_held_out(self) -> HeldOut | None:
        """The held-out preferences, encoded, if there are any."""
        if self.held_out_rows is None:
            return None
        place = (self.native_resolution(), self.multiple(), self.train.train_batch_size)
        asked = self.personal and self.personal.held_out(self.held_out_rows.rows, self.config)
        batches = held_out_batches(self.held_out_rows, *place, asked)
        return HeldOut(self.learner, batches, self.config.data.validation_draws, self.train.gradient_noise_draws)

    def native_resolution(self) -> int:
        """The picture side that the pipeline draws by itself."""
        return self.family.side(self.denoiser) * self.pipe.vae_scale_factor

    def multiple(self) -> int:
        """What the sides of a picture must be multiples of: the VAE's factor, times the patch of a transformer."""
        return self.family.patch(self.denoiser) * self.pipe.vae_scale_factor

    def team(self) -> Team:
        """All processes."""
        return Team(self.rank, self.world, self.patience.wait, engines.gather)

    def fill_cache(self) -> None:
        """Encode what is not on disk yet, then let encoders go that are no longer needed."""
        settings = self.config.cache
        if not (settings.latents or settings.text):
            return
        self.cache = open_cache(self.checked.rows, self.sizes, self.config, self.pipe, **vars(self.team()))
        release_encoders(self.pipe, settings.latents, settings.text)

    def open_reference_table(self) -> None:
        """The reference's errors that are kept, if they are to be."""
        place = (self.checked.rows, self.sizes, self.pipe, self.cache)
        known = (self.base_facts, self.parameterization, self.dtype, self.team())
        self.learner.table = reference_table(self.config, *place, *known)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def learn(self, start: int, position: dict | None, verdict: Verdict | None) -> int:
        """Train from step `start` to the end, or to where the drift alarm stops; returns the last step.

        Raises Stopped, after a checkpoint, when a signal asked for it.
        """
        loader = training_loader(
            self.checked.rows,
            self.sizes,
            self.config,
            start=start,
            rank=self.rank,
            world=self.world,
            seed=self.train.seed,
            cache=self.cache,
            asked=self.personal and self.personal.asked(),
            state=position,
            draws=self.config.reference.draws,
        )

        def preview(step: int) -> None:
            self.validate(step)
            if verdict and self.prompts:
                verdict.preview(step)

        last = self.loop.run(start, loader, self.learner.learn, preview, self.config.sample.validation_steps)
        self.dropped = loader.dropped
        return last

    def validate(self, step: int) -> Ranks | None:
        """Measure the held-out preferences, if there are any, and note it in the log."""
        if self.held_out is None:
            return None
        with self.loop.average.applied():
            ranks = self.held_out.measure()
        numbers = ranks.numbers(self.config.objective.beta) | self.held_out.gradient_noise()
        self.loop.journal.note(step, numbers)
        return ranks

    # --- the whole --------------------------------------------------------------------------------------------------

    @contextmanager
    def drawing(self) -> Iterator[Draws]:
        """The pipeline with the policy as it is now, averaged if so configured, and encoders, loaded again if a cache
        has let them go."""
        with self.loop.average.applied(), eagerly() if self.train.compile != "none" else nullcontext():
            pipe = self.pipe
            if self.cache is not None:
                kept = {self.family.denoiser: self.denoiser}
                pipe = load_pipeline(self.config.model, **kept).to(self.accelerator.device)
            yield self.personal.drawing(pipe) if self.personal else pipe

    def run(self) -> dict:
        """Pictures of the base, training, pictures of the policy, verdict; returns the report."""
        return in_folder(self.config, self.checkpoint, self.accelerator, self.run_in_folder)

    def run_in_folder(self) -> dict:
        """`run`, once the folder is ours."""
        started = time.perf_counter()
        # Where the weights are sharded, one process cannot draw alone: all do, and the first one keeps the pictures.
        draws = self.main or engines.sharded(self.loop.policy)
        verdict = Verdict(self.config, self.drawing, self.prompts, self.main) if draws else None
        if verdict:
            verdict.draw_base()
        self.loop.patience.wait()
        drawn = time.perf_counter()
        self.fill_cache()
        self.open_reference_table()
        start, position = self.loop.resume(self.checkpoint)
        encoded = time.perf_counter()
        last = self.learn(start, position, verdict)
        trained = time.perf_counter()
        ranks = self.validate(last)
        self.save()
        kept = self.learner.table.report() if self.learner.table else {}
        seconds = {"before": drawn - started, "cache": encoded - drawn, "train": trained - encoded}
        report = verdict.conclude(self.facts(start, last, ranks) | kept, seconds, started) if verdict else {}
        self.loop.patience.wait()
        engines.end(self.accelerator)
        return report

    def export(self, folder: Path) -> None:
        """The adapter as stock diffusers loads it, averaged if so configured. Full weights are only exported at the
        end."""
        if self.learner.table:
            self.learner.table.sync()  # a checkpoint goes on with the errors that it was trained with
        with self.loop.average.applied():
            if self.config.model.tuning == "lora":
                save_lora(self.pipe, self.denoiser, folder, self.main)
            if self.config.model.lora and self.main:
                copy_base_lora(self.config.model.lora, folder)
            if self.personal:
                self.personal.export(self.denoiser, folder, self.main)

    def save(self) -> None:
        """The result, in a format that stock diffusers loads: a LoRA file, or a whole pipeline. Raises
        FloatingPointError when its weights are no numbers."""
        refuse_no_numbers(
            "the weights at the end", {k: engines.full(p) for k, p in self.loop.checkpoints.parameters.items()}
        )
        self.export(self.config.run_dir)
        if self.config.model.tuning == "full":
            with self.drawing() as pipe:
                save_pipeline(pipe, self.config.run_dir / "pipeline", self.main)

    def facts(self, start: int, last: int, ranks: Ranks | None) -> dict:
        """What the report says about the training itself."""
        return (ranks.report(self.config) if ranks else {}) | {
            "steps": last,
            "stopped_by_drift_alarm": self.loop.journal.stopped_by_drift,
            "resumed_from_step": start,
            "groups_seen": last * self.loop.groups_per_step(),
            "groups_in_set": None if self.config.data.streaming else len(self.checked.rows),
            "groups_left_out": self.checked.dropped | self.dropped,
            "groups_replaced": self.loop.journal.faults,
            "steps_skipped": self.loop.spikes.skipped,
            "drift_alarms": self.loop.journal.alarm.steps,
        }
