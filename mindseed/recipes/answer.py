"""What `chat` and `generate` share: which model, on which device, and how to choose tokens."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mindseed.adapt.lora import merge
from mindseed.adapt.peft import load_adapter
from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import warn
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import Loaded, load_directory
from mindseed.recipes.machine import choose_device
from mindseed.tokenizers.template import Template


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    model: str = option("", help="the model directory", positional=True, elsewhere=(
        "load_from", "weight", "model_path", "model_name_or_path",
        *(f"{name} DIRECTORY, which says its shape" for name in ("hidden_size", "num_hidden_layers", "use_moe"))))
    adapter: str | None = option(None, help="an adapter of the model (LoRA), merged into it: its folder",
                                 elsewhere=("lora_weight", "lora_name", "adapter_name_or_path"))
    temperature: float | None = option(None, help="0: always the likeliest token; higher: bolder [the model's]")
    top_k: int | None = option(None, help="choose among the k likeliest tokens; 0: all [the model's]")
    top_p: float | None = option(None, help="choose among the likeliest with this much probability [the model's]")
    min_p: float | None = option(None, help="drop tokens less likely than this times the likeliest [the model's]")
    repetition_penalty: float | None = option(None, help="above 1: avoid tokens that occurred [the model's]")
    seed: int = option(0, help="the same seed gives the same answers")
    max_new: int = option(512, help="longest answer, in tokens", elsewhere=("max_new_tokens", "max_tokens"))
    stop: tuple[str, ...] = option((), help="end an answer at any of these texts")
    device: str = option("auto", help="cpu, cuda, mps, or auto")
    draft: Literal["off", "ngram", "mtp"] = option(
        "off", help="guess tokens ahead, for the same answers sooner: from what was said before (ngram), or by the "
                     "model's own modules for further tokens (mtp)")
    dtype: str = option("auto", help="fp32, bf16, or auto: fp32 on a CPU, bf16 elsewhere")

    def load(self, recipe: str) -> Loaded:
        """The model on its device. UserError if none is named."""
        if not self.model:
            raise UserError(f"which model? mindseed {recipe} DIRECTORY, for example runs/demo/fine-tune/model")
        device = choose_device(self.device)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16,
                  "auto": torch.float32 if device.type == "cpu" else torch.bfloat16}
        if self.dtype not in dtypes:
            raise UserError(f"dtype={self.dtype!r} is not known; choose one of {', '.join(dtypes)}")
        loaded = load_directory(self.model, dtype=dtypes[self.dtype], device=device)
        if self.adapter is not None:
            load_adapter(loaded.model, self.adapter)
            merge(loaded.model, keep=False)
        return loaded

    def engine(self, loaded: Loaded, *, max_seqs: int) -> Engine:
        """What answers with the model, `max_seqs` answers at once."""
        return Engine.of(loaded, EngineConfig(max_seqs=max_seqs, draft=self.draft))

    def sampling(self, loaded: Loaded) -> Sampling:
        """The options over the directory's defaults over plain sampling."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: loaded.sampling[name] for name in names if name in loaded.sampling}
        if loaded.sampling.get("do_sample") is False:
            values["temperature"] = 0.0
        values |= {name: value for name in names if (value := getattr(self, name)) is not None}
        return Sampling(**values, seed=self.seed)


def not_unicode(what: str, error: UnicodeDecodeError) -> UserError:
    """The error of text that was piped in, or typed, in another encoding."""
    return UserError(f"{what} not valid UTF-8 ({error.reason} at byte "
                     f"{error.start}); Chinese in GBK? iconv -f GBK -t UTF-8")


def warn_of_foreign_chat(loaded: Loaded, where: str) -> None:
    """Say so if the model is spoken to otherwise than it was taught, as far as that is known."""
    if loaded.chat_template is None:
        warn(f"{where} has no chat template, so it is asked in this project's own chat format, which it may not know")
    elif loaded.template_hash not in (None, Template(loaded.chat_template).hash()):
        warn(f"{where} was not trained with the chat template that it has now, so its answers may be poor")
