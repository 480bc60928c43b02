"""Tokens per second of cached greedy decoding, against transformers' `generate` with its default cache.

Same weights (one directory, read by both), same prompts, same number of new tokens, same dtype; both answers are
compared before anything is measured.
"""
from __future__ import annotations

import sys
import tempfile

import torch

from benchmarks.common import in_turn, ratio, reference, report, seconds, spread
from mindseed.infer.generate import generate
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import preset
from mindseed.tokenizers.byte import Byte

NAME = "decode"
VOCAB, PROMPT, NEW = 6400, 32, 128


def main(rounds: int = 5) -> None:
    transformers = reference("decode")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = build(preset("mini").lm_config(vocab_size=VOCAB, seq_len=512))
        save_directory(model, Byte(), folder)
        for dtype in (torch.float32, torch.bfloat16):
            ours = load_directory(folder, dtype=dtype).model
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for batch in (1, 16):
                rows.append(measure(ours, theirs, str(dtype).removeprefix("torch."), batch, rounds))
    report(NAME, f"Cached greedy decoding, 26M, {PROMPT} + {NEW} tokens",
           ["dtype", "sequences", "mindseed, tokens/s", "transformers, tokens/s", "ratio"], rows,
           command="python -m benchmarks decode",
           notes="Median (min to max) of runs in turn; the ratio is the median of the ratios pair by pair.")


def measure(ours, theirs, dtype: str, batch: int, rounds: int) -> list[str]:
    """One row of the table."""
    ids = torch.randint(3, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    prompts, mask = ids.tolist(), torch.ones_like(ids)

    def mindseed() -> list[list[int]]:
        return [c.ids for c in generate(ours, None, prompts, sampling=Sampling(temperature=0), max_new=NEW)]

    def transformers() -> list[list[int]]:
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                              pad_token_id=0)
        return out[:, PROMPT:].tolist()

    a, b = mindseed(), transformers()
    agree = sum(x == y for p, q in zip(a, b) for x, y in zip(p, q)) / (batch * NEW)
    if dtype == "float32" and agree < 1:
        raise RuntimeError(f"the two disagree: only {agree:.0%} of the tokens are the same")
    taken = in_turn({"ours": lambda: seconds(mindseed), "theirs": lambda: seconds(transformers)}, rounds)
    speed = {name: [batch * NEW / s for s in times] for name, times in taken.items()}
    print(f"{dtype} x {batch}: same tokens {agree:.0%}", file=sys.stderr)
    return [dtype, str(batch), spread(speed["ours"]), spread(speed["theirs"]),
            f"{ratio(speed['ours'], speed['theirs']):.2f}"]


if __name__ == "__main__":
    main()
