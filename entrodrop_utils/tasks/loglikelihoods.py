"""Log-likelihoods of continuations, for many sets of dropped sub-blocks at once.

A context that several continuations share runs once, and so do layers that several sets share. Results are cached by weights,
tokens and set, so a run that was stopped continues.
"""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import cache
from ..dropping import Repair
from ..families.self_check import measuring
from ..layerwise import MAX_TOKENS, Bar, DropSet, LayerwiseForward, set_name
from ..processes import share_of, split_map

Question = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a context and of a continuation
Answer = tuple[float, bool]  # log-likelihood of the continuation (nats), and whether greedy decoding would give it
Row = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # a context and its continuations
PACKED = 512  # tokens: the longest row of a context with several continuations


@measuring
def loglikelihoods_by_set(
    model: PreTrainedModel, questions: Sequence[Question], sets: Sequence[DropSet], repair: Repair | None = None
) -> dict[DropSet, dict[Question, Answer]]:
    """The answers of the model without each of the sets (of ``distinct_sets``) to each question, repaired if a repair is given.

    Batches of questions are split over the processes (``processes.split_map``).
    """
    batches = list(_batches(_rows(questions, _longest_packed(model))))
    named = {set_name(one): one for one in sets}
    answers: dict[DropSet, dict[Question, Answer]] = {one: {} for one in sets}
    base = cache.repaired(cache.model_key(model, "tasks.loglikelihoods"), repair)
    with Bar(len(share_of(len(batches))) * len(named), f"{len(questions)} questions") as done:

        def answered(batch: int) -> pd.DataFrame:
            rows = batches[batch]

            def compute(missing: list[str]) -> pd.DataFrame:
                return _answered(model, rows, [named[name] for name in missing], repair, done)

            return cache.rows_by_set("answers", cache.subkey(base, rows), named, compute, done)

        tables = split_map(answered, range(len(batches)))
    for rows, table in zip(batches, tables, strict=True):
        asked = [(context, continuation) for context, continuations in rows for continuation in continuations]
        for row in table.itertuples():
            answers[named[row.set]][asked[row.question]] = (row.logprob, row.greedy)
    return answers


def _rows(questions: list[Question], longest: int) -> list[Row]:
    """The questions grouped by context, a row within ``longest`` tokens; single ones last, short ones first."""
    groups: dict[tuple[int, ...], list[list[tuple[int, ...]]]] = {}
    for context, continuation in questions:
        rows = groups.setdefault(context, [[]])
        if rows[-1] and _length((context, (*rows[-1], continuation))) > longest:
            rows.append([])
        rows[-1].append(continuation)
    found = [(context, tuple(row)) for context, rows in groups.items() for row in rows]
    return sorted(found, key=lambda row: (len(row[1]) == 1, _length(row), row))


def _length(row: Row) -> int:
    """How many tokens of a row are run: the last of each continuation is only predicted."""
    context, continuations = row
    return len(context) + sum(len(continuation) - 1 for continuation in continuations)


def _batches(rows: list[Row]) -> Iterator[tuple[Row, ...]]:
    """Rows in order, as many as fit into ``MAX_TOKENS`` tokens when padded to the longest, which is the last.

    Single rows, which may be longer than those with several continuations, are by themselves: they need no mask of ours.
    """
    batch: list[Row] = []
    for row in rows:
        single = bool(batch) and (len(batch[0][1]) == 1) != (len(row[1]) == 1)
        if batch and (single or (len(batch) + 1) * _length(row) > MAX_TOKENS):
            yield tuple(batch)
            batch = []
        batch.append(row)
    if batch:
        yield tuple(batch)


def _packed(rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Rows as one padded batch: ids, what else the model is given, and the predictions to read (question, row, token, target).

    Continuations stand one after another behind their context, each seeing the context and itself, at the positions that it
    would have alone. A batch of single continuations is an ordinary padded one: nothing attends to what comes after it.
    """
    longest = max(map(_length, rows))
    ids, place = torch.zeros(len(rows), longest, dtype=torch.long), torch.arange(longest).repeat(len(rows), 1)
    part = torch.full((len(rows), longest), -1)  # which continuation a token belongs to; 0 is the context
    reads, question = [], 0
    for r, (context, continuations) in enumerate(rows):
        start = len(context)
        ids[r, :start], part[r, :start] = torch.tensor(context), 0
        for number, continuation in enumerate(continuations, 1):
            end = start + len(continuation) - 1
            ids[r, start:end] = torch.tensor(continuation[:-1], dtype=torch.long)
            place[r, start:end], part[r, start:end] = torch.arange(len(context), len(context) + end - start), number
            at = [len(context) - 1, *range(start, end)]
            reads += [(question, r, t, target) for t, target in zip(at, continuation, strict=True)]
            start, question = end, question + 1
    if all(len(continuations) == 1 for _, continuations in rows):
        return ids, {}, torch.tensor(reads)
    before = torch.arange(longest)[:, None] >= torch.arange(longest)
    sees = before & ((part[:, :, None] == part[:, None]) | (part[:, None] == 0))
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    return ids, {"attention_mask": mask[:, None], "position_ids": place}, torch.tensor(reads)


def _inputs(rows: Sequence[Row], model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """``_packed`` where the model is, masks in its dtype."""
    ids, inputs, reads = _packed(rows)
    if inputs:
        inputs["attention_mask"] = inputs["attention_mask"].to(model.dtype)
    return ids.to(model.device), {name: tensor.to(model.device) for name, tensor in inputs.items()}, reads.to(model.device)


@torch.inference_mode()
def _longest_packed(model: PreTrainedModel) -> int:
    """How long a row with several continuations may be; 0 where packed rows do not give this model what single ones give."""
    row = ((1, 2, 3), ((4, 5, 6, 7), (8, 9, 8), (5, 4, 3)))
    try:
        single = [_inputs([(row[0], (one,))], model)[0] for one in row[1]]
        alone = torch.cat([model.base_model(ids, use_cache=False)[0][0, len(row[0]) :] for ids in single])
        ids, inputs, _ = _inputs([row], model)
        packed = model.base_model(ids, use_cache=False, **inputs)[0][0, len(row[0]) :]
    except Exception:  # a family that takes no such mask or positions says so in its own way
        return 0
    same = torch.allclose(alone, packed, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    return min(PACKED, window or PACKED) if same else 0


def _answered(model: PreTrainedModel, rows: Sequence[Row], sets: list[DropSet], repair: Repair | None, done) -> pd.DataFrame:
    """The answers of one batch for each set: set (written), question, logprob (nats), greedy."""
    ids, inputs, reads = _inputs(rows, model)
    question, row, token, target = reads.T
    layerwise, found = LayerwiseForward(model, ids, repair, **inputs), []
    count = int(question.max()) + 1
    for one, state in layerwise.last_states(sets):
        logprob, greedy = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool)
        for some in torch.arange(len(reads)).split(MAX_TOKENS):
            logits = layerwise.logits(state[row[some], token[some]][None])[0].float()
            right = logits.gather(1, target[some, None])[:, 0] - logits.logsumexp(1)
            logprob.index_add_(0, question[some].cpu(), right.double().cpu())
            greedy[question[some][logits.argmax(1) != target[some]].cpu()] = False
        found.append(pd.DataFrame({"set": set_name(one), "question": range(count), "logprob": logprob, "greedy": greedy}))
        done()
    return pd.concat(found, ignore_index=True)
