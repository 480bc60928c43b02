"""The model directory: the one form in which a model lies on disk, and at once a Hugging Face directory.

    config.json              the architecture, as transformers, vLLM and the converters of llama.cpp read it
    model.safetensors        the weights, under that architecture's names
    tokenizer.json, tokenizer_config.json      the tokenizer and the chat template
    generation_config.json   the ids that end an answer, and how to sample
    mindseed.json            what only we know: the exact configuration, where the model comes from, and the hashes of
                             the tokenizer and the chat format it was trained with

Directories of others need no mindseed.json. Whatever does not fit together is an error on loading, not a surprise in
the answers.
"""
from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mindseed import __version__
from mindseed.base.errors import UserError
from mindseed.base.files import atomic, read_json, recover, write_json
from mindseed.core import Tokenizer
from mindseed.interop import qwen3
from mindseed.interop.rules import read_names, write_names
from mindseed.models.config import LMConfig, config_from_dict, config_to_dict
from mindseed.models.lm import LM
from mindseed.tokenizers.base import BOS, EOS, PAD
from mindseed.tokenizers.chat import JINJA, template_hash
from mindseed.tokenizers.hf_json import load_tokenizer, save_tokenizer

FORMAT = 1                                        # of mindseed.json
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model directory in memory."""

    model: LM
    tokenizer: Tokenizer
    info: dict[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()                # ids that end an answer
    sampling: dict[str, Any] = field(default_factory=dict)     # the directory's own defaults for generating
    chat_template: str | None = None              # Jinja
    template_hash: str | None = None              # of the chat format it was trained with; None: a foreign directory
    dtype: torch.dtype | None = None              # of the weights in the file

    @property
    def speaks_our_chat(self) -> bool:
        """Whether the chat format in which it was trained is the one that this version renders."""
        return self.template_hash == template_hash()


# ------------------------------------------------------------------------------------------------------------- saving

def save_directory(model: LM, tokenizer: Tokenizer, folder: Path | str, *, info: dict[str, Any] | None = None,
                   dtype: torch.dtype | None = None, chat_template: str | None = JINJA,
                   sampling: dict[str, Any] = SAMPLING) -> Path:
    """Write a model directory, wholly or not at all. `dtype` is that of the weights in the file [the model's].

    `info` (parent, data, seed, metrics: plain JSON) is kept in mindseed.json. `chat_template` and `sampling` go where
    others look for them; only a model trained with our own template is marked as such. UserError if the architecture
    has no published layout or the tokenizer needs more ids than the model has.
    """
    folder, config = Path(folder), model.config
    require_vocabulary(tokenizer.vocab_size, config.vocab_size, str(folder))
    dtype = dtype or model.embed.weight.dtype
    specials = {"bos": tokenizer.specials.get(BOS), "eos": tokenizer.specials.get(EOS),
                "pad": tokenizer.specials.get(PAD)}
    data = qwen3.to_json(config, dtype=str(dtype).removeprefix("torch."), specials=specials)
    tensors = {name: x.detach().to(device="cpu", dtype=dtype, copy=False).contiguous()
               for name, x in model.state_dict().items()}
    stop_ids = [specials[name] for name in ("eos", "pad") if specials[name] is not None]
    generation = {"bos_token_id": specials["bos"], "eos_token_id": stop_ids or None, "pad_token_id": specials["pad"]}
    with atomic(folder) as temp:
        temp.mkdir()
        write_json(temp / "config.json", data)
        save_file(write_names(qwen3.RULES, tensors), temp / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(tokenizer, temp, chat_template=chat_template, max_len=config.seq_len)
        write_json(temp / "generation_config.json",
                   {key: value for key, value in generation.items() if value is not None} | sampling)
        write_json(temp / "mindseed.json", {
            "format": FORMAT, "mindseed": __version__, "config": config_to_dict(config), "info": info or {},
            "tokenizer_hash": tokenizer.hash(), "template_hash": template_hash() if chat_template == JINJA else None})
    return folder


# ------------------------------------------------------------------------------------------------------------ loading

def load_directory(folder: Path | str, *, dtype: torch.dtype = torch.float32,
                   device: torch.device | str = "cpu") -> Loaded:
    """Read a model directory, ours or another's Qwen3; the model is in eval mode, its parameters in `dtype`.

    UserError, naming file and remedy, for whatever is missing, truncated, foreign or does not fit together.
    """
    folder = require_folder(recover(Path(folder)))
    data = read_json(folder / "config.json")
    config = qwen3.from_json(data, str(folder / "config.json"))
    ours = read_json(folder / "mindseed.json") if (folder / "mindseed.json").exists() else {}
    config = exact_config(config, ours, folder)
    tokenizer = load_tokenizer(folder)
    require_vocabulary(tokenizer.vocab_size, config.vocab_size, str(folder))
    if ours.get("tokenizer_hash", tokenizer.hash()) != tokenizer.hash():
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer this model was trained with: its hash "
                        "is not that in mindseed.json. Restore the file.")
    with torch.device("meta"):
        model = LM(config)
    stored = load_weights(model, folder, dtype, device)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    return Loaded(model=model.eval(), tokenizer=tokenizer, info=ours.get("info", {}), dtype=stored,
                  stop_ids=stop_ids(generation, data), chat_template=read_template(folder),
                  template_hash=ours.get("template_hash"),
                  sampling={k: generation[k] for k in ("do_sample", "temperature", "top_p", "top_k", "min_p",
                                                       "repetition_penalty") if generation.get(k) is not None})


def require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        near = sorted(str(p.parent) for p in folder.parent.glob("*/config.json")) if folder.parent.is_dir() else []
        hint = f"; beside it there is {', '.join(near[:5])}" if near else ""
        raise UserError(f"{folder} is not a model directory: there is no such folder{hint}")
    if not (folder / "config.json").exists():
        near = sorted(str(p.parent) for p in folder.rglob("config.json"))
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{folder} is not a model directory: it has no config.json{hint}")
    return folder


def exact_config(config: LMConfig, ours: dict[str, Any], folder: Path) -> LMConfig:
    """What mindseed.json says, once it agrees with config.json in everything that config.json can say."""
    if "config" not in ours:
        return config
    try:
        exact = config_from_dict(ours["config"])
    except UserError as error:
        raise UserError(f"{folder / 'mindseed.json'}: {error}") from None
    if not isinstance(exact, LMConfig) or replace(exact, dropout=0.0) != config:
        raise UserError(f"{folder}: config.json and mindseed.json describe different models; restore the one that was "
                        "changed, or delete mindseed.json to go by config.json alone")
    return exact


def require_vocabulary(tokens: int, rows: int, where: str) -> None:
    """The embedding may have rows to spare, but every id of the tokenizer needs one."""
    if tokens > rows:
        raise UserError(f"{where}: the tokenizer has {tokens} tokens but the model only {rows}; they do not belong "
                        "together. Use the tokenizer that the model was trained with.")


def stop_ids(generation: dict[str, Any], config: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, else of config.json."""
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def read_template(folder: Path) -> str | None:
    """The chat template, from its own file or from tokenizer_config.json."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else None


def load_weights(model: LM, folder: Path, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Fill a model made on the meta device from the directory's files; returns the dtype that was stored."""
    with TensorFiles(weight_files(folder)) as tensors:
        shapes = dict(tensors.shapes)
        twice = model.config.tied and shapes.pop("lm_head.weight", None) is not None   # some writers store it as well
        names = read_names(qwen3.RULES, shapes, {name: x.shape for name, x in model.state_dict().items()}, str(folder))
        state = {ours: tensors(theirs).to(device=device, dtype=dtype) for ours, theirs in names.items()}
        if twice:
            check_copy(tensors("lm_head.weight"), tensors(names["embed.weight"]), folder)
        stored = tensors(names["embed.weight"]).dtype
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)
    return stored


def check_copy(head: Tensor, embed: Tensor, folder: Path) -> None:
    if not torch.equal(head, embed):
        raise UserError(f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                        "model.embed_tokens.weight; set tie_word_embeddings to false in config.json")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pth"))
        why = f"; {other[0]} is a pickle, which is not read: convert it to safetensors" if other else ""
        raise UserError(f"{folder} has no model.safetensors{why}")
    files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if gone := [file.name for file in files if not file.exists()]:
        raise UserError(f"{index} names {', '.join(gone)}, which {'is' if len(gone) == 1 else 'are'} not there")
    return files


class TensorFiles:
    """Several safetensors files as one: `shapes` of all tensors, and a call that reads one of them."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.home: dict[str, Any] = {}            # name -> the open file that holds it
        self.shapes: dict[str, torch.Size] = {}

    def __enter__(self) -> TensorFiles:
        with contextlib.ExitStack() as stack:
            for file in self.files:
                try:
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from None
                for name in opened.keys():
                    self.home[name], self.shapes[name] = opened, torch.Size(opened.get_slice(name).get_shape())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def __call__(self, name: str) -> Tensor:
        x = self.home[name].get_tensor(name)
        if x.dtype not in DTYPES.values():
            raise UserError(f"{name} is stored as {x.dtype}; only weights in {', '.join(DTYPES)} can be read")
        return x
