"""Lightning callbacks: further scores, pictures while training, DenseCRF, a report at the end, files from predict."""

from .boundary_scores import BoundaryScores
from .dense_crf import DenseCRF
from .em_scores import EMScores
from .prediction_logger import PredictionLogger
from .prediction_writer import PredictionWriter
from .report import Report

__all__ = ["BoundaryScores", "DenseCRF", "EMScores", "PredictionLogger", "PredictionWriter", "Report"]
