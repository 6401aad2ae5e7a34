"""Metrics: those of the confusion matrix, IoU near contours, and the errors of the ISBI 2012 challenge."""

from .boundary import BoundaryIoU, TrimapIoU
from .confusion import ConfusionMatrix, confusion_metrics
from .membranes import EMErrors

__all__ = ["BoundaryIoU", "ConfusionMatrix", "EMErrors", "TrimapIoU", "confusion_metrics"]
