"""Methods that kfac_flat is compared with, on the same interface: each prunes or wraps as its counterpart does."""

from baselines.eigendamage import EigenDamagePruner, rotated
from baselines.kron_pruning import ChannelOBDPruner, ChannelOBSPruner, KronOBDPruner, KronOBSPruner
from baselines.magnitude import MagnitudePruner

__all__ = [
    "ChannelOBDPruner",
    "ChannelOBSPruner",
    "EigenDamagePruner",
    "KronOBDPruner",
    "KronOBSPruner",
    "MagnitudePruner",
    "rotated",
]
