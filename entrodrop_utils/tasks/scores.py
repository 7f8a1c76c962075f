"""Scores on tasks: of one model, and of the model without each of many sets of sub-blocks."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..dropping import Repair
from ..families.self_check import measuring
from ..residual import SubBlock
from .harness import PrunedLM, TaskUnavailable, check_tasks, evaluate_task
from .local_tasks import build_tasks, is_local_task


def task_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Iterable[str], limit: int | Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Scores of a model on tasks of lm-evaluation-harness, or on the suite's own (``local_tasks.NAMES``).

    Args:
        limit: at most so many items a task, or of each task by name; a group of tasks shares them.
    Returns:
        task, metric, value, stderr (the harness's own), chance (the accuracy of a guess; nan where there is none), n, note (why
        there is no value, where the data cannot be had).
    Raises:
        ValueError: a task that does not exist.
    """
    return task_scores_by_set(model, tokenizer, names, [()], limit)[0].drop(columns="set")


@measuring
def task_scores_by_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Iterable[str],
    sets: Iterable[Sequence[SubBlock]],
    limit: int | Mapping[str, int] | None = None,
    repair: Repair | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``task_scores`` of the model without each of many sets of sub-blocks, doing once what they share; and every single item.

    Args:
        repair: of all these sub-blocks, by layer.

    Returns:
        set, then the columns of ``task_scores``; and set, task, part (of a group), metric, item, value, which pairs sets item by
        item.
    """
    names = list(names)
    own = str(build_tasks()) if any(map(is_local_task, names)) else ""
    check_tasks(names, own)
    lm, scores, items = PrunedLM(model, tokenizer, sets, repair), [], []
    for name in names:
        try:
            found, single = evaluate_task(lm, name, limit.get(name) if isinstance(limit, Mapping) else limit, own)
            scores.append(found.assign(note=""))
            items.append(single.rename(columns={"task": "part"}).assign(task=name))
        except TaskUnavailable as error:
            scores.append(pd.DataFrame({"set": lm.sets, "task": name, "metric": "", "n": 0, "note": str(error)}))
    columns = ["set", "task", "metric", "value", "stderr", "chance", "n", "note"]
    single = pd.concat(items, ignore_index=True) if items else pd.DataFrame()
    return (
        pd.concat(scores, ignore_index=True).reindex(columns=columns),
        single.reindex(columns=["set", "task", "part", "metric", "item", "value"]),
    )
