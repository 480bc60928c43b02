"""Reward models: the value head, its directory, outcome and process rewards against TRL and transformers, scoring."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mindseed.base.errors import UserError
from mindseed.core import Batch
from mindseed.data.loader import Once, RowSource
from mindseed.data.mix import Mixture
from mindseed.data.steps import Chain, StepRows, encode_steps, read_chains
from mindseed.infer.fused import available, fits
from mindseed.infer.generate import generate
from mindseed.infer.step import decoding_step, flat as flat_fits
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.heads import ValueHead, add_value_head, alike, score, values_of
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape
from mindseed.models.upcycle import upcycle
from mindseed.nn.moe import MoEConfig
from mindseed.objectives.reward import ProcessReward, Reward, last_values
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import encode_chat
from mindseed.tokenizers.template import Template
from mindseed.train.step import train_step
from tests.test_dpo import gradients, stub
from tests.test_preference import rows_of
from tests.test_template import APPENDING, MARKS
from tests.test_train import make_run
from tests.tiny import VOCAB, pages, randomise, tiny_model

TOKENIZER = Byte()


def judge(seed: int = 1, **changes) -> LM:
    model = add_value_head(tiny_model(seed, **changes), seed)
    randomise(model.value_head, seed)
    return model


def speaker() -> LM:
    """A model of the tokenizer's bytes."""
    shape = Shape(layers=1, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48)
    return build(shape.lm_config(vocab_size=300, seq_len=64)).eval()


def pair_batches(batch_size: int = 5) -> list[Batch]:
    return list(Once(rows_of("pairs", shuffle=False), batch_size=batch_size))


def alone(model, ids) -> torch.Tensor:
    """The value of a document's last slot, the model reading it alone and nothing else."""
    ids = torch.tensor(np.asarray(ids, np.int64))[None, :-1]
    output = model(ids, torch.arange(ids.shape[1])[None])
    return (output.hidden @ model.value_head.weight[0] + model.value_head.bias)[0, -1]


# -------------------------------------------------------------------------------------------------------- the loss

SETTINGS = {"plain": {}, "centred": {"centre": 0.03}, "margin": {"margin": True},
            "both": {"centre": 0.1, "margin": True}}


def with_margin(batch: Batch, wanted: bool) -> Batch:
    if wanted:
        batch.extra["margin"] = torch.linspace(0, 1, len(batch.ids)).double()
    return batch


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_of_bradley_and_terry(name):
    model, settings = judge().double(), SETTINGS[name]
    objective, rows = Reward(centre=settings.get("centre", 0.0)), rows_of("pairs", shuffle=False)
    batch = with_margin(pair_batches(len(rows))[0], "margin" in settings)
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    expected, right, sums = 0.0, 0, np.zeros(2)
    for k in range(len(rows)):
        chosen, rejected = (alone(model, ids[:12]) for ids, _ in rows.sides(k))
        more = batch.extra["margin"][k] if "margin" in settings else 0.0
        expected = expected + torch.log(1 + torch.exp(rejected - chosen + more))
        expected = expected + objective.centre * (chosen + rejected) ** 2
        right, sums = right + int(chosen > rejected), sums + [chosen.item(), rejected.item()]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-7, atol=1e-9)
    assert objective.count(batch) == len(rows) and metrics["accuracy"] == right
    assert [metrics[f"reward_{side}"].item() for side in ("chosen", "rejected")] == pytest.approx(sums.tolist())
    assert metrics["margin"].item() == pytest.approx(sums[0] - sums[1])


def test_a_reward_does_not_change_with_what_is_packed_beside():
    model, objective = judge().double(), Reward(centre=0.1)
    with torch.no_grad():
        whole = pair_batches(13)[0]
        loss = objective.loss(model(whole.ids, whole.positions), whole)[0]
        parts = pair_batches(4)
        torch.testing.assert_close(sum(objective.loss(model(b.ids, b.positions), b)[0] for b in parts), loss)
        rewards = last_values(model(whole.ids, whole.positions), whole, 2)
        names = ("ids", "targets", "weights", "positions")
        padded = Batch(**{k: F.pad(getattr(whole, k), (0, 7, 0, 2)) for k in names})
        output = model(padded.ids, padded.positions)
        torch.testing.assert_close(objective.loss(output, padded)[0], loss)
        torch.testing.assert_close(last_values(output, padded, 2)[:13], rewards)
        swapped = pair_batches(13)[0]             # other tokens in the chosen document
        start = swapped.positions[0].tolist().index(0, 1)
        swapped.ids[0, :start] = (swapped.ids[0, :start] + 1) % VOCAB
        moved = (last_values(model(swapped.ids, swapped.positions), swapped, 2) - rewards).abs()
        assert moved[0, 0] > 1e-6 and moved.flatten()[1:].max() < 1e-12
        none = Batch(**{k: torch.zeros_like(getattr(whole, k)) for k in names})
        assert objective.count(none) == 0 and objective.loss(model(none.ids, none.positions), none)[0] == 0


@pytest.mark.parity
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_trls(name):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.trainer.reward_trainer import RewardTrainer
    model, settings = judge().double(), SETTINGS[name]
    objective, rows = Reward(centre=settings.get("centre", 0.0)), rows_of("pairs", shuffle=False)
    batch = with_margin(pair_batches(len(rows))[0], "margin" in settings)
    loss = objective.loss(model(batch.ids, batch.positions), batch)[0] / objective.count(batch)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    rewards = torch.stack([alone(model, rows.sides(k)[side][0][:12]) for side in (0, 1) for k in range(len(rows))])
    inputs = {"attention_mask": torch.ones(2 * len(rows), 1)} | (
        {"margin": batch.extra["margin"]} if "margin" in settings else {})
    trainer = stub(args=SimpleNamespace(center_rewards_coefficient=objective.centre or None))
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-8, atol=1e-10)


def test_a_mixture_of_experts_keeps_its_balance_loss():
    model = upcycle(judge(), MoEConfig(experts=4, top_k=2, expert_dim=48, z_weight=0.1)).train()
    batch = pair_batches(13)[0]
    loss, metrics = Reward().loss(model(batch.ids, batch.positions), batch)
    rewards = last_values(model(batch.ids, batch.positions), batch, 2)
    plain = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()
    assert metrics["router_z"] > 0
    torch.testing.assert_close(loss, plain + metrics["router_z"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tiny_model_learns_to_judge(precision):
    model = add_value_head(tiny_model(1))
    run = make_run(model, RowSource(rows_of("pairs"), batch_size=13), objective=Reward(), precision=precision, lr=3e-3)
    run.schedule = lambda step: 3e-3
    values = [train_step(run) for _ in range(40)]
    assert values[0]["loss"] > 0.5 and values[-1]["accuracy"] == 1 and values[-1]["loss"] < 0.2
    rows = rows_of("pairs", shuffle=False)
    rewards = np.array([score(model, [rows.sides(k)[side][0][:12] for k in range(len(rows))]) for side in (0, 1)])
    assert (rewards[0] > rewards[1]).all() and model.training


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="centre"):
        Reward(centre=-1.0)
    batch, model = pair_batches()[0], tiny_model()
    for objective in (Reward(), ProcessReward()):
        with pytest.raises(ValueError, match="no value head"):
            objective.loss(model(batch.ids, batch.positions), Batch(
                ids=batch.ids, targets=batch.targets, weights=batch.weights, positions=batch.positions,
                extra={"steps": torch.ones_like(batch.ids)}))
    with pytest.raises(UserError, match="no value head"):
        score(model, [[1, 2, 3]])


# ---------------------------------------------------------------------------------------------------- the value head

def test_the_head_is_a_function_of_its_seed_and_leaves_the_model_alone():
    model, plain = add_value_head(tiny_model(1), 3), tiny_model(1)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"value_head.weight", "value_head.bias"}
    assert plain(torch.ones(1, 3).long(), torch.arange(3)[None]).values is None
    same, other = add_value_head(tiny_model(1), 3), add_value_head(tiny_model(1), 4)
    assert torch.equal(model.value_head.weight, same.value_head.weight)
    assert not torch.equal(model.value_head.weight, other.value_head.weight)
    batch = pair_batches()[0]
    ours, theirs = model(batch.ids, batch.positions), plain(batch.ids, batch.positions)
    assert torch.equal(ours.hidden, theirs.hidden) and ours.values.shape == batch.ids.shape
    assert ValueHead(10_000)(F.rms_norm(torch.randn(99, 10_000), (10_000,))).std() < 0.2        # begins near 0


@pytest.mark.parametrize("dtype, autocast, wide", [
    (torch.bfloat16, None, torch.float32), (torch.float32, torch.bfloat16, torch.float32),
    (torch.float64, None, torch.float64)])
def test_values_are_computed_in_float32_or_above(dtype, autocast, wide):
    model = judge().to(dtype)
    randomise(model.value_head)
    if dtype == torch.bfloat16:
        add_value_head(model)
        assert model.value_head.weight.dtype == torch.float32
    batch = pair_batches()[0]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(batch.ids, batch.positions)
    assert output.values.dtype == wide
    exact = output.hidden.double() @ model.value_head.weight[0].double() + model.value_head.bias.double()
    torch.testing.assert_close(output.values.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_keeps_the_head_apart(tmp_path, dtype):
    model = add_value_head(speaker())
    randomise(model)
    save_directory(model, TOKENIZER, tmp_path / "m", dtype=dtype)
    folder = tmp_path / "m"
    assert json.loads((folder / "mindseed.json").read_text())["value_head"] is True
    loaded = load_directory(folder, dtype=dtype).model
    assert loaded.value_head.weight.dtype == torch.float32
    assert torch.equal(loaded.value_head.weight, model.value_head.weight)
    assert torch.equal(loaded.value_head.bias, model.value_head.bias)
    again = save_directory(loaded, TOKENIZER, tmp_path / "again", dtype=dtype)
    assert (again / "value_head.safetensors").read_bytes() == (folder / "value_head.safetensors").read_bytes()
    assert load_directory(folder, dtype=torch.float64).model.value_head.weight.dtype == torch.float64
    plain = LM(model.config)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("value_head")})
    save_directory(plain, TOKENIZER, tmp_path / "plain", dtype=dtype)
    for name in ("config.json", "model.safetensors"):                 # to others it is the language model it was
        assert (tmp_path / "plain" / name).read_bytes() == (folder / name).read_bytes()
    assert load_directory(tmp_path / "plain").model.value_head is None
    whole = (folder / "value_head.safetensors").read_bytes()
    (folder / "value_head.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="truncated"):
        load_directory(folder)
    (folder / "value_head.safetensors").unlink()
    with pytest.raises(UserError, match="value_head.safetensors is missing"):
        load_directory(folder)
    (tmp_path / "again" / "mindseed.json").unlink()                   # it goes by config.json alone
    assert load_directory(tmp_path / "again").model.value_head is None


@pytest.mark.parity
def test_transformers_reads_the_directory_of_a_reward_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = add_value_head(speaker())
    save_directory(model, TOKENIZER, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids, torch.arange(20)[None]).logits(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_as_fast_and_the_same_with_a_head(dtype):
    plain, model = tiny_model(1).to(dtype).eval(), add_value_head(tiny_model(1).to(dtype)).eval()
    assert flat_fits(model) and fits(model) == available() == fits(plain)
    ids = torch.randint(VOCAB, (3, 7))
    with torch.inference_mode():
        hidden = []
        for one in (plain, model):
            step, state = decoding_step(one), pages(one, 3)
            hidden.append([step(ids[:, t], torch.full((3, 1), t), state) for t in range(7)])
        assert all(torch.equal(a, b) for a, b in zip(*hidden))
        torch.testing.assert_close(hidden[0][-1], model(ids, torch.arange(7).expand(3, -1)).hidden[:, -1],
                                   rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1 if dtype == torch.bfloat16
                                   else 1e-4)


def test_generating_with_a_head():
    model = speaker()
    answers = [generate(model, TOKENIZER, [[1, 2, 3]], max_new=6)[0].text]
    answers.append(generate(add_value_head(model), TOKENIZER, [[1, 2, 3]], max_new=6)[0].text)
    assert answers[0] == answers[1]


# ------------------------------------------------------------------------------------------------------------ scoring

def test_scores_are_those_of_training_whatever_they_are_computed_with():
    model = judge().eval()
    generator = np.random.default_rng(0)
    documents = [generator.integers(VOCAB, size=n).tolist() for n in (5, 2, 31, 9, 9, 3, 17, 2)]
    alone_each = [alone(model, ids).item() for ids in documents]
    for batch_tokens in (1, 20, 64, 8192):
        assert score(model, documents, batch_tokens) == pytest.approx(alone_each, abs=1e-5)
    values = values_of(model, documents)
    assert [len(v) for v in values] == [len(ids) - 1 for ids in documents] and score(model, []) == []
    batch = pair_batches(13)[0]
    rows = rows_of("pairs", shuffle=False)
    with torch.no_grad():
        trained = last_values(model(batch.ids, batch.positions), batch, 2)
    for side in (0, 1):
        assert score(model, [rows.sides(k)[side][0][:12] for k in range(13)]) == pytest.approx(
            trained[:, side].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="two ids"):
        score(model, [[1]])


def test_documents_of_like_length_go_together():
    lengths = [5, 1, 30, 8, 8, 2, 16, 1]
    batches = alike(lengths, 32)
    assert sorted(i for some in batches for i in some) == list(range(8))
    assert all(len(some) * max(lengths[i] for i in some) <= 32 for some in batches)
    assert batches == [[2], [6, 3], [4, 0, 5, 1], [7]] and alike([40, 41], 32) == [[1], [0]]


# ------------------------------------------------------------------------------------------------- rewards of steps

ROW = {"prompt": "2+3+4?", "steps": ["2+3=5", "5+4=8 <|im_end|>"], "labels": [True, False]}


def write(tmp_path, rows) -> str:
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chains(count: int = 12, seed: int = 0) -> list[Chain]:
    rng, made = np.random.default_rng(seed), []
    for i in range(count):
        right = np.full(rng.integers(6, 20), -1, np.int8)
        right[rng.choice(np.arange(2, len(right) - 1), size=2, replace=False)] = rng.integers(2, size=2)
        made.append(Chain(rng.integers(VOCAB, size=len(right)).astype(np.uint32), right, f"memory:{i}"))
    return made


def test_a_row_of_steps_knows_the_token_that_ends_each(tmp_path):
    found = read_chains([write(tmp_path, [ROW])], TOKENIZER, heldout=0)["train"][0]
    asked = [{"role": "user", "content": "2+3+4?"}]
    ids = found.ids.tolist()
    assert ids + TOKENIZER.encode("\n") == encode_chat(TOKENIZER, asked + [
        {"role": "assistant", "content": "2+3=5\n5+4=8 <|im_end|>"}])[0]       # the byte tokenizer melts no border
    ends = np.flatnonzero(found.right >= 0)
    texts = [TOKENIZER.decode(ids[:end + 1]) for end in ends]
    assert texts[0].endswith("\n2+3=5") and texts[1].endswith("\n5+4=8 <|im_end|>") and len(ends) == 2
    assert found.right[ends].tolist() == [1, 0] and found.name.endswith("steps.jsonl:1")
    assert encode_steps(TOKENIZER, [(asked, None, ROW["steps"])])[0] == (ids, ends.tolist())
    theirs, places = encode_steps(TOKENIZER, [(asked, None, ROW["steps"])], Template(APPENDING, MARKS))[0]
    assert TOKENIZER.decode(theirs[:places[0] + 1]).endswith("<|im_start|>(assistant)\n2+3=5")
    assert theirs[-1] == TOKENIZER.specials["<|im_end|>"]


BAD = {
    "kind": ({"text": "a story"}, "a row of kind text"), "lengths": (ROW | {"labels": [True]}, "2 steps have 1 labels"),
    "labels": (ROW | {"labels": [True, 2]}, "not 2"), "empty": (ROW | {"steps": ["a", " "]}, "step 1 is empty"),
    "unknown": (ROW | {"labels": [None, None]}, "no step is judged"),
    "texts": (ROW | {"steps": ["a", 3]}, "list of texts"),
    "prompt": ({"steps": ["a"], "labels": [1]}, "not a conversation"),
    "answered": ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "steps": ["a"],
                  "labels": [1]}, "ends with an answer"), "json": ("{", "corrupt JSON")}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_of_steps_are_counted_and_named(tmp_path, name):
    row, reason = BAD[name]
    file = write(tmp_path, [ROW, {"messages": [{"role": "user", "content": "?"}], "completions": ["a", "b", "c"],
                                  "labels": [1, None, 0]}])
    with open(file, "a") as more:
        more.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    found = read_chains([file], TOKENIZER, heldout=0)["train"]
    assert [(chain.right[chain.right >= 0]).tolist() for chain in found] == [[1, 0], [1, 0]]
    with pytest.raises(UserError, match=rf"1 of the first 3 rows cannot be used, 0 are allowed(.|\n)*:3: .*{reason}"):
        read_chains([file], TOKENIZER, heldout=0, max_skipped=0)


def test_steps_are_split_by_content(tmp_path):
    rows = [ROW | {"prompt": f"{i}?"} for i in range(200)]
    found = [read_chains([write(tmp_path, some)], TOKENIZER, heldout=0.3, seed=2) for some in (rows, rows[::-1])]
    held = [{chain.ids.tobytes() for chain in split["heldout"]} for split in found]
    assert held[0] == held[1] and 30 < len(held[0]) < 90 and len(found[0]["train"]) == 200 - len(held[0])
    with pytest.raises(UserError, match="nothing to train on"):
        read_chains([write(tmp_path, [ROW | {"labels": [1]}])], TOKENIZER)


def test_rows_of_steps():
    some = chains()
    rows = StepRows(some, seq_len=9, seed=1)
    lost = [chain.name for chain in some if not (chain.right[:9] >= 0).any()]
    assert lost and list(rows.stats.dropped) == lost and len(rows) == len(some) - len(lost)
    by_name, seen = {chain.name: chain for chain in some}, []
    for batch in Once(rows, batch_size=4):
        assert batch.ids.shape[1] % 8 == 0 and batch.extra["steps"].shape == batch.ids.shape
        for b, name in enumerate(rows.describe(int(r))[0] for r in batch.extra["row"]):
            chain, seen = by_name[name], [*seen, name]
            n = min(len(chain.ids) - 1, 9)
            assert batch.ids[b, :n].tolist() == chain.ids[:n].tolist()
            assert batch.targets[b, :n].tolist() == chain.ids[1:n + 1].tolist()
            assert batch.extra["steps"][b].tolist() == chain.right[:n].tolist() + [-1] * (batch.ids.shape[1] - n)
            assert torch.equal(batch.weights[b] > 0, batch.extra["steps"][b] >= 0)
    assert sorted(seen) == sorted(chain.name for chain in rows.chains)
    source, again = (RowSource(Mixture([(rows, 1.0)]), batch_size=3) for _ in range(2))
    batches = [next(source) for _ in range(6)]
    again.load_state_dict({**source.state_dict(), "rows_seen": 9})
    assert torch.equal(next(again).extra["steps"], batches[3].extra["steps"])
    with pytest.raises(UserError, match="no step ends"):
        StepRows(some, seq_len=1)
    with pytest.raises(UserError, match="no answers in steps"):
        StepRows([], seq_len=8)


@pytest.mark.parity
def test_losses_of_steps_are_those_of_token_classification():
    """TRL trains its process rewards as transformers classifies tokens: into two classes, of which ours are the
    difference. Its trainer for them is no longer there, the loss it called is."""
    pytest.importorskip("transformers")
    from transformers.loss.loss_utils import ForTokenClassification
    model, objective = judge().double(), ProcessReward()
    batch = next(iter(Once(StepRows(chains(), seq_len=19), batch_size=12)))
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    (loss / objective.count(batch)).backward()
    ours = gradients(model)
    model.zero_grad()
    values, steps = model(batch.ids, batch.positions).values, batch.extra["steps"]
    logits = torch.stack([torch.zeros_like(values), values], -1)
    labels = torch.where(steps >= 0, steps, -100)
    theirs = ForTokenClassification(logits, labels, SimpleNamespace(num_labels=2))
    theirs.backward()
    torch.testing.assert_close(loss / objective.count(batch), theirs.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-5, atol=1e-7)
    assert metrics["accuracy"] == ((logits.argmax(-1) == labels) & (labels >= 0)).sum()
    assert objective.count(batch) == 24 and metrics["right"] == (steps == 1).sum()


def test_steps_may_be_taken_in_any_parts():
    model, objective, rows = judge().double(), ProcessReward(), StepRows(chains(), seq_len=19, shuffle=False)
    with torch.no_grad():
        losses = [sum(objective.loss(model(b.ids, b.positions), b)[0] for b in Once(rows, batch_size=n))
                  for n in (1, 5, 12)]
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(losses[0], losses[2])
        expected = 0.0
        for chain in rows.chains:
            values = values_of(model, [chain.ids.tolist()])[0]
            for t in np.flatnonzero(chain.right >= 0):
                p = torch.sigmoid(values[t])
                expected = expected - torch.log(p if chain.right[t] else 1 - p)
        torch.testing.assert_close(losses[0], expected)


def test_a_tiny_model_learns_which_steps_are_right():
    model = add_value_head(tiny_model(1))
    run = make_run(model, RowSource(StepRows(chains(), seq_len=19), batch_size=12), objective=ProcessReward(), lr=3e-3)
    run.schedule = lambda step: 3e-3
    values = [train_step(run) for _ in range(40)]
    assert values[0]["loss"] == pytest.approx(np.log(2), abs=0.1) and values[-1]["accuracy"] == 1
    assert values[-1]["loss"] < 0.2
