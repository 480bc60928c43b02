"""The engine: everybody's requests, one forward pass at a time.

`submit` puts a request in line, `step` plans a pass, runs it, and hands out a token for every answer that is being
written; `generate` does so until all is answered. Token in, token out: prompts are ids, and every token comes with its
log-probability under the model and under the distribution it was drawn from, so that what is learnt from answers later
(reinforcement learning, distillation) needs no second pass and no second tokenisation.

The engine does no arithmetic of its own: blocks.py and scheduler.py say who computes what, paged.py remembers it,
runner.py computes it, sample.py chooses, rows.py makes text, speculative.py guesses ahead. It belongs to one thread;
service.py gives it one for a server.
"""
from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.hardware import total_memory
from mindseed.core import Tokenizer
from mindseed.infer.blocks import Blocks
from mindseed.infer.constrain import Grammar, Matcher
from mindseed.infer.paged import PagedCache, windows_of
from mindseed.infer.rows import Completion, Row, Token, check_prompt, ends_of
from mindseed.infer.runner import Passed, Runner, fused_step
from mindseed.infer.sample import Chooser, NotFinite, Sampling, choose, top_logps
from mindseed.infer.scheduler import Scheduler, Sequence, Work
from mindseed.infer.speculative import drafter_of
from mindseed.interop.directory import Loaded
from mindseed.models.lm import LM
from mindseed.nn.adapters import Switch, switch_of

SHARE_OF_MEMORY = 0.25                            # of the machine's that the cache takes at most, if nobody says


class QueueFull(UserError):
    """More requests are waiting than the engine was told to keep."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    block_size: int = option(16, help="tokens in a block of the cache")
    cache_tokens: int | None = option(None, help="tokens the cache holds [what the sequences could need, up to a "
                                                 "quarter of the memory]")
    max_seqs: int = option(64, help="answers written at once")
    chunk: int = option(512, help="tokens of prompts read in one pass, beside the answers being written")
    max_queue: int = option(1024, help="requests that may wait; more are refused")
    prefix_caching: bool = option(True, help="find the beginnings of prompts in the cache")
    cache_dtype: Literal["auto", "int8"] = option("auto", help="auto: that of the weights; int8: a quarter of fp32")
    draft: Literal["off", "ngram", "model", "mtp"] = option(
        "off", help="guess tokens ahead, to be verified together: from what was said before (ngram), by a smaller "
                     "model, or by the model's own modules for further tokens (mtp)")
    draft_tokens: int = option(4, help="tokens guessed ahead")
    fused: bool = option(True, help="decode with kernels of our own: on a CPU if numba is installed, on a GPU as a "
                                    "recorded graph")

    def __post_init__(self) -> None:
        for name in ("block_size", "max_seqs", "chunk", "max_queue", "draft_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise UserError(f"cache_tokens={self.cache_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it. Answer i of `n` draws with `sampling.seed + i`; `stop` are strings, which are
    found across the borders of tokens; `priority` is served in rising order; `grammar` holds every answer to a
    form."""

    prompt: list[int]
    sampling: Sampling = Sampling()
    max_new: int = 128
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None       # None: the engine's
    priority: int = 0
    top_logps: int = 0                            # alternatives to report for every token
    prompt_logps: bool = False                    # of every token of the prompt, and its alternatives
    grammar: Grammar | None = None
    adapter: str | None = None                    # of those of the model, which one; None: the model as it stands


@dataclass
class Stats:
    """What the engine has done so far, and how full it is."""

    waiting: int = 0
    running: int = 0
    blocks: int = 0
    blocks_free: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass(eq=False, kw_only=True)
class Job:
    """A request on its way."""

    id: int
    request: Request
    open: int                                     # answers that are not finished
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logps: list[float | None] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Answer:
    """What a sequence is to the engine."""

    job: Job
    row: Row
    chooser: Chooser
    matcher: Matcher | None = None
    guess: list[int] = field(default_factory=list)        # what the drafter expects next
    index: dict[tuple[int, ...], int] = field(default_factory=dict)      # n-gram -> where it ended last
    indexed: int = 0


class Engine:
    """Answers requests with a model. `stop_ids` end an answer [the tokenizer's ends of text and of turn];
    `draft_model` guesses ahead with draft="model". UserError for settings that the model cannot have."""

    def __init__(self, model: LM, tokenizer: Tokenizer | None, config: EngineConfig = EngineConfig(), *,
                 stop_ids: tuple[int, ...] | None = None, draft_model: LM | None = None) -> None:
        if model.config.depends_on_length:        # what a cache holds of the upper layers is of another length
            config = replace(config, prefix_caching=False, chunk=max(config.chunk, model.config.seq_len))
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.stop_ids = ends_of(tokenizer) if stop_ids is None else tuple(stop_ids)
        rows = model.config.vocab_size
        self.vocab = rows if tokenizer is None else min(rows, tokenizer.vocab_size)
        known = range(rows) if tokenizer is None else {*tokenizer.tokens, *tokenizer.specials.values()}
        self.gaps = frozenset(range(self.vocab)) - frozenset(known)       # ids that say nothing, never chosen
        self.device, dtype = model.embed.weight.device, model.embed.weight.dtype
        self.drafter = drafter_of(config.draft, config.draft_tokens, model, draft_model)
        specs = [*model.state_specs(), *self.drafter.own_specs()]
        theirs = [] if draft_model is None else draft_model.state_specs()
        has_slots, int8 = any(spec.per_seq for spec in specs), config.cache_dtype == "int8"
        counts = self.block_counts(specs, theirs, 1 if int8 else dtype.itemsize)
        self.cache = PagedCache(specs, counts, config.block_size, slots=(config.max_seqs + 1) * has_slots, dtype=dtype,
                                device=self.device, int8=int8)
        self.kinds = [Blocks(count, config.block_size, window) for window, count in counts.items()]
        self.scheduler = Scheduler(self.kinds, config.block_size, max_seqs=config.max_seqs, chunk=config.chunk,
                                   slots=has_slots, caching=config.prefix_caching)
        self.limit = min(model.config.seq_len, *((blocks.count - 2) * config.block_size for blocks in self.kinds
                                                 if blocks.window is None), model.config.seq_len)
        self.adapters = switch_of(model)
        self.runner = Runner(model, self.cache, self.vocab, fused_step(model, self.cache) if config.fused else None,
                             self.gaps, self.adapters)
        self.drafter.attach(self)
        self.jobs: dict[int, Job] = {}
        self.failed: dict[int, UserError] = {}
        self.kept: list[tuple[int, Token]] = []   # tokens of others, which a `stream` has come by
        self.ids = itertools.count()
        self.counts, self.version = Stats(), 0

    @classmethod
    def of(cls, loaded: Loaded, config: EngineConfig = EngineConfig(), *, draft: Loaded | None = None) -> Engine:
        """An engine for a model directory; the draft's tokenizer must be the model's."""
        if draft is not None and draft.tokenizer.hash() != loaded.tokenizer.hash():
            raise UserError("the draft model has another tokenizer than the model, so its guesses would mean other "
                            "texts; take one that was trained with the same tokenizer")
        return cls(loaded.model, loaded.tokenizer, config, stop_ids=loaded.stop_ids or None,
                   draft_model=None if draft is None else draft.model)

    def block_counts(self, specs: list, theirs: list, itemsize: int) -> dict[int | None, int]:
        """Blocks for every window: as many as the sequences could need, as far as memory goes."""
        config, size = self.config, self.config.block_size
        seq_len = self.model.config.seq_len
        tokens = config.cache_tokens
        if tokens is None:
            each = sum(spec.bytes_per_token(itemsize) for spec in [*specs, *theirs]) or 1
            tokens = min(config.max_seqs * (seq_len + size), int(SHARE_OF_MEMORY * total_memory(self.device)) // each)
        most = max(-(-tokens // size), 2) + 2     # block 0, and one for a copy
        counts = {}
        for window in windows_of([*specs, *theirs]):
            kept = seq_len if window is None else min(window + size, seq_len)
            need = 2 * config.max_seqs * (-(-kept // size) + 1) + -(-config.chunk // size) + 3
            counts[window] = most if window is None else max(min(most, need), -(-(kept + config.chunk) // size) + 3)
        return counts

    # ------------------------------------------------------------------------------------------------ what is asked

    def submit(self, request: Request) -> int:
        """Put a request in line and return its number. UserError if it cannot be answered, QueueFull if too many wait.
        """
        if len(self.scheduler.waiting) >= self.config.max_queue:
            raise QueueFull(f"{self.config.max_queue} requests are waiting already; try again later")
        self.check(request)
        stop_ids = self.stop_ids if request.stop_ids is None else request.stop_ids
        job = Job(id=next(self.ids), request=request, open=request.n)
        sequence = Sequence(ids=list(request.prompt), priority=request.priority, forks=request.n - 1,
                            reuse=not request.prompt_logps, adapter=request.adapter)
        sequence.owner = self.answer(job, 0, frozenset(stop_ids))
        job.sequences.append(sequence)
        self.jobs[job.id] = job
        self.scheduler.add(sequence)
        self.counts.prompt_tokens += len(request.prompt)
        return job.id

    def check(self, request: Request) -> None:
        """UserError for what cannot be answered; touches nothing, so any thread may ask."""
        check_prompt(request.prompt, self.limit, self.vocab, gaps=self.gaps)
        self.require_adapter(request.adapter)
        for name in ("max_new", "n"):
            if getattr(request, name) < 1:
                raise UserError(f"{name}={getattr(request, name)} must be at least 1")
        if request.top_logps < 0:
            raise UserError(f"top_logps={request.top_logps} must be at least 0")
        if request.n > self.config.max_seqs:
            raise UserError(f"n={request.n} answers to one prompt are more than the {self.config.max_seqs} that are "
                            "written at once; ask for fewer, or raise max_seqs")
        if bad := [id for id, _ in request.sampling.logit_bias if not 0 <= id < self.vocab or id in self.gaps]:
            raise UserError(f"logit_bias names the token {bad[0]}, which does not exist; the vocabulary is 0 to "
                            f"{self.vocab - 1}")

    def require_adapter(self, name: str | None) -> None:
        if name is not None:
            (self.adapters or Switch()).require(name)

    def answer(self, job: Job, index: int, stop_ids: frozenset[int]) -> Answer:
        request = job.request
        row = self.row(request.prompt, request.stop, request.max_new, index, stop_ids)
        chooser = Chooser.of(request.sampling, request.sampling.seed + index, request.prompt, self.vocab, self.device)
        return Answer(job=job, row=row, chooser=chooser,
                      matcher=None if request.grammar is None else request.grammar.start())

    def row(self, prompt: list[int], stop: tuple[str, ...], max_new: int, index: int = 0,
            stop_ids: frozenset[int] | None = None) -> Row:
        """What makes text of the ids that follow a prompt."""
        stop_ids = frozenset(self.stop_ids) if stop_ids is None else stop_ids
        return Row(index, self.tokenizer, stop, stop_ids, self.limit - len(prompt), max_new)

    def cancel(self, id: int) -> None:
        """Forget a request; its blocks are free at once. Nothing happens if it is finished."""
        self.kept = [one for one in self.kept if one[0] != id]
        if (job := self.jobs.pop(id, None)) is not None:
            for sequence in job.sequences:
                self.scheduler.remove(sequence)

    def fail(self, job: Job, error: UserError) -> None:
        """Give up one request. If its numbers overflowed, all that nobody holds is forgotten, for they lie there."""
        self.cancel(job.id)
        self.failed[job.id] = error
        if isinstance(error, NotFinite):
            for kind, blocks in enumerate(self.kinds):
                blocks.forget_all(blocks.idle)
                self.cache.clear_blocks(kind, [0, *blocks.idle])

    @property
    def busy(self) -> bool:
        return bool(self.jobs or self.kept)

    # -------------------------------------------------------------------------------------------------- what is done

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Token]]:
        """One pass: (number of the request, token) for every answer that goes on, several with speculation. Requests
        that could not go on are in `failed`, with the reason, until somebody takes them out."""
        out, self.kept = self.kept, []
        if not self.jobs:
            return out
        for sequence in self.scheduler.running:
            self.drafter.wish(sequence)
        plan = self.scheduler.plan()
        self.cache.copy_blocks(plan.copies)
        self.cache.clear_slots(plan.fresh)
        assert plan.work, "nobody can go on: the cache is too small for one sequence"
        self.drafter.guess(plan)
        passed = self.runner.run(plan.work)
        self.counts.steps += 1
        writing = []
        for work, offset in zip(plan.work, passed.offsets):
            sequence = work.sequence
            self.note_prompt(work, passed, offset)
            if not work.drafts:
                self.scheduler.computed(sequence, work.count)
            if work.last:
                writing.append((sequence, work, offset + work.count - 1))
                writing += [(twin, work, offset + work.count - 1) for twin in self.twins(sequence)]
        self.write(writing, passed, out)
        self.drafter.learn(plan.work, passed)
        return out

    def twins(self, sequence: Sequence) -> list[Sequence]:
        """The further answers to a prompt that has just been read."""
        made, answer = [], sequence.owner
        while sequence.forks:
            twin = self.scheduler.fork(sequence)
            if twin.slot is not None:
                self.cache.copy_slot(sequence.slot, twin.slot)
            twin.owner = self.answer(answer.job, len(answer.job.sequences), answer.row.stop_ids)
            answer.job.sequences.append(twin)
            made.append(twin)
        return made

    def write(self, writing: list[tuple[Sequence, Work, int]], passed: Passed, out: list) -> None:
        """Choose the next token of every row; where it is what was guessed, the one after it too, and so on. Row by row
        (sequence, its work, index of its last known token in the pass)."""
        going = [(sequence, work, at, 0) for sequence, work, at in writing]
        verified = [(sequence, work) for sequence, work, _ in writing if work.drafts]
        self.counts.drafted += sum(len(work.drafts) for _, work in verified)
        accepted = {id(sequence): 0 for sequence, _ in verified}
        while going := [one for one in going if one[0].alive and self.may_go_on(one[0].owner)]:
            index = [at + ahead for _, _, at, ahead in going]
            source = passed.hidden if passed.logits is None else passed.logits
            source = source if index == list(range(len(source))) else source[index]
            logits = self.runner.head(source) if passed.logits is None else source       # (R, V)
            answers = [sequence.owner for sequence, *_ in going]
            try:
                choice = choose(logits, [answer.chooser for answer in answers])
            except NotFinite as error:
                for job in {answers[i].job for i in error.rows}:
                    self.fail(job, error)
                continue
            tops = top_logps(logits, [answer.job.request.top_logps for answer in answers])
            further = []
            for (sequence, work, at, ahead), id_, logp, sampled, top in zip(
                    going, choice.ids.tolist(), choice.logps.tolist(), choice.sampled_logps.tolist(), tops):
                if not sequence.alive:            # another answer to its prompt has failed
                    continue
                token = self.push(sequence, id_, logp, sampled, top)
                if token is None:
                    continue
                out.append((sequence.owner.job.id, token))
                right = ahead < len(work.drafts) and work.drafts[ahead] == id_
                if work.drafts:
                    accepted[id(sequence)] += right
                if token.finish is None and right:
                    further.append((sequence, work, at, ahead + 1))
            going = further
        for sequence, work in verified:
            self.counts.accepted += accepted[id(sequence)]
            if sequence.alive:
                self.scheduler.computed(sequence, work.count + accepted[id(sequence)])

    def may_go_on(self, answer: Answer) -> bool:
        """Ask the answer's grammar what may follow; if nothing, the request has failed."""
        try:
            answer.chooser.allowed = self.allowed(answer)
        except UserError as error:
            self.fail(answer.job, error)
        return answer.job.id in self.jobs

    def push(self, sequence: Sequence, id: int, logp: float, sampled_logp: float, top: tuple) -> Token | None:
        """Append a token to an answer; finish the answer if it is the last. None if its grammar refuses the token."""
        answer, more = sequence.owner, {}
        job = answer.job
        if not answer.row.count:
            more["cached"] = sequence.cached
            self.counts.cached_tokens += sequence.cached * (answer.row.index == 0)
            if job.request.prompt_logps:
                more["prompt_logps"], more["prompt_top"] = (None, *job.prompt_logps), ((), *job.prompt_top)
        end = False
        if answer.matcher is not None and id not in answer.row.stop_ids:
            try:
                answer.matcher.advance(id)
            except UserError as error:
                self.fail(job, error)
                return None
            end = answer.matcher.done
        sequence.ids.append(id)
        answer.chooser.chose(id)
        token = answer.row.push(id, logp, end=end, sampled_logp=sampled_logp, top=top, **more)
        self.counts.generated_tokens += 1
        if token.finish is not None:
            self.scheduler.remove(sequence)
            job.open -= 1
            if not job.open:
                del self.jobs[job.id]
        return token

    def allowed(self, answer: Answer) -> Tensor | None:
        """What the answer's grammar lets follow, (V,); stop ids as it says whether it may end."""
        if answer.matcher is None or (allowed := answer.matcher.allowed()) is None:
            return None
        allowed = allowed[:self.vocab].clone()
        ends = [id for id in answer.row.stop_ids if id < self.vocab]
        allowed[ends] = answer.matcher.may_stop
        if not allowed.any():
            raise UserError("no token of the vocabulary goes on with what the grammar asks for")
        return allowed

    def note_prompt(self, work: Work, passed: Passed, offset: int) -> None:
        """Log-probabilities of a prompt's tokens, if they were asked for."""
        job = work.sequence.owner.job
        if not job.request.prompt_logps:
            return
        prompt, known = job.request.prompt, len(job.prompt_logps)
        first, end = max(work.start, known), min(work.start + work.count, len(prompt) - 1)
        if first >= end:
            return
        logits = self.runner.head(passed.hidden[offset + first - work.start:offset + end - work.start])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        targets = torch.tensor(prompt[first + 1:end + 1], device=wide.device)
        job.prompt_logps += wide.gather(1, targets[:, None])[:, 0].tolist()
        job.prompt_top += top_logps(logits, [job.request.top_logps] * len(logits))

    def generate(self, requests: list[Request], on_token: Callable[[int, Token], None] | None = None
                 ) -> list[list[Completion]]:
        """The answers to every request, [request][answer]. `on_token(i, token)` is told of request i's as they come."""
        done = [[Completion() for _ in range(request.n)] for request in requests]
        for i, token in self.stream(requests):
            done[i][token.row].add(token)
            if on_token is not None:
                on_token(i, token)
        return done

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, Token]]:
        """(index of the request, token) until all requests are answered; who stops listening cancels the rest."""
        for request in requests:
            self.check(request)
        waiting, index = deque(enumerate(requests)), {}
        try:
            while waiting or any(id in self.jobs for id in index) or any(id in index for id, _ in self.kept):
                while waiting and len(self.scheduler.waiting) < self.config.max_queue:
                    i, request = waiting.popleft()
                    index[self.submit(request)] = i
                tokens = self.step()
                self.kept += [(id, token) for id, token in tokens if id not in index]
                for id, token in tokens:
                    if id in index:
                        yield index[id], token
                for id in index.keys() & self.failed.keys():
                    raise self.failed.pop(id)
        finally:
            for id in index:
                self.cancel(id)

    # --------------------------------------------------------------------------------------------------- and besides

    @torch.inference_mode()
    def embed(self, prompts: list[list[int]], adapter: str | None = None) -> Tensor:
        """A vector of length 1 for every text, (n, D) in float32: the mean of its last hidden vectors."""
        self.require_adapter(adapter)
        vectors = []
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, self.model.config.seq_len + 1, self.vocab,
                         f"text {i + 1}" if len(prompts) > 1 else "the text", gaps=self.gaps)
            ids = torch.tensor([prompt], device=self.device)
            with self.runner.using([adapter]):
                hidden = self.model(ids, torch.arange(len(prompt), device=self.device)[None]).hidden[0]
            mean = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).mean(0)
            vectors.append(mean / mean.norm().clamp_min(1e-12))
        return torch.stack(vectors).to(torch.float32)

    @torch.no_grad()
    def update_weights(self, model: LM) -> None:
        """Take over the weights of a model of the same shape, in place, or hear that one's own have changed, adapters
        included. What the old ones computed is forgotten, and answers that are being written go on under the new ones,
        their texts read again."""
        if model.config != self.model.config:
            raise UserError("the new weights belong to a model of another shape")
        if model is not self.model:
            theirs = model.state_dict()
            for name, mine in self.model.state_dict().items():
                mine.copy_(theirs[name])
        for job in self.jobs.values():            # nobody has been told yet what the old ones think of a prompt
            if not job.sequences[0].owner.row.count:
                job.prompt_logps.clear()
                job.prompt_top.clear()
        self.version += 1
        self.adapters = switch_of(self.model)
        self.runner.refresh(self.adapters)
        self.scheduler.new_weights(self.version.to_bytes(8, "little"))

    def stats(self) -> Stats:
        full = [b for b in self.kinds if b.window is None] or self.kinds
        return replace(self.counts, waiting=len(self.scheduler.waiting), running=len(self.scheduler.running),
                       blocks=sum(b.count - 1 for b in full), blocks_free=sum(b.free for b in full),
                       preemptions=self.scheduler.preemptions)
