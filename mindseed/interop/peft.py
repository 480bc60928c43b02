"""An adapter on disk, in the form of PEFT (the library of Hugging Face), which other programs read beside the base:

    adapter_config.json         rank, alpha, kind; the modules that have a part
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector
    mindseed.json               only ours: which base it belongs to

Modules have the names of the base's family of architectures, by the same rules as in a model directory. An adapter
means nothing without its base, and on another one of the same shape it answers nonsense without an error; so the base's
fingerprint is kept, and compared. MiniMind's bare files of LoRA weights, which have no alpha, can be read too.
"""
from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mindseed import __version__
from mindseed.base.errors import UserError
from mindseed.base.files import atomic, read_json, write_json
from mindseed.interop.families import family_of
from mindseed.interop.rules import Names, listed, translate
from mindseed.interop.weights import TensorFiles
from mindseed.models.config import LMConfig, config_to_dict, without_training
from mindseed.models.lm import LM
from mindseed.nn.linear import Linear
from mindseed.nn.moe import ExpertLinear

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "mindseed.json"
PREFIX = "base_model.model."
TENSORS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
SHAPE = {"peft_type": str, "r?": int, "lora_alpha?": float, "lora_dropout?": float, "use_rslora?": bool,
         "use_dora?": bool, "alpha_pattern?": {str: float}, "base_model_name_or_path?": str | None}
READ = {key.removesuffix("?") for key in SHAPE}
IDLE = {"auto_mapping", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "loftq_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
        "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"}     # say no more than tensors do
STARTS = (True, False, "gaussian", "orthogonal", "eva", None)    # ways to begin that leave the base as it is
WHY = {"fan_in_fan_out": "its base keeps matrices the other way round (fan_in_fan_out)",
       "modules_to_save": "whole modules were trained beside it (modules_to_save); merge it with PEFT, load the result",
       "bias": "biases were trained beside it", "lora_bias": "its updates have biases",
       "target_parameters": "it adapts parameters instead of modules (target_parameters)",
       "layer_replication": "it repeats layers of its base (layer_replication)"}


class Piece(NamedTuple):
    """What an adapter holds for one matrix, or for a stack of them."""

    A: Tensor                                     # (.., r, in)
    B: Tensor                                     # (.., out, r)
    magnitude: Tensor | None                      # (.., out), of DoRA
    alpha: float
    rs: bool = False
    dropout: float = 0.0


# --------------------------------------------------------------------------------------------------------------- names

def module_names(config: LMConfig, shapes: Mapping[str, torch.Size]) -> Names:
    """Our matrices by name -> modules of the base's family: one, or one for every expert. What no family has a place
    for keeps its name."""
    family = family_of(config)
    table = dict(family.layout.pairs(config)) if family else {}
    placed = {f"{name}.weight": shape for name, shape in shapes.items() if f"{name}.weight" in table}
    theirs = translate(family.layout, config, placed) if family else {}
    own = {name: [f"{name}.experts.{e}" for e in range(shape[0])] if len(shape) == 3 else [name]
           for name, shape in shapes.items()}
    return {ours: [name.removesuffix(".weight") for name in theirs.get(f"{ours}.weight", own[ours])] for ours in shapes}


def targets(covered: list[str], there: list[str]) -> list[str]:
    """Last names, if they mean just what is covered; else whole names."""
    last = {name.rpartition(".")[2] for name in covered}
    meant = {name for name in there if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(covered) else covered


# ------------------------------------------------------------------------------------------------------- which base

def identity(model: LM) -> dict[str, str | None]:
    """Fingerprints of a model without its adapters: of its shape, of what lies in matrices of its layers, and of the
    rest. Values are compared in bfloat16, some hundred of every tensor, so that a copy in another dtype counts as the
    same. A quantised model does not know its matrices' any more: they are None, or what was found before
    (`remember_identity`)."""
    if known := getattr(model, "known_identity", None):
        return known
    config = replace(without_training(model.config), seq_len=1)
    shape = hashlib.blake2b(json.dumps(config_to_dict(config), sort_keys=True).encode(), digest_size=8)
    matrices, rest, quantised = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8), False
    apart = {id(inner) for module in (model.value_head, model.matching) if module is not None
             for inner in module.modules()}
    for place, module in model.named_modules():
        if id(module) in apart or getattr(module, "adapts", False):
            continue
        matrix = isinstance(module, (Linear, ExpertLinear))
        quantised |= matrix and not module.weight.is_floating_point()
        for name, p in module.named_parameters(recurse=False) if not (matrix and quantised) else ():
            flat, count = p.detach().flatten(), min(p.numel(), 256)
            some = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)]
            into = matrices if matrix else rest
            into.update(f"{place}.{name} {tuple(p.shape)}".encode())
            into.update(some.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return {"config": shape.hexdigest(), "matrices": None if quantised else matrices.hexdigest(),
            "rest": rest.hexdigest()}


def remember_identity(model: LM) -> None:
    """Before it is quantised: which base it is."""
    model.known_identity = identity(model)


def require_base(folder: Path, model: LM) -> None:
    """UserError if an adapter of ours belongs to another base. One that PEFT saved does not say."""
    if not (folder / OURS).exists():
        return
    base = read_json(folder / OURS, {"base": {"path?": str | None, "config": str, "matrices": str | None, "rest": str}})
    told, here = base["base"], identity(model)
    words = {"config": "another shape", "rest": "other weights", "matrices": "other weights"}
    other = [word for key, word in words.items()
             if told[key] is not None and here[key] is not None and told[key] != here[key]]
    if other:
        raise UserError(f"{folder} was trained on {told.get('path') or 'a base whose place was not written down'}, and "
                        f"this model has {other[0]}; on it the adapter would answer nonsense. Load it on its own base")


# ------------------------------------------------------------------------------------------------------------- writing

def write_adapter(folder: Path, model: LM, pieces: Mapping[str, Piece], shapes: Mapping[str, torch.Size], *,
                  base: str | None, info: dict[str, Any] | None = None) -> Path:
    """Write an adapter's folder, wholly or not at all. `shapes` are those of all matrices that could have a part.
    Tensors are stored as they are, those in float64 in float32."""
    names = module_names(model.config, shapes)
    tensors, sizes = {}, {}
    for place, piece in pieces.items():
        many, count = len(shapes[place]) == 3, len(names[place])
        several = ([None] * count if x is None else list(x) if many else [x] for x in piece[:3])
        for name, *parts in zip(names[place], *several, strict=True):
            sizes[name] = parts[0].shape[0], piece.alpha
            tensors |= {f"{PREFIX}{name}.{tail}": x.detach().to("cpu", torch.float32 if x.dtype == torch.float64 else
                                                                x.dtype).contiguous().clone()
                        for tail, x in zip(TENSORS.values(), parts) if x is not None}
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    first = next(iter(pieces.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": whole(alpha), "lora_dropout": first.dropout, "use_rslora": first.rs,
        "use_dora": first.magnitude is not None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "modules_to_save": None,
        "target_modules": targets(list(sizes), [name for several in names.values() for name in several]),
        "rank_pattern": {name: r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {name: whole(a) for name, (_, a) in sizes.items() if a != alpha}}
    with atomic(folder) as temp:
        temp.mkdir()
        write_json(temp / CONFIG, config)
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        write_json(temp / OURS, {"format": 1, "mindseed": __version__, "base": {"path": base, **identity(model)},
                                 "info": info or {}})
    return folder


def whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


# ------------------------------------------------------------------------------------------------------------- reading

def read_adapter(where: Path, model: LM, shapes: Mapping[str, torch.Size]) -> dict[str, Piece]:
    """What an adapter holds for every matrix of a model, by our name of it: from PEFT's folder, or from a bare file of
    MiniMind's. UserError for what cannot be computed here, or does not fit the model."""
    names = module_names(model.config, shapes)
    if where.is_dir() and (where / CONFIG).exists():
        require_base(where, model)
        config = read_config(where / CONFIG)
        file, old = where / WEIGHTS, where / "adapter_model.bin"
        file = old if old.exists() and not file.exists() else file
        pattern = rf"{re.escape(PREFIX)}(?P<module>.+)\.(lora_(?P<AB>[AB])\.weight|lora_magnitude_vector(\.weight)?)$"
    elif where.is_file() and where.suffix in (".pth", ".pt", ".bin"):
        config, file, pattern = {}, where, r"^(?:model\.)?(?P<module>.+)\.lora\.(?P<AB>[AB])\.weight$"
        names = {ours: [name.removeprefix("model.") for name in theirs] for ours, theirs in names.items()}
    else:
        kinds = f"is no adapter, which is a folder with {CONFIG} or a file of LoRA weights (.pth)"
        near = f"; {where / 'adapter'} is one" if (where / "adapter" / CONFIG).exists() else ""
        raise UserError(f"{where} {kinds if where.exists() else 'does not exist'}{near}")
    found, strange = {}, []
    with TensorFiles([file]) as tensors:
        for key in tensors.shapes:
            match = re.match(pattern, key)
            if match is None:
                strange.append(key)
            else:
                found.setdefault(match["module"], {})[match["AB"] or "magnitude"] = tensors(key)
    strange += sorted(found.keys() - {name for theirs in names.values() for name in theirs})
    if strange:
        raise UserError(f"{file} adapts what is not there or cannot be adapted here: {listed(strange)}")
    if not found:
        raise UserError(f"{file} holds nothing")
    pieces = {}
    for place, theirs in names.items():
        if any(name in found for name in theirs):
            pieces[place] = piece_of(file, {name: found.get(name, {}) for name in theirs}, config, shapes[place])
    return pieces


def piece_of(file: Path, found: dict[str, dict[str, Tensor]], config: dict[str, Any], shape: torch.Size) -> Piece:
    """The piece of one matrix from the tensors of its module, of a stack from those of every expert, shapes checked."""
    wanted = {"A", "B"} | ({"magnitude"} if config.get("use_dora") else set())
    for name, x in found.items():
        if x.keys() != wanted:
            raise UserError(f"{file} has {', '.join(sorted(x)) or 'nothing'} for {name}, not "
                            f"{', '.join(sorted(wanted))}")
        rank, (rows, columns) = len(x["A"]), shape[-2:]
        good = {"A": (rank, columns), "B": (rows, rank), "magnitude": (rows,)}
        for key, value in x.items():
            if tuple(value.shape) != good[key] or not rank:
                raise UserError(f"{file}: {key} of {name} is {list(value.shape)}, but the matrix it adapts is "
                                f"{rows} x {columns}; it belongs to another base than this model")
    sizes = {(len(x["A"]), alpha_of(name, config, len(x["A"]))) for name, x in found.items()}
    if len(sizes) > 1:
        raise UserError(f"{file}: experts such as {next(iter(found))} have updates of several ranks or alphas, which "
                        "cannot be stacked")
    A, B, magnitude = ([x.get(key) for x in found.values()] for key in ("A", "B", "magnitude"))
    join = torch.stack if len(shape) == 3 else lambda x: x[0]
    return Piece(join(A), join(B), None if magnitude[0] is None else join(magnitude), sizes.pop()[1],
                 bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0))


def alpha_of(name: str, config: dict[str, Any], rank: int) -> float:
    """Of one module: the first pattern that its name ends with, else alpha. A bare file has none: its scale is 1."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config.get("lora_alpha", 8) if config else rank


def read_config(file: Path) -> dict[str, Any]:
    """PEFT's description of an adapter. UserError for one that computes what we do not; a key that we have never heard
    of is taken for such, if it is set."""
    config = read_json(file, SHAPE)
    if config["peft_type"] != "LORA":
        raise UserError(f"{file} describes an adapter of the kind {config['peft_type']}; only LORA (with rsLoRA and "
                        "DoRA) can be read")
    reasons = []
    for key, value in config.items():
        if key == "init_lora_weights":
            bad = value not in STARTS
        else:
            bad = bool(value) and key not in READ | IDLE and (key, value) != ("bias", "none")
        if bad:
            reasons.append(WHY.get(key, f"it uses {key}={value!r}"))
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            reasons.append(f"its alpha_pattern {pattern!r} is no pattern ({error})")
        if not math.isfinite(alpha):
            reasons.append(f"its alpha_pattern has {alpha}")
    if not math.isfinite(config.get("lora_alpha", 8)):
        reasons.append(f"lora_alpha is {config['lora_alpha']}")
    if reasons:
        raise UserError(f"{file} cannot be used here: {'; '.join(reasons)}")
    return config
