"""The errors of the ISBI 2012 challenge, for models of two classes: membrane and cell."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from ..base import SegmentationModule
from ..errors import UserError
from ..losses import IGNORE
from ..metrics.membranes import ERRORS, EMErrors
from .evaluation import EvaluationMetric


class EMScores(EvaluationMetric):
    """Pixel, Rand and warping error, in `validate` and `test`; see `EMErrors`.

    Each error is the lowest over the thresholds of the membrane probability. As in the challenge, the threshold is
    chosen on the same data. It logs ``test/rand_error``, ``test/rand_error_threshold`` and so on, or the same under
    ``val/``.

    Args:
        membrane: label of the membrane, 0 or 1; 0 in `ISBIEM`.
        thresholds: a pixel is cell where its membrane probability is below the threshold.

    Raises:
        UserError: if `membrane` is neither 0 nor 1, or a threshold is not above 0 and at most 1; in a run, if the model
            has more than two classes, or if a mask has ignored pixels.
    """

    def __init__(
        self,
        membrane: int = 0,
        thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ) -> None:
        if membrane not in (0, 1):
            raise UserError(f"EMScores: membrane must be one of the two labels, 0 or 1, got {membrane}")
        self.membrane, self.errors = membrane, EMErrors(thresholds)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check the number of classes, before a training run too."""
        if stage != "predict" and pl_module.num_classes > 2:
            raise UserError(
                f"EMScores is for two classes, membrane and cell, but the model has {pl_module.num_classes} classes: "
                "remove EMScores from trainer.callbacks"
            )

    def build(self, module: SegmentationModule) -> EMErrors:
        """Return the metric."""
        return self.errors

    def update(self, trainer: L.Trainer, module: SegmentationModule, outputs: Any, batch: Any) -> None:
        """Give the metric membrane probabilities and true cells."""
        if (batch["mask"] == IGNORE).any():
            raise UserError(
                f"EMScores needs a label for every pixel, but masks of {', '.join(batch['name'])} ignore some: "
                "remove EMScores from trainer.callbacks"
            )
        last = module.probabilities(outputs["logits"])[:, -1]  # of label 1, whether the model has one logit or two
        self.errors.update(last if self.membrane else 1 - last, batch["mask"] != self.membrane)

    def values(self, module: SegmentationModule) -> dict[str, Any]:
        """Return the lowest of each error, and its threshold."""
        values: dict[str, Any] = {}
        for name, errors in zip(ERRORS, self.errors.compute(), strict=True):
            values |= {name: errors.min(), f"{name}_threshold": self.errors.thresholds[int(errors.argmin())]}
        return values
