"""Variance of a step's gradient from products of its groups' gradients, with intervals.

For a step of B groups with gradients g_i, each of mean μ and total variance V = E|g|² − |μ|²,

    tr Cov(1/B·Σ g_i) = (V + C)/B,    C = 1/B·Σ_{i≠j} (E g_i·g_j − |μ|²)

and C = 0 for independent draws. So a way to draw is judged by 1 + C/V, its variance over that of independent draws:

    stratified     C = |μ|² − 1/S·Σ_s |m_s|², m_s the mean gradient in stratum s: minus the variance between strata
    neighbour      C = E g(a, t, ε)·g(b, t', −ε) − |μ|²       two pairs a, b and timesteps t, t' share a noise
    a pair twice   C = E g(a, t, ε)·g(a, t', ±ε) − |μ|²       half as many pairs, each drawn twice

All expectations are means of products of different draws (U-statistics), so nothing is biased upwards by noise. With
V_data = Var_a E[g | a], from two draws of a pair, V − V_data is the variance that timesteps and noise make.

Intervals: a percentile bootstrap over steps, whose pairs are distinct. A product of a step with itself, which the
bootstrap repeats, is left out; that makes intervals rather too wide than too narrow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from diffpref.config import NoiseConfig
from spread.draws import Gradients

ALIKE = ("iid", "stratified", "neighbour", "mirrored", "mirrored afresh")  # a single pair's draw is the same in all
RESAMPLES = 2000
Array = np.ndarray
Row = dict[str, float | None]


def quantiles(level: Array, noise: NoiseConfig) -> Array:
    """Levels -> places in [0,1) of their distribution."""
    if noise.timesteps == "uniform":
        return level
    safe = np.clip(level, 1e-12, 1 - 1e-7)
    return norm.cdf((np.log(safe / (1 - safe)) - noise.logit_mean) / noise.logit_std)


@dataclass(frozen=True)
class Weighted:
    """Means over n steps that count weights [R,n] times, R times over."""

    weights: Array

    def mean(self, values: Array) -> Array:
        """Values [n] -> [R]."""
        return self.weights @ values / self.weights.sum(1)

    def cross(self, products: Array) -> Array:
        """Sum over pairs of different steps, products [n,n] -> [R]."""
        w = self.weights
        return ((w @ products) * w).sum(1) - w**2 @ np.diag(products)


class Products:
    """The products that the estimates are made of, of n steps."""

    def __init__(self, found: Gradients, noise: NoiseConfig):
        self.found = {name: value.double().numpy() for name, value in found.items()}
        self.noise, (self.steps, self.pairs) = noise, found["iid"].shape[:2]

    def sums(self, ways: tuple[str, ...]) -> Array:
        """Mean gradient of each step over its groups and these ways, [n,SKETCH]."""
        return np.mean([self.found[way].mean(1) for way in ways], axis=0)

    def means(self, ways: tuple[str, ...], others: tuple[str, ...] | None = None) -> Callable[[Weighted], Array]:
        """|μ|², or μ·μ' of two lots of ways."""
        first, second = self.sums(ways), self.sums(others or ways)
        products = first @ second.T
        ones = np.ones_like(products)
        return lambda over: over.cross(products) / over.cross(ones)

    def lengths(self, ways: tuple[str, ...]) -> Array:
        """Mean |g|² in each step, [n], exact."""
        return np.mean([self.found[f"{way}/squared"].mean(1) for way in ways], axis=0)

    def along(self, way: str, other: str, shift: int = 0) -> Array:
        """Mean of g_i·g'_{i+shift} in each step, [n]."""
        return (self.found[way] * np.roll(self.found[other], -shift, axis=1)).sum(2).mean(1)

    def between(self) -> Callable[[Weighted], Array]:
        """1/S·Σ_s |m_s|² over the strata."""
        parts = [self.stratum(s) for s in range(self.pairs)]
        return lambda over: np.mean([over.cross(p) / over.cross(n) for p, n in parts], axis=0)

    def stratum(self, s: int) -> tuple[Array, Array]:
        """Products [n,n] of sums over a stratum's groups in each step, and how many products each is the sum of."""
        sums, counts = 0.0, 0.0
        for way, level in (("iid", "iid"), ("mirrored", "iid"), ("neighbour", "iid"), ("stratified", "stratified")):
            places = quantiles(self.found[f"{level}/level"], self.noise)
            inside = np.minimum(places * self.pairs, self.pairs - 1).astype(int) == s
            sums = sums + np.einsum("nb,nbd->nd", inside, self.found[way])
            counts = counts + inside.sum(1)
        return sums @ sums.T, np.outer(counts, counts).astype(float)

    def whole(self, way: str) -> Array:
        """|mean of the step's gradients|², [n]."""
        return (self.found[way].mean(1) ** 2).sum(1)


# --- what is reported -------------------------------------------------------------------------------------------------


def estimates(products: Products) -> dict[str, Callable[[Weighted], Array]]:
    """Every number of the report, by name, as a function of the weights of the steps."""
    mean2, lengths = products.means(ALIKE), products.lengths(ALIKE)
    apart2, apart_lengths = products.means(("independent",)), products.lengths(("independent",))
    both, strata = products.means(ALIKE, ("independent",)), products.between()
    twice, mirrored = products.along("iid", "stratified"), products.along("iid", "mirrored")
    afresh, neighbour = products.along("iid", "mirrored afresh"), products.along("iid", "neighbour", 1)
    difference = products.found["independent"].mean(1) - products.sums(ALIKE)
    shift = difference @ difference.T

    def variance(over: Weighted) -> Array:
        return over.mean(lengths) - mean2(over)

    def data(over: Weighted) -> Array:
        return over.mean(twice) - mean2(over)

    def apart(over: Weighted) -> Array:
        return over.mean(apart_lengths) - apart2(over)

    def total(products_: Array) -> Callable[[Weighted], Array]:
        return lambda over: 1 + (over.mean(products_) - mean2(over)) / variance(over)

    def given(products_: Array) -> Callable[[Weighted], Array]:
        """Of the part that timesteps and noise make, with the same pairs in both."""
        return lambda over: 1 + (over.mean(products_) - over.mean(twice)) / (variance(over) - data(over))

    def whole(way: str) -> Callable[[Weighted], Array]:
        """1 + C/V from the lengths of steps' gradients less those of their pairs' (whose tails are heavy)."""
        crossed = products.pairs * products.whole(way) - products.lengths((way,))
        return lambda over: 1 + (over.mean(crossed) - (products.pairs - 1) * mean2(over)) / variance(over)

    def stratified(over: Weighted) -> Array:
        return strata(over) - mean2(over)

    return {
        "mean squared": mean2,
        "variance of a pair": variance,
        "noise scale": lambda over: variance(over) / mean2(over),
        "share of the data": lambda over: data(over) / variance(over),
        "share between timesteps": lambda over: stratified(over) / variance(over),
        "ratio/stratified": lambda over: 1 - stratified(over) / variance(over),
        "ratio/antithetic neighbours": total(neighbour),
        "ratio/a pair twice": total(twice),
        "ratio/a pair twice, mirrored": total(mirrored),
        "ratio/a pair twice, mirrored, fresh timestep": total(afresh),
        "ratio/independent": lambda over: apart(over) / variance(over),
        "given the pairs/stratified": lambda over: 1 - stratified(over) / (variance(over) - data(over)),
        "given the pairs/antithetic neighbours": lambda over: (
            1 + (over.mean(neighbour) - mean2(over)) / (variance(over) - data(over))
        ),
        "given the pairs/a pair twice, mirrored": given(mirrored),
        "given the pairs/a pair twice, mirrored, fresh timestep": given(afresh),
        "whole steps/iid": whole("iid"),
        "whole steps/stratified": whole("stratified"),
        "independent/cosine of the means": lambda over: both(over) / np.sqrt(mean2(over) * apart2(over)),
        "independent/length of the mean": lambda over: np.sqrt(apart2(over) / mean2(over)),
        "independent/bias squared": lambda over: over.cross(shift) / over.cross(np.ones_like(shift)) / mean2(over),
        "independent/noise scale": lambda over: apart(over) / apart2(over) * mean2(over) / variance(over),
    }


def measured(found: Gradients, noise: NoiseConfig, seed: int = 0) -> dict[str, Row]:
    """Gradients of n steps -> each number with its 95 % interval; None where they are too few to tell."""
    products = Products(found, noise)
    n, rng = products.steps, np.random.default_rng(seed)
    once, again = Weighted(np.ones((1, n))), Weighted(rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float))
    report = {}
    for name, estimate in estimates(products).items():
        with np.errstate(invalid="ignore", divide="ignore"):  # of too few steps: |μ|² below 0, a stratum without pairs
            values, drawn = estimate(once), estimate(again)
        drawn = drawn[np.isfinite(drawn)]
        bounds = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else [np.nan, np.nan]
        row = dict(zip(("value", "low", "high"), map(float, (values[0], *bounds)), strict=True))
        report[name] = {key: value if np.isfinite(value) else None for key, value in row.items()}
    return report
