"""Many clients at once against `mindseed serve`: time to the first token, speed, and whether every answer is right.

The server is a process of its own, as in use. Every prompt has 64 tokens of its own after 512 that all share, as a
system prompt would be; every client streams its answer. What each is told is compared with what it was told when
nobody else asked: none may be lost, none may differ.
"""
from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import report
from mindseed.interop.directory import save_directory
from mindseed.models.lm import build
from mindseed.models.presets import preset
from mindseed.tokenizers.byte import Byte

NAME = "serving"
SHARED, OWN, NEW = 512, 64, 32                    # tokens of the common beginning, of each prompt, of each answer
CLIENTS = (1, 50, 200)


@dataclass(kw_only=True)
class Answer:
    """What one client was told, and when."""

    text: str = ""
    first_s: float = 0.0                          # from asking to the first token
    last_s: float = 0.0
    tokens: int = 0
    error: str | None = "the stream broke off"


async def ask(host: str, port: int, body: dict[str, Any]) -> Answer:
    """Stream the answer to one request. A client of few lines, for it shares the machine with the server."""
    answer, started = Answer(), time.perf_counter()
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(data) + data)
        status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].decode()
        if " 200 " not in status:
            answer.error = status
            return answer
        while size := int(await reader.readline(), 16):               # chunked
            piece = (await reader.readexactly(size + 2))[:-2]
            answer.first_s = answer.first_s or time.perf_counter() - started
            for event in filter(None, piece.decode().split("\n\n")):
                read(answer, event.removeprefix("data: "))
        writer.close()
    except (OSError, asyncio.IncompleteReadError) as error:
        answer.error = repr(error)
    answer.last_s = time.perf_counter() - started
    return answer


def read(answer: Answer, event: str) -> None:
    if event == "[DONE]":
        answer.error = None
        return
    value = json.loads(event)
    answer.text += "".join(choice["text"] for choice in value.get("choices", ()))
    if value.get("usage"):
        answer.tokens = value["usage"]["completion_tokens"]


async def load(host: str, port: int, bodies: list[dict[str, Any]], clients: int) -> list[Answer]:
    """All requests by so many clients, each of which asks its next once it has its answer."""
    todo, done = list(enumerate(bodies)), [Answer() for _ in bodies]
    todo.reverse()

    async def client() -> None:
        while todo:
            i, body = todo.pop()
            done[i] = await ask(host, port, body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return done


def prompts(count: int, vocab: int, *, shared: int = SHARED, own: int = OWN, first: int = 36) -> list[list[int]]:
    """Ids that begin alike."""
    draw = random.Random(0)
    common = [draw.randrange(first, vocab) for _ in range(shared)]
    return [common + [draw.randrange(first, vocab) for _ in range(own)] for _ in range(count)]


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def main(count: int = 200) -> None:
    rows = []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = build(preset("mini").lm_config(vocab_size=6400, seq_len=1024))
        save_directory(model, Byte(), f"{folder}/mini")
        bodies = [{"prompt": ids, "max_tokens": NEW, "temperature": 0, "logit_bias": {"0": -100, "2": -100}}
                  for ids in prompts(count, Byte().vocab_size)]
        server = subprocess.Popen([sys.executable, "-m", "mindseed", "serve", f"{folder}/mini", "--port", "0",
                                   "--engine.max_seqs", "64"], stdout=subprocess.PIPE, text=True)
        try:
            lines = iter(server.stdout.readline, "")
            port = int(next(found[1] for line in lines if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line))))
            alone: list[Answer] = []
            for clients in CLIENTS:
                started = time.perf_counter()
                answers = asyncio.run(load("127.0.0.1", port, bodies, clients))
                seconds = time.perf_counter() - started
                alone = alone or answers
                rows.append(row(clients, answers, alone, seconds))
                print(" | ".join(rows[-1]), file=sys.stderr)
        finally:
            server.terminate()
            code = server.wait(60)
    assert code == 0, f"the server left with {code}"
    report(NAME, f"Serving a 26M model: {count} requests of {SHARED} + {OWN} tokens, {NEW} new ones, fp32",
           ["clients", "first token, s: p50", "p90", "p99", "tokens/s of a client: p50", "p10", "tokens/s of all",
            "lost", "wrong"], rows, command="python -m benchmarks serving",
           notes=f"The first {SHARED} tokens are the same in all prompts. `wrong`: another answer than to the same "
                 "request from the only client. A client's speed counts from its first token to its last.")


def row(clients: int, answers: list[Answer], alone: list[Answer], seconds: float) -> list[str]:
    good = [a for a in answers if a.error is None]
    if not good:
        raise RuntimeError(f"nobody was answered: {answers[0].error}")
    firsts = [a.first_s for a in good]
    speeds = [(a.tokens - 1) / (a.last_s - a.first_s) for a in good]
    wrong = sum(a.error is None and a.text != b.text for a, b in zip(answers, alone))
    return [str(clients), *(f"{percentile(firsts, p):.3f}" for p in (50, 90, 99)),
            *(f"{percentile(speeds, p):.1f}" for p in (50, 10)), f"{sum(a.tokens for a in good) / seconds:.0f}",
            str(len(answers) - len(good)), str(wrong)]


if __name__ == "__main__":
    main()
