"""`mindseed serve DIR --adapters NAME=FOLDER`: the program itself, asked by many at once for all that it has."""
from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mindseed.adapt.lora import LoRAConfig, add_adapter, merge
from mindseed.adapt.peft import load_adapter, save_adapter
from mindseed.infer.engine import Engine, Request
from mindseed.interop.directory import load_directory, save_directory
from mindseed.tokenizers.chat import encode_chat
from tests.oracle import GREEDY
from tests.test_lora import shake

httpx = pytest.importorskip("httpx")
from tests.serving import first_words, random_folder                  # noqa: E402
from tests.test_serve_errors import failed                            # noqa: E402

ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    where, found = tmp_path_factory.mktemp("adapters"), {}
    for name, config in (("legal", LoRAConfig(rank=4)), ("poems", LoRAConfig(rank=2, dora=True, targets=("o", "up")))):
        model = load_directory(random_folder()).model
        add_adapter(model, config, seed=len(found))
        shake(model, "default", size=0.3, seed=len(found))
        found[name] = save_adapter(model, where / name, base=str(random_folder()))
    return found


def test_every_adapter_is_a_model_of_its_own(adapters):
    words = [f"{name}={folder}" for name, folder in adapters.items()]
    process = subprocess.Popen([sys.executable, "-m", "mindseed", "serve", str(random_folder()), "--port", "0",
                                "--adapters", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = first_words(process)
        assert "legal" in said and "of mini" in said
        url = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        with httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(12) as crowd:
            cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
            assert {name: card.get("parent") for name, card in cards.items()} == {
                "mini": None, "legal": "mini", "poems": "mini"}
            names = list(cards) * 4

            def ask(name: str):
                return http.post("/v1/chat/completions", json={
                    "model": name, "messages": ASK, "max_tokens": 12, "temperature": 0, "logprobs": True}).json()

            answers = list(crowd.map(ask, names))
            vectors = {name: http.post("/v1/embeddings", json={"model": name, "input": "hello"}).json()["data"][0]
                       for name in cards}
            figures = http.get("/metrics").text
        for name in cards:
            loaded = load_directory(random_folder())
            if name in adapters:
                load_adapter(loaded.model, adapters[name])
                merge(loaded.model)
            engine = Engine.of(loaded)
            ids, _ = encode_chat(loaded.tokenizer, ASK, generation_prompt=True)
            [[want]] = engine.generate([Request(prompt=ids, sampling=GREEDY, max_new=12)])
            for asked, got in zip(names, answers):
                if asked == name:
                    logps = [token["logprob"] for token in got["choices"][0]["logprobs"]["content"]]
                    assert got["model"] == name and got["usage"]["completion_tokens"] == len(want.ids)
                    assert logps == pytest.approx(want.logps[:len(logps)], abs=1e-3) and logps
            vector = engine.embed([loaded.tokenizer.encode("hello")])[0]
            torch.testing.assert_close(torch.tensor(vectors[name]["embedding"]), vector, rtol=1e-3, atol=1e-4)
        texts = {name: got["choices"][0]["message"]["content"] for name, got in zip(names, answers)}
        assert len(set(texts.values())) == 3, texts
        assert 'mindseed_generated_tokens_total{model="legal"}' in figures
        assert re.findall(r'mindseed_engine_blocks{model="(.*)"}', figures) == ["mini"]        # told once
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_mistakes_with_adapters_on_the_command_line(capsys, adapters, tmp_path):
    base, legal = random_folder(), adapters["legal"]
    assert "must be NAME=FOLDER" in failed(capsys, base, "--adapters", legal)
    assert "two models would be called a" in failed(capsys, base, "--adapters", f"a={legal}", f"a={legal}")
    assert "two models would be called mini" in failed(capsys, base, "--adapters", f"mini={legal}")
    assert "belong to one model" in failed(capsys, base, f"other={base}", "--adapters", f"a={legal}")
    assert "does not exist" in failed(capsys, base, "--adapters", f"a={tmp_path / 'nothing'}", "--port", 0)
    assert "is no adapter" in failed(capsys, base, "--adapters", f"a={base}", "--port", 0)
    assert "cannot be an adapter's name" in failed(capsys, base, "--adapters", f"a.b={legal}", "--port", 0)
    other = load_directory(base)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    save_directory(other.model, other.tokenizer, tmp_path / "other")
    assert f"was trained on {base}, and" in failed(
        capsys, tmp_path / "other", "--adapters", f"a={legal}", "--port", 0)
