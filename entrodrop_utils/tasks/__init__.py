"""Accuracy on tasks: lm-evaluation-harness for the definitions, our own log-likelihoods for many pruned models at once.

``task_scores`` and ``task_scores_by_set`` are the entry points. ``harness`` connects lm-evaluation-harness, ``loglikelihoods``
answers its requests, ``local_tasks`` and ``items`` build tasks that need no download, ``retention`` compares with the dense model,
and ``encoders`` has the measure for encoders, which have no such tasks.
"""

from .scores import task_scores, task_scores_by_set

__all__ = ["task_scores", "task_scores_by_set"]
