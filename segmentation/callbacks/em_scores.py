"""The errors of the ISBI 2012 challenge for models of two classes, membrane and cell."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from ..errors import UserError
from ..losses import IGNORE
from ..metrics.membranes import ERRORS, EMErrors


class EMScores(L.Callback):
    """Logs pixel, Rand and warping error, on `validate` and `test` but not within `fit`; see `EMErrors`.

    Each is the lowest over the thresholds of the membrane probability, found on the data that it is reported for, as
    the challenge does: ``test/rand_error``, at ``test/rand_error_threshold``, and so on, or ``val/...``.

    Args:
        membrane: label of the membrane, 0 or 1; 0 in `ISBIEM`.
        thresholds: a pixel is cell where its membrane probability is below.

    Raises:
        UserError: if `membrane` is neither 0 nor 1; in a run, if the model has more than two classes, or if pixels of
            a mask are ignored.
    """

    def __init__(
        self,
        membrane: int = 0,
        thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ) -> None:
        if membrane not in (0, 1):
            raise UserError(f"EMScores.membrane is a label of two, 0 or 1, got {membrane}")
        self.membrane, self.errors = membrane, EMErrors(thresholds)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew."""
        if pl_module.num_classes > 2:
            raise UserError(
                f"EMScores is for membrane and cell, but the model has {pl_module.num_classes} classes: take it out of "
                "trainer.callbacks"
            )
        self.errors.to(pl_module.device).reset()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        if trainer.state.fn == "fit":
            return
        if (batch["mask"] == IGNORE).any():
            raise UserError(
                f"EMScores needs a label for every pixel, but masks of {', '.join(batch['name'])} ignore some: take it "
                "out of trainer.callbacks"
            )
        last = pl_module.probabilities(outputs["logits"])[:, -1]  # of label 1, from one logit as from two
        self.errors.update(last if self.membrane else 1 - last, batch["mask"] != self.membrane)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the scores."""
        if trainer.state.fn == "fit":
            return
        split = "test" if trainer.testing else "val"
        for name, errors in zip(ERRORS, self.errors.compute(), strict=True):
            threshold = self.errors.thresholds[int(errors.argmin())]
            values = {name: float(errors.min()), f"{name}_threshold": threshold}
            pl_module.log_dict({f"{split}/{key}": value for key, value in values.items()}, sync_dist=True)

    # `test` is evaluated as `validate` is.
    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
