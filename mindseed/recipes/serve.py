"""Serve models over HTTP, as OpenAI's API: `mindseed serve runs/demo/fine-tune/model`, then any client of OpenAI's.

  mindseed serve runs/demo/fine-tune/model
  mindseed serve small=runs/a/model large=runs/b/model --port 0     several, under names of your choice
  mindseed serve runs/a/model --host 0.0.0.0 --api_key SECRET       for others, who must know the key
  mindseed serve runs/a/model --adapters legal=runs/l/adapter poems=runs/p/adapter     each a model of its own

Requests share one batch, from which answers stream as they are written; the beginnings of prompts that were seen before
are not read again. /docs describes every field, /metrics counts for Prometheus. SIGTERM and Ctrl-C let answers in
progress finish.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mindseed.adapt.lora import base_parameters, coverage, set_active
from mindseed.adapt.peft import load_adapter
from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.base.files import read_text
from mindseed.base.log import say, table, warn
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.service import Service
from mindseed.interop.directory import Loaded
from mindseed.recipes.answer import AnswerOptions, warn_of_foreign_chat
from mindseed.tokenizers.template import Template

KEYS = "MINDSEED_API_KEY"
THINKING = {"on": True, "off": False, "auto": None}
HERE = ("127.0.0.1", "localhost", "::1")          # addresses that only this machine reaches


@dataclass(frozen=True, kw_only=True)
class Options:
    models: tuple[str, ...] = option((), help="model directories, DIR or NAME=DIR", positional=True, elsewhere=(
        "load_from", "weight", "model", "model_path", "model_name_or_path"))
    adapters: tuple[str, ...] = option((), help="adapters of the model, NAME=FOLDER: each is a model of its own to "
                                                "clients, and all share the base and its batches", elsewhere=(
        "lora_weight", "lora_modules"))
    host: str = option("127.0.0.1", help="the address to listen on; 0.0.0.0: all of this machine's, for others too")
    port: int = option(8998, help="0: any that is free")
    api_key: tuple[str, ...] = option((), help=f"keys, one of which every client must send [{KEYS}, a list with "
                                               "commas]", elsewhere=("api_keys",))
    api_key_file: str | None = option(None, help="a file with a key on every line")
    cors: tuple[str, ...] = option((), help="web pages that may ask from a browser, https://example.org; *: all",
                                   elsewhere=("allowed_origins",))
    rate: int | None = option(None, help="requests a minute that one key, or address, may make")
    body_mb: float = option(4.0, help="largest request")
    timeout_s: float | None = option(None, help="the longest an answer may take")
    drain_s: float = option(30.0, help="how long answers in progress may go on after SIGTERM")
    think: Literal["on", "off", "auto"] = option("auto", help="think first, don't, or as the model likes, where a "
                                                              "request does not say", elsewhere=("open_thinking on",))
    allow_other_template: bool = option(False, help="serve a model although its chat template is not the one it was "
                                                    "trained with")
    device: str = option("auto", help="cpu, cuda, mps, or auto")
    dtype: str = option("auto", help="fp32, bf16, or auto: fp32 on a CPU, bf16 elsewhere")
    draft_model: str | None = option(None, help="with --engine.draft model: the directory of the smaller model that "
                                                "guesses ahead")
    access_log: bool = option(False, help="a line for every request")
    engine: EngineConfig = EngineConfig()


def main(options: Options) -> None:
    try:
        from mindseed.serve import openai, server
        from mindseed.serve.served import Served
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mindseed"):
            raise
        raise UserError(f"serving needs the package {error.name}, which is not installed:\n"
                        f"    {install('[serve]')}") from None
    check(options)
    places, adapters = named(options.models), adapters_in(options)
    keys = find_keys(options)
    if options.host not in HERE and not keys:
        warn(f"whoever reaches {options.host}:{options.port} may use the models; --api_key SECRET asks for a key")
    sock = server.bind(options.host, options.port)
    machine = AnswerOptions(device=options.device, dtype=options.dtype)
    models: list[Served] = []
    try:
        for name, place in places.items():
            asked = replace(machine, model=place)
            loaded = asked.load("serve")
            require_template(loaded, place, options.allow_other_template)
            for adapter, folder in adapters.items():
                load_adapter(loaded.model, folder, adapter)
            set_active(loaded.model, {})
            draft = replace(machine, model=options.draft_model).load("serve") if options.draft_model else None
            engine = Engine.of(loaded, options.engine, draft=draft)
            engine.generate([Request(prompt=[0], max_new=3)])         # kernels are compiled before anybody waits
            models.append(Served(name=name, loaded=loaded, service=Service(engine), sampling=asked.sampling(loaded),
                                 thinking=THINKING[options.think]))
            for adapter in adapters:
                engine.check(Request(prompt=[0], adapter=adapter))
                models.append(models[0].with_adapter(adapter))
        app = openai.create_app(models, openai.ServeConfig(
            keys=keys, origins=options.cors, body_bytes=round(options.body_mb * 1e6), per_minute=options.rate,
            timeout_s=options.timeout_s))
        sock.listen(2048)                         # whoever reads the address may call at once
        introduce(models, server.address_of(sock), bool(keys))
        server.run(app, sock, drain_s=options.drain_s, access_log=options.access_log)
        say("stopped")
    finally:
        sock.close()
        for served in models:
            if served.parent is None:
                served.service.close()


def check(options: Options) -> None:
    """UserError for options that cannot be meant."""
    if not options.models:
        raise UserError("which model? mindseed serve DIRECTORY, for example runs/demo/fine-tune/model")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"port={options.port} must lie between 0 and 65535")
    if options.adapters and len(options.models) > 1:
        raise UserError("--adapters belong to one model; serve the others by a server of their own")
    for name in ("rate", "body_mb", "timeout_s"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"{name}={value} must be above 0")
    if (options.engine.draft == "model") != (options.draft_model is not None):
        raise UserError("--engine.draft model and --draft_model DIRECTORY belong together; give both or neither")


def named(models: Iterable[str]) -> dict[str, str]:
    """Name -> directory. The name is the folder's, or that of the run whose folder `model` it is; NAME=DIR chooses."""
    places: dict[str, str] = {}
    for word in models:
        name, equals, place = word.partition("=")
        if not equals or Path(word).is_dir():
            place = word
            parts = [part for part in Path(place).resolve().parts if part != os.sep]
            name = parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1] if parts else place
        if not name or not place:
            raise UserError(f"{word!r} must be NAME=DIRECTORY or a directory")
        if name in places:
            raise UserError(f"{places[name]} and {place} would both be called {name}; give one another name: "
                            f"{name}-2={place}")
        places[name] = place
    return places


def adapters_in(options: Options) -> dict[str, str]:
    """Name -> folder."""
    found: dict[str, str] = {}
    for word in options.adapters:
        name, equals, folder = word.partition("=")
        if not (name and folder):
            raise UserError(f"{word!r} must be NAME=FOLDER, by which name clients ask for the adapter")
        if name in found or name in named(options.models):
            raise UserError(f"two models would be called {name}; give the adapter in {folder} another name")
        found[name] = folder
    return found


def find_keys(options: Options) -> tuple[str, ...]:
    """The API keys of flags, file and environment."""
    from_file = [] if options.api_key_file is None else read_text(options.api_key_file).splitlines()
    from_environment = os.environ.get(KEYS, "").split(",")
    keys = [key.strip() for key in (*options.api_key, *from_file, *from_environment) if key.strip()]
    if options.api_key_file is not None and not any(line.strip() for line in from_file):
        raise UserError(f"{options.api_key_file} holds no key; write one on a line")
    return tuple(dict.fromkeys(keys))


def require_template(loaded: Loaded, place: str, allowed: bool) -> None:
    """UserError if a model would be spoken to otherwise than it was taught."""
    template, trained = loaded.chat_template, loaded.template_hash
    if template is not None and trained not in (None, Template(template).hash()) and not allowed:
        raise UserError(f"{place}: the chat template is not the one the model was trained with (its hash is not that "
                        "in mindseed.json), so its answers may be poor\nRestore the template, or serve it all the same"
                        " with --allow_other_template")
    warn_of_foreign_chat(loaded, place)


def introduce(models: list, address: str, keys: bool) -> None:
    """What is served where, and how to ask for it."""
    rows = []
    for served in models:
        engine, model = served.service.engine, served.loaded.model
        tokens = served.service.stats().blocks * engine.config.block_size
        if served.parent is None:
            rows.append([served.name, f"{sum(p.numel() for p in base_parameters(model)) / 1e6:.1f}M",
                         str(served.context), f"{tokens} tokens", str(engine.config.max_seqs)])
        else:
            count = coverage(model, served.name).parameters
            rows.append([served.name, f"+ {count / 1e6:.2f}M", "", f"of {served.parent}", ""])
    table("", ["model", "parameters", "context", "cache", "answers at once"], rows)
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    body = json.dumps({"model": models[0].name, "messages": [{"role": "user", "content": "Hello"}]})
    say(f"listening on {address}, OpenAI's API at {address}/v1, its page at {address}/docs\n\n"
        f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n")
