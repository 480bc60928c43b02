"""From logits to the next token.

Logits are first biased and penalised, then cut in the order of Hugging Face's processors: temperature, top-k, top-p,
min-p. What remains is drawn by the Gumbel trick (1611.00712): the token with the largest log-probability plus noise,
where the noise is a function of the request's seed, of how many tokens came before and of the token itself, and of
nothing else. So a request with a seed gets the same answer whatever shares its batch, however often it is interrupted,
and whoever guesses its tokens beforehand: a draft that draws with the same noise mostly draws the same token, and
comparing the two is all there is to exact speculation (2408.07978).
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mindseed.base.errors import UserError

LEAST = 1e-6                          # temperature and penalty: beyond it, or its inverse, float32 would overflow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The defaults draw from the model's own distribution; temperature 0 is greedy."""

    temperature: float = 1.0          # 0: always the most likely token
    top_k: int = 0                    # keep the k most likely tokens; 0: all
    top_p: float = 1.0                # keep the smallest set with at least this much probability (1904.09751); 1: all
    min_p: float = 0.0                # keep tokens at least this likely relative to the likeliest (2407.01082); 0: all
    repetition_penalty: float = 1.0   # divide the odds of tokens that already occurred (1909.05858); 1: none
    frequency_penalty: float = 0.0    # taken from a logit for every time the answer holds the token, as OpenAI does
    presence_penalty: float = 0.0     # taken once if it holds it at all
    logit_bias: tuple[tuple[int, float], ...] = ()    # (id, what is added to its logit)
    seed: int = 0

    def __post_init__(self) -> None:
        def need(name: str, good: bool, rule: str) -> None:
            if not good:
                raise UserError(f"{name}={getattr(self, name)} is out of range: {rule}")

        need("temperature", self.temperature == 0 or LEAST <= self.temperature <= 1 / LEAST,
             f"0 (always the likeliest token), or from {LEAST:g} to {1 / LEAST:g}")
        need("top_k", self.top_k >= 0, "at least 1, or 0 to keep all tokens")
        need("top_p", 0 < self.top_p <= 1, "above 0, and 1 to keep all tokens; for the likeliest token, temperature 0")
        need("min_p", 0 <= self.min_p < 1, "from 0 (keep all tokens) to below 1")
        need("repetition_penalty", LEAST <= self.repetition_penalty <= 1 / LEAST,
             f"from {LEAST:g} to {1 / LEAST:g}, and 1 for none")
        need("frequency_penalty", abs(self.frequency_penalty) <= 100, "from -100 to 100, and 0 for none")
        need("presence_penalty", abs(self.presence_penalty) <= 100, "from -100 to 100, and 0 for none")
        need("logit_bias", all(abs(bias) <= 1e4 for _, bias in self.logit_bias), "from -10000 to 10000 for a token")
        need("seed", 0 <= self.seed < 1 << 63, "a whole number from 0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


# ------------------------------------------------------------------------------------------------- the distribution

def filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidates that temperature, top-k, top-p and min-p leave of logits (B, V).

    Returns probabilities (B, C), summing to 1 with 0 for what was cut, and the ids (B, C) they belong to. With top_k or
    top_p, candidates are in falling order, and ties are cut by that order.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    V = logits.shape[-1]
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = logits.topk(min(sampling.top_k or V, V), dim=-1)
    else:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs                                         # the mass of all likelier tokens
        probs = renormalise(probs.masked_fill(before >= sampling.top_p, 0))
    if sampling.min_p:
        probs = renormalise(probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0))
    return probs, ids


def renormalise(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of seen tokens divided by the penalty, or multiplied where they are negative."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class Seen:
    """Which tokens a row has read, and how often it has written each: what penalties need to know."""

    def __init__(self, prompt: list[int], vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen[torch.tensor([id for id in prompt if id < vocab_size], dtype=torch.long, device=device)] = True
        self.written = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    def add(self, id: int) -> None:
        self.seen[id] = True
        self.written[id] += 1


# ---------------------------------------------------------------------------------------------------------- choosing

@dataclass(kw_only=True)
class Chooser:
    """How one row chooses: its sampling and seed, and where it stands. `step` counts the tokens it has chosen."""

    sampling: Sampling
    seed: int
    seen: Seen | None = None
    allowed: Tensor | None = None                 # bool (V,): what a grammar lets follow now; None: anything
    step: int = 0

    @classmethod
    def of(cls, sampling: Sampling, seed: int, prompt: list[int], vocab_size: int,
           device: torch.device | str = "cpu") -> Chooser:
        seen = Seen(prompt, vocab_size, device) if sampling.penalises else None
        return cls(sampling=replace(sampling, seed=0), seed=seed % (1 << 63), seen=seen)

    @property
    def plain(self) -> bool:
        """Whether it takes the model's likeliest token, whatever that is."""
        s = self.sampling
        return s.temperature == 0 and not s.logit_bias and self.seen is None and self.allowed is None

    def chose(self, id: int) -> None:
        self.step += 1
        if self.seen is not None:
            self.seen.add(id)


class NotFinite(UserError):
    """Rows with logits that are no numbers."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__("the model's logits are not finite: its weights are damaged, or too large for this dtype")
        self.rows = rows


@dataclass(frozen=True)
class Choice:
    ids: Tensor                                   # (B,)
    logps: Tensor                                 # (B,): under the model itself
    sampled_logps: Tensor                         # (B,): under the distribution that was drawn from; 0 if greedy


def choose(logits: Tensor, rows: list[Chooser]) -> Choice:
    """The next token of every row of logits (B, V). Changes nothing: tell a row by `chose`. Raises NotFinite."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps, best = wide.log_softmax(-1), wide.max(-1)                              # (B, V), (B,)
    likeliest = logps.gather(1, best.indices[:, None])[:, 0]
    if not (finite := torch.isfinite(likeliest)).all():
        raise NotFinite((~finite).nonzero()[:, 0].tolist())
    if all(row.plain for row in rows):
        return Choice(best.indices, likeliest, torch.zeros_like(likeliest))
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.sampling, []).append(i)
    ids, sampled = torch.empty(len(rows), dtype=torch.long, device=logits.device), torch.zeros_like(likeliest)
    for sampling, members in groups.items():
        some = [rows[i] for i in members]
        index = slice(None) if len(groups) == 1 else torch.tensor(members, device=logits.device)
        changed = adjusted(wide[index], sampling, some)
        if sampling.greedy:
            ids[index] = changed.max(-1).indices
        else:
            ids[index], sampled[index] = draw(*filtered(changed, sampling), some)
    return Choice(ids, logps.gather(1, ids[:, None])[:, 0], sampled)


def adjusted(logits: Tensor, sampling: Sampling, rows: list[Chooser]) -> Tensor:
    """Logits (B, V) after bias, penalties and grammar."""
    if sampling.logit_bias:
        ids, bias = zip(*sampling.logit_bias)
        logits = logits.index_add(1, torch.tensor(ids, device=logits.device),
                                  logits.new_tensor(bias).expand(len(logits), -1))
    if sampling.repetition_penalty != 1:
        logits = penalised(logits, torch.stack([row.seen.seen for row in rows]), sampling.repetition_penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        written = torch.stack([row.seen.written for row in rows])
        logits = logits - sampling.frequency_penalty * written - sampling.presence_penalty * (written > 0)
    if any(row.allowed is not None for row in rows):
        everything = torch.ones(logits.shape[-1], dtype=torch.bool)
        allowed = torch.stack([everything if row.allowed is None else row.allowed for row in rows])
        logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
    return logits


def draw(probs: Tensor, ids: Tensor, rows: list[Chooser]) -> tuple[Tensor, Tensor]:
    """One of the candidates (B, C) for every row, and its log-probability."""
    seeds, steps = (torch.tensor(x, device=ids.device)[:, None] for x in zip(*((r.seed, r.step) for r in rows)))
    logps = probs.to(torch.float64).log()
    best = (logps + gumbel(seeds, steps, ids)).argmax(-1, keepdim=True)
    return ids.gather(1, best)[:, 0], logps.gather(1, best)[:, 0].to(probs.dtype)


# ------------------------------------------------------------------------------------------------------------- noise

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)           # numbers of splitmix64 (Steele et al., OOPSLA 2014), as int64
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, where products wrap and every bit of x comes to matter for every bit."""
    x = (x ^ shifted(x, 30)) * MIX_1
    x = (x ^ shifted(x, 27)) * MIX_2
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as if x had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(seeds: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
    """Noise (B, C) in float64 for seeds (B, 1), steps (B, 1) and ids (B, C), the same on every device."""
    stream = mixed(mixed(seeds + GOLDEN) + (steps + 1) * GOLDEN)
    uniform = (shifted(mixed(stream + (ids + 1) * GOLDEN), 12).to(torch.float64) + 0.5) * 2.0 ** -52   # never 1
    return -(-uniform.log()).log()


def top_logps(logits: Tensor, wanted: list[int]) -> list[tuple[tuple[int, float], ...]]:
    """For every row of logits (R, V) its `wanted` likeliest (id, log-probability)."""
    if not any(wanted):
        return [()] * len(wanted)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    best = wide.topk(min(max(wanted), wide.shape[-1]), dim=-1)
    return [tuple(zip(ids[:n], values[:n])) for n, ids, values in zip(wanted, best.indices.tolist(),
                                                                      best.values.tolist())]
