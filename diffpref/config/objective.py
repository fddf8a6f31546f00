"""The sections that say what is learned: noise, objective, reference. Their docstrings are the help text, too."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NoiseConfig:
    """How x_t is made. The timestep is shared by a group in any case.

    Args:
        strategy: shared, one noise for the group (Diffusion-DPO); shared_latent, one x_t for all prompts of a picture;
            independent, one noise for each item; ddim, renoise (for eps and v models) and flow, no noise drawn but the
            picture inverted by the model itself (InPO, SmPO).
        timesteps: How timesteps are drawn.
        logit_mean: m of the logit-normal sampler.
        logit_std: s of the logit-normal sampler.
        timestep_range: Lowest and highest level of the range sampler, 0 = clean, 1 = noise.
        timestep_list: Timesteps of the list sampler, counted 0..999 as the scheduler's (of a flow model, before its
            shift).
        stratified: Spread the timesteps of an optimiser step evenly over their distribution.
        inversion_steps: Steps from the picture to x_t.
        inversion_network: Which model inverts.
        inversion_eta: Fresh noise added at each step, in units of DDIM's own.
        inversion_grid: exact ends at the timestep drawn; snap takes the grid that was published, whose noise level is
            another than the timestep says.
        source: What draws the noise: torch's generator on the CPU, or a counter-based one, Philox, that gives the same
            noise on every device and needs no copy to it.
    """

    strategy: Literal["shared", "shared_latent", "independent", "ddim", "renoise", "flow"] = "shared"
    timesteps: Literal["uniform", "logit_normal", "range", "list"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_range: tuple[float, float] = (0.0, 1.0)
    timestep_list: list[int] | None = None
    stratified: bool = False
    inversion_steps: int = 10
    inversion_network: Literal["reference", "policy"] = "reference"
    inversion_eta: float = 0.0
    inversion_grid: Literal["exact", "snap"] = "exact"
    source: Literal["generator", "philox"] = "generator"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised. The docstrings in diffpref/objectives have the equations.

    Args:
        name: A row of OBJECTIVES; README.md has them with what each needs of the data.
        beta: Multiplies half the margin of mean squared errors, as in Diffusion-DPO's --beta_dpo; dspo, kto, text_kto,
            mapo and mapo_v1 have their own meaning of it.
        error_space: Space in which errors are measured; model is that of the model's own prediction. A flow model's
            error in epsilon is (1-t)^2 times that in velocity, which is Flow-DPO's beta_t.
        margin_cap: Preference logit beyond which a pair no longer pushes; without it the incentive to unlearn
            losers has no end.
        winner_anchor: λ of DPO-Positive: a winner that the policy fits worse than the reference lowers the logit.
        label_smoothing: Share of labels taken to be wrong (cdpo, rdpo, exo).
        ipo_tau: τ of ipo: the logit is drawn to 1/(2τ).
        smoothing: g of smpo, which multiplies the logit with g·(2p-1).
        probability_range: Preference probabilities are clipped to it (smpo, osp).
        rank_source: Whose ranking discounts the pairs of rankdpo: the data's, or the policy's own.
        list_temperature: T of listnet's target, softmax(scores / T).
        utility: What an item is worth by its logit (kto, text_kto): bounded both ways (sigmoid), for gains only
            (loss_averse), for losses only (risk_seeking), or the published code's two other forms of the last.
        desirable_weight: What liked items count (kto, text_kto).
        undesirable_weight: What disliked items count (kto, text_kto).
        loser_clip: Logit by which a loser may be unlearned before it no longer pushes (text_dpo, text_kto).
        prompt_baseline: Subtract the mean advantage of the other items with the same prompt (dove).
        reward_temperature: T of rwr's weight, exp(score / T).
        similarity_temperature: T of rpo's weights between prompts.
        sft_weight: Adds the winners' own error, so many times.
        drift_weight: Adds the squared distance between the predictions of policy and reference, so many times.
        safeguard: μ of Diffusion-SDPO: a loser's gradient is scaled down where it would harm the winner. 0 does the
            least, 1 takes the loser away altogether where the two point alike.
    """

    name: Literal[
        "dpo",
        "cdpo",
        "rdpo",
        "ipo",
        "hinge",
        "exo",
        "osp",
        "smpo",
        "rankdpo",
        "diffusion_lpo",
        "pro",
        "lipo",
        "listnet",
        "kto",
        "text_kto",
        "text_dpo",
        "dcpo",
        "dove",
        "rpo",
        "mapo",
        "mapo_v1",
        "sft",
        "rwr",
        "dspo",
    ] = "dpo"
    beta: float = 5000.0
    error_space: Literal["model", "epsilon", "velocity", "sample"] = "model"
    margin_cap: float | None = None
    winner_anchor: float = 0.0
    label_smoothing: float = 0.1
    ipo_tau: float = 1.0
    smoothing: float = 10.0
    probability_range: tuple[float, float] = (0.0, 1.0)
    rank_source: Literal["data", "policy"] = "data"
    list_temperature: float = 1.0
    utility: Literal["sigmoid", "loss_averse", "risk_seeking", "risk_seeking_signed", "risk_seeking_exponential"] = (
        "sigmoid"
    )
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loser_clip: float | None = 1.0
    prompt_baseline: bool = False
    reward_temperature: float = 1.0
    similarity_temperature: float = 0.1
    sft_weight: float = 0.0
    drift_weight: float = 0.0
    safeguard: float | None = None


@dataclass(frozen=True)
class ReferenceConfig:
    """What the policy is compared with.

    Args:
        kind: The same model with its adapter off, or a frozen copy made before training (the choice for full
            fine-tuning).
        draws: Keep the reference's errors on disk for so many fixed timesteps and noises of each row, and train on
            these draws only: runs with other rates, β or objectives share them. It changes the estimator: gradients
            are right on average over the draws that were kept, not over all. Fresh draws when not given. A table lies
            in cache.folder and belongs to these base weights, pictures, noise settings and way of computing.
    """

    kind: Literal["adapter_off", "frozen_copy"] = "adapter_off"
    draws: int | None = None
