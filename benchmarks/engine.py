"""The engine on a CPU, 26M parameters in float32: one sequence, thirty-two of mixed length, and a shared beginning.

Same weights (one directory, read by both), same prompts, same numbers of new tokens, greedy; the answers are compared
before anything is measured. transformers decodes with its dynamic cache: alone, one request after the other, and in
padded batches, of which the best size counts. The limit of a single sequence is the time memory needs to give every
weight once, measured by reading the same weights and nothing else.
"""
from __future__ import annotations

import random
import sys
import tempfile

import torch

from benchmarks.common import in_turn, ratio, reference, report, seconds, spread
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.jit import available
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import LM, build
from mindseed.models.presets import preset
from mindseed.tokenizers.byte import Byte

NAME = "engine"
VOCAB = 6400
GREEDY = Sampling(temperature=0)
BATCHES = (4, 8, 16, 32)                          # of transformers' padded batches
HEADER = ["what", "mindseed, tokens/s", "against", "its tokens/s", "ratio", "target"]


def main(rounds: int = 5) -> None:
    transformers = reference(NAME)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = build(preset("mini").lm_config(vocab_size=VOCAB, seq_len=1024))
        save_directory(model, Byte(), folder)
        ours = load_directory(folder).model
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    single, share = one_sequence(ours, theirs, rounds)
    rows = [single, *mixed_lengths(ours, theirs, max(rounds // 2, 1)), shared_beginning(ours, max(rounds // 2, 1))]
    kernels = "kernels of our own (numba)" if available() else "torch's kernels (numba is not installed)"
    report(NAME, "The engine, 26M, fp32, greedy, CPU", HEADER, rows, command="python -m benchmarks engine",
           notes=f"With {kernels}. Median (min to max) of runs in turn; a ratio is the median of the ratios pair by "
                 f"pair. One sequence decodes at {share:.0%} of the speed at which this machine's memory gives the "
                 "weights.")


# ----------------------------------------------------------------------------------------------------------- the rows

def one_sequence(ours: LM, theirs, rounds: int, prompt: int = 32, new: int = 128) -> tuple[list[str], float]:
    """(row of the table, share of the memory's bandwidth while decoding)."""
    request = requests([(prompt, new)])
    engine = engine_for(ours)
    a, b = answers(engine, request), [generated(theirs, request[0])]
    same(a, b)
    taken = in_turn({"ours": lambda: seconds(lambda: answers(engine, request)),
                     "theirs": lambda: seconds(lambda: generated(theirs, request[0])),
                     "reading": lambda: reading(ours),
                     "prompt": lambda: seconds(lambda: answers(engine, requests([(prompt, 1)])))}, rounds)
    step = [(all_ - prompt_) / (new - 1) for all_, prompt_ in zip(taken["ours"], taken["prompt"])]
    speed = {name: [new / s for s in taken[name]] for name in ("ours", "theirs")}
    row = ["one sequence, 32 + 128 tokens", spread(speed["ours"]), "transformers, dynamic cache",
           spread(speed["theirs"]), f"{ratio(speed['ours'], speed['theirs']):.2f}x", "2x"]
    return row, ratio(taken["reading"], step)


def mixed_lengths(ours: LM, theirs, rounds: int, count: int = 32) -> list[list[str]]:
    draw = random.Random(0)
    asked = requests([(draw.randint(16, 256), draw.randint(16, 256)) for _ in range(count)])
    tokens = sum(request.max_new for request in asked)
    engine = engine_for(ours)
    same(answers(engine, asked), [generated(theirs, request) for request in asked])
    best = min(BATCHES, key=lambda size: seconds(lambda: padded(theirs, asked, size)))
    taken = in_turn({"ours": lambda: seconds(lambda: answers(engine, asked)),
                     "padded": lambda: seconds(lambda: padded(theirs, asked, best)),
                     "one by one": lambda: seconds(lambda: [generated(theirs, r) for r in asked])}, rounds)
    speed = {name: [tokens / s for s in times] for name, times in taken.items()}
    first = f"{count} requests, prompts and answers of 16 to 256 tokens"
    return [[first, spread(speed["ours"]), "transformers, one by one", spread(speed["one by one"]),
             f"{ratio(speed['ours'], speed['one by one']):.2f}x", "5x"],
            ["the same", spread(speed["ours"]), f"transformers, padded batches of {best} (its best)",
             spread(speed["padded"]), f"{ratio(speed['ours'], speed['padded']):.2f}x", "2x"]]


def shared_beginning(ours: LM, rounds: int, count: int = 32) -> list[str]:
    """Requests that begin with the same 512 tokens, as a system prompt with tools does; 64 of their own, 16 new."""
    beginning = requests([(512, 1)])[0].prompt
    asked = [Request(prompt=beginning + r.prompt, sampling=GREEDY, max_new=16, stop_ids=())
             for r in requests([(64, 1)] * count, seed=1)]
    engines = {name: engine_for(ours, prefix_caching=on) for name, on in (("with", True), ("without", False))}
    same(answers(engines["with"], asked), answers(engines["without"], asked))

    def run(name: str) -> float:
        if name == "with":                                    # nothing is known of them at the start of a round
            engines[name].scheduler.new_weights(random.randbytes(8))
        return seconds(lambda: answers(engines[name], asked))

    taken = in_turn({name: lambda name=name: run(name) for name in engines}, rounds)
    speed = {name: [16 * count / s for s in times] for name, times in taken.items()}
    return [f"{count} requests, 512 tokens shared, 64 + 16 of their own", spread(speed["with"]),
            "mindseed without prefix caching", spread(speed["without"]),
            f"{ratio(speed['with'], speed['without']):.2f}x", "3x"]


# ---------------------------------------------------------------------------------------------------------- the tools

def requests(lengths: list[tuple[int, int]], seed: int = 0) -> list[Request]:
    """Random prompts of (prompt, new) tokens."""
    g = torch.Generator().manual_seed(seed)
    return [Request(prompt=torch.randint(3, VOCAB, (n,), generator=g).tolist(), sampling=GREEDY, max_new=new,
                    stop_ids=()) for n, new in lengths]


def engine_for(model: LM, **options) -> Engine:
    return Engine(model, None, EngineConfig(**{"max_seqs": 32, "prefix_caching": False} | options))


def answers(engine: Engine, asked: list[Request]) -> list[list[int]]:
    return [done.ids for [done] in engine.generate(asked)]


def generated(theirs, request: Request) -> list[int]:
    ids = torch.tensor([request.prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new,
                          min_new_tokens=request.max_new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(request.prompt):].tolist()


def padded(theirs, asked: list[Request], size: int) -> None:
    """Batches of `size`, padded on the left, each as long as its longest answer; similar lengths together."""
    order = sorted(asked, key=lambda request: request.max_new)
    for first in range(0, len(order), size):
        some = order[first:first + size]
        width = max(len(request.prompt) for request in some)
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in some])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in some])
        theirs.generate(ids, attention_mask=mask, max_new_tokens=max(r.max_new for r in some), do_sample=False,
                        eos_token_id=None, pad_token_id=0)


def same(a: list[list[int]], b: list[list[int]]) -> None:
    pairs = [(x, y) for p, q in zip(a, b) for x, y in zip(p, q, strict=True)]
    agree = sum(x == y for x, y in pairs) / len(pairs)
    print(f"{agree:.1%} of {len(pairs)} tokens are the same", file=sys.stderr)
    if agree < 0.99:                              # a near tie may tip over, and all that follows with it
        raise RuntimeError(f"the two disagree: only {agree:.1%} of the tokens are the same")


def reading(model: LM) -> float:
    """Seconds to read every weight of a decoding step once."""
    weights = [p.detach() for name, p in model.named_parameters() if p.ndim == 2]
    return min(seconds(lambda: [w.sum() for w in weights]) for _ in range(5))


if __name__ == "__main__":
    main()
