"""Two passes over a step: errors without graph, then gradients a few items at a time.

A loss depends on the weights only through the items' errors (and drifts), so

    dL/dw = sum_i c_i·de_i/dw + k_i·dd_i/dw,    c_i = dL/de_i,    k_i = dL/dd_i

is exact. The second pass needs one more forward of the policy, and the memory of so few items. An objective in which an
item's loss depends on the other groups of the step sees the errors of all accumulated batches and all processes at
once. (Gao et al. 2021, arXiv 2101.06983, for contrastive losses.)
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from diffpref.batch import Encoded, Errors, Noised, Structure

Item = tuple[Encoded, Noised]
Joined = TypeVar("Joined", Errors, Structure, Noised)
Loss = Callable[[Errors, Structure], tuple[Tensor, Tensor]]  # -> (scalar with graph, vector)


def split(item: Item, size: int) -> Iterator[Item]:
    """The items of a batch, `size` at a time; the structure stays whole."""
    encoded, noised = item
    for start in range(0, len(noised.t), size):
        part = slice(start, start + size)
        conditioning = {key: value[part] for key, value in encoded.conditioning.items()}
        yield (
            replace(encoded, latents=encoded.latents[part], conditioning=conditioning),
            Noised(*(None if value is None else value[part] for value in vars(noised).values())),
        )


def join_structures(parts: list[Structure]) -> Structure:
    """One structure of several batches, in order: groups and items are counted on. What some batch lacks, all lack."""
    groups, items = [0], [0]
    for part in parts:
        groups.append(groups[-1] + len(part.weight))
        items.append(items[-1] + len(part.group))
    counted = [replace(s, group=s.group + g, pairs=s.pairs + i) for s, g, i in zip(parts, groups, items, strict=False)]
    return join(counted)


def join(parts: list[Joined]) -> Joined:
    """Each field of all parts, one after the other; None where some part has none."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(parts[0])}
    whole = {name: None if any(v is None for v in values) else torch.cat(values) for name, values in columns.items()}
    return type(parts[0])(**whole)


def coefficients(errors: Errors, structure: Structure, loss: Loss) -> tuple[Tensor, Tensor | None, Tensor]:
    """dL/de_θ [N], dL/ddrift [N] (None without drift), and the vector of losses.

    The advantage is e_ref − e_θ, so its share of the gradient goes to e_θ with the sign turned.
    """
    e = errors.policy.detach().requires_grad_()
    advantage = None if errors.advantage is None else errors.advantage - (e - e.detach())
    drift = None if errors.drift is None else errors.drift.detach().requires_grad_()
    scalar, losses = loss(replace(errors, policy=e, advantage=advantage, drift=drift), structure)
    leaves = [leaf for leaf in (e, drift) if leaf is not None]
    found = torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True)
    return found[0], (found[1] if drift is not None else None), losses.detach()


def gathered(
    errors: Errors, structure: Structure, gather: Callable[[list], list], rank: int
) -> tuple[Errors, Structure, slice]:
    """The short vectors of all processes, on this one's device, and where its own items are among them."""
    device, cpu = errors.policy.device, torch.device("cpu")
    shares = gather([(errors.to(cpu), structure.to(cpu))])
    counts = [len(share.policy) for share, _ in shares]
    first = sum(counts[:rank])
    everyone = (
        join([share for share, _ in shares]).to(device),
        join_structures([share for _, share in shares]).to(device),
    )
    return *everyone, slice(first, first + counts[rank])


def padded(chunks: list[Item], most: int) -> list[Item]:
    """As many chunks as the process that has most: sharded models go forward together or not at all."""
    return chunks + [chunks[-1]] * (most - len(chunks))
