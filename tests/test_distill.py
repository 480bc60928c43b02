"""Distillation: distances against torch and TRL, what must not change them, what lies in memory, a lesson learnt."""
from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.core import Batch, Output
from mindseed.interop.directory import Loaded, load_directory, save_directory
from mindseed.models.config import LayerConfig
from mindseed.models.lm import build
from mindseed.models.matching import attach, detach
from mindseed.objectives.distill import Distill, divergence
from mindseed.objectives.matching import relation_distance, state_distance
from mindseed.objectives.sft import SFT
from mindseed.optim.ema import EMA
from mindseed.tokenizers.byte import Byte
from mindseed.train.loss_scale import LossScale
from mindseed.train.state import capture, restore
from mindseed.train.teacher import check_teacher, distillation
from tests import spawn
from tests.test_train import make_run, steps
from tests.tiny import (FFN_KIT, MIXER_KIT, VOCAB, Fixed, flat, kit, kit_model, random_batch, randomise, split,
                        tiny_model)

WIDE = dict(dim=48, heads=6, kv_heads=2, head_dim=12, layers=4)
KINDS = {"forward": {}, "reverse": {"distance": "reverse"}, "jsd": {"distance": "jsd", "beta": 0.3},
         "warm": {"temperature": 2.5}, "warm jsd": {"distance": "jsd", "beta": 0.8, "temperature": 0.7},
         "mixed": {"hard": 0.4, "distance": "reverse"}}


def teacher_model(**changes):
    return tiny_model(7, **WIDE | changes).double().eval()


def objective(teacher, vocab_size: int = VOCAB, **settings) -> Distill:
    return Distill(teacher=teacher, teacher_head=(teacher.head or teacher.embed).weight.detach(), vocab_size=vocab_size,
                   **settings)


def loss_of(model, objective: Distill, batch: Batch):
    with torch.no_grad():
        batch = objective.prepare(batch)
    return objective.loss(model(batch.ids, batch.positions), batch)


def both_logits(model, teacher, batch: Batch, vocab_size: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        theirs = teacher(batch.ids, batch.positions).logits()
    return theirs[..., :vocab_size], model(batch.ids, batch.positions).logits()[..., :vocab_size]


def written_out(name: str, theirs: torch.Tensor, ours: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The loss by torch's own kl_div(log Q, log P) = KL(P || Q)."""
    s = {"distance": "forward", "beta": 0.5, "temperature": 1.0, "hard": 0.0} | KINDS[name]
    p, q = ((x / s["temperature"]).log_softmax(-1) for x in (theirs, ours))

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    m = (s["beta"] * p.exp() + (1 - s["beta"]) * q.exp()).log()
    each = {"forward": lambda: kl(p, q), "reverse": lambda: kl(q, p),
            "jsd": lambda: s["beta"] * kl(p, m) + (1 - s["beta"]) * kl(q, m)}[s["distance"]]()
    nll = F.cross_entropy(ours.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.weights)
    return (((1 - s["hard"]) * s["temperature"] ** 2 * each + s["hard"] * nll) * batch.weights).sum()


def gradients(total: torch.Tensor, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


# ------------------------------------------------------------------------------------------------- values and gradients

@pytest.mark.parity
@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients_are_those_of_torch(name):
    """A teacher of another width and depth, weights of all sizes, prompts that count for nothing."""
    model, teacher, batch = tiny_model(1).double(), teacher_model(), random_batch(3, 24)
    batch = replace(batch, weights=batch.weights * torch.rand(3, 24).add(0.2))
    total, metrics = loss_of(model, objective(teacher, **KINDS[name]), batch)
    want = written_out(name, *both_logits(model, teacher, batch), batch)
    torch.testing.assert_close(total, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(total, model), gradients(want, model), rtol=1e-7, atol=1e-10)
    assert 0 < (batch.weights > 0).sum() < batch.weights.numel() and metrics["distance"] > 0


@pytest.mark.parity
@pytest.mark.parametrize("beta, settings", [
    (0, {}), (1, {"distance": "reverse"}), (0.5, {"distance": "jsd"}), (0.1, {"distance": "jsd", "beta": 0.1}),
    (0.9, {"distance": "jsd", "beta": 0.9, "temperature": 0.7}), (0, {"temperature": 2.0})])
def test_losses_and_gradients_are_trls(beta, settings):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    model, teacher, batch = tiny_model(1).double(), teacher_model(), random_batch(3, 24)
    total = loss_of(model, objective(teacher, **settings), batch)[0] / batch.weights.sum()
    theirs, ours = both_logits(model, teacher, batch)
    temperature = settings.get("temperature", 1.0)
    labels = batch.targets.masked_fill(batch.weights == 0, -100)
    want = GKDTrainer.generalized_jsd_loss(ours, theirs, labels, beta=beta, temperature=temperature)
    want = want * temperature ** 2
    torch.testing.assert_close(total, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(total, model), gradients(want, model), rtol=1e-7, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["forward", "reverse", "jsd"]), st.floats(0.05, 0.95),
       st.floats(0.1, 20.0))
def test_a_divergence_is_0_between_equals_and_positive_between_others(seed, distance, beta, spread):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, 5, 17, generator=g, dtype=torch.float64) * spread).log_softmax(-1)
    assert divergence(p, p, distance, beta).abs().max() < 1e-9
    assert divergence(p, q, distance, beta).min() > 0
    coin = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert distance != "jsd" or divergence(p, q, distance, beta).max() <= coin + 1e-9


def test_at_its_ends_the_jsd_is_the_forward_and_the_reverse_divergence():
    p, q = torch.randn(2, 6, 17, dtype=torch.float64).mul(2).log_softmax(-1)
    for beta, distance in ((1e-7, "forward"), (1 - 1e-7, "reverse")):
        near = divergence(p, q, "jsd", beta) / min(beta, 1 - beta)
        torch.testing.assert_close(near, divergence(p, q, distance), rtol=1e-4, atol=1e-6)
    swapped = divergence(q, p, "jsd", 0.7)
    torch.testing.assert_close(divergence(p, q, "jsd", 0.3), swapped)
    torch.testing.assert_close(divergence(p, q, "reverse"), divergence(q, p, "forward"))


@pytest.mark.parametrize("name", KINDS)
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    model, batch = tiny_model(1).double(), random_batch(2, 16)
    settings = {k: v for k, v in KINDS[name].items() if k != "hard"}
    total, metrics = loss_of(model, objective(copy.deepcopy(model), **settings), batch)
    assert total.abs() < 1e-9 and gradients(total, model).abs().max() < 1e-9


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_change_nothing(chunk):
    model, teacher, batch = tiny_model(1).double(), teacher_model(), random_batch(3, 24)
    one, other = (loss_of(model, objective(teacher, **KINDS["warm jsd"], chunk=n), batch)[0] for n in (chunk, 32))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(one, model), gradients(other, model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("inside", [{}, {"states": 0.7, "relations": 0.3}])
def test_accumulation_changes_nothing(pieces, inside):
    batch = random_batch(8, 24, empty=(2, 3))

    def run(batches, accumulate):
        model, teacher = tiny_model(1).double(), teacher_model()
        if inside:
            attach(model, teacher, related=(1, 3))
        return make_run(model, Fixed(batches), accumulate=accumulate,
                        objective=objective(teacher, **KINDS["mixed"], **inside))

    one, many = run([batch], 1), run(split(batch, pieces), pieces)
    assert pieces < 4 or split(batch, 4)[1].weights.sum() == 0
    torch.testing.assert_close(torch.tensor(steps(many, 3)), torch.tensor(steps(one, 3)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(flat(many.backend.model), flat(one.backend.model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_comes_near_to_float32(precision):
    """The teacher in bfloat16, whose hidden states travel so."""
    found = {}
    for kind in ("fp32", precision):
        model, teacher = tiny_model(1), teacher_model().to(torch.float32 if kind == "fp32" else torch.bfloat16)
        attach(model, teacher, related=(1, 3))
        asked = objective(teacher, **KINDS["mixed"], states=0.5, relations=0.5)
        run = make_run(model, Fixed([random_batch(4, 24)]), precision=kind, objective=asked)
        if kind == "fp16":
            run.backend.scaler = LossScale(True, 2.0**10)
        found[kind] = torch.tensor(steps(run, 6))
    torch.testing.assert_close(found[precision], found["fp32"], rtol=0.05, atol=0.02)
    assert found["fp32"][-1, 0] < found["fp32"][0, 0]


def test_rows_of_heads_without_a_token_are_left_out():
    """Two paddings of the same vocabulary: what lies there changes no loss and is given no gradient."""
    model = build(replace(tiny_model().config, vocab_size=VOCAB + 7)).double()
    teacher = build(replace(teacher_model().config, vocab_size=VOCAB + 3)).double().eval()
    randomise(model, 1)
    randomise(teacher, 2)
    batch = random_batch(2, 16)

    def measured():
        total = loss_of(model, objective(teacher), batch)[0]
        want = written_out("forward", *both_logits(model, teacher, batch), batch)
        torch.testing.assert_close(total, want, rtol=1e-9, atol=1e-9)
        return total

    before = measured()
    head = torch.autograd.grad(before, (model.head or model.embed).weight)[0]
    assert head[:VOCAB].abs().sum() > 0 and head[VOCAB:].abs().sum() == 0
    with torch.no_grad():
        for one in (model, teacher):
            (one.head or one.embed).weight[VOCAB:] += 9
    torch.testing.assert_close(measured(), before)


def test_modules_that_look_further_ahead_and_experts_keep_their_losses():
    layer = LayerConfig(mixer=MIXER_KIT["gqa"], ffn=replace(FFN_KIT["moe"], z_weight=0.1))
    config = kit("gqa", mtp=(layer,))
    model = kit_model(replace(config, layers=(layer,))).train()
    batch, asked = random_batch(2, 16), objective(teacher_model())
    total, metrics = loss_of(model, asked, batch)
    assert metrics.keys() == {"distance", "router_z", "nll_2_ahead"}, metrics.keys()
    torch.testing.assert_close(total, metrics["distance"] + metrics["router_z"] + config.mtp_weight
                               * metrics["nll_2_ahead"])
    total.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused, unused                                              # DDP would wait for them
    torch.testing.assert_close(metrics["distance"], loss_of(model.eval(), asked, batch)[1]["distance"])


def test_a_batch_of_which_nothing_counts_has_a_loss_of_0_with_a_gradient():
    model, teacher = tiny_model(1).double(), teacher_model()
    attach(model, teacher, related=(0, 0))
    total, _ = loss_of(model, objective(teacher, states=1.0, relations=1.0), random_batch(2, 8, empty=(0, 1)))
    assert total == 0 and gradients(total, model).abs().sum() == 0


# ------------------------------------------------------------------------------------------------------------ in memory

class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that any operation's result holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "mixed"])
def test_two_vocabularies_never_lie_in_memory_for_all_tokens(name, monkeypatch):
    V, B, T, chunk = 10_000, 4, 256, 64
    config = replace(tiny_model().config, vocab_size=V, seq_len=T)
    model, teacher = build(config, seed=1), build(config, seed=2).eval()
    batch = replace(random_batch(B, T), weights=torch.ones(B, T))
    asked = objective(teacher, V, chunk=chunk, **KINDS[name])
    monkeypatch.setattr(Output, "logits", lambda self: pytest.fail("all logits were asked for"))
    with torch.no_grad():
        batch = asked.prepare(batch)
    output = replace(model(batch.ids, batch.positions), chunk=chunk)
    with Largest() as seen:
        total = asked.loss(output, batch)[0]
        total.backward()
    assert seen.numbers == chunk * V == B * T * V / 16 > V * config.dim


# -------------------------------------------------------------------------------------------------------- inside models

def loaded(model, tokenizer=None) -> Loaded:
    return Loaded(model=model.eval(), tokenizer=tokenizer or Byte())


def randomised(vocab_size: int, seed: int, **changes):
    config = replace(tiny_model(seed, **changes).config, vocab_size=vocab_size)
    model = build(config, seed=seed)
    randomise(model, seed)
    return model


def test_states_are_the_residual_stream_and_matching_sees_them_in_the_teachers_width():
    model, teacher, batch = tiny_model(1).double(), teacher_model(), random_batch(2, 16)
    attach(model, teacher)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    output, told = model(batch.ids, batch.positions), teacher(batch.ids, batch.positions)
    assert model.collect == (1, 2) and teacher.collect == (2, 4)           # each second block of twice as many
    for x, projection, want in zip(output.states, model.matching.projections, seen):
        torch.testing.assert_close(x, want @ projection.weight.T)
    assert [x.shape for x in output.states] == [x.shape for x in told.states] == 2 * [(2, 16, 48)]
    depth_0 = tiny_model(1).double()
    depth_0.collect = (0,)
    torch.testing.assert_close(depth_0(batch.ids, batch.positions).states[0], depth_0.embed(batch.ids))
    detach(model)
    assert model(batch.ids, batch.positions).states == () and not any("matching" in n for n in model.state_dict())
    ours, theirs = torch.randn(2, 3, 4, 5).double()
    want = (ours - theirs).norm(dim=-1) ** 2 / theirs.norm(dim=-1) ** 2
    torch.testing.assert_close(state_distance(ours, theirs), want)


def test_relations_are_those_of_minilm_written_out():
    """Token by token and head by head: only earlier tokens of the same document are seen."""
    batch = random_batch(2, 13, seed=3)
    ours, theirs = torch.randn(2, 13, 2, 5).double(), torch.randn(2, 13, 2, 9).double()
    assert (batch.positions == 0).sum() > 3
    want = torch.zeros(2, 13).double()
    for b in range(2):
        for t in range(13):
            seen = range(t - int(batch.positions[b, t]), t + 1)
            for h in range(2):
                q, p = ((torch.stack([x[b, t, h] @ x[b, s, h] for s in seen]) / x.shape[-1] ** 0.5).log_softmax(0)
                        for x in (ours, theirs))
                want[b, t] += (p.exp() * (p - q)).sum() / 2
    for chunk in (1, 4, 100):
        torch.testing.assert_close(relation_distance(ours, theirs, batch.positions, chunk), want)
    assert relation_distance(theirs, theirs, batch.positions).abs().max() < 1e-12


@pytest.mark.parametrize("mixer", ["gqa", "no qk-norm", "window", "alibi", "mla"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_parts_are_what_the_attention_of_that_layer_works_with(mixer, placement, monkeypatch):
    """They reach `attend` in the forward pass itself."""
    import mindseed.nn.gqa
    import mindseed.nn.mla
    model = kit_model(kit("gqa", mixer, placement=placement))
    attach(model, kit_model(kit(mixer)), depths=(), related=(1, 0))
    heard = []
    for room in (mindseed.nn.gqa, mindseed.nn.mla):
        monkeypatch.setattr(room, "attend", lambda q, k, v, *rest, real=room.attend, **more:
                            heard.append((q, k, v)) or real(q, k, v, *rest, **more))
    batch = random_batch(2, 10)
    output = model(batch.ids, batch.positions)
    assert list(output.parts) == ["queries", "keys", "values"] and len(heard) == 2 and output.states == ()
    for x, want in zip(output.parts.values(), heard[1]):
        torch.testing.assert_close(x.flatten(2), want.flatten(2))
        assert x.shape[2] == model.matching.heads > 0


def test_projections_learn_and_follow_the_student():
    """Trained, resumed to the bit, in no model directory; recomputing blocks changes nothing."""
    def fresh(recompute=False):
        student, teacher = randomised(Byte().vocab_size, 1), randomised(Byte().vocab_size, 7, **WIDE)
        asked = distillation(student, loaded(teacher), Byte(), states=1.0, relations=0.5)
        student.recompute = recompute
        run = make_run(student.train(), Fixed(split(random_batch(4, 16), 2)), kind="muon", objective=asked)
        ema = EMA(student, 0.9)
        run.after_step.append(ema.update)
        return run, ema

    run, ema = fresh()
    before = run.backend.model.matching.projections[0].weight.detach().clone()
    want = steps(run, 6)
    assert want[-1][0] < want[0][0] and not torch.equal(before, run.backend.model.matching.projections[0].weight)
    half, half_ema = fresh()
    got, saved = steps(half, 3), copy.deepcopy(capture(half, half_ema))
    other, other_ema = fresh()
    restore(other, other_ema, saved)
    assert got + steps(other, 3) == want and torch.equal(flat(other.backend.model), flat(run.backend.model))
    torch.testing.assert_close(torch.tensor(steps(fresh(True)[0], 6)), torch.tensor(want))


def test_a_model_directory_holds_no_projections(tmp_path):
    student, teacher = randomised(Byte().vocab_size, 1), randomised(Byte().vocab_size, 7, **WIDE)
    distillation(student, loaded(teacher), Byte(), states=1.0)
    again = load_directory(save_directory(student, Byte(), tmp_path / "model")).model
    batch = random_batch(1, 8)
    torch.testing.assert_close(again(batch.ids, batch.positions).hidden, student(batch.ids, batch.positions).hidden)
    assert again.state_dict().keys() == student.state_dict().keys() - {
        "matching.projections.0.weight", "matching.projections.1.weight"}


def on_rank(rank: int, world: int) -> tuple:
    out, weights = on_one(split(random_batch(8, 16, empty=(0, 1)), 4)[rank::world], 2)
    return out, weights.tolist()


def on_one(batches: list[Batch], accumulate: int):
    model, teacher = tiny_model(1).double(), teacher_model()
    attach(model, teacher, related=(1, 2))
    run = make_run(model, Fixed(batches), accumulate=accumulate,
                   objective=objective(teacher, states=0.7, relations=0.3, hard=0.2))
    return steps(run, 3), flat(model)


@pytest.mark.slow
def test_two_ranks_equal_one_on_the_union():
    """One rank begins with a micro-batch of which nothing counts."""
    two, weights = spawn.on_ranks(on_rank)[0]
    one, want = on_one([random_batch(8, 16, empty=(0, 1))], 1)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), want, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"beta": 0.0}, {"beta": 1.0}, {"hard": 1.1}, {"states": -1.0},
                                   {"vocab_size": VOCAB + 1}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError):
        objective(teacher_model(), **wrong)


def test_a_teacher_of_another_vocabulary_is_refused():
    teacher = randomised(Byte().vocab_size + 5, 3)                         # padded: no matter
    assert check_teacher(loaded(teacher), Byte(), seq_len=32) == Byte().vocab_size

    def told(change) -> str:
        other = Byte()
        change(other)
        with pytest.raises(UserError) as caught:
            check_teacher(loaded(teacher, other), Byte(), name="old/model")
        return str(caught.value)

    def swapped(t):
        t.tokens[100], t.tokens[101] = t.tokens[101], t.tokens[100]

    assert "old/model has another vocabulary than the student: id 100 is the ordinary token b" in told(swapped)
    said = told(lambda t: t.specials.update({"<|im_end|>": 9, t._spelling[9].decode(): 2}))
    assert "id 2 is the special token" in said and "'<|im_end|>' here" in said
    more = Byte().vocab_size

    def grown(t):
        t.tokens[more], t.vocab_size = b"new", more + 1

    assert f"{more + 1} tokens there, {more} here" in told(grown)
    with pytest.raises(UserError, match="reads 32 tokens, and rows are of 64; set data.seq_len to 32"):
        check_teacher(loaded(teacher), Byte(), seq_len=64)


def test_layers_that_cannot_be_matched_are_refused():
    model = tiny_model()
    for asked, why in (({"depths": (3,)}, "2 layers, so a state after 3"), ({"related": (0, 4)}, "there is no layer 4"),
                       ({"related": (2, 0)}, "there is no layer 2")):
        with pytest.raises(UserError, match=why):
            attach(model, teacher_model(), **asked)
    with pytest.raises(UserError, match="layer 0 of the teacher is linear attention"):
        attach(model, kit_model(kit("delta")), related=(0, 0))


# ------------------------------------------------------------------------------------------------------------- a lesson

def chains(count: int, seed: int, length: int = 32) -> Batch:
    """Texts in which the next token is one of a few, as the two before it say."""
    g = torch.Generator().manual_seed(99)
    follow = torch.randint(VOCAB, (VOCAB, 4), generator=g)
    odds = torch.tensor([0.6, 0.25, 0.1, 0.05])
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (count, 1), generator=g)
    for _ in range(length):
        choice = torch.multinomial(odds.expand(count, -1), 1, generator=g)
        ids = torch.cat([ids, follow[ids[:, -1]].gather(1, choice)], 1)
    return Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(count, length),
                 positions=torch.arange(length).expand(count, -1))


@pytest.fixture(scope="module")
def taught():
    """A teacher that has read much, and students that read little: {name: divergence from it on fresh texts}."""
    torch.manual_seed(0)
    teacher = build(tiny_model(**WIDE | {"layers": 2}).config, seed=3)
    run = make_run(teacher, Fixed([chains(16, seed) for seed in range(60)]), kind="muon", lr=2e-2)
    run.schedule = lambda step: 2e-2 * (1 - step / 60)
    steps(run, 60)
    teacher.eval()
    fresh, few, found = chains(64, 1234), [chains(8, seed) for seed in (500, 501)], {}
    lessons = {"fine-tuned": SFT(), "forward": objective(teacher), "reverse": objective(teacher, distance="reverse"),
               "jsd": objective(teacher, distance="jsd"), "mixed": objective(teacher, hard=0.5),
               "within": objective(teacher, states=0.3, relations=0.3)}
    for name, lesson in lessons.items():
        student, tutor = build(tiny_model().config, seed=4), copy.deepcopy(teacher)
        if name == "within":
            attach(student, tutor, related=(1, 1))
            lesson = replace(lesson, teacher=tutor)
        run = make_run(student, Fixed(few), kind="muon", lr=2e-2, objective=lesson)
        run.schedule = lambda step: 2e-2 * (1 - step / 40)
        steps(run, 40)
        with torch.no_grad():
            p, q = (m(fresh.ids, fresh.positions).logits().log_softmax(-1) for m in (teacher, student.eval()))
        found[name] = divergence(p, q, "forward").mean().item()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "mixed", "within"])
def test_a_distilled_student_is_nearer_to_its_teacher_than_a_fine_tuned_one(name, taught):
    assert taught[name] < 0.6 * taught["fine-tuned"], taught
