"""Methods that kfac_flat is compared with, on the same interface: each prunes or wraps as its counterpart does."""

from baselines.data_free import DataFreePruner
from baselines.hybrid import HybridPruner
from baselines.magnitude import MagnitudePruner
from baselines.sam import SAM
from baselines.snip import SNIP
from baselines.spectral_radius import SpectralRadius
from baselines.weight import MagnitudeWeightPruner

__all__ = [
    "SAM",
    "SNIP",
    "DataFreePruner",
    "HybridPruner",
    "MagnitudePruner",
    "MagnitudeWeightPruner",
    "SpectralRadius",
]
