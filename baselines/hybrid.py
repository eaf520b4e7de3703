"""The hybrid: Taylor while most neurons are there, HGNP from a threshold on.

Source: Ebrahimi & Klabjan, arXiv 2111.08577, section 4.4. Its threshold is a sparsity that a Lasso predicts from
statistics of data set and model; here it is the share of the neurons that are left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kfac_flat import NeuronPruner
from kfac_flat.changes import Change, setting
from kfac_flat.pruning.layers import is_producer
from kfac_flat.pruning.remaining import Removal

# ---------------------------------------------------------------- the pruner


class HybridPruner(NeuronPruner):
    """Choose by one pruner's scores until few enough neurons are left, and by Theta from then on.

    Each event goes wholly by one of them, as the share of the neurons that are left at its start says. Both have been
    scoring since the last event, so that neither starts from nothing at the switch. All else is as in NeuronPruner.

    Args:
        model: As for NeuronPruner, like all that follows.
        optimizer: With the penalty of :class:`kfac_flat.FlatKFAC`, Theta is HGNP's.
        example_inputs: What the model is called with.
        taylor: The pruner that chooses first: a subclass of NeuronPruner.
        threshold: Share of the neurons left, in [0, 1], above which it chooses: 1 for never, 0 for always. See
            :class:`~baselines.hybrid.ThresholdPredictor`.
        taylor_options: Options of its own.
        options: Options of NeuronPruner, for both.

    Raises:
        TypeError: if ``taylor`` is no kind of NeuronPruner.
        ValueError: as NeuronPruner does, or if ``threshold`` is out of range.

    Example:
        >>> from baselines import MagnitudePruner
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = {"target": 0.75, "start": 1, "events": 2}
        >>> pruner = HybridPruner(
        ...     model, optimizer, torch.randn(1, 4), taylor=MagnitudePruner, threshold=0.6, **schedule
        ... )
        >>> for _ in range(2):
        ...     nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        ...     optimizer.step()
        ...     print(pruner.chooses, pruner.step().widths_after["0"])
        MagnitudePruner 3
        NeuronPruner 2
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        taylor: type[NeuronPruner],
        threshold: float,
        taylor_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(taylor, type) and issubclass(taylor, NeuronPruner)):
            raise TypeError(f"taylor must be a subclass of NeuronPruner, not {taylor!r}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold!r} must lie in [0, 1]")
        super().__init__(model, optimizer, example_inputs, **options)
        self._threshold = threshold
        # No epoch of the other pruner ever ends, so that it cannot tell how many steps there are in one.
        own = {**options, "readings": None, **(taylor_options or {})}
        self._taylor = taylor(model, optimizer, example_inputs, **own)

    @property
    def chooses(self) -> str:
        """Name of the pruner by whose scores the next neurons go."""
        return type(self._taylor).__name__ if self._in_first_part() else NeuronPruner.__name__

    def _in_first_part(self) -> bool:
        return 1 - self.sparsity > self._threshold

    def _scores(self) -> list[float] | None:
        return self._taylor._scores() if self._in_first_part() else super()._scores()

    def _cut(self, removal: Removal) -> list[Change]:
        """Prepare a cut that the other pruner follows."""
        followed = {"_left": removal.left, "_saliency": self._taylor._unscored(removal.left)}
        return [*super()._cut(removal), setting(self._taylor, followed)]

    def undo(self) -> None:
        """Put back the neurons that the last removal took; the pruner that chose first scores anew from then on."""
        super().undo()
        self._taylor._left, self._taylor._saliency = self._left, self._taylor._unscored(self._left)

    def state_dict(self) -> dict[str, Any]:
        """Return what NeuronPruner does, and the scores of the pruner that chooses first under ``"taylor"``."""
        return {**super().state_dict(), "taylor": self._taylor._saliency.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Cut the fresh dense model to the recorded shape and go on from there; as NeuronPruner does."""
        if "taylor" not in state_dict:
            raise ValueError("this is no state of a HybridPruner: it lacks taylor")
        super().load_state_dict(state_dict)
        self._taylor._saliency.load_state_dict(state_dict["taylor"])


# ---------------------------------------------------------------- the threshold


@dataclass(frozen=True)
class Statistics:
    """What is known of a task before anything is trained.

    Attributes:
        classes: Number of classes.
        examples: Number of training examples.
        parameters: Number of the model's parameters.
        layers: Number of its layers with neurons: Linear and convolutions.
    """

    classes: int
    examples: int
    parameters: int
    layers: int

    @classmethod
    def of(cls, model: nn.Module, *, classes: int, examples: int) -> Statistics:
        """Count the model's part.

        Example:
            >>> Statistics.of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), classes=3, examples=100)
            Statistics(classes=3, examples=100, parameters=67, layers=2)
        """
        parameters = sum(p.numel() for p in model.parameters())
        return cls(classes, examples, parameters, sum(is_producer(module) for module in model.modules()))

    def features(self) -> list[float]:
        """Return their logarithms: such numbers differ by factors."""
        return [math.log(value) for value in asdict(self).values()]


class ThresholdPredictor:
    """Predict the threshold of a task from its statistics: a Lasso on experiments whose best threshold is known.

    Features are standardised, so that the Lasso's penalty means the same to all. Needs scikit-learn, which
    comes with the extra ``baselines``.

    Args:
        alpha: Weight of the Lasso's penalty; the larger, the fewer statistics count.

    Example:
        >>> known = [Statistics(10, 1000, 10**5, 4), Statistics(100, 1000, 10**5, 4), Statistics(1000, 1000, 10**5, 4)]
        >>> predictor = ThresholdPredictor(alpha=1e-4).fit(known, [0.2, 0.4, 0.6])
        >>> round(predictor.predict(Statistics(100, 1000, 10**5, 4)), 2), sorted(predictor.weights())
        (0.4, ['classes'])
    """

    def __init__(self, alpha: float = 0.01) -> None:
        from sklearn.linear_model import Lasso  # type: ignore[import-untyped]
        from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
        from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

        self._lasso = Lasso(alpha=alpha)
        self._pipeline = make_pipeline(StandardScaler(), self._lasso)
        self._fitted = False

    def fit(self, tasks: Sequence[Statistics], thresholds: Sequence[float]) -> ThresholdPredictor:
        """Learn from experiments, each task with its best threshold (:func:`~baselines.hybrid.best_threshold`).

        Raises:
            ValueError: if there are fewer than two, or not as many thresholds as tasks.
        """
        if len(tasks) < 2 or len(tasks) != len(thresholds):
            raise ValueError(f"{len(tasks)} tasks with {len(thresholds)} thresholds: give at least two, one for each")
        self._pipeline.fit([task.features() for task in tasks], list(thresholds))
        self._fitted = True
        return self

    def predict(self, task: Statistics) -> float:
        """Return the threshold to use for a task, in [0, 1].

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        self._check_fitted()
        return min(1.0, max(0.0, float(self._pipeline.predict([task.features()])[0])))

    def weights(self) -> dict[str, float]:
        """Return the weights of the statistics that count, by name, in thresholds per standard deviation."""
        self._check_fitted()
        names = Statistics.__dataclass_fields__
        return {name: float(w) for name, w in zip(names, self._lasso.coef_, strict=True) if w}

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise RuntimeError("nothing has been learned yet: call fit() with tasks and their best thresholds")


def best_threshold(left: Sequence[float], taylor: Sequence[float], hgnp: Sequence[float]) -> float:
    """Return the threshold under which the hybrid of two known runs has the largest area under its accuracy.

    Args:
        left: Shares of the neurons left, in [0, 1], different ones.
        taylor: Accuracy at each share when Taylor chooses.
        hgnp: Accuracy at each share when HGNP chooses.

    Returns:
        0, 1, or the middle between two of the shares; of equals, the one that leaves most to HGNP.

    Raises:
        ValueError: if there are fewer than two shares, or not as many accuracies.

    Example:
        >>> best_threshold([1.0, 0.8, 0.4, 0.2], [0.9, 0.8, 0.5, 0.1], [0.9, 0.7, 0.6, 0.5])
        0.6000000000000001
    """
    runs = sorted(zip(left, taylor, hgnp, strict=True))
    if len(runs) < 2:
        raise ValueError("an area takes at least two shares: give the accuracies of both runs at each of them")
    shares = [share for share, _, _ in runs]
    candidates = [1.0, *((a + b) / 2 for a, b in itertools.pairwise(reversed(shares))), 0.0]
    return max(candidates, key=lambda threshold: area(shares, [t if s > threshold else h for s, t, h in runs]))


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under a polygon through the points, x ascending [HGNP, table 4, compares the area of accuracies].

    Example:
        >>> area([0.0, 0.5, 1.0], [0.0, 1.0, 1.0])
        0.75
    """
    return float(torch.trapezoid(torch.tensor(y, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)))
