"""Lightning callbacks: pictures while training, DenseCRF, a report at the end, files from predict."""

from .dense_crf import DenseCRF
from .prediction_logger import PredictionLogger
from .prediction_writer import PredictionWriter
from .report import Report

__all__ = ["DenseCRF", "PredictionLogger", "PredictionWriter", "Report"]
