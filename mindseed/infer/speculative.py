"""Speculative decoding: guess some tokens ahead, let the model read them all in one pass, keep those it would have
chosen itself (2211.17192, 2302.01318).

Decoding reads every weight for one token; reading five tokens at once costs hardly more. So a pass that confirms two
guesses gives three tokens for the price of one. Three ways to guess:

    ngram    what followed when the last few tokens stood in this text before (prompt lookup): free, good at quoting
    model    a smaller model with the same tokenizer, which writes ahead
    mtp      the model's own modules for further tokens (models/mtp.py), which read its hidden vectors

What is accepted is decided in the engine by one comparison: the token that the model draws at a place, with the noise
of that place (sample.py), is the guess or it is not. So guessing never changes an answer, greedy or sampled, and no
rule of rejection is needed: drafts that draw from their own distribution with the same noise agree with the model at
least as often as (1 - d) / (1 + d), d being the distance of the two distributions in total variation (2408.07978).
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mindseed.base.errors import UserError
from mindseed.core import StateSpec
from mindseed.infer.paged import PagedCache
from mindseed.infer.runner import Passed, Runner
from mindseed.infer.sample import choose
from mindseed.infer.scheduler import Plan, Sequence, Work
from mindseed.models.lm import LM
from mindseed.nn.attend import Layout

NGRAMS = (4, 3, 2)                                # how many of the last tokens are looked for, the longest first


def drafter_of(kind: str, tokens: int, model: LM, draft_model: LM | None) -> Drafter:
    """The drafter that a configuration asks for. UserError if the model cannot have it."""
    if draft_model is not None and kind != "model":
        raise UserError(f'a draft model was given, but draft="{kind}"; say draft="model" to use it')
    if kind == "off":
        return Drafter(0)
    for name, one in (("the model", model), ("the draft model", draft_model)):
        if one is not None and any(spec.per_seq for spec in one.state_specs()):
            raise UserError(f"{name} has linear attention, whose memory cannot take back a wrong guess; use draft=off")
        if one is not None and one.config.depends_on_length:
            raise UserError(f"{name} has dynamic rope scaling: a guess would change all angles; use draft=off")
    if kind == "mtp":
        if not model.mtp:
            raise UserError("the model has no modules for further tokens (model.mtp), so it cannot draft by itself; "
                            "use draft=ngram, or a draft model")
        return MTPDrafter(model, tokens)
    if kind == "model":
        if draft_model is None:
            raise UserError('draft="model" needs a draft model')
        return ModelDrafter(tokens, draft_model)
    return NgramDrafter(tokens)


class Drafter:
    """Guesses nothing; the others say more."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.engine: Any = None                   # the one that it is attached to, which imports this file

    def own_specs(self) -> list[StateSpec]:
        """What it keeps in the model's own cache, in further layers."""
        return []

    def attach(self, engine: Any) -> None:
        self.engine = engine

    def room(self, sequence: Sequence) -> int:
        """How many guesses are of use to a sequence: none while it reads, none for its last token."""
        row = sequence.owner.row
        if not self.tokens or not row.count or len(sequence.ids) - sequence.computed != 1:
            return 0
        return max(min(self.tokens, row.room - row.count - 1, row.max_new - row.count - 1), 0)

    def wish(self, sequence: Sequence) -> None:
        """Before a pass is planned: how many guesses there will be."""
        sequence.guesses = self.room(sequence)

    def guess(self, plan: Plan) -> None:
        """Before the pass: the guesses themselves."""

    def learn(self, work: list[Work], passed: Passed) -> None:
        """After the pass."""


class NgramDrafter(Drafter):
    def wish(self, sequence: Sequence) -> None:
        sequence.guesses = room = self.room(sequence)
        if room:
            sequence.owner.guess = self.find(sequence, room)
            sequence.guesses = len(sequence.owner.guess)

    def find(self, sequence: Sequence, room: int) -> list[int]:
        """What followed the last time the text went as it goes now."""
        ids, index = sequence.ids, sequence.owner.index
        for end in range(sequence.owner.indexed, len(ids)):           # what ends before `end`, which follows it
            for n in NGRAMS:
                if end >= n:
                    index[tuple(ids[end - n:end])] = end
        sequence.owner.indexed = len(ids)
        at = next((index[key] for n in NGRAMS if (key := tuple(ids[-n:])) in index), None)
        return [] if at is None else ids[at:at + room]

    def guess(self, plan: Plan) -> None:
        for work in plan.work:
            if work.guesses:
                work.drafts = sequence_guess(work)


def sequence_guess(work: Work) -> list[int]:
    return work.sequence.owner.guess[:work.guesses]


class ModelDrafter(Drafter):
    """A second model in the same blocks: its own pools, the sequences' tables."""

    def __init__(self, tokens: int, model: LM) -> None:
        super().__init__(tokens)
        self.model = model.eval()

    def attach(self, engine: Any) -> None:
        super().attach(engine)
        if self.model.config.vocab_size < engine.vocab:
            raise UserError(f"the draft model has {self.model.config.vocab_size} tokens and the model {engine.vocab}; "
                            "take a draft with the same tokenizer")
        if self.model.config.learned_positions and self.model.config.seq_len < engine.limit:
            raise UserError(f"the draft model knows {self.model.config.seq_len} positions and the model's context is "
                            f"{engine.limit}; take a draft with as long a context")
        counts = {blocks.window: blocks.count for blocks in engine.kinds}
        self.cache = PagedCache(self.model.state_specs(), counts, engine.config.block_size, device=engine.device,
                                dtype=self.model.embed.weight.dtype, int8=engine.config.cache_dtype == "int8")
        self.runner = Runner(self.model, self.cache, engine.vocab, gaps=engine.gaps)

    def guess(self, plan: Plan) -> None:
        self.cache.copy_blocks(plan.copies)
        behind = [Work(w.sequence, w.sequence.drafted, w.start + w.count - w.sequence.drafted) for w in plan.work]
        passed = self.runner.run(behind)          # whoever guesses or not: the blocks may come to be somebody else's
        for w in behind:
            w.sequence.drafted = w.start + w.count
        last = {id(w.sequence): at + w.count - 1 for w, at in zip(behind, passed.offsets)}
        drafting = [w for w in plan.work if w.guesses]
        hidden = passed.hidden[[last[id(w.sequence)] for w in drafting]]
        for ahead in range(self.tokens):
            self.draw(drafting, hidden, ahead)
            drafting = [w for w in drafting if w.guesses > ahead + 1]
            if not drafting:
                return
            place = [Work(w.sequence, w.start + w.count + ahead, 0, drafts=w.drafts[-1:]) for w in drafting]
            passed = self.runner.run(place)
            hidden = passed.hidden[passed.offsets]
            for w, p in zip(drafting, place):
                w.sequence.drafted = p.start + 1

    def draw(self, work: list[Work], hidden: torch.Tensor, ahead: int) -> None:
        for w, id in zip(work, drawn(self.runner, work, hidden, ahead)):
            w.drafts.append(id)

    def learn(self, work: list[Work], passed: Passed) -> None:
        for w in work:                            # what it wrote beyond what was accepted is written anew
            w.sequence.drafted = min(w.sequence.drafted, w.sequence.computed)


def drawn(runner: Runner, work: list[Work], hidden: torch.Tensor, ahead: int) -> list[int]:
    """What a draft draws after hidden vectors (R, D), with the noise of the token `ahead` of the next."""
    if not work:
        return []
    rows = [replace(w.sequence.owner.chooser, allowed=None, step=w.sequence.owner.chooser.step + ahead) for w in work]
    return choose(runner.head(hidden).nan_to_num(), rows).ids.tolist()            # a bad guess is no reason to stop


class MTPDrafter(Drafter):
    """The modules read the hidden vectors of every token that has been verified, together with the token after it. A
    module's entry at the last place rests on the guess of the one before it and is not mended later: that costs some
    guesses and no correctness."""

    def __init__(self, model: LM, tokens: int) -> None:
        super().__init__(min(tokens, len(model.mtp)))
        self.modules, self.first = model.mtp[:self.tokens], len(model.blocks)

    def own_specs(self) -> list[StateSpec]:
        return [module.block.mixer.state_spec() for module in self.modules]

    def wish(self, sequence: Sequence) -> None:
        sequence.guesses = min(self.room(sequence), len(sequence.owner.guess))

    def guess(self, plan: Plan) -> None:
        for work in plan.work:
            if work.guesses:
                work.drafts = sequence_guess(work)

    def learn(self, work: list[Work], passed: Passed) -> None:
        going = [(w, at) for w, at in zip(work, passed.offsets) if w.sequence.alive and w.sequence.computed > w.start]
        if not going:
            return
        model, runner = self.engine.model, self.engine.runner
        rows = [w.sequence for w, _ in going]
        sizes = [s.computed - w.start for s, (w, _) in zip(rows, going)]
        width, device = max(sizes), self.engine.device
        positions = torch.tensor([[*range(w.start, w.start + n), *[-1] * (width - n)]
                                  for (w, _), n in zip(going, sizes)], device=device)
        hidden = passed.hidden.new_zeros(len(rows), width, passed.hidden.shape[-1])
        for i, ((_, at), n) in enumerate(zip(going, sizes)):
            hidden[i, :n] = passed.hidden[at:at + n]
        pages = runner.pages(rows)
        layout = Layout(positions, pages.begin(positions))
        guesses: list[list[int]] = [[] for _ in rows]
        for ahead, module in enumerate(self.modules):
            module.block.mixer.add_to(layout, torch.promote_types(hidden.dtype, torch.float32))
            known = [s.ids + g for s, g in zip(rows, guesses)]
            ids = torch.tensor([[k[min(max(p, 0) + ahead + 1, len(k) - 1)] for p in row]
                                for k, row in zip(known, positions.tolist())], device=device)
            hidden, _ = module(hidden, model.embed(ids), layout, pages.layer(self.first + ahead))
            last = hidden[torch.arange(len(rows), device=device), torch.tensor(sizes, device=device) - 1]
            for g, id in zip(guesses, drawn(runner, [w for w, _ in going], last, ahead)):
                g.append(id)
        for s, g in zip(rows, guesses):
            s.owner.guess = g if len(s.ids) - s.computed == 1 else []
