"""The model directory: the one form in which a model lies on disk, and at once a Hugging Face directory.

    config.json              the architecture, as transformers, vLLM and the converters of llama.cpp read it
    model.safetensors        the weights, under that architecture's names (or shards of them, with an index)
    mtp.safetensors          modules of multi-token prediction, where that architecture has no place for them
    value_head.safetensors   the head of a reward model or critic, in float32, if mindseed.json says that there is one
    tokenizer.json, tokenizer_config.json      the tokenizer and the chat template
    generation_config.json   the ids that end an answer, and how to sample
    mindseed.json            what only we know: the exact configuration, where the model comes from, and the hashes of
                             the tokenizer and the chat format it was trained with

Directories of others need no mindseed.json. Whatever does not fit together is an error on loading, not a surprise in
the answers.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mindseed import __version__
from mindseed.base.errors import UserError
from mindseed.base.files import atomic, folders_with, read_json, recover, write_json
from mindseed.core import Tokenizer
from mindseed.interop.families import NATIVE, family_in, family_of
from mindseed.interop.family import Family
from mindseed.interop.rules import Names, read_names, read_tensors, translate, write_names
from mindseed.interop.weights import DTYPES, TensorFiles, save_tensors, weight_files
from mindseed.models.config import LMConfig, config_from_dict, config_to_dict, without_training
from mindseed.models.heads import ValueHead
from mindseed.models.lm import LM
from mindseed.nn.adapters import switch_of
from mindseed.tokenizers.base import BOS, PAD, document_marks
from mindseed.tokenizers.chat import JINJA
from mindseed.tokenizers.hf_json import load_tokenizer, save_tokenizer
from mindseed.tokenizers.template import Template, foreign, read_template

FORMAT = 1                                        # of mindseed.json
MTP_FILE, VALUE_FILE = "mtp.safetensors", "value_head.safetensors"
MAX_SHARD = 5 << 30                               # bytes of one file of weights
OURS = {"config?": {str: Any}, "info?": {str: Any}, "tokenizer_hash?": str, "template_hash?": str | None,
        "value_head?": bool}
THEIRS = {"do_sample?": bool | None, "temperature?": float | None, "top_k?": int | None, "top_p?": float | None,
          "min_p?": float | None, "repetition_penalty?": float | None}    # what we read of generation_config.json
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model directory in memory."""

    model: LM
    tokenizer: Tokenizer
    info: dict[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()                # ids that end an answer
    bos_id: int | None = None                     # what the directory calls its begin token
    sampling: dict[str, Any] = field(default_factory=dict)     # the directory's own defaults for generating
    chat_template: str | None = None              # Jinja
    marks: dict[str, str] = field(default_factory=dict)        # bos_token, eos_token ...: spellings
    template_hash: str | None = None              # of the chat template it was trained with; None: nobody says
    dtype: torch.dtype | None = None              # of the weights in the file
    family: Family | None = None                  # None: our own layout

    @property
    def template(self) -> Template | None:
        """How to render what is said to it; None: in our own format."""
        return foreign(self.chat_template, self.marks)

    @property
    def kept(self) -> dict[str, Any]:
        """What `save_directory` is to be told so that a copy is spoken to, and stops, as this one."""
        return {"chat_template": self.chat_template, "marks": self.marks, "sampling": self.sampling or SAMPLING,
                "stop_ids": self.stop_ids}


# ------------------------------------------------------------------------------------------------------------- saving

def save_directory(model: LM, tokenizer: Tokenizer, folder: Path | str, *, info: dict[str, Any] | None = None,
                   dtype: torch.dtype | None = None, chat_template: str | None = JINJA,
                   marks: Mapping[str, str] | None = None, sampling: dict[str, Any] = SAMPLING,
                   family: Family | None = None, stop_ids: tuple[int, ...] = (), max_shard: int = MAX_SHARD) -> Path:
    """Write a model directory, wholly or not at all. `dtype` is that of the weights in the file [the model's].

    `info` (parent, data, seed, metrics: plain JSON) is kept in mindseed.json. `chat_template` and `sampling` go where
    others look for them. `marks` are the spellings of bos_token, eos_token and pad_token, and `stop_ids` end an answer
    [both: the tokenizer's]. `family` is by default the first that can hold the model, else our own layout. `max_shard`
    are the bytes of one file of weights. UserError if `family` cannot hold the model or the tokenizer needs more ids
    than the model has.
    """
    folder, config = Path(folder), model.config
    if (adapters := switch_of(model)) is not None:
        raise UserError(f"the model has adapters ({', '.join(adapters.names)}), for which a model directory has no "
                        "place; merge them first, or save them alone")
    require_vocabulary(tokenizer.vocab_size, config.vocab_size, str(folder))
    if packed := [name for name, x in model.named_parameters() if x.dtype == torch.uint8]:
        raise UserError(f"{packed[0]} is quantised, and a model directory holds dense weights: make them dense first "
                        "(quant.linear.unquantize)")
    dtype, family = dtype or model.embed.weight.dtype, family or family_of(config)
    begin, end = document_marks(tokenizer.specials) or (None, None)
    if chat_template == JINJA and begin != BOS:   # our chats cannot be told in this tokenizer's special tokens
        chat_template = None
    spelt = marks or {"bos_token": begin, "eos_token": end, "pad_token": PAD}
    specials = {name: tokenizer.specials.get(spelt.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    word = str(dtype).removeprefix("torch.")
    data = family.to_json(config, dtype=word, specials=specials) if family else {
        "architectures": ["MindseedForCausalLM"], "model_type": NATIVE, "dtype": word,
        **{f"{name}_token_id": id for name, id in specials.items()}}
    steering = {name for name, _ in model.named_buffers()}    # biases of routers move in steps that bf16 cannot tell
    tensors = {name: x.detach().to(device="cpu", dtype=x.dtype if name in steering else dtype).contiguous()
               for name, x in model.state_dict().items() if not name.startswith(("value_head.", "matching."))}
    ahead = {name: x for name, x in tensors.items() if name.startswith("mtp.")}
    if family and not family.layout.has_mtp:
        tensors = {name: x for name, x in tensors.items() if name not in ahead}
    stop_ids = list(stop_ids or dict.fromkeys(specials[x] for x in ("eos", "pad") if specials[x] is not None))
    generation = {"bos_token_id": specials["bos"], "eos_token_id": stop_ids or None, "pad_token_id": specials["pad"]}
    with atomic(folder) as temp:
        temp.mkdir()
        write_json(temp / "config.json", data)
        save_tensors(write_names(names_in(family, config, tensors), tensors), temp, max_shard=max_shard)
        if ahead.keys() - tensors.keys():
            save_file(ahead, temp / MTP_FILE, metadata={"format": "pt"})
        if model.value_head is not None:
            save_file({name: x.detach().to("cpu", torch.float32).contiguous()
                       for name, x in model.value_head.state_dict().items()},
                      temp / VALUE_FILE, metadata={"format": "pt"})
        save_tokenizer(tokenizer, temp, chat_template=chat_template, max_len=config.seq_len, marks=marks)
        write_json(temp / "generation_config.json",
                   {key: value for key, value in generation.items() if value is not None} | sampling)
        write_json(temp / "mindseed.json", {
            "format": FORMAT, "mindseed": __version__, "config": config_to_dict(config), "info": info or {},
            **({} if model.value_head is None else {"value_head": True}), "tokenizer_hash": tokenizer.hash(),
            "template_hash": Template(chat_template).hash() if chat_template else None})
    return folder


def names_in(family: Family | None, config: LMConfig, tensors: Mapping[str, Any]) -> Names:
    """Our names to theirs; in our own layout they stay as they are."""
    shapes = {name: x.shape for name, x in tensors.items()}
    return translate(family.layout, config, shapes) if family else {name: [name] for name in shapes}


# ------------------------------------------------------------------------------------------------------------ loading

def load_directory(folder: Path | str, *, dtype: torch.dtype = torch.float32,
                   device: torch.device | str = "cpu") -> Loaded:
    """Read a model directory, ours or another's; the model is in eval mode, its parameters in `dtype`.

    UserError, naming file and remedy, for whatever is missing, truncated, foreign or does not fit together.
    """
    folder = require_folder(Path(folder))
    data, ours = read_files(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder / 'tokenizer.json'} does not exist; copy it there from where the model comes from, "
                        "or have transformers write it: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)")
    family, config = read_config(data, ours, folder)
    tokenizer = load_tokenizer(folder)
    require_vocabulary(tokenizer.vocab_size, config.vocab_size, str(folder))
    if ours.get("tokenizer_hash", tokenizer.hash()) != tokenizer.hash():
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer this model was trained with: its hash "
                        "is not that in mindseed.json. Restore the file.")
    path = folder / "generation_config.json"
    generation = read_json(path, THEIRS) if path.exists() else {}
    ends, (template, marks) = stop_ids(generation, data, folder), read_template(folder)
    begin = generation.get("bos_token_id", data.get("bos_token_id"))
    for name, id in [*(("eos_token_id", end) for end in ends), ("bos_token_id", begin)]:
        if type(id) is int and not 0 <= id < config.vocab_size:
            raise UserError(f"{folder}: {name}={id} is no token of a vocabulary of {config.vocab_size}; mend it in "
                            "generation_config.json or config.json")
    model, stored = load_weights(family, config, folder, dtype, device)
    if ours.get("value_head"):
        model.value_head = load_value_head(folder, config.dim, dtype, device)
    return Loaded(model=model.eval(), tokenizer=tokenizer, info=ours.get("info", {}), dtype=stored, family=family,
                  stop_ids=ends, chat_template=template, marks=marks, template_hash=ours.get("template_hash"),
                  bos_id=begin if type(begin) is int else None,
                  sampling={k: generation[k] for k in (key.removesuffix("?") for key in THEIRS)
                            if generation.get(k) is not None})


def require_folder(folder: Path) -> Path:
    """`folder`, if it is a model directory; else a UserError that names those in and beside it."""
    recover(folder)
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise UserError(f"{folder} is a GGUF file, which is written here for llama.cpp and Ollama and not read; "
                            "name the model directory that it was made from")
        raise UserError(f"{folder} is a file and no model directory; make one of it first: mindseed convert {folder} "
                        "DIRECTORY")
    if not folder.is_dir():
        near = sorted(str(p.parent) for p in folder.parent.glob("*/config.json")) if folder.parent.is_dir() else []
        hint = f"; beside it there is {', '.join(near[:5])}" if near else ""
        raise UserError(f"{folder} is not a model directory: there is no such folder{hint}")
    if not (folder / "config.json").exists():
        near = [*folders_with("config.json", folder),
                *(p / "model" for p in folder.parents[:2] if (p / "model" / "config.json").exists())]
        hint = f"; did you mean {near[0]}?" if near else ""
        if not near and (folder / "checkpoint.json").exists():
            hint = "; it is a checkpoint, from which its run can go on (--resume) and write a model"
        raise UserError(f"{folder} is not a model directory: it has no config.json{hint}")
    return folder


def config_of(folder: Path | str) -> LMConfig:
    """The configuration of a model directory's model, without its weights."""
    folder = require_folder(Path(folder))
    return read_config(*read_files(folder), folder)[1]


def context_of(folder: Path | str) -> int:
    """Tokens of the context that a model directory's model was trained on."""
    return config_of(folder).seq_len


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and mindseed.json if there is one."""
    data = read_json(folder / "config.json", {"model_type?": str | None})
    return data, read_json(folder / "mindseed.json", OURS) if (folder / "mindseed.json").exists() else {}


def read_config(data: dict[str, Any], ours: dict[str, Any], folder: Path) -> tuple[Family | None, LMConfig]:
    """(family, configuration): mindseed.json's, once it agrees with config.json in all that config.json can say."""
    exact = None
    if "config" in ours:
        try:
            exact = config_from_dict(ours["config"])
        except UserError as error:
            remedy = "" if data.get("model_type") == NATIVE else "; delete the file to go by config.json alone"
            raise UserError(f"{folder / 'mindseed.json'}: {error}{remedy}") from None
    if data.get("model_type") == NATIVE:
        if not isinstance(exact, LMConfig):
            raise UserError(f"{folder} is in this project's own layout and needs its mindseed.json; restore the file")
        return None, exact
    family = family_in(data, str(folder / "config.json"))
    config = family.from_json(data, str(folder / "config.json"))
    if exact is None:
        return family, config
    told = without_training(exact) if isinstance(exact, LMConfig) else None
    if told is not None and not family.layout.has_mtp:
        told = replace(told, mtp=())
    if told != config:
        raise UserError(f"{folder}: config.json and mindseed.json describe different models; restore the one that was "
                        "changed, or delete mindseed.json to go by config.json alone")
    return family, exact


def require_vocabulary(tokens: int, rows: int, where: str) -> None:
    """The embedding may have rows to spare, but every id of the tokenizer needs one."""
    if tokens > rows:
        raise UserError(f"{where}: the tokenizer has {tokens} tokens but the model only {rows}; they do not belong "
                        "together. Use the tokenizer that the model was trained with.")


def stop_ids(generation: dict[str, Any], config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, else of config.json."""
    name = "generation_config.json" if "eos_token_id" in generation else "config.json"
    ids = (generation if "eos_token_id" in generation else config).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(id) is not int for id in ids):
        raise UserError(f"{folder / name}: eos_token_id must be one id or a list of them, not {ids}")
    return tuple(ids)


def load_weights(family: Family | None, config: LMConfig, folder: Path, dtype: torch.dtype,
                 device: torch.device | str) -> tuple[LM, torch.dtype]:
    """(the model, filled from the directory's files; the dtype that was stored)."""
    with TensorFiles(weight_files(folder)) as tensors:
        if family and config.mtp and not family.layout.has_mtp and not (folder / MTP_FILE).exists():
            raise UserError(f"{folder / MTP_FILE} is missing, which holds the modules that predict further tokens; "
                            "restore it, or delete mindseed.json to do without")
        if family and family.layout.has_mtp and config.mtp and not any(
                name.startswith(family.layout.layer.format(i=len(config.layers))) for name in tensors.shapes):
            config = replace(config, mtp=())      # promised in config.json, as by default, and not kept
        with torch.device("meta"):
            model = LM(config)
        here = {name: x.shape for name, x in model.state_dict().items()}
        apart = {name for name in here if name.startswith("mtp.") and family and not family.layout.has_mtp}
        here = {name: shape for name, shape in here.items() if name not in apart}
        names = translate(family.layout, config, here) if family else {name: [name] for name in here}
        shapes = {name: shape for name, shape in tensors.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
        twice = family and config.tied and shapes.pop("lm_head.weight", None) is not None      # some store it as well
        read_names(names, here, shapes, str(folder))
        steering = {name for name, _ in model.named_buffers()}                    # kept as they are, see save_directory
        state = {name: x.to(device=device, dtype=torch.promote_types(x.dtype, torch.float32) if name in steering
                            else dtype) for name, x in read_tensors(names, tensors)}
        embed = tensors(names["embed.weight"][0])
        if twice:
            check_copy(tensors("lm_head.weight"), embed, folder)
    if apart:
        with TensorFiles([folder / MTP_FILE]) as more:
            expected = {name: x.shape for name, x in model.state_dict().items() if name in apart}
            read_names({name: [name] for name in apart}, expected, more.shapes, str(folder / MTP_FILE))
            state |= {name: more(name).to(device=device, dtype=dtype) for name in apart}
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)
    return model, embed.dtype


def load_value_head(folder: Path, dim: int, dtype: torch.dtype, device: torch.device | str) -> ValueHead:
    file = folder / VALUE_FILE
    if not file.exists():
        raise UserError(f"{file} is missing, which holds the head that gives rewards or values; restore it, or take "
                        "value_head out of mindseed.json to load the language model alone")
    head = ValueHead(dim, dtype=dtype, device=device)
    with TensorFiles([file]) as tensors:
        expected = {name: x.shape for name, x in head.state_dict().items()}
        read_names({name: [name] for name in expected}, expected, tensors.shapes, str(file))
        head.load_state_dict({name: tensors(name) for name in expected})
    return head


def check_copy(head: Tensor, embed: Tensor, folder: Path) -> None:
    if not torch.equal(head, embed):
        raise UserError(f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                        "model.embed_tokens.weight; set tie_word_embeddings to false in config.json")
