"""Lightning callbacks: further metrics, pictures during training, DenseCRF, the report, and files from `predict`."""

from .boundary_scores import BoundaryScores
from .dense_crf import DenseCRF
from .em_scores import EMScores
from .evaluation import EvaluationCallback, EvaluationMetric
from .prediction_logger import PredictionLogger
from .prediction_writer import PredictionWriter
from .report import Report

__all__ = [
    "BoundaryScores",
    "DenseCRF",
    "EMScores",
    "EvaluationCallback",
    "EvaluationMetric",
    "PredictionLogger",
    "PredictionWriter",
    "Report",
]
