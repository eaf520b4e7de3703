"""Neural networks that get smaller while they train, steered toward flat minima.

:class:`FlatKFAC` wraps a torch optimizer and penalises the spectral radius of the Kronecker-factored curvature;
:class:`NeuronPruner` removes whole neurons and channels between epochs. Together they are HGNP
[Ebrahimi & Klabjan, arXiv 2111.08577].
"""

from kfac_flat.chained import ChainedOptimizer
from kfac_flat.curvature import likelihood
from kfac_flat.curvature.measure import spectral_radii
from kfac_flat.distributed import rewrap
from kfac_flat.optimizer import FlatKFAC
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.registration import register_rule
from kfac_flat.pruning.report import PruneReport, Size
from kfac_flat.pruning.scheduler import NeuronPruner
from kfac_flat.pruning.surgery import shrink

__all__ = [
    "ChainedOptimizer",
    "CutError",
    "FlatKFAC",
    "NeuronPruner",
    "PruneReport",
    "Size",
    "likelihood",
    "register_rule",
    "rewrap",
    "shrink",
    "spectral_radii",
]
__version__ = "0.1.0"
