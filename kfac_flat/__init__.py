"""Neural networks that get smaller while they train, steered toward flat minima.

:class:`FlatKFAC` wraps a torch optimizer and penalises the spectral radius of the Kronecker-factored curvature;
:class:`NeuronPruner` removes whole neurons and channels between epochs. Together they are HGNP
[Ebrahimi & Klabjan, arXiv 2111.08577].
"""

from kfac_flat.curvature import likelihood
from kfac_flat.optimizer import FlatKFAC

__all__ = ["FlatKFAC", "likelihood"]
__version__ = "0.1.0"
