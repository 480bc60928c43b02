"""Our GGUF files in llama.cpp itself: ids of texts, logits, 32 tokens of greedy continuation. `make parity-llamacpp`.

    python -m tests.parity_llamacpp path/to/a/python/that/has/llama-cpp-python [part of a case's name]

Not part of the suite, for llama.cpp takes minutes to compile. This process makes tiny models with every parameter
random, converts them and computes what should come out; the other Python, which needs nothing of ours, runs the files
and judges. Exit code 1 if any case differs.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

NEW = 32                                          # tokens of continuation
MARGIN = 0.003                                    # between the best two logits at every step, in their deviation
ALLOWED = {"f32": 1e-4, "f16": 0.01, "bf16": 0.05, "q8_0": 0.15}     # distance of a token's logits, as a share
TEXTS = [
    "The seed grows; the trees grow, and Ada's garden isn't SMALL. They'll see: we've 3 apples!",
    "种子发芽，模型生长。你好，世界！一二三，３４５。", "数字1234567和 3.14159, 1e-5; 2026年11月22日",
    "emoji 🌱🌳🙂 and 👩‍👩‍👧‍👦 flags 🇨🇳🇬🇧 1️⃣", "  leading, trailing  and   runs   ",
    "tabs\tand\nlines\n\n\n and\r\nmore \n \n x",
    "", " ", "\n", "x",
    "naïve café, e\u0301 combined, Ärger; Ünïcödé", "Привет, мир! Καλημέρα κόσμε", "こんにちは世界 안녕하세요 세계",
    "שלום עולם مرحبا بالعالم १२३ ไทย ½ ² Ⅷ",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # ok?\n", "I'M we'LL don't 'twas ''s",
    "\u3000全角\u3000空格\u00a0nbsp\u200bzero", "a" * 300 + " " + "ab" * 40, "<not special> <| im_start |> </thinks>"]
SPECIAL = [
    "<|im_start|>user\n7+8=?<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|im_end|>x<|im_start|>",
    "<think>\n想一想 🙂\n</think>\n\n15<|im_end|>", '<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>',
    "<|im_start|><|im_start|> a <|im_end|> <|im_end|>"]


# ------------------------------------------------------------------------------------------------- what should come out

def cases():
    """name -> (shape, changes of every layer's mixer, kind of file, splitter, whole words first)."""
    from dataclasses import replace

    from mindseed.interop.gguf_vocab import LLAMA3
    from mindseed.models.presets import LatentShape, Shape
    from mindseed.nn.moe import MoEConfig
    from mindseed.nn.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
    from mindseed.tokenizers.split import GPT2, QWEN

    qwen3 = Shape(layers=3, dim=64, heads=4, kv_heads=2, head_dim=32, ffn_dim=96, theta=1e6)
    llama = replace(qwen3, head_dim=16, qk_norm=False, tied=False, norm_eps=1e-5, theta=5e5)
    moe = MoEConfig(experts=8, top_k=3, expert_dim=32)
    deepseek = replace(qwen3, kv_heads=4, qk_norm=False, dense_layers=1, tied=False, theta=1e4,
                       latent=LatentShape(kv_rank=48, q_rank=40, rope_dim=16),
                       moe=replace(moe, shared_dim=64, score="sigmoid", bias=True, groups=4, top_groups=2, scaling=2.5))
    straight = replace(deepseek, tied=True, dense_layers=0, latent=LatentShape(kv_rank=32, rope_dim=8),
                       moe=replace(deepseek.moe, groups=2, top_groups=2, renormalise=False, scaling=1.5))
    yarn = YarnScaling(factor=4.0, original=512)
    both = replace(yarn, mscale=0.7, mscale_all_dim=0.7)

    def case(shape, *, kind="f32", pattern=QWEN, whole=False, mtp=0, **rope):
        config = replace(shape, mtp=mtp).lm_config(vocab_size=1, seq_len=512)
        if rope:
            place = "rope" if shape.latent else "positions"
            rope = RopeConfig(**{"theta": shape.theta, "interleaved": shape.latent is not None} | rope)
            config = replace(config, layers=tuple(replace(layer, mixer=replace(layer.mixer, **{place: rope}))
                                                  for layer in config.layers))
        return config, kind, pattern, whole

    return {
        "qwen3": case(qwen3), "qwen3 f16": case(qwen3, kind="f16"), "qwen3 bf16": case(qwen3, kind="bf16"),
        "qwen3 q8_0": case(qwen3, kind="q8_0"), "qwen3 linear": case(qwen3, scaling=LinearScaling(factor=4.0)),
        "qwen3 yarn": case(qwen3, scaling=yarn), "qwen3 gpt-2": case(qwen3, pattern=GPT2),
        "qwen3 yarn factor": case(qwen3, scaling=replace(yarn, attention_factor=1.3)),
        "llama": case(llama, pattern=LLAMA3, whole=True), "llama tied": case(replace(llama, tied=True), pattern=LLAMA3),
        "llama q8_0": case(llama, kind="q8_0"), "llama yarn": case(llama, scaling=yarn),
        "llama llama3": case(llama, scaling=Llama3Scaling(factor=8.0, original=64)),
        "qwen3moe": case(replace(qwen3, moe=moe)), "qwen3moe q8_0": case(replace(qwen3, moe=moe), kind="q8_0"),
        "qwen3moe top 1": case(replace(qwen3, moe=replace(moe, top_k=1))),
        "deepseek2": case(deepseek, mtp=1), "deepseek2 bf16": case(deepseek, kind="bf16"),
        "deepseek2 q8_0": case(deepseek, kind="q8_0"), "deepseek2 halves": case(deepseek, interleaved=False),
        "deepseek2 no rank": case(straight), "deepseek2 yarn": case(deepseek, scaling=both),
        "deepseek2 yarn plain": case(straight, scaling=replace(yarn, attention_factor=1.0)),
        "deepseek2 yarn all": case(deepseek, scaling=replace(yarn, mscale=1.0, mscale_all_dim=1.0)),
    }


def prepare(folder: Path, name: str, config, kind: str, pattern: str, whole: bool) -> None:
    """The file of a case, and a JSON of what it should do."""
    from dataclasses import replace

    import torch

    from mindseed.infer.generate import generate
    from mindseed.infer.sample import Sampling
    from mindseed.interop.convert import convert_gguf
    from mindseed.interop.directory import save_directory
    from mindseed.models.lm import build
    from mindseed.tokenizers.bpe import BPE
    from mindseed.tokenizers.bpe_train import train
    from mindseed.tokenizers.split import Splitter, by_pattern
    from tests.tiny import randomise

    tokenizer = train(TEXTS * 3, vocab_size=900, splitter=Splitter((by_pattern(pattern),)))
    tokenizer = BPE(tokenizer.tokens, tokenizer.merges, specials=tokenizer.specials, splitter=tokenizer.splitter,
                    whole_words=whole)
    config = replace(config, vocab_size=tokenizer.vocab_size + 5)                 # rows to spare
    prompts = [tokenizer.encode(text, allow_special=True) for text in (SPECIAL[0], TEXTS[0] + TEXTS[1], SPECIAL[2])]
    greedy = Sampling(temperature=0)
    for seed in range(100):                       # until no step is a near tie
        model = build(config, seed=seed).eval()
        randomise(model, seed)
        for buffer in model.buffers():            # biases of routers, which are no parameters
            buffer.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(seed))
        done = generate(model, None, prompts, sampling=greedy, max_new=NEW, stop_ids=())
        whole_ids = [p + c.ids for p, c in zip(prompts, done)]
        with torch.inference_mode():
            logits = [model(torch.tensor([ids]), torch.arange(len(ids))[None]).logits()[0] for ids in whole_ids]
        best = torch.cat([x[-NEW - 1:-1].topk(2).values for x in logits])
        margin = ((best[:, 0] - best[:, 1]).min() / torch.cat(logits).std()).item()
        if margin > MARGIN or kind != "f32":
            break
    source = save_directory(model, tokenizer, folder / f"{name} source")
    written = convert_gguf(source, folder / f"{name}.gguf", dtype=kind, drop_mtp=True, overwrite=True)
    assert written.good, written
    (folder / f"{name}.json").write_text(json.dumps({
        "kind": kind, "margin": margin, "rounding": written.rounding, "prompts": prompts,
        "continued": [c.ids for c in done], "logits": [x.tolist() for x in logits],
        "plain": [[text, tokenizer.encode(text)] for text in TEXTS],
        "special": [[text, tokenizer.encode(text, allow_special=True)] for text in TEXTS + SPECIAL],
        "ends": [tokenizer.eos_id, tokenizer.pad_id], "bos": tokenizer.bos_id}))


# ------------------------------------------------------------------------------------------------------ what comes out

def judge(folder: Path) -> int:
    """Run every file with llama.cpp; a line each. Returns how many differ."""
    import llama_cpp
    import numpy as np

    print(f"llama-cpp-python {llama_cpp.__version__}")
    failures = 0
    for case in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        want = json.loads(case.read_text(encoding="utf-8"))
        model = llama_cpp.Llama(str(case.with_suffix(".gguf")), n_ctx=512, logits_all=True, type_k=0, type_v=0,
                                n_threads=1, verbose=False)                       # type 0: keys and values in F32
        wrong = [text for kind in ("plain", "special") for text, ids in want[kind]
                 if model.tokenize(text.encode(), add_bos=False, special=kind == "special") != ids]
        wrong += [text for text, ids in want["special"]
                  if detokenize(llama_cpp, model, ids) != text]
        odd = [word for word, id, expected in (("bos", model.token_bos(), want["bos"]),
                                               ("eos", model.token_eos(), want["ends"][0])) if id != expected]
        odd += [f"{id} ends no answer" for id in want["ends"]
                if not llama_cpp.llama_vocab_is_eog(model._model.vocab, id)]
        same, apart = 0, []
        for prompt, continued, logits in zip(want["prompts"], want["continued"], want["logits"]):
            ids, exact = list(prompt), np.array(logits)
            model.reset()
            model.eval(ids)
            while len(ids) < len(prompt) + len(continued):
                ids.append(int(np.argmax(model.scores[len(ids) - 1])))
                model.eval(ids[-1:])
            same += sum(a == b for a, b in zip(ids[len(prompt):], continued))
            known = len(prompt)                   # where both have read the same ids
            apart += [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(model.scores[:known], exact[:known])]
        total, texts = sum(map(len, want["continued"])), len(want["plain"]) + 2 * len(want["special"])
        typical = float(np.median(apart))         # where a rounded router tips over, single tokens are far apart
        good = (not wrong and not odd and typical <= ALLOWED[want["kind"]]
                and (same == total and max(apart) <= ALLOWED["f32"] or want["kind"] != "f32"))
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {case.stem:22} texts {texts - len(wrong)}/{texts}  greedy {same}/{total} "
              f"(margin {want['margin']:.3f})  logits {typical:.1e} (worst {max(apart):.1e})"
              + "".join(f"\n       {w!r}" for w in wrong + odd), flush=True)
    print(f"{failures} of {len(list(folder.glob('*.json')))} cases differ")
    return failures


def detokenize(llama_cpp, model, ids: list[int]) -> str:
    """llama.cpp's own function: that of the Python package cuts tokens off after 32 bytes."""
    import ctypes
    room, array = ctypes.create_string_buffer(1 << 16), (llama_cpp.llama_token * len(ids))(*ids)
    size = llama_cpp.llama_detokenize(model._model.vocab, array, len(ids), room, len(room), False, True)
    return room.raw[:size].decode()


def main(argv: list[str]) -> int:
    if argv[:1] == ["--judge"]:
        return min(judge(Path(argv[1])), 1)
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    chosen = {name: case for name, case in cases().items() if argv[1:] == [] or argv[1] in name}
    if not chosen:
        print(f"error: no case has {argv[1]!r} in its name; they are {', '.join(cases())}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temp:
        for name, case in chosen.items():
            prepare(Path(temp), name, *case)
        return subprocess.run([argv[0], str(Path(__file__).resolve()), "--judge", temp]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
