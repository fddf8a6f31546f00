"""Errors of the reference at fixed draws, kept on disk: the gradient needs no more of the reference than these numbers.

    L depends on the reference through A = e_ref − e_θ alone, so dL/dw = Σ_i (dL/dA_i)·(−de_θ,i/dw)

A run whose every group has K fixed draws of timestep and noise asks the reference once for each of them; another run of
other rates, β, objective or seed finds them there.
"""

from diffpref.reference_cache.needs import check_draws
from diffpref.reference_cache.opening import reference_table
from diffpref.reference_cache.table import ReferenceTable

__all__ = ["ReferenceTable", "check_draws", "reference_table"]
