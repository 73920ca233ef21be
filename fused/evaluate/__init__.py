"""Evaluation of a trained model on a list of videos: `python -m fused.evaluate`, in Python `evaluate`.

    from fused.evaluate import Settings, evaluate
    results = evaluate("runs/first/model", "videos/val", settings=Settings(views=4, crops=3))
    results.numbers["top1"]

`evaluate_retrieval` is `--task retrieval`, of a video-text model on a file of captions.
"""

from fused.evaluate.protocols import PROTOCOLS
from fused.evaluate.results import ClassResult, Results
from fused.evaluate.retrieval import evaluate_retrieval
from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.run import Evaluation, evaluate
from fused.evaluate.settings import Settings

__all__ = [
    "PROTOCOLS",
    "ClassResult",
    "Evaluation",
    "Results",
    "RetrievalSettings",
    "Settings",
    "evaluate",
    "evaluate_retrieval",
]
