"""(policy, reference, target) -> one error per item. Wide tensors [N,...] end here."""

from torch import Tensor

from diffpref.batch import Errors


def item_errors(policy: Tensor, reference: Tensor | None, target: Tensor) -> Errors:
    """Per-item squared errors and advantage, in fp32 whatever the inputs' dtypes.

        e_θ = mean (p − y)²        A = e_ref − e_θ = mean (r − y)² − (p − y)² = mean (r − p)(p + r − 2y)

    The advantage is accumulated in the last form. As a difference of two means it would lose the digits that the
    preference logit (β ~ 5000) is made of; and it is exactly 0 where policy = reference.

    Args:
        policy: p [N,...], with graph.
        reference: r [N,...], without graph, or None for reference-free objectives.
        target: y [N,...].
    """
    p, y = policy.float(), target.float()
    error = (p - y).square().flatten(1).mean(1)
    if reference is None:
        return Errors(error)
    r = reference.float()
    return Errors(error, ((r - p) * (p + r - 2 * y)).flatten(1).mean(1))
