"""The engine against llama.cpp on the same weights: F32 and Q8_0 GGUF files of the 26M preset, one sequence, greedy.

    python -m benchmarks.llamacpp path/to/a/python/that/has/llama-cpp-python      (make bench-llamacpp compiles one)

llama.cpp runs in a process of its own, which waits while ours decodes: A B A B, as everywhere. In float32 both must
choose the same tokens. Q8_0 has a quarter of the bytes to read, and we decode float32 and bfloat16 beside it.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "llamacpp"
VOCAB, PROMPT, NEW = 6400, 32, 128


def main(argv: list[str]) -> int:
    if argv[:1] == ["--serve"]:
        return serve(argv[1])
    if len(argv) != 1 or not Path(argv[0]).exists():
        print(f"error: name the Python that has llama-cpp-python\n\n{__doc__}", file=sys.stderr)
        return 2
    import torch

    from benchmarks.common import in_turn, ratio, report, seconds, spread
    from benchmarks.engine import answers, engine_for, requests
    from mindseed.interop.convert import convert_gguf
    from mindseed.interop.directory import load_directory, save_directory
    from mindseed.models.lm import build
    from mindseed.models.presets import preset
    from mindseed.tokenizers.bpe_train import train

    rows = []
    asked = requests([(PROMPT, NEW)])
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "model"
        save_directory(build(preset("mini").lm_config(vocab_size=VOCAB, seq_len=512)),
                       train(["the seed grows, the trees grow"], vocab_size=300), folder)
        engines = {dtype: engine_for(load_directory(folder, dtype=getattr(torch, dtype)).model)
                   for dtype in ("float32", "bfloat16")}
        for kind in ("f32", "q8_0"):
            file = Path(temp) / kind / "model.gguf"                               # with a Modelfile beside it
            convert_gguf(folder, file, dtype=kind)
            with Other(argv[0], file) as other:
                theirs = other.ask(asked[0].prompt)
                agree = sum(a == b for a, b in zip(theirs["ids"], answers(engines["float32"], asked)[0])) / NEW
                if kind == "f32" and agree < 1:
                    raise RuntimeError(f"llama.cpp chooses other tokens: only {agree:.0%} are the same")
                for dtype in ("float32",) if kind == "f32" else ("float32", "bfloat16"):
                    taken = in_turn({"ours": lambda: seconds(lambda: answers(engines[dtype], asked)),
                                     "theirs": lambda: other.ask(asked[0].prompt)["seconds"]})
                    speed = {name: [NEW / s for s in times] for name, times in taken.items()}
                    rows.append([f"mindseed, {dtype}", spread(speed["ours"]), f"llama.cpp, {kind.upper()}",
                                 spread(speed["theirs"]), f"{ratio(speed['ours'], speed['theirs']):.2f}x",
                                 "1x" if kind == "f32" else ""])
    report(NAME, "One sequence against llama.cpp, 26M, 32 + 128 tokens, CPU",
           ["what", "tokens/s", "against", "its tokens/s", "ratio", "target"], rows,
           command="make bench-llamacpp",
           notes="Prompt included; greedy; F32 gives the same tokens. llama-cpp-python with its defaults, compiled for "
                 "this machine, keys and values in F32, as many threads as torch.")
    return 0


class Other:
    """llama.cpp in another Python, which needs nothing of ours."""

    def __init__(self, python: str, file: Path) -> None:
        import torch
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--serve", json.dumps([str(file), torch.get_num_threads(), NEW])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, ids: list[int]) -> dict:
        print(json.dumps(ids), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"llama.cpp has stopped, exit code {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(options: str) -> int:
    """In the other Python: a prompt's ids per line in, ids and seconds out."""
    import time

    import llama_cpp
    import numpy as np
    file, threads, new = json.loads(options)
    model = llama_cpp.Llama(file, n_ctx=512, type_k=0, type_v=0, n_threads=threads, n_threads_batch=threads,
                            verbose=False)
    for line in sys.stdin:
        prompt, ids = json.loads(line), []
        start = time.perf_counter()
        model.reset()
        model.eval(prompt)
        while True:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1), (model.n_vocab(),))
            ids.append(int(logits.argmax()))
            if len(ids) == new:
                break
            model.eval(ids[-1:])
        print(json.dumps({"ids": ids, "seconds": time.perf_counter() - start}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
