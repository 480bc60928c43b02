"""Kernels of our own against the model's own forward pass, and attention over blocks against attention written out."""
from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed.infer import fused
from mindseed.infer.fused import FusedStep, fits, paged_attention
from mindseed.infer.paged import Pages
from mindseed.models.lm import LM
from mindseed.nn.attend import attend_oracle
from tests.tiny import DYNAMIC, KITS, VOCAB, kit, kit_model, pages, tiny_model

MODELS = {
    "plain": {},
    "no qk-norm": {"qk_norm": False},
    "one key head, untied": {"tied": False, "kv_heads": 1},
    "heads apart": {"kv_heads": 4},
    "odd sizes": {"head_dim": 6, "dim": 29, "ffn_dim": 37},
    "more than a register": {"head_dim": 40, "dim": 77, "ffn_dim": 130, "heads": 6, "kv_heads": 2},
    "windows": {"pattern": "SL", "window": 3},
    "window of one": {"pattern": "S", "window": 1},
}
KIT = ("interleaved", "linear", "yarn", "llama3")


def float_model(name: str) -> LM:
    return (kit_model(KITS[name]).float() if name in KIT else tiny_model(**MODELS[name])).eval()


class Rows:
    """Blocks for `batch` rows of up to `tokens` tokens, in disorder; what nobody has written is NaN."""

    def __init__(self, model: LM, batch: int, tokens: int, block_size: int, dtype: torch.dtype = torch.float32) -> None:
        each, self.block_size = -(-tokens // block_size), block_size
        self.table = torch.randperm(batch * each, generator=torch.Generator().manual_seed(batch)).view(batch, each) + 1
        configs = [block.mixer.config for block in model.blocks]
        self.windows = {c.window for c in configs}
        self.pools = [tuple(torch.full(((batch * each + 1) * block_size, c.kv_heads, c.head_dim), torch.nan,
                                       dtype=dtype) for _ in "kv") for c in configs]
        self.step = FusedStep(model, self.pools, block_size)

    def tables(self, rows: torch.Tensor, at: torch.Tensor) -> dict[int | None, torch.Tensor]:
        """As the engine gives them: 0 where a block lies wholly before the window, or after the row."""
        found, block = {}, torch.arange(self.table.shape[1])[None]
        for window in self.windows:
            unseen = block > at[:, None] // self.block_size
            if window is not None:
                unseen |= (block + 1) * self.block_size <= at[:, None] + 1 - window
            found[window] = self.table[rows].masked_fill(unseen, 0)
        return found


def check(model: LM, other: LM, batch: int, *, block_size: int = 4, tokens: int = 9, uneven: bool = False,
          close: float = 1e-4) -> None:
    """Decode `batch` texts with the kernels, some of them beginning later if `uneven`, and compare every token with one
    pass of `other` over the whole texts."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=generator)
    start = torch.randint(0, tokens, (batch,), generator=generator) * uneven
    with torch.inference_mode():
        out, rows = other(ids, torch.arange(tokens).expand(batch, -1)), Rows(model, batch, tokens, block_size)
        logits = out.logits()
        for t in range(tokens + int(start.max())):
            here = ((t >= start) & (t < start + tokens)).nonzero()[:, 0]
            if len(here):
                at = (t - start)[here]
                tables = rows.tables(here, at)
                hidden, head = rows.step.logits(ids[here, at], at, tables)
                again = rows.step(ids[here, at], at, tables)                      # writes the same into the same slots
                for got, want in ((hidden, out.hidden), (again, out.hidden), (head, logits),
                                  (rows.step.head(hidden), logits)):
                    torch.testing.assert_close(got.float(), want[here, at], rtol=close, atol=close)


# ---------------------------------------------------------------------------------------------------------- whole pass

@pytest.mark.parametrize("batch, block_size", [(1, 4), (2, 3), (5, 1), (16, 16), (20, 5)])
@pytest.mark.parametrize("name", [*MODELS, *KIT])
def test_equals_the_forward_pass(name, batch, block_size):
    model = float_model(name)
    assert fits(model)
    check(model, model, batch, block_size=block_size, uneven=batch > 1)


def test_long_texts_are_attended_in_spans(monkeypatch):
    monkeypatch.setattr(fused, "SPAN", 7)
    for name in ("plain", "windows"):
        model = float_model(name)
        check(model, model, 1, tokens=30)
        check(model, model, 2, tokens=20, block_size=3, uneven=True)


class Rounded:
    """A State in float32 that keeps keys and values as bfloat16 would."""

    def __init__(self, state: Pages) -> None:
        self.state = state

    def begin(self, positions: torch.Tensor) -> dict[int | None, torch.Tensor]:
        return self.state.begin(positions)

    def layer(self, index: int) -> Rounded:
        return Rounded(self.state.layer(index))

    def append(self, **new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.state.append(**{name: x.bfloat16().float() for name, x in new.items()})


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("name", ["plain", "more than a register"])
def test_bfloat16(name, batch):
    """Weights and cache are widened exactly and sums are float32: the same as a float32 model whose weights have been
    rounded. (A key may be rounded the other way now and then.)"""
    narrow, wide = float_model(name).bfloat16(), float_model(name).bfloat16().float()
    ids, each = torch.randint(0, VOCAB, (batch, 6)), torch.arange(batch)
    with torch.inference_mode():
        rows, state = Rows(narrow, batch, 6, 4, torch.bfloat16), Rounded(pages(wide, batch))
        for t in range(6):
            at = torch.full((batch,), t)
            hidden, got = rows.step.logits(ids[:, t], at, rows.tables(each, at))
            out = wide(ids[:, t:t + 1], at[:, None], state)
            assert hidden.dtype == torch.bfloat16
            torch.testing.assert_close(hidden.float(), out.hidden[:, 0], rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(got, out.logits()[:, 0], rtol=2e-3, atol=2e-3)


def test_weights_are_the_models_own():
    model = float_model("plain")
    rows = Rows(model, 1, 4, 4)
    at = torch.tensor([0])
    arguments = torch.tensor([5]), at, rows.tables(at, at)
    with torch.inference_mode():
        before = rows.step(*arguments)
        for p in model.parameters():
            p.mul_(1.1)
        after = rows.step(*arguments)
        torch.testing.assert_close(after, model(torch.tensor([[5]]), at[None]).hidden[:, 0], rtol=1e-4, atol=1e-4)
        assert (after - before).abs().max() > 0.01


def test_a_nan_is_not_hidden():
    for name in ("mixer.q", "mixer.k", "mixer.v", "mixer.o", "ffn.gate", "ffn.up", "ffn.down"):
        model = float_model("plain")
        with torch.inference_mode():
            model.blocks[0].get_submodule(name).weight[3, 5] = torch.nan
            rows, each = Rows(model, 3, 2, 4), torch.arange(3)
            for t in range(2):                                      # the second token meets it in the cache
                at = torch.full((3,), t)
                assert rows.step(each, at, rows.tables(each, at)).isnan().any(), name


def test_what_lies_outside_is_an_error_and_nothing_is_written():
    rows = Rows(float_model("plain"), 2, 8, 4)
    zero = torch.zeros(2, dtype=torch.int64)
    table = rows.tables(torch.arange(2), zero)
    for ids, positions, tables, what in (
            (torch.tensor([1, VOCAB]), zero, table, "vocabulary"), (torch.tensor([-1, 1]), zero, table, "vocabulary"),
            (zero, torch.tensor([0, 8]), table, "position"), (zero, torch.tensor([-1, 0]), table, "position"),
            (zero, zero, {None: table[None] + 5}, "block"), (zero, zero, {None: table[None] - 9}, "block")):
        with pytest.raises(ValueError, match=what):
            rows.step(ids, positions, tables)
    assert all(bool(x.isnan().all()) for pool in rows.pools for x in pool)


def test_models_that_it_does_not_know():
    class Special(torch.nn.Linear):
        """An adapter, say."""

    assert not fits(tiny_model().double()) and not fits(tiny_model().to("meta"))
    for name in set(KITS) - {"gqa", "no qk-norm", "window", "window 1", *KIT}:
        assert not fits(kit_model(KITS[name]).float()), name
    assert not fits(kit_model(kit(DYNAMIC)).float())
    for change in (lambda m: setattr(m.blocks[1].ffn, "up", Special(32, 48, bias=False)),
                   lambda m: m.blocks[0].mixer.register_forward_hook(lambda *_: None)):
        model = tiny_model()
        assert fits(model)
        change(model)
        assert not fits(model)
    with pytest.raises(ValueError, match="fits"):
        FusedStep(model, [], 4)


# ------------------------------------------------------------------------------------------------------------- threads

@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch):
    """Have threads help, however small the model."""
    monkeypatch.setattr(fused, "WORTH", 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(count, threads):
    threads(count)
    model = float_model("more than a register")
    for batch in (1, 18):
        check(model, model, batch)


def test_a_helper_that_comes_too_late_changes_nothing(threads, monkeypatch):
    threads(3)
    crew = fused.Crew()
    crew.jobs = [fused.queue.SimpleQueue() for _ in range(2)]                     # nobody listens
    monkeypatch.setattr(fused, "CREW", crew)
    model = float_model("plain")
    check(model, model, 3, tokens=2)
    rows, at = Rows(model, 1, 4, 4), torch.tensor([0])
    rows.step(torch.tensor([5]), at, rows.tables(at, at))
    kept = [x.clone() for pool in rows.pools for x in pool]
    rows.step.plan[fused.Plan.IDS] = rows.step.plan[fused.Plan.X] = 0             # it would crash if it touched them
    for jobs in crew.jobs:
        while not jobs.empty():
            function, arguments, _ = jobs.get()
            function(*arguments)
    torch.testing.assert_close(kept, [x for pool in rows.pools for x in pool], equal_nan=True)
    assert rows.step.state[0] & 0xFFFF == 0


def test_an_interruption_leaves_no_thread_at_work(threads, monkeypatch):
    threads(3)
    rows, at = Rows(float_model("plain"), 1, 4, 4), torch.tensor([0])
    arguments = torch.tensor([5]), at, rows.tables(at, at)
    wanted, entries = rows.step(*arguments), fused.compiled()

    def interrupted(*given):
        if given[4] == 0:                                           # thread 0; the others do all the work
            raise KeyboardInterrupt
        entries["decode"](*given)

    for _ in range(20):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fused, "compiled", lambda: entries | {"decode": interrupted})
            rows.step(*arguments)
        assert rows.step.state[0] & 0xFFFF == 0
        torch.testing.assert_close(rows.step(*arguments), wanted)


def test_several_callers_at_once(threads):
    threads(3)
    failed = []

    def caller(name: str) -> None:
        try:
            for batch in (1, 4):
                check(float_model(name), float_model(name), batch)
                attention(batch, 4, 2, 8, 4, [9] * batch, None)
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=caller, args=(name,)) for name in ("plain", "windows", "odd sizes")]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failed, failed


# ----------------------------------------------------------------------------------------------------------- attention

def attention(batch: int, heads: int, kv_heads: int, head_dim: int, block_size: int, lengths: list[int],
              window: int | None, dtype: torch.dtype = torch.float32, close: float = 1e-5) -> None:
    """paged_attention against attention written out; every slot that a row may not read is NaN."""
    generator = torch.Generator().manual_seed(sum(lengths))
    each = -(-max(lengths) // block_size)
    table = torch.randperm(batch * each, generator=generator).view(batch, each) + 1
    pools = [torch.full(((batch * each + 1) * block_size, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in "kv"]
    q, wanted = torch.randn(batch, heads, head_dim, generator=generator), []
    for b, length in enumerate(lengths):
        first = max(length - window, 0) if window else 0
        at = torch.arange(first, length)
        slots = table[b, at // block_size] * block_size + at % block_size
        for pool in pools:
            pool[slots] = torch.randn(len(at), kv_heads, head_dim, generator=generator).to(dtype)
        k, v = (pool[slots][None].float() for pool in pools)
        wanted.append(attend_oracle(q[b][None, None], k, v, torch.ones(1, 1, 1, len(at), dtype=torch.bool))[0, 0])
        table[b, :first // block_size] = 0
        table[b, -(-length // block_size):] = 0
    got = paged_attention(q, *pools, table, torch.tensor(lengths), block_size, window=window)
    torch.testing.assert_close(got, torch.stack(wanted), rtol=close, atol=close)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kv_heads=st.integers(1, 3), times=st.integers(1, 4), head_dim=st.integers(1, 40),
       block_size=st.integers(1, 17), window=st.none() | st.integers(1, 40), lengths=st.lists(st.integers(1, 60),
                                                                                              min_size=1, max_size=9))
def test_attention_over_blocks(data, kv_heads, times, head_dim, block_size, window, lengths):
    attention(len(lengths), kv_heads * times, kv_heads, head_dim, block_size, lengths, window)


@pytest.mark.parametrize("batch", [1, 6])                                         # spans of keys; whole rows in tiles
@pytest.mark.parametrize("window", [None, 300, 1000])
def test_attention_over_long_rows(batch, window):
    attention(batch, 4, 2, 16, 16, [1500, 256, 257, 1, 511, 900][:batch], window)


def test_attention_over_a_bfloat16_cache():
    attention(3, 4, 2, 24, 8, [5, 40, 17], None, torch.bfloat16)


def test_attention_refuses_what_does_not_fit():
    pool, table, one = torch.zeros(8, 2, 4), torch.tensor([[1]]), torch.tensor([1])
    for q, tables, lengths in ((torch.zeros(1, 3, 4), table, one), (torch.zeros(1, 4, 8), table, one),
                               (torch.zeros(1, 4, 4), table + 1, one), (torch.zeros(1, 4, 4), table, one * 5),
                               (torch.zeros(1, 4, 4), table, one * 0), (torch.zeros(1, 4, 4), table.int(), one)):
        with pytest.raises(ValueError):
            paged_attention(q, pool, pool, tables, lengths, 4)
