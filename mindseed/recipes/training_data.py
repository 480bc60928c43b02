"""What a training run reads: data that are tokenised already, or now, once; mixed, and with held-out rows set apart.

The tokenizer is the start model's, or the one that is named, or a prepared folder's, or one trained on the data.
"""
from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.files import read_json, write_json
from mindseed.data.loader import Evaluation, Once, Rows
from mindseed.data.mix import BLOCK, Mixture
from mindseed.data.readers import expand
from mindseed.data.shards import Prepared
from mindseed.data.steps import StepRows, read_chains
from mindseed.interop.directory import require_folder
from mindseed.recipes import prepare
from mindseed.recipes.methods import heldout_of, require_kind, rows_of
from mindseed.recipes.options import TrainOptions
from mindseed.recipes.run_folder import begun
from mindseed.tokenizers.chat import template_hash
from mindseed.tokenizers.hf_json import load_tokenizer
from mindseed.tokenizers.template import Template, foreign, read_template


REMEMBERED = 200                                  # rows of an entry of data.remember that are measured


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the run reads: an endless stream of packed rows, and held-out rows by the name of their entry."""

    tokenizer: Any
    template: Template | None                     # how conversations are told; None: in our own format
    rows: Rows
    entries: list[Prepared]
    names: list[str]
    heldout: dict[str, Any]
    remembered: dict[str, Evaluation] = field(default_factory=dict)               # of data.remember


def open_data(options: TrainOptions, run_folder: Path) -> Data:
    """Tokenise what is raw (once, by rank 0), open what is prepared, mix, and set the held-out documents apart."""
    given = options.data
    if not given.train:
        hint = (f", or give the run's own preset: mindseed train {run_folder / 'config.toml'} --resume"
                if (run_folder / "config.toml").exists() else "")
        raise UserError("data.train is empty: name files, folders or prepared folders, e.g. --data.train "
                        f"corpus.jsonl{hint}")
    if given.weights and len(given.weights) != len(given.train):
        raise UserError(f"data.weights has {len(given.weights)} numbers for {len(given.train)} entries of data.train")
    where = choose_tokenizer(options, run_folder)
    if options.method == "process-reward":
        return open_steps(options, where)
    folders = [prepare_entry(entry, i, options, where, run_folder) for i, entry in enumerate(given.train)]
    dist.barrier()                                # rank 0 has written it all
    tokenizer, template = load_tokenizer(where), foreign(*read_template(where))
    told = template.hash() if template else template_hash()
    entries = [Prepared(folder, tokenizer=tokenizer, template_hash=told) for folder in folders]
    for entry in entries:
        require_kind(entry.kind, entry.folder, options.method)
    names = [Path(entry).name.split(".")[0] or "data" for entry in given.train]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    parts = [rows_of(entry.split("train"), options) for entry in entries]
    sizes = [float(len(part)) for part in parts]
    weights = given.weights or [max(n, 1.5 * sum(sizes) / BLOCK) for n in sizes]             # tiny files count as well
    rows = parts[0] if len(parts) == 1 else Mixture(list(zip(parts, weights)), seed=options.seed, names=names)
    heldout = {name: measured for name, entry in zip(names, entries)
               if len(entry.split("heldout")) and (measured := heldout_of(entry, options)) is not None}
    return Data(tokenizer=tokenizer, template=template, rows=rows, entries=entries, names=names, heldout=heldout,
                remembered=open_remembered(options, where, run_folder))


def open_remembered(options: TrainOptions, where: Path, run_folder: Path) -> dict[str, Evaluation]:
    """What is measured and not learnt from: up to REMEMBERED rows of each entry of data.remember."""
    bare = replace(options, data=replace(options.data, heldout=0.0, fim_rate=0.0))
    folders = [prepare_entry(entry, f"remember-{i}", bare, where, run_folder)
               for i, entry in enumerate(options.data.remember)]
    dist.barrier()
    found: dict[str, Evaluation] = {}
    for entry, folder in zip(options.data.remember, folders):
        prepared = Prepared(folder, tokenizer=load_tokenizer(where))
        require_kind(prepared.kind, entry, "sft")
        name = Path(entry).name.split(".")[0] or "data"
        split = "train" if not len(prepared.split("heldout")) else "heldout"
        found[name if name not in found else f"{len(found)}-{name}"] = Evaluation(
            prepared.split(split), seq_len=options.data.seq_len, batch_size=max(1, 4096 // options.data.seq_len),
            limit=REMEMBERED)
    return found


def open_steps(options: TrainOptions, where: Path) -> Data:
    """Answers in judged steps, which are read into memory."""
    given, tokenizer, template = options.data, load_tokenizer(where), foreign(*read_template(where))
    chains = read_chains(given.train, tokenizer, template=template, heldout=given.heldout, seed=options.seed,
                         max_skipped=given.max_skipped)
    kept = {split: StepRows(some, seq_len=given.seq_len, seed=options.seed, shuffle=split == "train")
            for split, some in chains.items() if some or split == "train"}
    heldout = {"steps": Once(kept["heldout"], batch_size=max(1, 4096 // given.seq_len),
                             limit=options.loop.validate_documents)} if "heldout" in kept else {}
    return Data(tokenizer=tokenizer, template=template, rows=kept["train"], entries=[], names=["steps"],
                heldout=heldout)


def choose_tokenizer(options: TrainOptions, run_folder: Path) -> Path:
    """Where the tokenizer is, and with it the chat template: the start model's; else named; else that of a prepared
    folder, or of a teacher; else one trained on the data, in the run's folder."""
    if options.model.start:
        return require_folder(Path(options.model.start))
    if options.data.tokenizer:
        return Path(options.data.tokenizer)
    for entry in options.data.train:
        if (Path(entry) / "manifest.json").exists():
            return Path(entry) / "tokenizer"
    if options.method == "distill" and options.distill.teacher:           # whose vocabulary must be the student's
        return require_folder(Path(options.distill.teacher))
    own = run_folder / "tokenizer"
    learnt_from = {"vocab_size": options.data.vocab_size, "files": [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in expand(options.data.train)]}
    before = read_json(own / "learnt_from.json") if (own / "learnt_from.json").exists() else None
    if dist.is_main() and before != learnt_from and not begun(run_folder):
        recipe = importlib.import_module("mindseed.recipes.tokenizer")
        recipe.main(recipe.Options(data=options.data.train, out=str(own), vocab_size=options.data.vocab_size,
                                   overwrite=True))
        write_json(own / "learnt_from.json", learnt_from)
    return own


def prepare_entry(entry: str, index: int | str, options: TrainOptions, tokenizer: Path, run_folder: Path) -> Path:
    """The prepared folder of one entry of data.train; rank 0 makes it if the entry is raw."""
    path = Path(entry)
    if (path / "manifest.json").exists() or (path / ".parts").exists():
        return path
    out = run_folder / "data" / f"{index}-{path.name.split('.')[0] or 'data'}"
    if dist.is_main():
        prepare.main(prepare.Options(
            paths=(entry,), out=str(out), tokenizer=str(tokenizer), heldout=options.data.heldout,
            max_skipped=options.data.max_skipped, fim_rate=options.data.fim_rate, workers=options.data.workers,
            overwrite=not begun(run_folder)))     # a start that was refused may have left what another one needs not
    return out
