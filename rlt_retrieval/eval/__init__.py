"""Retrieval evaluation on plain arrays; importing it loads neither torch nor matplotlib."""

from rlt_retrieval.annotations import ek100_relevancy
from rlt_retrieval.eval.metrics import evaluate, mean_average_precision, ndcg, recall_at_k

__all__ = ["ek100_relevancy", "evaluate", "mean_average_precision", "ndcg", "recall_at_k"]
