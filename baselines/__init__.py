"""Methods that kfac_flat is compared with, on the same interface: each prunes or wraps as its counterpart does."""

from baselines.ablations import PenaltyInThetaOnly, PenaltyInTrainingOnly
from baselines.apoz import APoZPruner
from baselines.magnitude import MagnitudePruner
from baselines.random_ import RandomPruner
from baselines.taylor import GateTaylorPruner, TaylorPruner

__all__ = [
    "APoZPruner",
    "GateTaylorPruner",
    "MagnitudePruner",
    "PenaltyInThetaOnly",
    "PenaltyInTrainingOnly",
    "RandomPruner",
    "TaylorPruner",
]
