"""Tokens per forward pass with speculation, on the embedded world: n-grams, a draft model, the model's own modules.

Three models are grown like the demo's: the demo's own, a draft of a tenth of its size, and one like the demo's with two
modules for further tokens. They answer the held-out questions, and go on with texts of their world; greedy, one
sequence at a time, where speculation counts. Answers with and without guesses are compared: they must be the same.
Growing them takes fifteen minutes; they are kept in runs/speculation and found there the next time.
"""
from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import in_turn, ratio, report, seconds
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import Loaded, load_directory
from mindseed.recipes import demo, train
from mindseed.recipes.model_options import ModelOptions
from mindseed.tasks.toy import ToyTask
from mindseed.data.toy import World
from mindseed.tokenizers.base import document_marks
from mindseed.tokenizers.chat import encode_chat, normalise

NAME = "speculation"
FOLDER = Path("runs/speculation")
KINDS = {                                         # how they differ from the demo's model
    "model": ModelOptions(preset="toy"),
    "draft": ModelOptions(preset="toy", layers=1, dim=96, heads=3, kv_heads=1, ffn_dim=256),
    "mtp": ModelOptions(preset="toy", mtp=2),
}
QUESTIONS, TEXTS, NEW = 40, 20, 64


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)                      # so small a model is faster on one
    loaded = {name: grown(name) for name in KINDS}
    rows = []
    for what, asked in workloads(loaded["model"]).items():
        plain = {name: Engine.of(loaded[name], EngineConfig(max_seqs=1)) for name in ("model", "mtp")}
        for label, base, engine in (
                ("n-grams", "model", Engine.of(loaded["model"], config("ngram"))),
                ("a draft model", "model", Engine.of(loaded["model"], config("model"), draft=loaded["draft"])),
                ("two modules of its own", "mtp", Engine.of(loaded["mtp"], config("mtp")))):
            rows.append([what, label, *measure(plain[base], engine, asked, rounds)])
    report(NAME, "Speculative decoding on the embedded world", [
        "what", "guesses by", "tokens per pass", "accepted", "tokens/s, against none"], rows,
        command="python -m benchmarks speculation",
        notes=f"2M parameters, greedy, one sequence at a time, four guesses at most; {QUESTIONS} held-out questions "
              f"and {TEXTS} beginnings of texts, {NEW} new tokens at most. The draft has a tenth of the parameters. "
              "Every answer is the same with and without guesses. Passes that read a prompt are counted as passes.")


def grown(name: str) -> Loaded:
    """A model of KINDS, trained as the demo trains its own, from where it was left."""
    options = demo.Options(out=str(FOLDER))
    if not (FOLDER / "fine-tune" / "model").exists():
        demo.main(options)
    if name == "model":
        return load_directory(FOLDER / "fine-tune" / "model")
    first, then = demo.pretraining(options, FOLDER), demo.fine_tuning(options, FOLDER)
    first = replace(first, out=str(FOLDER / f"{name}-pretrain"), model=KINDS[name])
    then = replace(then, out=str(FOLDER / f"{name}-fine-tune"),
                   model=ModelOptions(start=str(FOLDER / f"{name}-pretrain" / "model")))
    for stage in (first, then):
        if not (Path(stage.out) / "model").exists():
            train.train(stage, torch.device("cpu"))
    return load_directory(Path(then.out) / "model")


def config(draft: str) -> EngineConfig:
    return EngineConfig(max_seqs=1, draft=draft, draft_tokens=4, prefix_caching=False)


def workloads(loaded: Loaded) -> dict[str, list[Request]]:
    tokenizer, task = loaded.tokenizer, ToyTask(World(0))
    chats = []
    for example in itertools.islice(task.examples(), 0, None, max(len(list(task.examples())) // QUESTIONS, 1)):
        messages, tools = normalise({"messages": task.prompt(example)})
        chats.append(encode_chat(tokenizer, messages, tools=tools, generation_prompt=True)[0])
    begin = tokenizer.specials[document_marks(tokenizer.specials)[0]]
    texts = [[begin, *tokenizer.encode(row["text"])[:16]] for row in itertools.islice(World(1).pretrain(TEXTS), TEXTS)]
    greedy = Sampling(temperature=0)
    return {"questions": [Request(prompt=ids, sampling=greedy, max_new=NEW) for ids in chats[:QUESTIONS]],
            "texts": [Request(prompt=ids, sampling=greedy, max_new=NEW) for ids in texts]}


def measure(plain: Engine, engine: Engine, asked: list[Request], rounds: int) -> list[str]:
    """Tokens per pass, share of guesses accepted, speed against the engine without guesses."""
    before = engine.stats()
    got, want = engine.generate(asked), plain.generate(asked)
    if [done.ids for [done] in got] != [done.ids for [done] in want]:
        raise RuntimeError("speculation changed an answer")
    after = engine.stats()
    drafted, accepted = after.drafted - before.drafted, after.accepted - before.accepted
    tokens = after.generated_tokens - before.generated_tokens
    taken = in_turn({"with": lambda: seconds(lambda: engine.generate(asked)),
                     "without": lambda: seconds(lambda: plain.generate(asked))}, rounds)
    print(f"{drafted} guesses, {accepted} accepted", file=sys.stderr)
    return [f"{tokens / (after.steps - before.steps):.2f}", f"{accepted / drafted:.0%}" if drafted else "-",
            f"{ratio(taken['without'], taken['with']):.2f}x"]


if __name__ == "__main__":
    main()
