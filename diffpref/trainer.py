"""The loop: a batch travels data → encode → noise → predict → errors → objective → optimiser."""

import math
import shutil
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffpref import checkpoint
from diffpref.adapters import add_lora, save_lora
from diffpref.batch import PreferenceBatch
from diffpref.config import Config, to_dict
from diffpref.data import PreferencePairs, TrainingStream, collate, load_preferences
from diffpref.encode import Encoder
from diffpref.errors import item_errors
from diffpref.families import family_of, load_pipeline
from diffpref.metrics import DriftAlarm, Window, append_line, step_metrics, truncate_lines
from diffpref.noise import add_noise, parameterization
from diffpref.objectives import OBJECTIVES
from diffpref.predict import REFERENCES, predict
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
        self.rows = load_preferences(config.data)  # data and prompts first: their faults should not wait for a model
        self.prompts = read_prompts(config.sample)
        if config.judge.judge and len(set(self.prompts)) < 2:
            raise ValueError("judge.judge needs two or more prompts: the win rate's interval is clustered by prompt")
        self.checkpoint = self.find_checkpoint()
        self.objective = OBJECTIVES[config.objective.name]
        check_trackers(self.train.report_to)
        self.accelerator = Accelerator(
            mixed_precision=self.train.mixed_precision,
            gradient_accumulation_steps=self.train.gradient_accumulation_steps,
            log_with=self.train.report_to or None,
            project_config=ProjectConfiguration(str(config.run_dir), logging_dir=str(config.run_dir / "logs")),
        )
        set_seed(self.train.seed)
        self.pipe = load_pipeline(config.model).to(self.accelerator.device)
        self.family = family_of(self.pipe)
        self.parameterization = parameterization(self.pipe.scheduler)
        self.encoder = Encoder(self.pipe, self.train.seed)
        self.denoiser = getattr(self.pipe, self.family.denoiser)
        self.dtype = self.prepare_weights()
        self.reference = REFERENCES[config.reference.kind](self.denoiser) if self.objective.reference else None
        self.prepare_optimizer()
        self.window, self.alarm = Window(), DriftAlarm(self.train.drift_alarm)

    # --- before the loop --------------------------------------------------------------------------------------------

    def prepare_weights(self) -> torch.dtype:
        """Make the weights that train, in fp32; returns the precision of the denoiser's inputs."""
        if self.config.model.tuning == "lora":
            add_lora(self.denoiser, self.family, self.config.lora, self.train.seed)
            return getattr(torch, self.config.model.dtype)
        self.denoiser.float().requires_grad_(True)
        return torch.float32

    def prepare_optimizer(self) -> None:
        """AdamW over what trains, its schedule, and accelerate's wrapping; checkpoints hold what trains."""
        if self.train.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            checkpoint.trainable(self.denoiser).values(),
            lr=self.train.learning_rate,
            betas=(self.train.adam_beta1, self.train.adam_beta2),
            weight_decay=self.train.adam_weight_decay,
            eps=self.train.adam_epsilon,
        )
        self.schedule = get_scheduler(
            self.train.lr_scheduler,
            optimizer,
            num_warmup_steps=self.train.lr_warmup_steps,
            num_training_steps=self.train.max_train_steps,
        )
        self.policy, self.optimizer = self.accelerator.prepare(self.denoiser, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        checkpoint.register(self.accelerator, self.denoiser)

    def open_run(self) -> None:
        """Make the run's folder, empty unless the run goes on, and write the resolved configuration into it."""
        if self.accelerator.is_main_process:
            if self.config.overwrite and self.train.resume_from_checkpoint is None:
                shutil.rmtree(self.config.run_dir, ignore_errors=True)
            self.config.run_dir.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is None:
                (self.config.run_dir / "metrics.jsonl").unlink(missing_ok=True)
            (self.config.run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False))
        if self.train.report_to:
            self.accelerator.init_trackers("diffpref", config={k: str(v) for k, v in to_dict(self.config).items()})
        self.accelerator.wait_for_everyone()

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from. Raises ValueError for one that cannot be, or where a run would be buried."""
        run_dir, which = self.config.run_dir, self.train.resume_from_checkpoint
        if which is None:
            if not self.config.overwrite and any(run_dir.glob("checkpoint-*")) | (run_dir / "report.json").exists():
                raise ValueError(
                    f"{run_dir} holds a run already; give another --name, go on with --train.resume_from_checkpoint"
                    " latest, or start it afresh with --overwrite true"
                )
            return None
        folder = checkpoint.find_checkpoint(run_dir, which)
        if folder and checkpoint.checkpoint_step(folder) > self.train.max_train_steps:
            raise ValueError(f"{folder} is past train.max_train_steps {self.train.max_train_steps}")
        return folder

    def resume(self) -> int:
        """Load the checkpoint that was asked for; returns the step to go on from."""
        if self.checkpoint is None:
            return 0
        step = checkpoint.checkpoint_step(self.checkpoint)
        self.accelerator.load_state(str(self.checkpoint))
        if self.accelerator.is_main_process:
            truncate_lines(self.config.run_dir / "metrics.jsonl", step)
        self.accelerator.print(f"resuming from {self.checkpoint}")
        return step

    def loader(self, start: int) -> DataLoader:
        """Batches of this process, from step `start` on."""
        data, train = self.config.data, self.train
        stream = TrainingStream(
            len(self.rows),
            train.seed,
            train.train_batch_size,
            train.gradient_accumulation_steps,
            range(start, train.max_train_steps),
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(
            PreferencePairs(self.rows, data, data.resolution or self.native_resolution(), train.seed),
            batch_sampler=stream,
            collate_fn=collate,
            num_workers=data.num_workers,
        )

    def native_resolution(self) -> int:
        """The picture side that the pipeline draws by itself."""
        size = self.denoiser.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor

    # --- the loop ---------------------------------------------------------------------------------------------------

    def loss(self, batch: PreferenceBatch) -> Tensor:
        """One forward pass of policy and reference -> mean loss of the comparisons."""
        encoded = self.encoder(batch)
        noised = add_noise(encoded, self.parameterization, self.config.noise, self.train.seed)
        with self.accelerator.autocast():
            policy, reference = predict(self.family, self.policy, self.reference, noised, encoded, self.dtype)
        errors, structure, beta = (
            item_errors(policy, reference, noised.target),
            encoded.structure,
            self.config.objective.beta,
        )
        loss = self.objective.loss(errors, structure, beta=beta)
        self.window.add(step_metrics(errors, noised, structure, loss, beta))
        return (loss * structure.weight).mean()

    def optimize(self, batch: PreferenceBatch) -> bool:
        """Forward, backward and, once enough batches are accumulated, an optimiser step (then True)."""
        with self.accelerator.accumulate(self.policy):
            self.accelerator.backward(self.loss(batch))
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.train.max_grad_norm)
                self.window.add({"grad_norm": norm.detach().reshape(1)})
            self.optimizer.step()
            if self.accelerator.sync_gradients:
                self.schedule.step()
            self.optimizer.zero_grad()
        return self.accelerator.sync_gradients

    def log(self, step: int, bar: tqdm, started: float) -> None:
        """Close the window: one line of metrics.jsonl, the progress bar, trackers, and the drift alarm."""
        window = self.window.close(partial(self.accelerator.reduce, reduction="sum"))
        line = {"step": step, "seconds": round(time.perf_counter() - started, 3)}
        line |= {key: mean for key, (mean, _, _) in window.items()} | {"learning_rate": self.schedule.get_last_lr()[0]}
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"the loss is {line['loss']} at step {step}: lower train.learning_rate or compute in bf16, not fp16"
                f" (train.mixed_precision), and go on from an earlier checkpoint in {self.config.run_dir}"
            )
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        if self.accelerator.is_main_process:
            append_line(self.config.run_dir / "metrics.jsonl", line)
        shown = {
            "loss": "loss",
            "acc": "rewards/accuracies",
            "margin": "rewards/margins",
            "winner drift": "drift/chosen",
        }
        bar.set_postfix({name: f"{line[key]:.3g}" for name, key in shown.items() if key in line})
        if (warning := self.alarm.update(step, window)) and self.accelerator.is_main_process:
            bar.write(warning)

    def loop(self, start: int, verdict: Verdict | None) -> None:
        """Train from step `start` to the end."""
        train, started, step = self.train, time.perf_counter(), start
        bar = tqdm(
            total=train.max_train_steps, initial=start, desc="training", disable=not self.accelerator.is_main_process
        )
        self.policy.train()
        for batch in self.loader(start):
            if not self.optimize(batch):
                continue
            step += 1
            bar.update()
            if step % train.logging_steps == 0 or step == train.max_train_steps:
                self.log(step, bar, started)
            if train.checkpointing_steps and step % train.checkpointing_steps == 0:
                checkpoint.save_checkpoint(self.accelerator, self.config.run_dir, step)
            if verdict and self.due(step):
                verdict.preview(step)
        bar.close()

    def due(self, step: int) -> bool:
        """Whether validation pictures are drawn after this step."""
        every = self.config.sample.validation_steps
        return bool(every) and step % every == 0 and step < self.train.max_train_steps

    # --- the whole --------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Pictures of the base, training, pictures of the policy, verdict; returns the report."""
        started = time.perf_counter()
        self.open_run()
        main, seconds = self.accelerator.is_main_process, {}
        verdict = Verdict(self.config, self.pipe, self.prompts) if main and self.prompts else None
        if verdict:
            verdict.draw_base()
        drawn = time.perf_counter()
        start = self.resume()
        self.loop(start, verdict)
        trained = time.perf_counter()
        self.accelerator.wait_for_everyone()
        report = {}
        if main:
            self.save()
            verdict = verdict or Verdict(self.config, self.pipe, [])
            seconds = {"before": drawn - started, "train": trained - drawn}
            report = verdict.conclude(self.facts(start), seconds, started)
        self.accelerator.end_training()
        return report

    def save(self) -> None:
        """The result, in a format that stock diffusers loads: a LoRA file, or a whole pipeline."""
        if self.config.model.tuning == "lora":
            save_lora(self.pipe, self.denoiser, self.config.run_dir)
        else:
            self.pipe.save_pretrained(self.config.run_dir / "pipeline", safe_serialization=True)

    def facts(self, start: int) -> dict:
        """What the report says about the training itself."""
        train = self.train
        per_step = train.train_batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes
        return {
            "steps": train.max_train_steps,
            "resumed_from_step": start,
            "pairs_seen": train.max_train_steps * per_step,
            "pairs_in_set": len(self.rows),
            "drift_alarms": self.alarm.steps,
        }
