"""Sentence similarities, against loops over scipy and transformers' own output."""

import numpy as np
import torch
from families import ids, tiny
from scipy.stats import spearmanr

from entrodrop_utils.residual import SubBlock
from entrodrop_utils.tasks import encoders


def random_embeddings(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=-1)


def test_agreement_is_spearmans_over_the_other_halves():
    dense, pruned = random_embeddings(0), random_embeddings(1)
    judged = encoders.compare_embeddings(dense, pruned)
    for window in range(4):
        agreement, distance, found = [], [], []
        for half in (window, window + 4):
            rest = [i for i in range(8) if i != half]
            one, other = ([float(e[half] @ e[i]) for i in rest] for e in (dense, pruned))
            agreement.append(spearmanr(one, other).statistic)
            distance.append(1 - float(dense[half] @ pruned[half]))
            found.append(rest[int(np.argmax(other))] == (half + 4) % 8)
        row = [np.mean(agreement), np.mean(distance), np.mean(found)]
        np.testing.assert_allclose(judged.loc[window, ["agreement", "distance", "found"]].to_numpy(dtype=float), row)


def test_a_model_agrees_with_itself_and_finds_equal_halves():
    one = random_embeddings(0, 4)
    judged = encoders.compare_embeddings(torch.cat([one, one]), torch.cat([one, one]))
    np.testing.assert_allclose(judged.to_numpy(), [[1, 0, 1]] * 4, atol=1e-12)


def test_embedding_is_the_normed_mean_of_the_last_states():
    model, tokens = tiny("BERT"), ids(3)
    with torch.no_grad():
        last = model(tokens, output_hidden_states=True).hidden_states[-1]
    for sentence, found in zip(last, encoders.embed(model, tokens), strict=True):
        mean = sum(sentence) / len(sentence)
        torch.testing.assert_close(found.float(), mean / mean.norm())


def test_halves_share_no_token_and_stand_between_marks():
    windows = torch.arange(100, 116).view(2, 8)
    windows[:, 0] = 1  # the tokenizer's first mark
    marked = encoders.halves(windows, 1, 2)
    assert marked.tolist() == [[1, 101, 102, 103, 2], [1, 109, 110, 111, 2], [1, 104, 105, 106, 2], [1, 112, 113, 114, 2]]
    bare = encoders.halves(windows, None, 2)
    assert bare.tolist()[0] == [101, 102, 103, 2]


def test_sweep_judges_each_set_against_the_encoder_as_it_is():
    model, tokens = tiny("BERT"), ids(6)
    whole = encoders.embed(model, tokens)
    sets = [(), (SubBlock(2, "mlp"), SubBlock(1, "attention")), (SubBlock(1, "attention"), SubBlock(2, "mlp"))]
    table = encoders.agreement_by_set(model, tokens, sets)
    assert len(table) == 2 * 3  # two different sets, three windows
    np.testing.assert_allclose(table[table["set"] == ()].agreement, 1)
    with torch.no_grad():  # by hand: the branches' last matrices add nothing
        for part in (model.bert.encoder.layer[1].attention.output.dense, model.bert.encoder.layer[2].output.dense):
            part.weight.zero_()
            part.bias.zero_()
    expected = encoders.compare_embeddings(whole, encoders.embed(model, tokens))
    found = table[table["set"] == tuple(sorted(sets[1]))]
    np.testing.assert_allclose(found[["agreement", "distance", "found"]], expected, atol=1e-6)
    assert expected.distance.min() > 1e-4
