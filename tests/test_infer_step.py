"""The flattened decoding step against the model's own forward pass."""
from __future__ import annotations

import pytest
import torch

from mindseed.infer.step import FlatStep, decoding_step
from tests.tiny import VOCAB, pages, tiny_model


@pytest.mark.parametrize("rows", [1, 3, 20])                        # 20 rows take the transposed products
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"tied": False, "kv_heads": 1}, {"head_dim": 6}])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_equals_the_forward_pass(rows, changes, dtype, close):
    model = tiny_model(**changes).to(dtype).eval()
    ids = torch.randint(0, VOCAB, (rows, 12))
    first = torch.arange(4).repeat(rows, 1)
    first[-1, 2:] = -1                                              # the last row's prompt is shorter
    positions = torch.tensor([4] * (rows - 1) + [2])[:, None]
    with torch.inference_mode():
        flat, plain = (pages(model, rows, 12) for _ in range(2))
        for state in (flat, plain):
            model(ids[:, :4], first, state)
        step = decoding_step(model)
        assert isinstance(step, FlatStep)
        for t in range(4, 12):
            got = step(ids[:, t], positions, flat)
            want = model(ids[:, t:t + 1], positions, plain).hidden[:, 0]
            torch.testing.assert_close(got, want, rtol=close, atol=close)
            assert got.dtype == dtype
            positions = positions + 1


def test_a_model_with_other_layers_runs_itself():
    class Special(torch.nn.Linear):
        """An adapter, say."""

    for change in (lambda m: setattr(m.blocks[1].ffn, "up", Special(32, 48, bias=False)),
                   lambda m: m.blocks[0].mixer.register_forward_hook(lambda *_: None)):
        model = tiny_model().eval()
        change(model)
        model.double()
        with torch.inference_mode():
            step = decoding_step(model)
            assert not isinstance(step, FlatStep)
            got = step(torch.tensor([5, 6]), torch.tensor([[0], [0]]), pages(model, 2))
            torch.testing.assert_close(got, model(torch.tensor([[5], [6]]), torch.tensor([[0], [0]])).hidden[:, 0])
