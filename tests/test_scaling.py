"""Scaling laws: the fit finds the law it was given, intervals hold what they say, a sweep is what runs alone are."""
from __future__ import annotations

import json
import math
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from mindseed import cli
from mindseed.base.errors import UserError
from mindseed.base.log import read_jsonl
from mindseed.data.loader import Evaluation, _Chosen
from mindseed.data.shards import Prepared
from mindseed.models.lm import build
from mindseed.objectives.sft import SFT
from mindseed.plan.params import count_params
from mindseed.plan.scaling import (CHINCHILLA, DELTA, REPLICATED, Centred, Law, Runs, fit, growth, huber, isoflop,
                                   worth)
from mindseed.recipes import scaling_law, sweep
from mindseed.recipes.options import LoopOptions, TrainOptions
from mindseed.recipes.scaling_page import draw, page
from mindseed.recipes.sweep import Sweep, judge, plan_line, problems, shape_of
from mindseed.train.native import NativeBackend
from mindseed.train.validate import evaluate

LAW = Law(E=1.9, A=60.0, B=900.0, alpha=0.3, beta=0.4)
FIELDS = ("E", "A", "B", "alpha", "beta")


def grid(law: Law = LAW, *, noise: float = 0.0, seed: int = 0, sizes=(1.5e5, 3e5, 6e5, 1.2e6, 2.4e6),
         budgets=(5e5, 1e6, 2e6, 4e6)) -> Runs:
    params, tokens = (x.ravel() for x in np.meshgrid(sizes, budgets, indexing="ij"))
    strays = np.random.default_rng(seed).standard_normal(len(params))
    return Runs.of(params, tokens, law.loss(params, tokens) * np.exp(noise * strays))


# -------------------------------------------------------------------------------------------------------------- the law

def test_a_law_without_noise_is_found_to_the_digit():
    for law in (LAW, REPLICATED):
        scale = 1 if law is LAW else 1e3
        found = fit(grid(law, sizes=np.geomspace(1e5, 1e7, 5) * scale, budgets=np.geomspace(1e6, 1e8, 4) * scale),
                    draws=2)
        assert [getattr(found.law, name) for name in FIELDS] == pytest.approx([getattr(law, name) for name in FIELDS],
                                                                              rel=1e-5)
        assert found.error < 1e-8


def test_joined_terms_are_found_and_told_from_a_sum():
    law = Law(E=1.5, A=60.0, B=900.0, alpha=0.25, beta=0.35, joined=True)
    runs = grid(law, noise=0.001)
    joined, summed = fit(grid(law), joined=True, draws=2), fit(runs, draws=2)
    assert [getattr(joined.law, name) for name in FIELDS] == pytest.approx([getattr(law, name) for name in FIELDS],
                                                                           rel=1e-4)
    assert fit(runs, joined=True, draws=2).objective < summed.objective / 2
    assert scaling_law.fitted(rows_of(runs), scaling_law.Options(fit="x", draws=2))[0] == "total, joined"


def test_kaplans_law_is_the_joined_one_without_a_constant():
    """Equation 1.5 of 2001.08361 with the numbers of its table 2."""
    a, b, n, d = 0.076, 0.103, 6.4e13, 1.8e13
    law = Law(E=0.0, A=n**a, B=d**b, alpha=a, beta=b, joined=True)
    for params, tokens in ((1e6, 1e8), (1e9, 2e10), (1e11, 3e11)):
        assert law.loss(params, tokens) == pytest.approx(((n / params) ** (a / b) + d / tokens) ** b)


@pytest.mark.parity
def test_the_valley_is_as_deep_as_lbfgs_finds_it():
    """The paper's minimiser, from several starts, on the same objective written out in torch."""
    runs = grid(noise=0.01, seed=3)
    n, d, y = (torch.from_numpy(np.log(x)) for x in (runs.params, runs.tokens, runs.loss))

    def objective(theta):
        a, b, e, alpha, beta = theta
        return torch.nn.functional.huber_loss(torch.logsumexp(torch.stack(
            [a - alpha * n, b - beta * d, e.expand_as(n)]), 0), y, delta=DELTA, reduction="sum")

    depths = []
    for start in ([4.0, 7.0, 0.6, 0.3, 0.4], [5.0, 5.0, 0.0, 0.5, 0.5]):
        theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        lbfgs = torch.optim.LBFGS([theta], max_iter=200, max_eval=400, history_size=20, tolerance_grad=1e-12,
                                  tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            value = objective(theta)
            value.backward()
            return value

        lbfgs.step(closure)
        depths.append(objective(theta).item())
    found = fit(runs, draws=2)
    law = found.law
    theta = torch.tensor([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta], dtype=torch.float64)
    assert objective(theta).item() == pytest.approx(found.objective, rel=1e-9)
    assert found.objective <= min(depths) * (1 + 1e-6) and min(depths) < 1.1 * found.objective


@pytest.mark.parametrize("joined", [False, True])
def test_derivatives_are_those_of_differences(joined):
    table, theta = Centred(grid(noise=0.02), joined=joined), np.array([[0.3, 0.9, 0.5, -1.2, -0.7]])
    _, slopes = table.residuals(theta)
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        difference = (table.residuals(theta + step)[0] - table.residuals(theta - step)[0]) / 2e-6
        np.testing.assert_allclose(slopes[..., i], difference, rtol=1e-6, atol=1e-9)


def test_the_huber_loss():
    np.testing.assert_allclose(huber(np.array([0.0, 5e-4, -5e-4, 3e-3, -3e-3]), 1e-3),
                               [0, 1.25e-7, 1.25e-7, 2.5e-6, 2.5e-6])


def test_one_run_that_went_wrong_hardly_pulls():
    runs = grid(noise=0.002, seed=1)
    spoilt = replace(runs, loss=np.where(np.arange(len(runs)) == 7, 1.5 * runs.loss, runs.loss))
    good, bad = fit(runs, draws=2).law, fit(spoilt, draws=2).law
    assert bad.loss(5e6, 1e7) == pytest.approx(good.loss(5e6, 1e7), rel=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Ten tables: at 90%, fewer than seven hits have a chance of 1 in 80."""
    hits = {"alpha": 0, "a": 0, "new": 0}
    for seed in range(10):
        found = fit(grid(noise=0.005, seed=seed), draws=60, seed=seed)
        figures = {"alpha": (lambda law: law.alpha, LAW.alpha), "a": (lambda law: law.exponents[0], LAW.exponents[0])}
        for name, (figure, truth) in figures.items():
            low, high = found.interval(figure, 0.9)
            hits[name] += low <= truth <= high
        said = found.predict(5e6, 8e6, level=0.9)
        assert said.low < said.loss < said.high
        truth = LAW.loss(5e6, 8e6) * math.exp(0.005 * np.random.default_rng(seed + 100).standard_normal())
        hits["new"] += said.low <= truth <= said.high
    assert all(n >= 7 for n in hits.values()), hits
    wide, narrow = (found.interval(lambda law: law.alpha, level) for level in (0.9, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_more_noise_makes_wider_intervals():
    widths = []
    for noise in (0.001, 0.01):
        said = fit(grid(noise=noise, seed=2), draws=60).predict(5e6, 8e6)
        widths.append(said.high - said.low)
    assert widths[1] > 3 * widths[0]


def test_a_new_run_strays_as_those_of_the_table_do():
    """In the middle of the table the law is well known, and yet a run is not."""
    found = fit(grid(noise=0.01, seed=4), draws=200)
    low, high = found.interval(lambda law: law.loss(6e5, 1.5e6), 0.9)
    said = found.predict(6e5, 1.5e6, level=0.9)
    assert said.high - said.low > 1.3 * (high - low) and (said.high - said.low) / said.loss > 0.022


def test_the_replicated_law_wants_twenty_tokens_a_parameter():
    params, tokens = REPLICATED.optimal(5.76e23)                      # Chinchilla's budget: 70B on 1.4T
    assert tokens / params == pytest.approx(18.4, abs=0.1) and params == pytest.approx(72.2e9, rel=0.01)
    assert REPLICATED.exponents == pytest.approx((0.513, 0.487), abs=1e-3)
    as_printed = CHINCHILLA.optimal(5.76e23)
    assert as_printed[1] / as_printed[0] > 60                         # the fault that 2404.10102 found


@pytest.mark.parametrize("law", [LAW, REPLICATED, replace(LAW, joined=True), replace(REPLICATED, joined=True)])
def test_the_optimum_is_one(law):
    params, tokens = law.optimal(1e18)
    assert 6 * params * tokens == pytest.approx(1e18)
    others = [law.loss(params * k, tokens / k) for k in (0.9, 1.1)]
    assert law.loss(params, tokens) < min(others)
    assert law.justified(tokens) == pytest.approx(params)


def test_parabolas_find_the_exponent_without_a_law():
    budgets = np.geomspace(1e9, 1e12, 13)
    runs = grid(REPLICATED, sizes=np.geomspace(5e7, 2e10, 11), budgets=budgets)
    slices = isoflop(runs)
    assert len(slices) >= 5 and growth(slices) == pytest.approx(REPLICATED.exponents[0], abs=0.03)
    for one in slices:
        assert one.params == pytest.approx(REPLICATED.optimal(one.flops)[0], rel=0.25)     # it is no parabola quite
        assert one.loss == pytest.approx(REPLICATED.loss(*REPLICATED.optimal(one.flops)), rel=0.01)


def test_a_narrow_sweep_has_no_parabolas():
    assert isoflop(grid(sizes=(1e5, 2e5), budgets=(1e6, 2e6, 4e6))) == []
    assert isoflop(grid(sizes=(1e3, 1e6, 1e9), budgets=(1e6, 1.1e6))) == [] and growth([]) is None
    small = grid(REPLICATED, sizes=np.geomspace(1e6, 1e7, 5), budgets=np.geomspace(1e11, 1e13, 7))
    assert isoflop(small) == []                   # the best size is larger than any of them


# ------------------------------------------------------------------------------------------------------------ few data

def test_repeated_tokens_by_hand():
    assert worth(100.0, 100.0) == worth(100.0, 500.0) == 100          # nothing is repeated
    assert worth(200.0, 100.0) == pytest.approx(100 + 100 * 15.39 * (1 - math.exp(-1 / 15.39)))
    assert worth(4.0, 1.0) == pytest.approx(3.7257, abs=1e-4)         # four passes are nearly four
    assert worth(41.0, 1.0) == pytest.approx(1 + 15.39 * (1 - math.exp(-40 / 15.39)))
    assert worth(1e9, 1.0) == pytest.approx(16.39)                    # and never more than this


def test_the_law_of_few_data_by_hand():
    """The paper's law for C4 (alpha = beta), 8 passes over 1e9 tokens by a model too large for them."""
    law = Law(E=1.87, A=521.0, B=1488.0, alpha=0.353, beta=0.353)
    scale = (521 / 1488) ** (1 / 0.706)
    assert law.justified(1e9) == pytest.approx(scale**2 * 1e9)
    filled, size = scale**2 * 1e9, 1e9
    params = filled + filled * 5.31 * (1 - math.exp(-(size / filled - 1) / 5.31))
    tokens = 1e9 + 1e9 * 15.39 * (1 - math.exp(-7 / 15.39))
    assert law.limited(size, 8e9, 1e9) == pytest.approx(1.87 + 521 / params**0.353 + 1488 / tokens**0.353)
    assert law.limited(1e7, 5e8, 1e9) == pytest.approx(law.loss(1e7, 5e8))        # one pass, a small model
    assert law.limited(1e7, 8e9, 1e9) > law.loss(1e7, 8e9)


# ----------------------------------------------------------------------------------------------------- a table as given

def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(runs: Runs, **more):
    return [{"params": n, "tokens": d, "loss": y, **more} for n, d, y in zip(runs.params, runs.tokens, runs.loss)]


def test_somebody_elses_table(tmp_path, capsys):
    table = write(tmp_path / "table.jsonl", rows_of(grid(noise=0.003)))
    assert cli.main(["scaling-law", "--fit", table, "--predict", "5e6x1e7", "--unique", "2e6", "--draws", "40", "--out",
                     str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out/scaling.json").read_text())
    law = facts["laws"]["total, sum"]
    assert (facts["law"], facts["form"]) == ("total, sum", "sum")
    assert facts["count"] == "total" and law["alpha"][1] < law["alpha"][0] < law["alpha"][2]
    assert law["error"] == pytest.approx(0.003, abs=0.002) and len(facts["runs"]) == 20
    [said] = facts["predictions"]
    assert said["low"] < said["loss"] < said["high"] and said["loss"] == pytest.approx(LAW.loss(5e6, 1e7), rel=0.03)
    assert [r["worth"] for r in facts["repeats"]][:2] == pytest.approx([1, 1.968], abs=1e-3)
    said = capsys.readouterr().out
    assert "5e6x1e7" in said and "fitted anew" in said
    assert "| total, sum |" in (tmp_path / "out/scaling.md").read_text()


def test_runs_that_determine_nothing_are_told_so(tmp_path, capsys):
    table = write(tmp_path / "table.jsonl", [{"params": n, "tokens": d, "loss": 1 + random.Random(n * d).random()}
                                             for n in (1e4, 2e4, 3e4, 4e4) for d in (2e4, 3e4, 4e4)])
    assert cli.main(["scaling-law", "--fit", table, "--draws", "60", "--predict", "1e9x1e12"]) == 0
    assert "follow no power law" in capsys.readouterr().err


def test_the_count_that_fits_better_is_chosen(tmp_path):
    runs = grid(noise=0.001)
    rows = [row | {"non_embedding": row["params"], "params": row["params"] + 3e5 * (1 + i % 3)}
            for i, row in enumerate(rows_of(runs))]
    options = scaling_law.Options(fit="x", draws=2)
    name, fits = scaling_law.fitted(rows, options)
    assert name == "non-embedding, sum" and len(fits) == 4
    assert scaling_law.fitted(rows, replace(options, count="total", form="sum"))[0] == "total, sum"
    assert scaling_law.fitted(rows, replace(options, form="joined"))[0] == "non-embedding, joined"
    with pytest.raises(UserError, match="--count non-embedding needs the column non_embedding"):
        scaling_law.fitted(rows_of(runs), replace(options, count="non-embedding"))


def test_all_that_is_wrong_with_a_table_is_told_at_once(tmp_path, capsys):
    good = {"params": 1e6, "tokens": 1e6, "loss": 3.0}
    table = write(tmp_path / "table.jsonl", [
        good, {"params": 1e6, "tokens": 2e6, "loss": -3.0}, {"size": 3}, "{oops\n", "\n", good | {"tokens": "many"},
        {"params": 1e6, "loss": 0}, good | {"non_embedding": True}])
    assert cli.main(["scaling-law", "--fit", table]) == 2
    said = capsys.readouterr().err
    for words in ("line 2 has loss=-3.0, which must be above 0", "line 3 has no params, tokens, loss",
                  "line 4 is not JSON", "line 6 has tokens='many'", "line 7 has no tokens and has loss=0",
                  "line 8 has non_embedding=True", "1 runs are too few", "1 different params are too few",
                  "1 different tokens are too few"):
        assert words in said, said
    assert cli.main(["scaling-law", "--fit", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_table_of_numbers_is_checked_too():
    runs = Runs.of([1e6, -1, 2e6], [1e6, 1e6, np.nan], [3.0, 2.9, np.inf])
    with pytest.raises(UserError) as error:
        fit(runs)
    for words in ("params must be above 0, and is -1 in run 2", "tokens must be above 0, and is nan in run 3",
                  "loss must be above 0, and is inf in run 3", "3 runs are too few"):
        assert words in str(error.value)


@pytest.mark.parametrize("words, message", [
    ("--predict 1e9", "predict=1e9 is not PARAMSxTOKENS"), ("--tokens 1e6 -2e6 3e6", "tokens must be above 0"),
    ("--level 1", "level=1.0 must lie"), ("--sizes 1x32 2x32 --tokens 1e6 2e6", "2 sizes and 2 budgets are too few"),
    ("--schedule.kind cosine", "falls from the start"), ("--draws 0 --level 2", "draws must be above 0; level=2.0")])
def test_options_that_make_no_sense(words, message, capsys):
    assert cli.main(["scaling-law", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_options_that_change_nothing_are_told():
    told = scaling_law.idle(scaling_law.Options(fit="x", sizes=("1", "2", "3"), level=0.9))
    assert told == ["sizes has no effect: with --fit nothing is trained"]
    told = scaling_law.idle(scaling_law.Options(target=None, target_tokens=1e5, trunk=False, schedule=replace(
        TrainOptions().schedule, kind="cosine", decay=0.2)))
    assert [line.partition(" has")[0] for line in told] == ["schedule.decay", "target_tokens"]


@pytest.mark.parametrize("size, message", [("3y4", "neither LAYERSxWIDTH"), ("0x32", "neither"),
                                           ("2x40", "multiple of 32"), ("2x288", "multiple of 64")])
def test_sizes_that_make_no_sense(size, message):
    with pytest.raises(UserError, match=message):
        shape_of(size)


def test_sizes():
    odd, even = shape_of("3x96"), shape_of("2x256")
    assert (odd.layers, odd.dim, odd.heads, odd.kv_heads, odd.head_dim, odd.ffn_dim) == (3, 96, 3, 3, 32, 256)
    assert (even.head_dim, even.heads, even.kv_heads, even.ffn_dim) == (64, 4, 2, 704)
    assert shape_of("5").dim == 320


# ------------------------------------------------------------------------------------------------------------ the sweep

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 5))) for _ in range(60)]
    texts = [" ".join(rng.choice(words[:1 + int(60 * rng.random()**2)]) for _ in range(30)) for _ in range(150)]
    return write(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", [{"text": text} for text in texts])


TINY = ("--data.vocab_size 300 --data.seq_len 32 --data.heldout 0.1 --data.workers 1 --micro_batch 2 --batch 2 "
        "--schedule.warmup_steps 2 --validate_documents 5 --draws 5 --device cpu --precision fp32").split()


def command(corpus, out, *more):
    return ["scaling-law", "--data.train", corpus, "--out", str(out), *TINY, *more]


@pytest.fixture(scope="module")
def grown(corpus, tmp_path_factory):
    """Three sizes and two budgets of a few steps, and the run that was predicted."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    words = "--sizes 1x32 2x32 1x64 --tokens 400 800 1200 --target 2x64 --target_tokens 1000".split()
    assert cli.main(command(corpus, out, *words)) == 0
    return out


def prepared(grown):
    """The same text, tokenised already."""
    return str(grown / "data/0-corpus")


def read(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_a_sweep_from_end_to_end(grown):
    rows = read(grown)
    assert [row["run"] for row in rows] == [f"{size}-{n}" for size in ("1x32", "2x32", "1x64")
                                            for n in ("400", "800", "1.20k")] + ["2x64-1.00k"]
    assert [row["steps"] for row in rows[:3]] == [7, 13, 19] and rows[-1]["steps"] == 16
    config = shape_of("1x64").lm_config(vocab_size=300, seq_len=32)
    assert rows[6]["params"] == count_params(config).total
    assert rows[6]["non_embedding"] == count_params(config).total - 300 * 64
    facts = json.loads((grown / "scaling.json").read_text())
    assert len(facts["runs"]) == 9                                    # the predicted run is no part of the fit
    [said] = facts["predictions"]
    assert said["measured"] == rows[-1]["loss"] and said["error"] == pytest.approx(said["loss"] / rows[-1]["loss"] - 1)
    assert not (grown / "work").exists()
    assert scaling_law.read_table(str(grown / "runs.jsonl")) == rows  # what a sweep wrote can be fitted


def test_a_finished_run_is_not_run_again(grown, corpus, monkeypatch):
    monkeypatch.setattr(Sweep, "begin", lambda *_: pytest.fail("trained again"))
    before, facts = read(grown), json.loads((grown / "scaling.json").read_text())
    words = "--sizes 1x32 2x32 1x64 --tokens 400 800 1200 --target 2x64 --target_tokens 1000".split()
    assert cli.main(command(corpus, grown, *words)) == 0 and read(grown) == before
    again = json.loads((grown / "scaling.json").read_text())
    assert again | {"written": ""} == facts | {"written": ""}         # nor has the predicted run become part of the fit


def test_other_options_are_another_sweep(grown, corpus, capsys):
    words = "--sizes 1x32 2x32 1x64 --tokens 400 800 1200 --target 2x64 --target_tokens 1000".split()
    for more, message in ((["--optim.weight_decay", "0.2"], "optim.weight_decay: 0.1 then, 0.2 now"),
                          (["--optim.kind", "adamw"], "optim.kind: muon then, adamw now"),
                          (["--seed", "1"], "seed: 0 then, 1 now")):
        assert cli.main(command(corpus, grown, *words, *more)) == 2
        assert message in capsys.readouterr().err
    words[5:8] = ["400", "800", "24000"]
    assert cli.main(command(corpus, grown, *words)) == 2
    assert "1x32-400 was trained otherwise (lr" in capsys.readouterr().err


def test_a_branch_is_the_run_alone_and_what_train_would_do(grown, tmp_path, capsys):
    """The same loss to the bit from the trunk, apart, and from `mindseed train`."""
    want = {row["run"]: row for row in read(grown)}["2x32-800"]
    words = f"--sizes 2x32 --tokens 800 --target none --no-trunk --optim.lr {want['lr']}".split()
    assert cli.main(command(prepared(grown), tmp_path / "apart", *words)) == 0
    assert "no law is fitted to them" in capsys.readouterr().err
    alone = read(tmp_path / "apart")[0]
    assert all(alone[key] == want[key] for key in ("loss", "bits_per_byte", "steps", "tokens", "flops"))
    shape = shape_of("2x32")
    words = [f"--model.{name}={getattr(shape, name)}" for name in ("layers", "dim", "heads", "kv_heads", "head_dim",
                                                                   "ffn_dim", "theta")]
    assert cli.main(["train", "--data.train", prepared(grown), "--out", str(tmp_path / "train"), *words,
                     *f"--data.seq_len 32 --schedule.warmup_steps 2 --optim.lr {want['lr']} --loop.batch 2 "
                     f"--loop.micro_batch 2 --loop.steps {want['steps']} --loop.validate_documents 5 "
                     "--loop.sample_every 0 --loop.precision fp32".split()]) == 0
    assert read_jsonl(tmp_path / "train/log.jsonl")[-1]["bits_per_byte"] == want["bits_per_byte"]


@pytest.mark.parametrize("stop, killed", [(3, False), (12, False), (22, False), (9, True), (13, True)])
def test_a_broken_sweep_goes_on(grown, tmp_path, monkeypatch, capsys, stop, killed):
    """Stopped or killed on the trunk, in a branch with a longer one to come, in the last one: the same command ends
    with the same losses."""
    steps, real = 0, sweep.train_step

    def counted(run):
        nonlocal steps
        steps += 1
        if steps == stop and killed:
            raise KeyboardInterrupt
        if steps == stop:
            signal.raise_signal(signal.SIGTERM)
        return real(run)

    words = "--sizes 1x32 --tokens 400 800 1200 --target none --save_minutes 1e-9".split()
    monkeypatch.setattr(sweep, "train_step", counted)
    assert cli.main(command(prepared(grown), tmp_path, *words)) == 130
    assert killed or "Give the same command again" in capsys.readouterr().out
    assert cli.main(command(prepared(grown), tmp_path, *words)) == 0
    whole = [row for row in read(grown) if row["size"] == "1x32"]
    assert [row["loss"] for row in read(tmp_path)] == [row["loss"] for row in whole]
    assert steps == 7 + (13 - 6) + (19 - 9) + killed and not (tmp_path / "work").exists()  # and no step was taken twice


def test_what_is_left_is_counted_in_flops(grown, corpus):
    """The trunk once, and every branch from its fork."""
    told = TrainOptions(loop=LoopOptions(batch=2, micro_batch=2), data=replace(TrainOptions().data, seq_len=32))
    told = replace(told, schedule=replace(told.schedule, warmup_steps=2))
    line = plan_line("1x32", [400, 800, 1200], told, vocab_size=300)
    one = Sweep(out=grown, data=None, device=torch.device("cpu"), precision="fp32", seed=0, optim=told.optim,
                schedule=told.schedule, save_s=60)
    forks = [one.fork(line, p) for p in line]
    assert [p.steps for p in line] == [7, 13, 19] and forks == [6, 9, 13]
    steps = 7 + (13 - 6) + (19 - 9)
    assert one.left([line]) == pytest.approx(steps * 2 * 32 * line[0].flops_per_token)
    assert one.left([[p] for p in line]) == pytest.approx((7 + 13 + 19) * 2 * 32 * line[0].flops_per_token)
    one.rows = {line[0].name: {}}
    assert one.left([line]) == pytest.approx((13 + 19 - 9) * 2 * 32 * line[0].flops_per_token)


def test_held_out_entries_count_by_their_tokens_and_bytes(grown):
    """Measured in two parts of different size it is what it is in one."""
    documents = Prepared(grown / "data/0-corpus").split("heldout")
    backend = NativeBackend(build(shape_of("1x32").lm_config(vocab_size=300, seq_len=32), seed=1), SFT(), [])

    def evaluation(some):
        return Evaluation(some, seq_len=32, batch_size=2)

    whole = evaluate(backend, evaluation(documents), raw_bytes=int(documents.bytes.sum()))
    found = judge(backend, [evaluation(_Chosen(documents, np.arange(2))),
                            evaluation(_Chosen(documents, np.arange(2, len(documents))))])
    assert found == pytest.approx({"loss": whole["nll"], "bits_per_byte": whole["bits_per_byte"]}, rel=1e-6)
    assert backend.model.training


def test_plans_that_cannot_be_told_apart():
    told = TrainOptions(loop=LoopOptions(batch=2, micro_batch=2), data=replace(TrainOptions().data, seq_len=32))
    line = plan_line("1x32", [400, 401, 401.0001], told, vocab_size=300)
    found = "\n".join(problems([line, line], told.schedule))
    for words in ("1x32-401 is planned 4 times", "1x32-400 is planned 2 times", "the same number of steps",
                  "1x32-400 has 7 steps, fewer than twice schedule.warmup_steps=20"):
        assert words in found


def test_the_table_of_a_sweep_may_be_damaged(grown, tmp_path):
    one = Sweep(out=tmp_path, data=None, device=torch.device("cpu"), precision="fp32", seed=0,
                optim=TrainOptions().optim, schedule=TrainOptions().schedule, save_s=60)
    lines = (grown / "runs.jsonl").read_text()
    one.table.write_text(lines + '{"run": "half')                     # of a kill
    one.read([])
    assert len(one.rows) == 10
    one.table.write_text('{"run": "x"}\n' + lines)
    with pytest.raises(UserError, match="runs.jsonl:1 is damaged"):
        one.read([])


def test_the_picture_and_the_page(grown, tmp_path):
    pytest.importorskip("matplotlib")
    facts = json.loads((grown / "scaling.json").read_text())
    assert draw(facts, tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    text = page(facts, "images/scaling.png")
    assert "![Loss against arithmetic](images/scaling.png)" in text and "| 2x64-1.00k |" in text
    above = facts | {"predictions": [facts["predictions"][0] | {"loss": 1.0, "low": 2.0, "high": 3.0}]}
    assert draw(above, tmp_path / "x.png")        # the law itself may lie outside of the draws' interval
    bare = facts | {"predictions": [], "repeats": [], "runs": [             # somebody else's table
        {key: row[key] for key in ("n", "params", "tokens", "loss", "fitted")} for row in facts["runs"]]}
    assert draw(bare, tmp_path / "y.png").exists() and "![" not in page(bare, None)
