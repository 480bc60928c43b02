"""Rollouts inside the GRPO loop against transformers in the same loop, and a DPO step against TRL's trainer; 26M, CPU.

Rollouts: the loop is ours both times (rl/rollout.py), prompts, rewards and updates too; what answers is the engine,
or transformers' generate on a left-padded batch, which is given the new weights before every rollout. Once all
answers have the same length, which suits a padded batch best; once they end by themselves, as answers do, at any of
STOPS ids. Timed is the drawing, new weights included.

DPO: one optimiser step on the same pairs, the same model and AdamW, in float32; TRL's DPOTrainer with the reference's
log-probabilities asked in advance, as ours are. Tokens are those of the pairs without padding. Peak memory is that of a
process each.
"""
from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.common import in_process, in_turn, ratio, reference, report, spread
from mindseed.base.hardware import peak_memory
from mindseed.core import Batch
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.infer.rows import Completion
from mindseed.interop.directory import load_directory, names_in, save_directory
from mindseed.interop.rules import write_names
from mindseed.models.lm import LM, build
from mindseed.models.presets import preset
from mindseed.objectives.dpo import DPO
from mindseed.objectives.grpo import GRPO
from mindseed.rl.env import Play, SingleTurn
from mindseed.rl.prompts import Prompt
from mindseed.rl.reward import Judge, Term, each
from mindseed.rl.rollout import Advantage, Rollout, RolloutConfig
from mindseed.tokenizers.byte import Byte
from mindseed.train.native import NativeBackend
from mindseed.train.step import Run, train_step

NAME, VOCAB = "post_step", 6400
PROMPTS, ANSWERS, NEW = 8, 8, 96                  # of a rollout
STOPS = 128                                       # ids that end an answer: of random ones, one in 50
PAIRS, LONG = 8, 192                              # of a DPO step; tokens of a prompt with its answer, at most


class FixedPrompts:
    """Prompts of 32 to 96 ids, without text."""

    thinking = None

    def __init__(self) -> None:
        draw = random.Random(0)
        self.ids = [[draw.randrange(VOCAB) for _ in range(draw.randint(32, 96))] for _ in range(64)]

    def at(self, number: int) -> tuple[Prompt, list[int]]:
        return Prompt(messages=[{"role": "user", "content": ""}]), self.ids[number % len(self.ids)]

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        return ""


class Theirs:
    """transformers' generate where the loop expects an engine."""

    version, limit = 0, 1024

    def __init__(self, ours: LM, theirs, family, stops: tuple[int, ...]) -> None:
        self.model, self.theirs, self.stops = ours, theirs, stops
        self.state = theirs.state_dict()
        self.names = names_in(family, ours.config, ours.state_dict())

    @torch.no_grad()
    def update_weights(self, model: LM) -> None:
        for name, x in write_names(self.names, model.state_dict()).items():
            self.state[name].copy_(x)

    @torch.no_grad()
    def generate(self, requests: list) -> list[list[Completion]]:
        width, n = max(len(r.prompt) for r in requests), requests[0].n
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
        out = self.theirs.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                   num_return_sequences=n, max_new_tokens=requests[0].max_new,
                                   eos_token_id=[*self.stops] or None, pad_token_id=0, return_dict_in_generate=True,
                                   output_logits=True)
        new = out.sequences[:, width:]
        logps = torch.stack([logits.log_softmax(-1).gather(-1, new[:, t, None])[:, 0]
                             for t, logits in enumerate(out.logits)], 1)
        rows = []
        for i, p in zip(new.tolist(), logps.tolist()):
            end = next((t + 1 for t, id in enumerate(i) if id in self.stops), len(i))
            rows.append(Completion(ids=i[:end], logps=p[:end], sampled_logps=p[:end], finish="length"))
        return [rows[i:i + n] for i in range(0, len(rows), n)]


class Timed:
    """Whatever answers, with a clock: seconds spent on new weights and on drawing, and tokens drawn."""

    def __init__(self, engine) -> None:
        self.engine, self.seconds, self.tokens = engine, 0.0, 0

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def update_weights(self, model: LM) -> None:
        start = time.perf_counter()
        self.engine.update_weights(model)
        self.seconds += time.perf_counter() - start

    def generate(self, requests: list) -> list[list[Completion]]:
        start = time.perf_counter()
        found = self.engine.generate(requests)
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(c.ids) for group in found for c in group)
        return found

    def speed(self) -> float:
        """Tokens per second since it was last asked for."""
        speed, self.seconds, self.tokens = self.tokens / self.seconds, 0.0, 0
        return speed


def loop(model: LM, engine: Timed) -> Run:
    """GRPO on rewards that random answers differ in."""
    judge = Judge([Term(name="even", weight=1.0, call=each(
        lambda s: float(np.mean([id % 2 for id in s.trajectory.ids[-NEW:]]))))])
    source = Rollout(policy=model, engine=engine, prompts=FixedPrompts(), judge=judge, env=SingleTurn(),
                     play=Play(answers=ANSWERS, max_new=NEW), config=RolloutConfig(prompts=PROMPTS),
                     advantage=Advantage(), accumulate=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    optimizer.param_groups[0]["lr_scale"] = 1.0
    backend = NativeBackend(model, GRPO(), [optimizer])
    return Run(source, GRPO(), backend, schedule=lambda step: 1e-5, accumulate=4, after_step=[source.report])


def rollouts(rounds: int, stops: tuple[int, ...]) -> list[str]:
    transformers = reference(NAME)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_directory(build(preset("mini").lm_config(vocab_size=VOCAB, seq_len=1024)), Byte(), folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None
        one, two = load_directory(folder), load_directory(folder)
    engines = {"ours": Timed(Engine(one.model, None, EngineConfig(max_seqs=64), stop_ids=stops)),
               "theirs": Timed(Theirs(two.model, theirs, two.family, stops))}
    runs = {name: loop(model, engines[name]) for name, model in (("ours", one.model), ("theirs", two.model))}

    def step(name: str) -> float:
        train_step(runs[name])
        return engines[name].speed()

    taken = in_turn({name: lambda name=name: step(name) for name in runs}, rounds)
    length = f"of 1 to {NEW}, ending by themselves" if stops else f"of {NEW}"
    return [f"rollouts in the GRPO loop, {PROMPTS} x {ANSWERS} answers {length}", spread(taken["ours"]),
            "transformers generate", spread(taken["theirs"]), f"{ratio(taken['ours'], taken['theirs']):.2f}x", "3x"]


# ------------------------------------------------------------------------------------------------------------ DPO

def pairs() -> list[dict[str, list[int]]]:
    """Ids of a prompt and two answers."""
    draw, found = random.Random(1), []
    for _ in range(PAIRS * 12):
        prompt = [draw.randrange(5, VOCAB) for _ in range(draw.randint(16, LONG // 2))]
        sides = [[draw.randrange(5, VOCAB) for _ in range(draw.randint(16, LONG // 2))] for _ in range(2)]
        found.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return found


def tokens_of(rows: list[dict]) -> int:
    return sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) for r in rows)


def dpo_ours(steps: int) -> dict:
    """Seconds of every step, and the peak of memory, of our own."""
    before = peak_memory(torch.device("cpu"))
    model = build(preset("mini").lm_config(vocab_size=VOCAB, seq_len=1024)).train()
    objective, rows = DPO(), pairs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    optimizer.param_groups[0]["lr_scale"] = 1.0
    backend = NativeBackend(model, objective, [optimizer])
    batches = [packed(rows[i * PAIRS:(i + 1) * PAIRS]) for i in range(steps)]
    run = Run(iter(batches), objective, backend, schedule=lambda step: 1e-5)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        train_step(run)
        times.append(time.perf_counter() - start)
    return {"seconds": times, "peak": peak_memory(torch.device("cpu")) - before}


def packed(rows: list[dict]) -> Batch:
    """Each pair a row, as data/preference.py makes them, with a reference of zeros."""
    sides = [[r["prompt"] + r[side] for side in ("chosen", "rejected")] for r in rows]
    width = -(-max(sum(len(ids) - 1 for ids in pair) for pair in sides) // 8) * 8
    ids, targets, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    weights = torch.zeros(len(rows), width)
    for b, pair in enumerate(sides):
        t = 0
        for document in pair:
            here = slice(t, t + len(document) - 1)
            ids[b, here], targets[b, here] = torch.tensor(document[:-1]), torch.tensor(document[1:])
            positions[b, here] = torch.arange(len(document) - 1)
            weights[b, t + len(rows[b]["prompt"]) - 1:here.stop] = 1
            t = here.stop
    return Batch(ids=ids, targets=targets, weights=weights, positions=positions,
                 extra={"reference": torch.zeros(len(rows), 2)})


def dpo_theirs(steps: int) -> dict:
    """The same of TRL's DPOTrainer: its step, called as its loop calls it."""
    reference(NAME)
    import datasets
    import transformers
    import trl
    transformers.logging.set_verbosity_error()
    assert trl.DPOConfig and trl.DPOTrainer and transformers.Qwen3ForCausalLM             # imported when first named
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        save_directory(build(preset("mini").lm_config(vocab_size=VOCAB, seq_len=1024)), Byte(), folder)
        before = peak_memory(torch.device("cpu"))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = pairs()
        data = datasets.Dataset.from_list([{f"{key}_ids": ids for key, ids in row.items()} for row in rows])
        options = trl.DPOConfig(output_dir=str(Path(folder) / "out"), per_device_train_batch_size=PAIRS,
                                max_steps=steps, learning_rate=1e-5, report_to=[], use_cpu=True, bf16=False,
                                gradient_checkpointing=False, max_length=None, logging_strategy="no",
                                save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                                precompute_ref_log_probs=True, dataloader_num_workers=0)
        times, last = [], SimpleNamespace(at=0.0)

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_, **__):
                last.at = time.perf_counter()

            def on_step_end(self, *_, **__):
                times.append(time.perf_counter() - last.at)

        class Fed(trl.DPOTrainer):
            def _prepare_dataset(self, dataset, *_, **__):        # it is tokens already
                return dataset

            def _get_train_sampler(self, *_, **__):               # in our order
                return torch.utils.data.SequentialSampler(self.train_dataset)

        trainer = Fed(model=model, args=options, train_dataset=data, processing_class=tokenizer,
                      callbacks=[Clock()])
        trainer.train()
    return {"seconds": times, "peak": peak_memory(torch.device("cpu")) - before}


def dpo(rounds: int) -> list[list[str]]:
    steps, tokens = 8, tokens_of(pairs()[2 * PAIRS:8 * PAIRS])                            # the first two are not timed
    found = in_turn({name: lambda name=name: in_process("benchmarks.post_step", name, str(steps))
                     for name in ("dpo_ours", "dpo_theirs")}, rounds)
    speed = {name: [tokens / sum(r["seconds"][2:]) for r in runs] for name, runs in found.items()}
    memory = {name: [r["peak"] / 1e6 for r in runs] for name, runs in found.items()}
    return [["DPO step, tokens/s", spread(speed["dpo_ours"]), "TRL's DPOTrainer", spread(speed["dpo_theirs"]),
             f"{ratio(speed['dpo_ours'], speed['dpo_theirs']):.2f}x", "1x"],
            ["DPO, peak memory, MB", spread(memory["dpo_ours"]), "TRL's DPOTrainer",
             spread(memory["dpo_theirs"]), f"{ratio(memory['dpo_ours'], memory['dpo_theirs']):.2f}x", "1x at most"]]


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ("dpo_ours", "dpo_theirs"):
        print(json.dumps(globals()[sys.argv[1]](int(sys.argv[2]))))
        return
    rows = [rollouts(3, ()), rollouts(3, tuple(range(STOPS))), *dpo(3)]
    report(NAME, "Post-training steps, 26M, fp32, CPU", ["what", "mindseed", "against", "its figure", "ratio",
                                                         "target"], rows, command="python -m benchmarks post_step",
           notes=f"Rollouts in tokens/s. A DPO step is {PAIRS} pairs of random ids, "
                 f"up to {LONG} a side; the reference's log-probabilities were asked before. Peak memory is that of a "
                 "process beyond what it held before the model was built. Median (min to max) of runs in turn.")


if __name__ == "__main__":
    main()
