"""Attention patterns, against attention computed by hand with loops and against a window that starts later."""

import math

import pandas as pd
import pytest
import torch
from families import ids, tiny
from tiny_llama import tiny_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from entrodrop_utils import scoring
from entrodrop_utils.attention import attention_on_first, restricted
from entrodrop_utils.families.decoder import decoder_layers
from entrodrop_utils.residual import states

RULES = {
    "full": lambda q, k: k <= q,
    "sliding window of 5": lambda q, k: q - k < 5,
    "sink masked": lambda q, k: (k > 0) | (q == 0),
    "sliding window of 3 and the first": lambda q, k: (q - k < 3) | (k == 0),
}


def by_hand(model, state, rule):
    """What the first layer's attention adds, a query, a head and a key at a time."""
    layer, n = model.model.layers[0], state.shape[1]
    attention, x = layer.self_attn, layer.input_layernorm(state)
    split = [part(x).view(1, n, -1, attention.head_dim).transpose(1, 2) for part in (attention.q_proj, attention.k_proj)]
    q, k = apply_rotary_pos_emb(*split, *model.model.rotary_emb(x, torch.arange(n)[None]))
    v = attention.v_proj(x).view(1, n, -1, attention.head_dim).transpose(1, 2)
    mixed = torch.zeros(n, q.shape[1], attention.head_dim)
    for query in range(n):
        for head in range(q.shape[1]):
            shared = head // attention.num_key_value_groups
            keys = [key for key in range(query + 1) if rule(query, key)]
            weights = [math.exp(float(q[0, head, query] @ k[0, shared, key]) / math.sqrt(attention.head_dim)) for key in keys]
            for weight, key in zip(weights, keys, strict=True):
                mixed[query, head] += weight / sum(weights) * v[0, shared, key]
    return attention.o_proj(mixed.flatten(1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_first_attention_is_that_of_a_loop_over_allowed_keys(name, kind, windows):
    model, rule = tiny_llama(2), RULES[name]
    model.set_attn_implementation(kind)
    with restricted(model, rule), torch.no_grad():
        before, after = states(model, windows[:1])[:2]
    with torch.no_grad():
        expected = by_hand(model, before, rule)
    torch.testing.assert_close((after - before)[0], expected, rtol=1e-4, atol=1e-5)


def test_without_the_first_token_the_rest_is_a_window_that_starts_later(model, windows):
    """Rotary positions are relative: a sequence that cannot see its first token is the sequence without it."""
    with restricted(model, RULES["sink masked"]):
        masked = states(model, windows)
    torch.testing.assert_close(masked[:, :, 1:], states(model, windows[:, 1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)", "GPT-2", "GPT-NeoX (parallel)", "Mixtral"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_what_a_token_may_not_see_cannot_change_it(name, kind):
    model, tokens = tiny(name), ids(1)
    model.set_attn_implementation(kind)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] - 3 + 1) % 90 + 3
    plain = states(model, tokens)
    with restricted(model, RULES["sink masked"]):
        one, two = states(model, tokens), states(model, other)
    torch.testing.assert_close(one[:, :, 1:], two[:, :, 1:], rtol=1e-3, atol=1e-5)  # experts see other batches, so not to the bit
    assert (one[-1, :, 1:] - plain[-1, :, 1:]).abs().max() > 0.01
    with restricted(model, RULES["full"]):
        torch.testing.assert_close(states(model, tokens), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states(model, tokens), plain, rtol=0, atol=0)  # nothing is left behind


def test_a_window_of_the_models_own_still_holds():
    """Gemma's first layer looks back 5 tokens; allowing everything must not widen it."""
    model, tokens = tiny("Gemma 3 (text)"), ids(1)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] - 3 + 1) % 90 + 3
    with restricted(model, lambda q, k: q >= 0 * k):
        one, two = states(model, tokens), states(model, other)
    torch.testing.assert_close(one[1, :, 5:], two[1, :, 5:], rtol=0, atol=0)
    assert not torch.equal(one[1, :, 4], two[1, :, 4])


def test_refusals_say_what_is_wrong(model, windows):
    with pytest.raises(ValueError, match="token 0 attend to nothing"), restricted(model, lambda q, k: k < q):
        model(windows)
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))  # nor is anything left when the body raises
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 attention, which takes no mask"), restricted(model, RULES["full"]):
        pass


def test_scores_under_a_rule_are_not_those_kept_of_the_plain_model(model, windows):
    plain = scoring.score(model, windows, ["bucket", "cosine"])
    with restricted(model, RULES["sliding window of 5"]):
        limited = scoring.score(model, windows, ["bucket", "cosine"])
    assert (limited.value - plain.value).abs().max() > 0.01
    pd.testing.assert_frame_equal(scoring.score(model, windows, ["bucket", "cosine"]), plain)


@pytest.mark.parametrize(
    ("name", "query", "seen"),
    [
        ("Llama", "self_attn.q_proj", lambda i: 1 / (i + 1)),
        ("Gemma 3 (text)", "self_attn.q_proj", lambda i: 1 / (i + 1) if i < 5 else 0.0),  # layer 0 sees five tokens
        ("BERT", "attention.self.query", lambda i: 1 / 10),
    ],
)
def test_attention_on_the_first_token_where_all_keys_are_alike(name, query, seen):
    """A query of zeros looks at every token it can see with the same weight, so what the first one gets is known."""
    model, tokens = tiny(name), ids(3)
    before, implementation = attention_on_first(model, tokens), model.config._attn_implementation
    with torch.no_grad():
        for weight in decoder_layers(model)[0].get_submodule(query).parameters():
            weight.zero_()
    after = attention_on_first(model, tokens)
    expected = sum(map(seen, range(1, 10))) / 9
    assert after[0] == pytest.approx(expected, rel=1e-5)
    assert before[0] != pytest.approx(expected, rel=1e-3)
    assert len(after) == len(decoder_layers(model))
    assert model.config._attn_implementation == implementation
