"""What the probe shows is what the model did: maps against attention written out, outputs rebuilt, lens, routes."""
from __future__ import annotations

import pytest
import torch

from mindseed.models.probe import gqa_parts, mla_parts, probe
from mindseed.nn.alibi import alibi_slopes
from mindseed.nn.attend import attend_oracle
from mindseed.nn.gqa import GQA, GQAConfig
from mindseed.nn.mla import MLA
from tests.tiny import DYNAMIC, KITS, VOCAB, kit, kit_model

T = 19
MODELS = KITS | {"dynamic": kit(DYNAMIC, DYNAMIC)}
IDS = torch.randint(0, VOCAB, (T,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=MODELS)
def seen(request):
    return probe(kit_model(MODELS[request.param]), IDS)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_rows_of_a_map_are_shares_of_what_a_query_may_see(seen):
    for i, block in enumerate(seen.model.blocks):
        weights = seen.attention(i)
        if not isinstance(block.mixer, (GQA, MLA)):
            assert weights is None
            continue
        assert weights.shape == (block.mixer.config.heads, T, T) and (weights >= 0).all()
        close(weights.sum(-1), torch.ones(len(weights), T, dtype=weights.dtype))
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        window = getattr(block.mixer.config, "window", None)
        if window:
            hidden |= torch.ones(T, T, dtype=torch.bool).tril(-window)
        assert (weights[:, hidden] == 0).all() and (weights[:, ~hidden] > 0).all()


def test_maps_are_those_of_attention_written_out(seen):
    """The oracle attends to the identity: with values of one token each it returns the map."""
    for i, block in enumerate(seen.model.blocks):
        mixer = block.mixer
        if not isinstance(mixer, (GQA, MLA)):
            continue
        parts = gqa_parts if isinstance(mixer, GQA) else mla_parts
        q, k, _, asked = parts(mixer, seen.heard[i], seen.layout)
        back = torch.arange(T)[:, None] - torch.arange(T)
        window = getattr(mixer.config, "window", None) or T
        bias = None
        if isinstance(mixer.config, GQAConfig) and asked["slopes"] is not None:
            bias = (-alibi_slopes(mixer.config.heads)[:, None, None] * back.clamp_min(0)).double()[None]
        one_hot = torch.eye(T, dtype=q.dtype)[None, :, None].expand(1, T, k.shape[2], T)
        expected = attend_oracle(q, k, one_hot, ((back >= 0) & (back < window))[None, None], scale=asked.get("scale"),
                                 bias=bias)
        close(seen.attention(i), expected[0].transpose(0, 1))


def test_a_mixers_answer_can_be_rebuilt_from_its_map(seen):
    for i, block in enumerate(seen.model.blocks):
        if seen.attention(i) is None:
            continue
        mixed = torch.einsum("hts,shv->thv", seen.attention(i), seen.values(i))
        close(block.mixer.o(mixed.flatten(1)), seen.told[i][0])


def test_the_lens_of_the_last_layer_is_the_models_own_word(seen):
    output = seen.model(torch.tensor([IDS]), torch.arange(T)[None])
    close(seen.lens(len(seen.model.blocks)), output.logits()[0].log_softmax(-1))
    assert len(seen.residual) == len(seen.model.blocks) + 1
    assert not torch.allclose(seen.lens(0), seen.lens(len(seen.model.blocks)))


def test_the_embedding_is_what_the_first_block_was_given(seen):
    model, place = seen.model, seen.model.place
    positions = 0 if place is None else place(torch.arange(T))
    close(seen.residual[0], model.embed(torch.tensor(IDS)) + positions)


@pytest.mark.parametrize("name", ["moe", "moe, groups"])
def test_routes_are_those_that_the_layer_took(name):
    """The layer's answer, built again expert by expert from the routes alone."""
    model = kit_model(MODELS[name])
    answers = {}
    for i, block in enumerate(model.blocks):
        block.ffn.register_forward_hook(lambda module, inputs, output, i=i: answers.__setitem__(i, output[0][0]))
    seen = probe(model, IDS)
    for i, block in enumerate(model.blocks):
        routes, ffn, x = seen.routes(i), block.ffn, seen.thought_of[i][0]
        assert routes.chosen.shape == (T, ffn.config.top_k) and routes.scores.shape == (T, ffn.config.experts)
        rows = []
        for t in range(T):
            y = ffn.shared(x[t]) if ffn.shared is not None else torch.zeros_like(x[t])
            for expert, weight in zip(routes.chosen[t].tolist(), routes.weights[t]):
                inside = torch.nn.functional.silu(ffn.gate.weight[expert] @ x[t]) * (ffn.up.weight[expert] @ x[t])
                y = y + weight * (ffn.down.weight[expert] @ inside)
            rows.append(y)
        close(torch.stack(rows), answers[i])


def test_a_dense_layer_has_no_routes_and_nothing_stays_on_the_model():
    model = kit_model(KITS["gqa"])
    assert probe(model, IDS).routes(0) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(IndexError):
        probe(model, [VOCAB + 5])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_token_is_enough():
    seen = probe(kit_model(KITS["mixed"]), IDS[:1])
    assert seen.attention(0).tolist() == [[[1.0]]] * 4
