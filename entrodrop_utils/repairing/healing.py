"""What training adds to a repair: a short self-distillation of the pruned model with LoRA (needs the extra ``heal``)."""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..dropping import Repair, check_drop_set
from ..families.decoder import decoder_layers
from ..families.modeling_entrodrop import RECORD
from ..families.self_check import evaluation_mode
from ..files import replacing
from ..progress import progress
from ..residual import SubBlock
from ..saving import remove
from ..text import text_digest

SAVED_EVERY = 10  # steps


def heal(
    model: PreTrainedModel,
    sub_blocks: Iterable[SubBlock],
    windows: Int[Tensor, "sequence token"],
    repair: Repair | None = None,
    steps: int = 60,
    rank: int = 8,
    rate: float = 1e-3,
    batch: int = 2,
    layers: Iterable[int] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
) -> Repair:
    """A repair whose weights were trained: LoRA (arXiv 2106.09685) on the layers around the cuts, merged.

    The loss is the divergence of the pruned model from the dense one on calibration text, so no labels are needed. The model itself
    is not changed; it and a copy are in memory.

    Args:
        repair: what the training starts from; its maps stay as they are.
        rate: of AdamW.
        batch: windows per step.
        layers: whose matrices are trained, as the model counts them: by default those of the cuts and their neighbours. The last
            three are the choice of arXiv 2411.15558, which trains the output head as well.
        folder: keeps the state of the training; the same call continues from there.
    Returns:
        A repair of exactly this set.
    Raises:
        ImportError: peft is not installed.
        ValueError: as ``dropped``; layers without matrices; a folder of another training.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("heal needs peft: pip install 'entrodrop-utils[heal]'") from error
    drop_set = sorted(check_drop_set(model, sub_blocks))
    depth, cuts = len(decoder_layers(model)), {s.layer for s in drop_set}
    wanted = set(layers) if layers is not None else {near for cut in cuts for near in (cut - 1, cut, cut + 1)}
    student = remove(copy.deepcopy(model), drop_set, repair)
    kept = getattr(student.config, RECORD)["kept"] if drop_set else list(range(depth))
    parts = decoder_layers(student)
    names = [n for n, part in parts.named_modules() if isinstance(part, nn.Linear) and kept[int(n.split(".")[0])] in wanted]
    if not names:
        raise ValueError(f"no layer among {sorted(wanted)} has a matrix to train")
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), parts)
    trained = {name: weight for name, weight in student.named_parameters() if "lora_" in name}
    for name, weight in student.named_parameters():
        weight.requires_grad_(name in trained)
    about = f"{len(windows)} windows ({text_digest(windows)}), {rank=}, {rate=}, {batch=}, {seed=}, {names}"
    with evaluation_mode(model), evaluation_mode(student):
        _train(model, student, trained, windows, steps, rate, batch, seed, folder and Path(folder) / "healing.pt", about)
    changed = dict(repair.changed) if repair else {}
    for name in names:
        part = parts.get_submodule(name)
        layer, _, path = name.partition(".")
        weight = part.get_base_layer().weight + part.get_delta_weight("default")
        changed[f"{kept[int(layer)]}.{path}.weight"] = weight.detach().float().clone()
    text = f"{len(windows)} windows of {windows.shape[1]} tokens (hash of the tokens: `{text_digest(windows)}`)"
    start = f"{repair.about}; then " if repair and repair.about else ""
    maps = {s: repair.maps[s] if repair else {} for s in drop_set}
    return Repair(maps, f"{start}{steps} steps of self-distillation with LoRA on {text}", None, changed, tuple(drop_set))


def _train(
    model: PreTrainedModel,
    student: PreTrainedModel,
    trained: dict[str, nn.Parameter],
    windows: Tensor,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    file: Path | None,
    about: str,
) -> None:
    """Take the steps that are left; which windows a step sees depends on its number alone."""
    optimiser = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    first = 0
    if file is not None and file.is_file():
        state = torch.load(file, weights_only=True)
        if state["about"] != about:
            raise ValueError(f"{file} belongs to another training: choose another folder")
        first = state["step"]
        optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(state["weights"][name])
    for step in progress(range(first, steps), "healing"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        ids = windows[torch.randperm(len(windows), generator=generator)[:batch]].to(model.device)
        with torch.no_grad():
            target = model(ids, use_cache=False).logits.float().log_softmax(-1)
        predicted = student(ids, use_cache=False).logits.float().log_softmax(-1)
        loss = nn.functional.kl_div(predicted.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if file is not None and ((step + 1) % SAVED_EVERY == 0 or step + 1 == steps):
            weights = {name: weight.detach() for name, weight in trained.items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as unfinished:
                state = {"about": about, "step": step + 1, "optimiser": optimiser.state_dict(), "weights": weights}
                torch.save(state, unfinished)
