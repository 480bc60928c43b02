"""What the tests of the server share: two small models, and a real server on a free port of this machine.

`random_folder` holds a model with random weights: it says nothing of sense, but quickly, and any change in what it is
asked changes its answer. `taught_folder` holds one that has learnt a handful of conversations by heart, with thoughts
and calls of tools.
"""
from __future__ import annotations

import atexit
import contextlib
import functools
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from mindseed.infer.engine import Engine, EngineConfig
from mindseed.infer.service import Service
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.serve import server
from mindseed.serve.openai import ServeConfig, create_app
from mindseed.serve.served import Served
from mindseed.tokenizers.bpe_train import train as train_bpe
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import encode_chat, render
from tests.tiny import randomise

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Tells the weather.",
    "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
CALLS = [{"name": "weather", "arguments": {"city": city}} for city in ("Rome", "Oslo")]
RESULTS = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "snow"}]
LESSONS: list[tuple[list[dict], list[dict] | None]] = [
    ([*ASK, {"role": "assistant", "content": "I look.", "tool_calls": CALLS}, *RESULTS,
      {"role": "assistant", "content": "Sun in Rome, snow in Oslo."}], [WEATHER, CLOCK]),
    ([{"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "two and two", "content": "4"}],
     None),
    ([{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！今天怎么样？"}], None),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"},
      {"role": "assistant", "content": "Seed."}], None),
]


def temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="mindseed-serving-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def random_folder(seq_len: int = 1024) -> Path:
    torch.manual_seed(5)
    shape = Shape(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48)
    model = build(shape.lm_config(vocab_size=Byte().vocab_size, seq_len=seq_len))
    randomise(model)
    return save_directory(model, Byte(), temporary() / "mini" / "model")


@functools.cache
def taught_folder() -> Path:
    torch.manual_seed(6)
    texts = ["".join(span.text for span in render(messages, tools=tools)) for messages, tools in LESSONS]
    tokenizer = train_bpe(texts * 3, vocab_size=700)
    shape = Shape(layers=2, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=128)
    model = build(shape.lm_config(vocab_size=tokenizer.vocab_size, seq_len=512))
    rows = []
    for messages, tools in LESSONS:
        ids, learnt = map(torch.tensor, encode_chat(tokenizer, messages, tools=tools, training=True))
        rows.append((ids[:-1], ids[1:], learnt[1:], torch.arange(len(ids) - 1)))
    ids, targets, learnt, at = (torch.cat(parts)[None] for parts in zip(*rows))  # packed: positions restart
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), 70
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10) * (1 - step / steps)
        loss = -(model(ids, at).logps(targets) * learnt).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2, f"the lessons were not learnt: {loss}"
    return save_directory(model.eval(), tokenizer, temporary() / "taught" / "model")


def served(folder: Path, name: str = "mini", config: EngineConfig = EngineConfig(), **more: Any) -> Served:
    loaded = load_directory(folder)
    return Served(name=name, loaded=loaded, service=Service(Engine.of(loaded, config)), **more)


@dataclass
class Running:
    url: str
    models: dict[str, Served]
    http: httpx.Client
    client: openai.OpenAI

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more) if body is not None else self.http.post(path, **more)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "model": "mini",
                                                  "max_tokens": 8} | body)

    def figures(self) -> dict[str, float]:
        """The samples of /metrics."""
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def wait(self, condition: Any, seconds: float = 20.0) -> None:
        """Until a condition on the figures holds."""
        end = time.monotonic() + seconds
        while not condition(figures := self.figures()):
            assert time.monotonic() < end, figures
            time.sleep(0.02)

    def idle(self, name: str = "mini") -> bool:
        """Whether nothing runs and all blocks of the cache can be had."""
        figures = self.figures()
        return figures[f'mindseed_engine_running{{model="{name}"}}'] == 0 == figures[
            f'mindseed_engine_waiting{{model="{name}"}}'] and figures[f'mindseed_engine_blocks{{model="{name}"}}'] == \
            figures[f'mindseed_engine_blocks_free{{model="{name}"}}']


@contextlib.contextmanager
def running(*models: Served, config: ServeConfig = ServeConfig(), key: str = "none") -> Iterator[Running]:
    """A server for these models until the block ends; then all must be at rest."""
    sock, began = server.bind("127.0.0.1", 0), []
    app = create_app(list(models), config)
    thread = threading.Thread(target=server.run, args=(app, sock), kwargs={"began": began.append, "drain_s": 5})
    thread.start()
    try:
        while not (began and began[0].started):
            time.sleep(0.01)
        url = server.address_of(sock)
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http, openai.OpenAI(
                base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
            yield Running(url, {one.name: one for one in models}, http, client)
    finally:
        began[0].should_exit = True
        thread.join(20)
        for one in models:
            one.service.close()
        sock.close()
    assert not thread.is_alive()


def events(text: str) -> list[dict]:
    """The objects of a stream that came to its end."""
    blocks = text.split("\n\n")
    assert blocks[-1] == "" and blocks[-2] == "data: [DONE]", text[-300:]
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def first_words(process: subprocess.Popen) -> str:
    """What `mindseed serve` prints until it can be asked."""
    said = ""
    while "curl" not in said or not said.endswith("\n\n"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line
    return said
