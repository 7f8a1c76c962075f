"""Every decoder and encoder class of the installed transformers that builds as a tiny model: right, or refused in words.

What came out goes into data/results/architectures.csv when every class had its turn.
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from families import VOCAB, ids
from reference import close, layout_name, output
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from entrodrop_utils import dropping, residual
from entrodrop_utils.families.decoder import decoder_layers
from entrodrop_utils.residual import KINDS, SubBlock, find, layout_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RESULTS = Path(__file__).resolve().parents[1] / "data" / "results" / "architectures.csv"
CLASSES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), *MODEL_FOR_MASKED_LM_MAPPING_NAMES.items()})
MOST = 3_000_000  # parameters of a tiny model
DEPTH, LONGER = 4, 8  # layers; tokens that are predicted with a cache
rows: dict[tuple[str, str], tuple[str, str] | None] = {}

# What families call the sizes; those that a config does not have are left out
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_num_shared_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **{"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    **{"num_key_value_heads": 2, "rotary_dim": 4, "sliding_window": 5, "local_attention": 4, "global_attn_every_n_layers": 2},
    **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "max_window_layers": 0, "image_size": 28, "patch_size": 14},
}
# A family that does not build with all of these builds without some of them
LEFT_OUT = [(), ("head_dim",), ("num_key_value_heads",), ("num_experts_per_tok",), ("head_dim", "num_key_value_heads")]


def settings(config: PreTrainedConfig, left_out: tuple[str, ...]) -> dict[str, object]:
    known = {*vars(config), *type(config).attribute_map} - {*left_out}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    nested = {name: {**part.to_dict(), **settings(part, left_out)} for name, part in parts.items() if part is not None}
    return {name: size for name, size in SIZES.items() if name in known} | nested


def build(model_type: str, name: str) -> PreTrainedModel | None:
    """A tiny random model whose branches are large enough to matter; None where these settings make none."""
    for left_out in LEFT_OUT:
        try:
            config_class, model_class = CONFIG_MAPPING[model_type], getattr(transformers, name)
            config = config_class(**settings(config_class(), left_out))
            with torch.device("meta"):
                assert sum(weight.numel() for weight in model_class(config).parameters()) < MOST
            torch.manual_seed(0)
            model = model_class(config).eval()
            for weight in model.parameters():
                spread = 0.2 * torch.randn_like(weight)
                weight.data = spread if weight.ndim > 1 else weight.data + spread
            if output(model, ids()).isfinite().all():
                return model
        except Exception:  # of whatever kind: these sizes do not suit the family
            continue
    return None


@contextmanager
def silenced(model: PreTrainedModel, sub_blocks: list[SubBlock]) -> Iterator[None]:
    """The dense model in which all weights of a branch's module are zero, or a block returns its input; whatever the suite does."""
    layers, layout, kept = decoder_layers(model), layout_of(model), []
    try:
        for layer, kind in sub_blocks:
            if kind == "block":
                kept.append((layers[layer], "forward", None))
                layers[layer].forward = unchanged(layers[layer].forward)
            else:
                for weight in layers[layer].get_submodule(next(iter(layout.branch(kind)))).parameters():
                    kept.append((weight, "data", weight.data))
                    weight.data = torch.zeros_like(weight.data)
        yield
    finally:
        for owner, name, value in kept:
            delattr(owner, name) if value is None else setattr(owner, name, value)


def unchanged(forward):
    def run(*args, **kwargs):
        found = forward(*args, **kwargs)
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *found[1:]) if isinstance(found, tuple) else state

    return run


@torch.no_grad()
def cached(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """The logits of the last tokens, one pass each; None where the model keeps no cache."""
    if not model.can_generate():
        return None
    found = model(tokens[:, :-LONGER], use_cache=True)
    logits = []
    for place in range(tokens.shape[1] - LONGER, tokens.shape[1]):
        if getattr(found, "past_key_values", None) is None:
            return None
        found = model(tokens[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
        logits.append(found.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def check_states(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    states, layout, layers = residual.states(model, tokens), layout_of(model), decoder_layers(model)
    assert len(states) == 2 * len(layers) + 1
    seen: dict[int, torch.Tensor] = {}

    def watch(i: int):
        return lambda _, args, kwargs, out: seen.update({i: out[0] if isinstance(out, tuple) else out})

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        output(model, tokens)
        assert all(close(states[2 * i + 2], out) for i, out in seen.items()), "boundaries"
        for i, layer in enumerate(layers):
            with silenced(model, [SubBlock(i, "mlp")]):
                output(model, tokens)
            between = layer.get_submodule(layout.norms[1])(states[2 * i + 1]) if layout.norms else states[2 * i + 1]
            assert close(seen[i], between), f"between the branches of layer {i}"
            assert not close(states[2 * i + 1], states[2 * i])
    finally:
        for handle in handles:
            handle.remove()


def sets(model: PreTrainedModel, kind: str) -> list[list[SubBlock]]:
    single = [[sub_block] for sub_block in find(model, kind) if dropping._can_be_dropped(model, sub_block)]
    return [*single, single[0] + single[-1]] if len(single) > 1 and len(single[0] + single[-1]) < DEPTH else single


def check_drops(model: PreTrainedModel, kind: str, tokens: torch.Tensor) -> None:
    dense, own = output(model, tokens), cached(model, tokens)
    consistent = own is not None and close(own, dense[:, -LONGER:])
    for chosen in sets(model, kind):
        with silenced(model, chosen):
            expected = output(model, tokens)
        with dropping.dropped(model, chosen):
            assert close(output(model, tokens), expected), f"without {chosen} it is not that of a zero contribution"
            if consistent:
                assert close(cached(model, tokens), expected[:, -LONGER:]), f"without {chosen} the cache says something else"
        assert not close(expected, dense)
        assert torch.equal(output(model, tokens), dense), "not as before"


@pytest.fixture(scope="module", autouse=True)
def table():
    """Write the table once every class had its turn."""
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()
    if rows.keys() == set(CLASSES):
        found = {key: row for key, row in rows.items() if row is not None}
        with open(RESULTS, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["model_type", "class", "layout or reason", "outcome"])
            writer.writerows([*key, reason[:100], outcome] for key, (reason, outcome) in found.items())
        assert len(found) > 180


@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_a_class_is_right_or_refused_in_words(model_type, name):
    rows[model_type, name] = None
    model, tokens = build(model_type, name), ids(2, 20)
    if model is None:
        pytest.skip("these settings build no tiny model of it")
    rows[model_type, name] = ("", "wrong")
    before = output(model, tokens)
    refusal = refused(lambda: layout_name(model), model)
    assert torch.equal(output(model, tokens), before)
    if refusal is not None:
        rows[model_type, name] = (refusal, "refused")
        return
    layout, found = layout_name(model), {}
    check_states(model, tokens)
    for kind in KINDS:
        found[kind] = refused(lambda kind=kind: check_drops(model, kind, tokens), model)
        assert torch.equal(output(model, tokens), before)
    reasons = [f"{kind}: {refusal}" for kind, refusal in found.items() if refusal]
    right = [kind for kind, refusal in found.items() if refusal is None]
    rows[model_type, name] = ("; ".join([layout, *reasons]), "right" if not reasons else f"right: {', '.join(right) or 'states'}")


def refused(run: Callable, model: PreTrainedModel) -> str | None:
    """The part of a refusal that differs between families; None where nothing was refused."""
    try:
        run()
        return None
    except ValueError as error:
        text = str(error)
    text = text.removeprefix(f"the layers of {type(model).__name__} ").removeprefix(f"{type(model).__name__} ")
    text = text.partition(" have no known layout")[0].partition("). Scores and drops")[0]
    text = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    return text.partition("are not the model's (")[2] or text
