"""Methods that kfac_flat is compared with, on the same interface: each prunes or wraps as its counterpart does."""

from baselines.ablations import PenaltyInThetaOnly, PenaltyInTrainingOnly
from baselines.apoz import APoZPruner
from baselines.data_free import DataFreePruner
from baselines.eigendamage import EigenDamagePruner, rotated
from baselines.hybrid import HybridPruner
from baselines.kron_pruning import ChannelOBDPruner, ChannelOBSPruner, KronOBDPruner, KronOBSPruner
from baselines.magnitude import MagnitudePruner
from baselines.random_ import RandomPruner
from baselines.sam import SAM
from baselines.snip import SNIP
from baselines.spectral_radius import SpectralRadius
from baselines.taylor import GateTaylorPruner, TaylorPruner
from baselines.weight import MagnitudeWeightPruner

__all__ = [
    "SAM",
    "SNIP",
    "APoZPruner",
    "ChannelOBDPruner",
    "ChannelOBSPruner",
    "DataFreePruner",
    "EigenDamagePruner",
    "GateTaylorPruner",
    "HybridPruner",
    "KronOBDPruner",
    "KronOBSPruner",
    "MagnitudePruner",
    "MagnitudeWeightPruner",
    "PenaltyInThetaOnly",
    "PenaltyInTrainingOnly",
    "RandomPruner",
    "SpectralRadius",
    "TaylorPruner",
    "rotated",
]
