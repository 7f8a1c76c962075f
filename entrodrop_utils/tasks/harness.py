"""Tasks of lm-evaluation-harness: its definitions, prompts, metrics and standard errors, with our own log-likelihoods.

The harness asks a model for log-likelihoods of continuations. When it asks the first time, ``loglikelihoods_by_set`` computes those
of all sets of dropped sub-blocks. Of tasks with free answers it asks for continuations, which each pruned model generates itself.
"""

import difflib
import functools
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from unittest import mock

import lm_eval
import numpy as np
import pandas as pd
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm.std import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import cache
from ..dropping import Repair, dropped
from ..layerwise import Bar, distinct_sets, set_name
from ..processes import share_of, split_map
from ..residual import SubBlock
from ..text import quiet_datasets
from .loglikelihoods import loglikelihoods_by_set


class TaskUnavailable(RuntimeError):
    """The data of a task are not available."""


BOOTSTRAP = 1000  # draws, for the standard errors of metrics that are no means
FEWSHOT_SEED = 1234  # that of the harness's own command line
GENERATED = 32  # answers that are generated at a time


class PrunedLM(HFLM):
    """The model without ``current`` (one of its sets), repaired if a repair is given, as the harness expects a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sets: Iterable[Sequence[SubBlock]] = ((),),
        repair: Repair | None = None,
    ):
        with quiet_harness():
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=GENERATED)
        self.sets, self.repair = distinct_sets(model, sets), repair
        self.current, self.answers = self.sets[0], {one: {} for one in self.sets}

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None):
        most = self.max_length + 1
        questions = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-most:]  # too long: the beginning is cut off, as the harness does
            questions.append((tuple(whole[: -len(continuation)]), tuple(continuation)))
        if missing := [question for question in dict.fromkeys(questions) if question not in self.answers[self.current]]:
            for one, found in loglikelihoods_by_set(self.model, missing, self.sets, self.repair).items():
                self.answers[one].update(found)
        return [self.answers[self.current][question] for question in questions]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model without ``current`` answers, batch by batch, long prompts first; batches are split over the processes."""
        order = sorted(range(len(requests)), key=lambda n: (-len(requests[n].args[0]), n))
        batches = [order[start : start + GENERATED] for start in range(0, len(order), GENERATED)]
        base, name = cache.repaired(cache.model_key(self.model, "tasks.harness"), self.repair), set_name(self.current)
        with Bar(len(share_of(len(batches))), f"{len(requests)} answers") as done:

            def answered(batch: list[int]) -> list[str]:
                chosen = [requests[n] for n in batch]

                def compute(_: list[str]) -> pd.DataFrame:
                    with dropped(self.model, self.current, self.repair):
                        texts = super(PrunedLM, self).generate_until(chosen, disable_tqdm=True)
                    done()
                    return pd.DataFrame({"set": name, "text": texts})

                entry = cache.subkey(base, lm_eval.__version__, *(str(request.args) for request in chosen))
                return cache.rows_by_set("generated", entry, [name], compute, done).text.tolist()

            texts = [text for part in split_map(answered, batches) for text in part]
        return [text for _, text in sorted(zip(order, texts, strict=True))]


@functools.cache
def _manager(own: str) -> TaskManager:
    """The tasks of the harness and those in a folder, read once: the harness has thousands."""
    return TaskManager(include_path=own or None)


def check_tasks(names: Iterable[str], own: str = "") -> None:
    """Raises ValueError for a task that does not exist, with similar names."""
    known = _manager(own).all_tasks
    for name in names:
        if name not in known:
            like = ", ".join(difflib.get_close_matches(name, known)) or "none is spelt like it"
            raise ValueError(
                f"unknown task {name!r} among the {len(known)} of lm-evaluation-harness and this suite (alike: {like})"
            )


def _loaded(name: str, own: str) -> dict:
    """A task or group as the harness evaluates it; errors are those of ``evaluate_task``."""
    check_tasks([name], own)
    try:
        loaded = _manager(own).load([name])
    except Exception as error:  # datasets and the hub raise a dozen kinds
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise TaskUnavailable(f"the data of {name} cannot be had here ({reason})") from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def worked_answers(name: str, limit: int, own: str = "") -> list[tuple[str, str]]:
    """The first prompts of a task with free answers, as the harness asks them, each with the right answer and its steps.

    Raises:
        ValueError: a task that does not exist, a group of tasks, or one whose answers are choices.
        TaskUnavailable: its data are not available.
    """
    with quiet_harness():
        task, *more = _loaded(name, own)["tasks"].values()
        if more:
            raise ValueError(f"{name} is a group of {1 + len(more)} tasks: name one of them")
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"{name} has no free answers: the harness asks it as {task.OUTPUT_TYPE}")
        task.build_all_requests(limit=limit)
    return [(asked.args[0], task.config.target_delimiter + task.doc_to_target(asked.doc)) for asked in task.instances]


def evaluate_task(lm: PrunedLM, name: str, limit: int | None = None, own: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """One task (or group of tasks) for every set of ``lm``.

    Args:
        limit: at most so many items, which a group shares among its tasks; None for all.
        own: a folder of further tasks.
    Returns:
        set, task, metric, value, stderr, chance, n (a group is one row a metric), and set, task, metric, item, value (single
        items of single tasks, for metrics that are means over items).
    Raises:
        ValueError: a task that does not exist.
        TaskUnavailable: its data are not available.
    """
    scores, items = [], []
    with quiet_harness():
        loaded = _loaded(name, own)
        share = None if limit is None else math.ceil(limit / len(loaded["tasks"]))
        for one in lm.sets:
            lm.current = one
            found = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=share, bootstrap_iters=BOOTSTRAP)
            chances = {task: _chance(loaded["tasks"][task], samples) for task, samples in found["samples"].items()}
            scores += [(lm.current, *row) for row in _scores(found, name, chances)]
            items += [(lm.current, *row) for row in _items(found)]
    columns = ["set", "task", "metric", "value", "stderr", "chance", "n"]
    return pd.DataFrame(scores, columns=columns), pd.DataFrame(items, columns=["set", "task", "metric", "item", "value"])


def _chance(task, samples: list[dict]) -> float:
    """The accuracy of guessing: the mean of 1 / choices; 0 for tasks without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    return float(np.mean([1 / len(sample["arguments"]) for sample in samples]))


def _scores(found: dict, name: str, chances: dict[str, float]) -> Iterator[tuple]:
    """task, metric, value, stderr, chance, n of a task or group; of the group's tasks if the group has no score."""
    done = {task: len({sample["doc_id"] for sample in samples}) for task, samples in found["samples"].items()}
    whole = found.get("groups", {}).get(name) or found["results"].get(name) or {}
    for task in [name] if any("," in key for key in whole) else done:
        within = [task] if task in done else list(done)
        n = sum(done[one] for one in within)
        of = found["groups"][task] if task not in done else found["results"][task]
        for metric, kept, value in (
            (*key.split(",", 1), value) for key, value in of.items() if "," in key and "_stderr," not in key
        ):
            chance = sum(chances[one] * done[one] for one in within) / n if metric.startswith("acc") else math.nan
            stderr = of.get(f"{metric}_stderr,{kept}")
            yield task, _metric_name(metric, kept), float(value), math.nan if stderr in (None, "N/A") else float(stderr), chance, n


def _items(found: dict) -> Iterator[tuple]:
    """task, metric, item, value of every metric that is a number for each item."""
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (bool, int, float)):
                    yield task, _metric_name(metric, sample["filter"]), sample["doc_id"], float(sample[metric])


def _metric_name(metric: str, kept: str) -> str:
    """A metric, with the filter that reads the answer from the text where a task has several."""
    return metric if kept == "none" else f"{metric} ({kept})"


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without the harness's own output, which would end up in notebooks. Errors are raised as usual."""
    names = ("lm_eval", "huggingface_hub")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            for bar in ("lm_eval.api.task.tqdm", "lm_eval.api.model.tqdm", "lm_eval.models.huggingface.tqdm", "tqdm.tqdm"):
                stack.enter_context(mock.patch(bar, lambda *args, **named: tqdm(*args, **named | {"disable": True})))
            stack.enter_context(mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(quiet_datasets())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
