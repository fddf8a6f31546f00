"""Batches of an optimiser step -> gradients: encode, noise, predict, errors, objective, backward."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from diffpref import engines
from diffpref.batch import Encoded, Errors, Noised, PreferenceBatch, Structure
from diffpref.config import Config
from diffpref.encode import Encoder
from diffpref.errors import check_kernel, item_errors, residual_overlap
from diffpref.gradient_cache import Item, coefficients, gathered, join, join_structures, padded, split
from diffpref.journal import Journal
from diffpref.metrics import step_metrics
from diffpref.noise import FIXED_SEED, Parameterization, add_noise, needs_model
from diffpref.objectives import is_coupled, needs_drift, needs_overlap, needs_reference, total
from diffpref.pair_loss import eligible, fused_total
from diffpref.predict import Models
from diffpref.reference_cache import ReferenceTable
from diffpref.speed.attention import Around


class Learner:
    """Everything between the batches and the gradients of the policy.

    Args:
        accelerator: accelerate's engine.
        models: Policy and reference.
        encoder: Pictures and prompts to latents and conditioning.
        parameterization: Of the pipeline's scheduler.
        config: noise, objective, train.
        groups_per_step: Groups of an optimiser step, over all processes.
        around: The context of forward and backward passes.
        fit: Called with the first batch, before it is learned from.

    With `table`, the errors of the reference come from there, as far as they are known.

    Raises ValueError for what cannot be had together.
    """

    table: ReferenceTable | None = None

    def __init__(
        self,
        accelerator: Accelerator,
        models: Models,
        encoder: Encoder,
        parameterization: Parameterization,
        config: Config,
        groups_per_step: int,
        around: Around = nullcontext,
        fit: Callable[[Item], object] | None = None,
    ):
        self.around, self.fit = around, fit
        self.accelerator, self.models, self.encoder = accelerator, models, encoder
        self.parameterization, self.config, self.groups_per_step = parameterization, config, groups_per_step
        self.objective, self.compared = config.objective, needs_reference(config.objective)
        self.coupled = is_coupled(config.objective)
        self.in_two_passes = runs_twice(config, accelerator)
        self.seed, self.kernel = draw_seed(config), config.train.kernel
        self.fused = check_kernel(self.kernel, accelerator.device)

    def learn(self, batches: Iterable[PreferenceBatch], journal: Journal) -> None:
        """Accumulate the gradient of one optimiser step, and note its numbers."""
        if self.table:
            self.table.step()
        with self.around():
            self.accumulate(batches, journal)

    def accumulate(self, batches: Iterable[PreferenceBatch], journal: Journal) -> None:
        """Forward and backward passes of each batch."""
        if self.in_two_passes:
            return self.learn_in_two_passes([self.prepare(batch) for batch in batches], journal)
        self.accelerator.step = 0
        for batch in batches:
            with self.accelerator.accumulate(self.models.denoiser):
                self.accelerator.backward(self.loss(self.prepare(batch), journal))

    def prepare(self, batch: PreferenceBatch) -> Item:
        """Encoded, and noised with the run's seed, or as its rows always are."""
        encoded = self.encoder(batch)
        noised = self.noise(encoded, self.seed)
        if self.fit is not None:
            self.fit((encoded, noised))
            self.fit = None
        if self.table is None:
            return encoded, noised
        kept = self.table.errors(self.table.cells(batch), lambda: self.reference_error((encoded, noised)))
        return encoded, replace(noised, reference_error=kept)

    @torch.no_grad()
    def reference_error(self, item: Item) -> Tensor:
        """e_ref [N], as many items at a time as the second of two passes takes."""
        size, found = self.config.train.gradient_cache or len(item[1].t), []
        for encoded, noised in split(item, size):
            base = self.models.reference(noised.x_t, noised.t, encoded.conditioning)
            errors = item_errors(base, None, noised.target, torch.ones_like(noised.weight), kernel=self.kernel)
            found.append(errors.policy)
        return torch.cat(found)

    def noise(self, encoded: Encoded, seed: int) -> Noised:
        """x_t and target of encoded items; equal seeds, equal draws."""
        inverts = needs_model(self.config.noise)
        return add_noise(
            encoded,
            self.parameterization,
            self.config.noise,
            seed,
            strata=self.config.reference.draws or self.groups_per_step,  # of fixed draws, one in each stratum
            model=getattr(self.models, self.config.noise.inversion_network) if inverts else None,
            error_space=self.objective.error_space,
            kernel=self.kernel,
        )

    def predictions(self, item: Item, compared: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """(policy's prediction, reference's or None: as the objective wants, unless said, and not where its errors are
        known). The reference goes first, while no activations are held."""
        encoded, noised = item
        inputs = (noised.x_t, noised.t, encoded.conditioning)
        asked = (self.compared if compared is None else compared) and noised.reference_error is None
        base = self.models.reference(*inputs) if asked else None
        return self.models.policy(*inputs), base

    def errors(self, noised: Noised, structure: Structure, policy: Tensor, reference: Tensor | None) -> Errors:
        """All that the objective asks for."""
        known = {"drift": needs_drift(self.objective), "reference_error": noised.reference_error}
        found = item_errors(policy, reference, noised.target, noised.weight, kernel=self.kernel, **known)
        if not needs_overlap(self.objective):
            return found
        return replace(found, overlap=residual_overlap(policy, noised.target, noised.weight, structure.pairs))

    def loss(self, item: Item, journal: Journal | None = None) -> Tensor:
        """One forward pass of policy and reference -> loss, with graph."""
        encoded, noised = item
        predictions = self.predictions(item)
        if self.fused and eligible(self.objective, encoded.structure):
            known = {"reference_error": noised.reference_error}
            whole = *predictions, noised.target, noised.weight, encoded.structure, self.objective
            errors, loss, losses = fused_total(*whole, **known)
        else:
            errors = self.errors(noised, encoded.structure, *predictions)
            loss, losses = total(errors, encoded.structure, self.objective)
        if journal:
            journal.add(step_metrics(errors, noised.level, encoded.structure, losses, self.objective.beta))
        return loss

    # --- two passes -------------------------------------------------------------------------------------------------

    def learn_in_two_passes(self, items: list[Item], journal: Journal) -> None:
        """The same gradient: errors of all items first, then the items again, a few at a time."""
        chunks, bases, errors, structure = self.first_pass(items)
        by_error, by_drift, losses = self.coefficients(errors, structure)
        level = torch.cat([noised.level for _, noised in items])
        journal.add(step_metrics(errors, level, structure, losses, self.objective.beta))
        self.accelerator.step, self.accelerator.gradient_accumulation_steps = 0, len(chunks)
        first = 0
        for (encoded, noised), base in zip(chunks, bases, strict=True):
            part = slice(first, first + len(noised.t))  # empty for chunks that only pad: they count nothing
            first = part.stop
            with self.accelerator.accumulate(self.models.denoiser):
                policy = self.models.policy(noised.x_t, noised.t, encoded.conditioning)
                drifts = None if by_drift is None else base
                asked = {"drift": drifts is not None, "kernel": self.kernel}
                again = item_errors(policy, drifts, noised.target, noised.weight, **asked)
                loss = weighted(again.policy, by_error[part])
                if by_drift is not None:
                    loss = loss + weighted(again.drift, by_drift[part])
                self.accelerator.backward(loss * len(chunks))  # accelerate divides by their number

    def first_pass(self, items: list[Item]) -> tuple[list[Item], list[Tensor | None], Errors, Structure]:
        """Chunks to run again, the reference's predictions of each, and the errors of all items, without graph."""
        size = self.config.train.gradient_cache or max(len(noised.t) for _, noised in items)
        chunks = [chunk for item in items for chunk in split(item, size)]
        own = len(chunks)
        chunks = padded(chunks, max(engines.gather([own])))
        with torch.no_grad():
            policies, bases = zip(*(self.predictions(chunk) for chunk in chunks), strict=True)
        reference = None if bases[0] is None else torch.cat(bases[:own])
        structure = join_structures([encoded.structure for encoded, _ in items])
        errors = self.errors(join([n for _, n in items]), structure, torch.cat(policies[:own]), reference)
        return chunks, list(bases), errors, structure

    def coefficients(self, errors: Errors, structure: Structure) -> tuple[Tensor, Tensor | None, Tensor]:
        """dL/de_θ [N] and dL/ddrift [N] of this process's items, and the vector of losses. A coupled objective sees the
        items of all processes; engines average gradients over these, hence the factor."""
        world, mine = 1, slice(None)
        if self.coupled:
            world = self.accelerator.num_processes
            errors, structure, mine = gathered(errors, structure, engines.gather, self.accelerator.process_index)
        by_error, by_drift, losses = coefficients(errors, structure, lambda e, s: total(e, s, self.objective))
        return world * by_error[mine], None if by_drift is None else world * by_drift[mine], losses


def draw_seed(config: Config) -> int:
    """Of what is drawn for the training groups: the run's, or one for all runs where a row's draws stay the same."""
    return FIXED_SEED if config.reference.draws else config.train.seed


def weighted(values: Tensor, by: Tensor) -> Tensor:
    """Σ c_i·v_i; with no coefficients 0, but with a graph, which engines want from every process."""
    return (values * by).sum() if len(by) else 0.0 * values.sum()


def runs_twice(config: Config, accelerator: Accelerator) -> bool:
    """Whether a step goes in two passes: as asked, or because its groups are coupled and not all in one batch.

    Raises ValueError where a second forward pass could not be had, or would not be the first one again.
    """
    several = config.train.gradient_accumulation_steps > 1 or accelerator.num_processes > 1
    if config.train.gradient_cache is not None:
        reason = "train.gradient_cache"
    elif is_coupled(config.objective) and several:
        reason = f"objective.name {config.objective.name}, which couples the groups of all batches of a step,"
    else:
        return False
    if config.lora.dropout > 0:
        raise ValueError(f"{reason} runs items twice, and lora.dropout would make the two differ; set it to 0")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(f"{reason} cannot be had with DeepSpeed, which counts the passes itself; use ddp or fsdp2")
    return True
