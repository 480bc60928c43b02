"""Scaling laws: what small runs say about a larger one.

The loss of a language model falls with its parameters N and its training tokens D, each by a power of its own, towards
what no model can predict (Chinchilla, Hoffmann et al., 2203.15556):

    L(N, D) = E + A / N^alpha + B / D^beta

What both terms cost together need not be their sum: a small model that has seen much gains less from more tokens than a
large one. Kaplan et al. (2001.08361, equation 1.5) join them so; here with a constant E added:

    L(N, D) = E + ((A / N^alpha)^(1/beta) + (B / D^beta)^(1/beta))^beta

Either way five numbers, fitted to a table of finished runs as in appendix D.3 of Chinchilla: the Huber loss (delta
1e-3) of log L, so that a run that went wrong pulls little, minimised from a grid of starts, since the surface has
several valleys. With the arithmetic of a run at C = 6 N D, the law has its optimum at N* = G (C/6)^a and D* = (C/6)^b /
G, where a = beta / (alpha + beta), b = alpha / (alpha + beta) and G = (alpha A / (beta B))^(1 / (alpha + beta)).

The numbers that the paper printed are not the minimum of its own objective: Besiroglu et al. (2404.10102) read the runs
off its figure and fitted them again (`REPLICATED`), which agrees with the paper's other two approaches, about 20 tokens
a parameter. Intervals are by bootstrap over runs: the law is fitted to many tables drawn from the table.

Data that are read again are worth less each time (Muennighoff et al., 2305.16264): U tokens read 1 + R times count as
U + U R* (1 - exp(-R / R*)) with R* = 15.39, and so do parameters beyond what the data can fill, with 5.31.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Callable

import numpy as np

from mindseed.base.errors import UserError

DELTA = 1e-3                                      # of the Huber loss, in log L
FEWEST = 6                                        # runs: one more than there are numbers to find
EXPONENTS = np.log(1e-3), np.log(5.0)             # between which alpha and beta are looked for
PER = 6.0                                         # FLOPs per parameter and token
REPEATED_DATA, REPEATED_PARAMS = 15.39, 5.31      # R*_D and R*_N of 2305.16264


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(N, D) in nats a token: the sum of three terms, or two of them `joined`. Its fields may be arrays: then it is as
    many laws."""

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any
    joined: bool = False

    def loss(self, params: Any, tokens: Any) -> Any:
        if not self.joined:
            return self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)
        n, d = np.log(self.A) - self.alpha * np.log(params), np.log(self.B) - self.beta * np.log(tokens)
        return self.E + np.exp(self.beta * np.logaddexp(n / self.beta, d / self.beta))

    @property
    def exponents(self) -> tuple[Any, Any]:
        """(a, b): N* grows as C^a and D* as C^b."""
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

    @property
    def scale(self) -> Any:
        """G. The joined terms are least where the sum of their powers 1 / beta is: a law of exponents alpha / beta and
        1, whose optimum grows as fast."""
        ratio = np.power(self.alpha / self.beta, self.beta if self.joined else 1.0)
        return np.power(ratio * self.A / self.B, 1 / (self.alpha + self.beta))

    def optimal(self, flops: Any, per: float = PER) -> tuple[Any, Any]:
        """(N*, D*), which reach the lowest loss for `flops` = per x N x D."""
        a, b = self.exponents
        return self.scale * np.power(flops / per, a), np.power(flops / per, b) / self.scale

    def justified(self, tokens: Any) -> Any:
        """Parameters that so many tokens can fill: N* where D* is `tokens`."""
        a, b = self.exponents
        return self.scale * np.power(self.scale * tokens, a / b)

    def limited(self, params: Any, tokens: Any, unique: Any, *, data: float = REPEATED_DATA,
                excess: float = REPEATED_PARAMS) -> Any:
        """The loss where only `unique` of the tokens are different ones (2305.16264, equations 5 and 6): both repeated
        tokens and parameters beyond what the unique ones can fill count for less and less."""
        filled = np.minimum(params, self.justified(np.minimum(unique, tokens)))
        return self.loss(worth(params, filled, excess), worth(tokens, unique, data))


CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)                 # as printed in 2203.15556
REPLICATED = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)        # 2404.10102


def worth(seen: Any, unique: Any, decay: float = REPEATED_DATA) -> Any:
    """How many different tokens `seen` tokens are worth of which `unique` are different: U + U R* (1 - e^(-R / R*)),
    R the times that they are repeated. Never more than unique x (1 + decay)."""
    unique = np.minimum(unique, seen)
    return unique + unique * decay * -np.expm1(-(np.divide(seen, unique) - 1) / decay)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A table of finished runs: parameters, training tokens, held-out loss in nats a token; (R,) each."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, params: Any, tokens: Any, loss: Any) -> Runs:
        return cls(params=np.asarray(params, float), tokens=np.asarray(tokens, float), loss=np.asarray(loss, float))

    def __len__(self) -> int:
        return len(self.loss)

    def problems(self) -> list[str]:
        """All that keeps five numbers from being found in it, a line each."""
        found = []
        for name in ("params", "tokens", "loss"):
            column = getattr(self, name)
            if bad := [i for i, x in enumerate(column, 1) if not np.isfinite(x) or x <= 0]:
                found.append(f"{name} must be above 0, and is {column[bad[0] - 1]:g} in run {bad[0]}"
                             + f" and {len(bad) - 1} more" * (len(bad) > 1))
        if len(self) < FEWEST:
            found.append(f"{len(self)} runs are too few: five numbers need {FEWEST} at the least, and 15 or more to be "
                         "known well")
        for name in ("params", "tokens"):
            if (kinds := len(np.unique(getattr(self, name)))) < 3:
                found.append(f"{kinds} different {name} are too few: a power and a constant need 3")
        return found


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The loss of a run that is not in the table, and the interval in which it is expected."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law, the runs it was fitted to, and the laws of the tables drawn from them (arrays, one entry each)."""

    law: Law
    runs: Runs
    objective: float             # sum of Huber losses
    drawn: Law
    seed: int = 0

    @property
    def residuals(self) -> np.ndarray:
        """(R,) log of measured over fitted loss."""
        return np.log(self.runs.loss) - np.log(self.law.loss(self.runs.params, self.runs.tokens))

    @property
    def error(self) -> float:
        """Root mean square of the residuals: the relative error of the loss of a run."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def interval(self, figure: Callable[[Law], Any], level: float = 0.95) -> tuple[float, float]:
        """In which a figure of the law lies, by the share `level` of the tables drawn."""
        with np.errstate(all="ignore"):
            values = np.atleast_1d(figure(self.drawn))
        known = values[np.isfinite(values)]
        if len(known) < 0.9 * len(values):                    # the runs do not determine it
            return np.nan, np.nan
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def predict(self, params: float, tokens: float, *, level: float = 0.95) -> Prediction:
        """The loss of a new run. Its interval has two parts: the law is not known better than the tables drawn from the
        runs agree, and a run strays from the law as those of the table do."""
        rng, free = np.random.default_rng(self.seed), np.sqrt(len(self.runs) / (len(self.runs) - 5))
        strays = rng.choice(self.residuals * free, size=np.shape(self.drawn.E))
        low, high = self.interval(lambda law: law.loss(params, tokens) * np.exp(strays), level)
        return Prediction(loss=float(self.law.loss(params, tokens)), low=low, high=high)


# -------------------------------------------------------------------------------------------------------------- fitting

def fit(runs: Runs, *, joined: bool = False, draws: int = 1000, seed: int = 0) -> Fit:
    """The law of a table of runs, and those of `draws` tables of as many runs drawn from it with replacement.

    Raises UserError, naming all that is wrong, for a table that cannot tell five numbers.
    """
    if problems := runs.problems():
        raise UserError("no law can be fitted:\n" + "\n".join(f"  {line}" for line in problems))
    table = Centred(runs, joined=joined)
    starts = table.starts()
    found, value = descend(table, starts, np.ones((len(starts), len(runs))), close=1e-3, rounds=60)
    best = found[np.argsort(value)[:8]]                       # the deepest valleys, now to their bottoms
    best, value = descend(table, best, np.ones((len(best), len(runs))), deltas=(DELTA,))
    here = best[value.argmin()]
    picked = np.random.default_rng(seed).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=draws)
    drawn, _ = descend(table, np.tile(here, (draws, 1)), picked.astype(float), deltas=(DELTA,), close=1e-5)
    return Fit(law=table.law(here), runs=runs, objective=float(value.min()), drawn=table.law(drawn.T), seed=seed)


class Centred:
    """The table in logarithms around their means, where the five unknowns hardly depend on each other: logs of the
    three terms at the middle of the table, and of the two exponents, which so stay positive."""

    def __init__(self, runs: Runs, *, joined: bool = False) -> None:
        self.joined = joined
        self.n, self.d, self.loss = np.log(runs.params), np.log(runs.tokens), np.log(runs.loss)
        self.n_mean, self.d_mean = self.n.mean(), self.d.mean()
        self.n, self.d = self.n - self.n_mean, self.d - self.d_mean

    def starts(self) -> np.ndarray:
        """(S, 5) ways to divide the mean loss among the three terms, each with several pairs of exponents."""
        middle = self.loss.mean()
        return np.array([[middle + np.log((1 - rest) * part), middle + np.log((1 - rest) * (1 - part)),
                          middle + np.log(rest), np.log(alpha), np.log(beta)]
                         for rest, part, alpha, beta in product((0.1, 0.5, 0.9), (0.25, 0.75), (0.1, 0.3, 0.6, 1.2),
                                                                (0.1, 0.3, 0.6, 1.2))])

    def law(self, theta: np.ndarray) -> Law:
        """The law of unknowns (5,), or of (5, S) a law of arrays."""
        a, b, e, alpha, beta = theta[0], theta[1], theta[2], np.exp(theta[3]), np.exp(theta[4])
        figures = {"E": np.exp(e), "A": np.exp(a + alpha * self.n_mean), "B": np.exp(b + beta * self.d_mean),
                   "alpha": alpha, "beta": beta}
        return Law(**{name: x if np.ndim(x) else float(x) for name, x in figures.items()}, joined=self.joined)

    def residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of unknowns (S, 5): log of fitted over measured loss (S, R), and its derivatives (S, R, 5)."""
        a, b, e = (theta[:, i, None] for i in range(3))
        alpha, beta = np.exp(theta[:, 3, None]), np.exp(theta[:, 4, None])
        if self.joined:
            return self.joined_residuals(a - alpha * self.n, b - beta * self.d, e, alpha, beta)
        terms = np.stack([a - alpha * self.n, b - beta * self.d, e + 0 * self.n], -1)          # (S, R, 3)
        top = terms.max(-1, keepdims=True)
        shares = np.exp(terms - top)
        total = shares.sum(-1, keepdims=True)
        shares = shares / total
        slopes = np.stack([-shares[..., 0] * alpha * self.n, -shares[..., 1] * beta * self.d], -1)
        return (top + np.log(total))[..., 0] - self.loss, np.concatenate([shares, slopes], -1)


    def joined_residuals(self, n: np.ndarray, d: np.ndarray, e: np.ndarray, alpha: np.ndarray, beta: np.ndarray
                         ) -> tuple[np.ndarray, np.ndarray]:
        """The same from logs of both terms (S, R): where they are joined, their shares q and 1 - q decide, and beta
        also moves the joint, by the entropy of the shares."""
        both = np.logaddexp(n / beta, d / beta)
        log_q, log_rest = n / beta - both, d / beta - both
        q, rest = np.exp(log_q), np.exp(log_rest)
        total = np.logaddexp(beta * both, e)
        share = np.exp(beta * both - total)
        entropy = -(q * log_q + rest * log_rest)
        slopes = [share * q, share * rest, 1 - share, -share * q * alpha * self.n,
                  share * beta * (entropy - rest * self.d)]
        return total - self.loss, np.stack(slopes, -1)


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 near zero, and a straight line further out."""
    size = np.abs(r)
    return np.where(size <= delta, r**2 / 2, delta * (size - delta / 2))


def descend(table: Centred, theta: np.ndarray, counts: np.ndarray, *, deltas: tuple[float, ...] = (30 * DELTA, DELTA),
            close: float = 1e-9, rounds: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """From every start (S, 5) down into its valley; `counts` (S, R) is how often each run stands in its table.

    Levenberg and Marquardt's steps on reweighted squares, for all starts at once: a run that strays by r weighs
    delta / |r|, which makes the squares touch the Huber loss from above. A wider delta first goes over the roughest
    ground. A start is done when ten steps in a row gain less than the share `close`. Returns the unknowns and the sums
    of Huber losses (S,).
    """
    theta, values = theta.copy(), np.zeros(len(theta))
    for delta in deltas:
        left = np.arange(len(theta))                          # the starts that still move, and where they are
        here, count, damping, still = theta.copy(), counts, np.full(len(theta), 1e-2), np.zeros(len(theta), int)
        r, slopes = table.residuals(here)
        value = (count * huber(r, delta)).sum(-1)
        for _ in range(rounds):
            weighted = (count * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300)))[..., None] * slopes
            matrix = weighted.swapaxes(1, 2) @ slopes         # (S, 5, 5)
            scale = np.einsum("spp->sp", matrix)
            ridge = damping[:, None] * scale + 1e-12 * scale.max(-1, keepdims=True)
            downhill = -(weighted * r[..., None]).sum(1)
            step = np.linalg.solve(matrix + ridge[:, None] * np.eye(5), downhill[..., None])[..., 0]
            tried = here + np.clip(step, -2, 2)
            tried[:, 3:] = np.clip(tried[:, 3:], *EXPONENTS)
            tried_r, tried_slopes = table.residuals(tried)
            reached = (count * huber(tried_r, delta)).sum(-1)
            better = reached < value
            still = np.where(reached < value * (1 - close), 0, still + 1)
            here, r = np.where(better[:, None], tried, here), np.where(better[:, None], tried_r, r)
            slopes, value = np.where(better[:, None, None], tried_slopes, slopes), np.where(better, reached, value)
            damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
            theta[left], values[left] = here, value
            if (on := still < 10).sum() < 0.7 * len(on):      # let go of those that have arrived
                left, here, count, damping, still = left[on], here[on], count[on], damping[on], still[on]
                r, slopes, value = r[on], slopes[on], value[on]
            if not on.any():
                break
    return theta, values


# ------------------------------------------------------------------------------------------------------- without a law

@dataclass(frozen=True, kw_only=True)
class Slice:
    """Runs of one amount of arithmetic: the size at which a parabola through their losses is lowest."""

    flops: float
    params: float
    loss: float
    sizes: tuple[float, ...]     # those that were compared


def isoflop(runs: Runs, *, levels: int = 8, per: float = PER) -> list[Slice]:
    """Approach 2 of Chinchilla, which assumes no law: among runs of equal arithmetic C = per x N x D the loss is a
    parabola in log N, and its lowest point is the best size for that C.

    A sweep has few runs of exactly equal C, so between the budgets of one size log L is read off a parabola in log D.
    Of `levels` amounts of arithmetic those remain at which three sizes or more were trained that long and the lowest
    point lies between them; an empty list says that the sweep is too narrow.
    """
    curves = []                                               # of every size: (N, its budgets, log L over log D)
    for size in np.unique(runs.params):
        mine = runs.params == size
        budgets, loss = np.log(runs.tokens[mine]), np.log(runs.loss[mine])
        if (kinds := len(np.unique(budgets))) > 1:
            curve = np.polynomial.Polynomial.fit(budgets, loss, min(2, kinds - 1))
            curves.append((size, budgets.min(), budgets.max(), curve))
    if len(curves) < 3:
        return []
    spans = [per * size * np.exp(end) for size, low, high, _ in curves for end in (low, high)]
    found = []
    for flops in np.geomspace(min(spans), max(spans), levels + 2)[1:-1]:
        there = [(np.log(size), curve(wanted)) for size, low, high, curve in curves
                 if low <= (wanted := np.log(flops / per / size)) <= high]
        if len(there) < 3:
            continue
        x, y = np.array(there).T
        parabola = np.polynomial.Polynomial.fit(x, y, 2)
        bent = parabola.deriv(2)(0)
        lowest = float(parabola.deriv().roots()[0]) if bent > 0 else np.inf
        if x.min() < lowest < x.max():
            found.append(Slice(flops=float(flops), params=float(np.exp(lowest)), loss=float(np.exp(parabola(lowest))),
                               sizes=tuple(np.exp(x).tolist())))
    return found


def growth(slices: list[Slice]) -> float | None:
    """The exponent a of N* ~ C^a through the lowest points; None for fewer than three."""
    if len(slices) < 3:
        return None
    return float(np.polynomial.Polynomial.fit(np.log([s.flops for s in slices]), np.log([s.params for s in slices]),
                                              1).convert().coef[1])
