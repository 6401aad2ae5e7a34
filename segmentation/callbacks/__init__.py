"""Lightning callbacks: pictures while training, a report at the end, files from predict."""

from .prediction_logger import PredictionLogger
from .prediction_writer import PredictionWriter
from .report import Report

__all__ = ["PredictionLogger", "PredictionWriter", "Report"]
