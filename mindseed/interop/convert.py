"""From one form of a model to another, and the proof that the copy computes the same.

The source may be any model directory that we read, or a bare state dict of MiniMind; the target is a directory of the
family that is asked for. The proof runs both as they lie on disk: the same ids must give the same logits. A change of
dtype rounds the weights, so the copy is held against the source rounded alike, and the rounding's own effect is
reported. A GGUF file is read back from nothing but what stands in it, and only a file that passes is kept.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.base.files import atomic
from mindseed.interop import gguf_read, minimind
from mindseed.interop.directory import Loaded, load_directory, names_in, save_directory
from mindseed.interop.families import family_of, named
from mindseed.interop.gguf import KINDS, Written, kind_named, write_gguf
from mindseed.interop.gguf_vocab import modelfile
from mindseed.interop.rules import stacked
from mindseed.interop.weights import DTYPES
from mindseed.tokenizers.hf_json import load_tokenizer
from mindseed.tokenizers.template import read_template

TOLERANCE = 1e-5
PICKLES = (".pth", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """One tensor: its names here and there, its shape there."""

    ours: str
    theirs: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    mapped: list[Mapped]
    source: str                       # what the source turned out to be
    target: str
    before: torch.dtype
    after: torch.dtype
    difference: float                 # largest difference of logits, copy against source rounded alike
    rounding: float                   # largest difference of logits, source rounded against source

    @property
    def good(self) -> bool:
        return self.difference <= TOLERANCE           # NaN is not good


def convert(source: Path | str, target: Path | str, *, to: str | None = None, dtype: str | None = None,
            tokenizer: str | None = None, overwrite: bool = False) -> Conversion:
    """Write `source` anew as `target`, in the family `to` [the first that can hold it], and compare the two. UserError
    if `target` exists, unless `overwrite`, or if that family cannot hold the model: nothing is approximated."""
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in DTYPES:
        known = f"is not known; choose one of {', '.join(DTYPES)}"
        raise UserError(f"dtype={dtype!r} {'is only written with --to gguf' if dtype in KINDS else known}")
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the source itself; choose another place")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already; choose another place or add --overwrite")
    if target.exists() and not (target / "config.json").exists():
        raise UserError(f"{target} is no model directory, so it is not overwritten; choose another place")
    if target.resolve() in source.resolve().parents or source.resolve() in target.resolve().parents:
        raise UserError(f"one of {source} and {target} lies in the other; choose another place")
    family = named(to) if to else None
    loaded = read(source, tokenizer)
    family = family or family_of(loaded.model.config)
    after = DTYPES[dtype] if dtype else loaded.dtype
    save_directory(loaded.model, loaded.tokenizer, target, info={"parent": str(source)} | loaded.info, dtype=after,
                   family=family, **loaded.kept)
    names = names_in(family, loaded.model.config, {
        name: x for name, x in loaded.model.state_dict().items()
        if not name.startswith("mtp.") or family is None or family.layout.has_mtp})
    shapes = {name: tuple(x.shape) for name, x in loaded.model.state_dict().items()}
    mapped = [Mapped(ours=ours, theirs=name, shape=shapes[ours][1:] if stacked(theirs) else shapes[ours])
              for ours, theirs in names.items() for name in theirs]
    difference, rounding = compare(loaded, load_directory(target), after)
    return Conversion(mapped=mapped, before=loaded.dtype, after=after, difference=difference, rounding=rounding,
                      source=loaded.family.name if loaded.family else "mindseed",
                      target=family.name if family else "mindseed")


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """A file that was written, or, if it is not `good`, was written and removed."""

    path: Path
    written: list[Written]
    source: str
    kind: str
    difference: float                 # largest difference of logits, file against source rounded alike, of the largest
    rounding: float                   # what rounding moves logits by, root of the mean square, as a share of them
    nfc: bool                         # whether the tokenizer composes characters, which llama.cpp does not

    @property
    def good(self) -> bool:
        return self.difference <= gguf_read.TOLERANCE and self.rounding <= gguf_read.ROUNDING[self.kind]


class Unlike(Exception):
    """The file computes something else, so that nothing is kept."""


def convert_gguf(source: Path | str, target: Path | str, *, dtype: str | None = None, tokenizer: str | None = None,
                 overwrite: bool = False, drop_mtp: bool = False) -> GGUF:
    """Write `source` as a GGUF file with a Modelfile beside it, in the folder `target`, or as `target` itself if that
    ends in .gguf. UserError for what llama.cpp cannot run and for places that are taken; then nothing is written."""
    source, target = Path(source), Path(target)
    kind = kind_named(dtype) if dtype else None
    require_gguf_place(source, target, overwrite)
    loaded = read(source, tokenizer)
    kind = kind or {torch.bfloat16: "bf16", torch.float16: "f16"}.get(loaded.dtype, "f32")
    return save_gguf(loaded, target, kind=kind, drop_mtp=drop_mtp)


def save_gguf(loaded: Loaded, target: Path, *, kind: str, drop_mtp: bool = False) -> GGUF:
    """As `convert_gguf`, of a model in memory; what stands at `target` is replaced."""
    name, found = target.stem if target.suffix == ".gguf" else target.name, []

    def fill(file: Path, beside: Path) -> None:
        written = write_gguf(loaded, file, kind=kind, name=name, drop_mtp=drop_mtp)
        difference, rounding = gguf_read.prove(loaded.model, file, written, kind)
        beside.write_text(modelfile(f"{name}.gguf", loaded), encoding="utf-8")
        found.append(GGUF(path=path, written=written, kind=kind, difference=difference, rounding=rounding,
                          source=loaded.family.name if loaded.family else "mindseed",
                          nfc=loaded.tokenizer.spec()["nfc"]))
        if not found[0].good:
            raise Unlike

    path = target if target.suffix == ".gguf" else target / f"{name}.gguf"
    try:
        if target == path:
            with atomic(path) as file, atomic(path.with_name("Modelfile")) as beside:
                fill(file, beside)
        else:
            with atomic(target) as folder:
                folder.mkdir()
                fill(folder / path.name, folder / "Modelfile")
    except Unlike:
        pass
    return found[0]


def require_gguf_place(source: Path, target: Path, overwrite: bool) -> None:
    """UserError where something would be lost: `overwrite` replaces a GGUF file and its Modelfile and nothing else."""
    single = target.suffix == ".gguf"
    taken = [p for p in ([target, target.with_name("Modelfile")] if single else [target]) if p.exists()]
    if taken and not overwrite:
        raise UserError(f"{taken[0]} exists already; choose another place or add --overwrite")
    if single and target.is_dir() or not single and target.exists() and (not target.is_dir() or any(
            p.suffix != ".gguf" and p.name != "Modelfile" for p in target.iterdir())):
        raise UserError(f"{target} holds more than a GGUF file and its Modelfile, so it is not overwritten; choose "
                        "another place")
    if not single and (target.resolve() == source.resolve() or target.resolve() in source.resolve().parents):
        raise UserError(f"{source} lies in {target}, which would be replaced; choose another place")


def read(source: Path, tokenizer: str | None) -> Loaded:
    """Whatever the source is."""
    if source.suffix in PICKLES and not source.exists():
        near = sorted(str(p) for p in source.parent.glob(f"*{source.suffix}"))
        raise UserError(f"{source} does not exist" + (f"; beside it there is {', '.join(near[:5])}" if near else ""))
    if source.is_file() and source.suffix in PICKLES:
        model, family, stored = minimind.load_state_dict(source)
        words = Path(tokenizer) if tokenizer else beside(source)
        template, marks = read_template(words)
        return Loaded(model=model, tokenizer=load_tokenizer(words), dtype=stored, family=family, chat_template=template,
                      marks=marks)
    if source.is_file():
        raise UserError(f"{source} is a file of a kind that is not read; give a model directory or a state dict "
                        f"({', '.join(PICKLES)})")
    if tokenizer is not None:
        raise UserError(f"tokenizer={tokenizer} has no effect: {source} is a directory and has its own")
    return load_directory(source)


def beside(source: Path) -> Path:
    """Where the tokenizer of a bare state dict lies: beside it, or, as MiniMind has it, in `model` next to its folder.
    """
    places = [source.parent, source.parent.parent / "model", source.parent / "model"]
    for place in places:
        if (place / "tokenizer.json").exists():
            return place
    raise UserError(f"{source} has no tokenizer beside it; say where it is with --tokenizer DIR (the folder of "
                    "tokenizer.json)")


@torch.inference_mode()
def compare(source: Loaded, copy: Loaded, dtype: torch.dtype) -> tuple[float, float]:
    """(copy against source rounded to `dtype`, that against source): largest differences of logits, in float32."""
    T = min(64, source.model.config.seq_len)
    ids = torch.randint(0, source.model.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    exact = logits(source, ids)
    for p in source.model.parameters():
        p.copy_(p.to(dtype))
    rounded = logits(source, ids)
    return (logits(copy, ids) - rounded).abs().max().item(), (rounded - exact).abs().max().item()


def logits(loaded: Loaded, ids: Tensor) -> Tensor:
    return loaded.model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits()


