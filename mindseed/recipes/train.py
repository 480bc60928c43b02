"""Pretrain or fine-tune a model, from raw text or conversations to a model directory.

  mindseed train --data.train corpus.jsonl --depth 4                            from nothing
  mindseed train --data.train chats.jsonl --model.start runs/base/model --out runs/chat     fine-tune
  mindseed train configs/real-cpu.toml --resume auto                            a preset; goes on where it stopped
  torchrun --nproc-per-node 2 -m mindseed train configs/real-cpu.toml           the same on two processes

Text is trained on whole; conversations only where the assistant speaks. The run's folder holds config.toml, run.json,
log.jsonl, the tokenised data, the checkpoints, and at the end `model`, which `mindseed chat` and every other tool of
the field read.
"""
from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mindseed.adapt.lora import Coverage
from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.hardware import peak
from mindseed.base.log import bytes_text, check_sinks, read_jsonl, say, si, table, warn
from mindseed.core import Objective, Source
from mindseed.data.mix import Mixture
from mindseed.data.readers import kind_of, read_rows
from mindseed.infer.generate import generate
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import SAMPLING, Loaded, load_directory, require_folder, save_directory
from mindseed.interop.weights import TensorFiles, weight_files
from mindseed.models.config import LMConfig, config_to_dict
from mindseed.interop.families import family_of
from mindseed.models.describe import describe
from mindseed.models.lm import LM, build
from mindseed.models.upcycle import upcycle
from mindseed.optim.ema import EMA
from mindseed.optim.groups import Group, build_optimizers, group_table, parameter_groups
from mindseed.optim.schedule import learning_rate
from mindseed.parallel.mesh import Mesh, make_mesh
from mindseed.parallel.parallelize import parallelize
from mindseed.plan.flops import flops_per_token
from mindseed.plan.memory import memory_of
from mindseed.plan.params import count_params
from mindseed.recipes import adapter
from mindseed.recipes.machine import DTYPES, choose_precision, multiply_in, warn_if_too_big
from mindseed.recipes.methods import VALUES, equip, learning, measure, require_kind, source_of
from mindseed.recipes.model_options import MLAOptions, ModelOptions
from mindseed.recipes.launch import backend_of, check_ranks, gathers_in_bf16, job_of, shared_out, short_hash
from mindseed.recipes.options import TrainOptions, derive, derive_intervals, with_rows, without_effect
from mindseed.recipes.run_folder import (alone_in_its_folder, begun, carried_out, open_run, options_of_run,
                                         resolved, say_changes)
from mindseed.recipes.training_data import Data, open_data
from mindseed.train.balance import Balance
from mindseed.train.loop import Fit, Hook, fit, steps_for_minutes
from mindseed.train.native import NativeBackend
from mindseed.train.state import Checkpoints, restore
from mindseed.train.step import Run
from mindseed.tokenizers.chat import JINJA
from mindseed.tokenizers.hf_json import load_tokenizer
from mindseed.train.validate import evaluate

Options = TrainOptions


def main(options: TrainOptions) -> int:
    return carried_out(options, train)


def train(options: TrainOptions, device: torch.device) -> Path:
    """The whole run; returns the model directory. Raises Interrupted when it was asked to stop."""
    return alone_in_its_folder(options, device, train_in)


def train_in(run_folder: Path, options: TrainOptions, given: TrainOptions, device: torch.device) -> Path:
    for line in without_effect(given) if dist.is_main() else []:
        warn(line)
    options = with_rows(options)
    check_ranks(options)
    check_early(options)
    mesh = make_mesh(options.parallel, device)
    data = open_data(options, run_folder)
    model, parent = open_model(options, data.tokenizer, device)
    equip(model, options)
    cover = adapter.adapt(model, options.lora, options.seed)
    facts = {"params": count_params(model.config).active, "rows_per_epoch": len(data.rows), "world": dist.row_ranks()}
    dist.agree(data=short_hash(data.rows.identity()), tokenizer=data.tokenizer.hash())
    options = derive(options, **facts)
    options = replace(options, loop=replace(options.loop, precision=choose_precision(options.loop.precision, device)))
    multiply_in(model, options.loop.precision)
    plan = learning(options, model, data.rows, data.heldout, data.tokenizer, run_folder, device)
    objective, data = plan.objective, replace(data, rows=plan.rows, heldout=plan.heldout)
    source = source_of(options, model, data.rows, data.tokenizer, parent)
    parallelize(model, mesh, bf16=gathers_in_bf16(options, device))
    groups = parameter_groups(model, options.optim)
    backend = backend_of(options, model, objective, build_optimizers(groups, options.optim), mesh)
    model.recompute, model.attention = options.loop.recompute, options.loop.attention
    if model.attention == "flex" and device.type != "cuda":
        raise UserError(f"loop.attention=flex has no backward pass on {device.type}; leave it out")
    if options.loop.compile:
        model.compile_blocks()
    run = Run(source, objective, backend, schedule=lambda step: 0.0, device=device,
              balance=Balance(model, mesh and mesh.pipeline, device=device),
              accumulate=max(1, (options.loop.batch or 0) // (options.loop.micro_batch * dist.row_ranks())),
              around=backend.whole if options.method in ("kto", "dpo", "distill") else contextlib.nullcontext)
    if options.loop.steps is None:
        options = derive_by_clock(options, run, facts)
    if mesh and not mesh.sharded_alone:           # nobody has the whole model to draw samples from
        options = replace(options, loop=replace(options.loop, sample_every=0))
    options = derive_intervals(options)
    run.schedule = learning_rate(options.schedule, peak=options.optim.lr, steps=options.loop.steps)
    ema = EMA(model, options.loop.ema) if options.loop.ema else None
    if ema:
        run.after_step.append(ema.update)

    checkpoints = Checkpoints(run_folder / "checkpoints", keep=options.loop.keep,
                              background=options.loop.background_save, fingerprints={
        "model": config_to_dict(model.config), "tokenizer": data.tokenizer.hash(), "data": data.rows.identity(),
        "optim.kind": options.optim.kind} | ({} if options.method == "sft" else {"method": options.method})
        | ({"distill": [bool(options.distill.states), bool(options.distill.relations), list(options.distill.layers)]}
           if options.method == "distill" else {})
        | ({"optim.layer_decay": options.optim.layer_decay} if options.optim.layer_decay < 1 else {})
        | ({"optim.states": "8bit"} if options.optim.states == "8bit" else {})    # pages keep what fp32 keeps
        | adapter.fingerprint(options.lora))
    resumed = resume(options, run, ema, checkpoints)
    if resumed and run.step >= options.loop.steps and (run_folder / "model").exists():
        if dist.is_main():
            say(f"{run_folder} has had its {options.loop.steps} steps, so nothing is left to do; give a larger "
                "loop.steps to go on")
        close(source)
        return run_folder / "model"
    torch.manual_seed(options.seed + 1_000_003 * (mesh.seed if mesh else dist.rank())) if not resumed else None
    announce(options, model, data, table_of(groups, mesh), run_folder, device, resumed, run.step, cover)

    peak_flops = dist.world_size() * peak(device, DTYPES[options.loop.precision]).flops
    fit(Fit(run=run, steps=options.loop.steps, checkpoints=checkpoints, save_every=options.loop.save_every, ema=ema,
            hooks=[Hook(every=options.loop.validate_every, call=validation(options, backend, objective, data, ema),
                        before_first=True),
                   Hook(every=options.loop.sample_every if options.method not in VALUES else 0,
                        call=samples(backend, data, options.seed))],
            score="bits_per_byte" if options.method == "sft" else "heldout/loss",
            sinks=open_run(options, given, resumed) if dist.is_main() else [],
            flops_per_token=flops_per_token(model.config, options.data.seq_len).model, peak_flops=peak_flops))
    close(source)
    return finish(options, backend, model, data, ema, run, parent, run_folder)


# ----------------------------------------------------------------------------------------------------------- the parts

def derive_by_clock(options: TrainOptions, run: Run, facts: dict[str, int]) -> TrainOptions:
    """The steps that fit into loop.minutes; and the batch, if it was left open, by what can be seen in that time."""
    minutes, given = options.loop.minutes, options.loop
    if given.batch is None:
        rows = given.micro_batch * facts["world"]
        seen = steps_for_minutes(run, minutes) * rows * options.data.seq_len
        batch = derive(options, **facts, tokens=seen).loop.batch
        options, run.accumulate = replace(options, loop=replace(given, batch=batch)), batch // rows
    steps = steps_for_minutes(run, minutes)
    return derive(replace(options, loop=replace(options.loop, steps=steps, minutes=None)), **facts)


SHAPE = {f.name for f in fields(ModelOptions)} - {"start", "extend", "dropout", "moe", "mla"}


def check_early(options: TrainOptions) -> None:
    """What would fail once all data are tokenised fails now."""
    check_sinks(options.trackers)
    start, named = options.model.start, options.data.tokenizer
    if start is None and options.lora.rank:
        raise UserError("an adapter learns beside a base that is kept: give --model.start DIR, the base's directory")
    if start is None and options.method in ("dpo", "kto", "reward", "process-reward") and dist.is_main():
        warn(f"--method {options.method} without --model.start teaches preferences to random weights")
    if start is None:
        options.model.shape(options.depth).lm_config(vocab_size=options.data.vocab_size, seq_len=options.data.seq_len)
    else:
        asked = [f"model.{name}" for name, value in vars(options.model).items() if value is not None and name in SHAPE]
        asked += ["model.mla"] if options.model.mla != MLAOptions() else []
        if asked or options.depth is not None:
            raise UserError(f"model.start brings its own shape; leave out {', '.join(asked) or '--depth'}")
        if Path(start).resolve() == (Path(options.out) / "model").resolve():
            raise UserError(f"{start} would be written over by the model of this run; choose another --out")
        options.model.upcycling()
        with TensorFiles(weight_files(require_folder(Path(start)))):
            pass                                  # whole as far as their headers tell
        if named and load_tokenizer(named).hash() != load_tokenizer(require_folder(Path(start))).hash():
            raise UserError(f"{start} was trained with another tokenizer than {named}; leave out data.tokenizer to use "
                            "the model's own")
    for entry in options.data.train:
        if not any((Path(entry) / name).exists() for name in ("manifest.json", ".parts")):
            with contextlib.suppress(StopIteration):
                require_kind(kind_of(next(read_rows([entry], bad=lambda *_: None)).row), f"the first row of {entry}",
                             options.method)


def open_model(options: TrainOptions, tokenizer: Any, device: torch.device) -> tuple[LM, Loaded | None]:
    """Random weights, or those of a model directory, which is returned as well."""
    if options.model.start is None:
        config = options.model.shape(options.depth).lm_config(vocab_size=tokenizer.vocab_size,
                                                              seq_len=options.data.seq_len)
        return build(config, seed=options.seed, device=device).train(), None
    loaded = load_directory(options.model.start, device=device)
    before, mixture = loaded.model.config.seq_len, options.model.upcycling()
    if options.data.seq_len > before and not options.model.extend and dist.is_main():
        warn(f"{options.model.start} was trained on {before} tokens and is now trained on {options.data.seq_len}, at "
             "positions it has never seen; model.extend stretches them (YaRN), and `mindseed extend` measures what "
             "comes of it")
    model = with_config(loaded.model, options.model.going_on(loaded.model.config, options.data.seq_len))
    if mixture is not None:
        model = upcycle(model, mixture, seed=options.seed)
    return model.train(), loaded


def with_config(model: LM, config: LMConfig) -> LM:
    """The same weights under a config that differs in dropout or context only."""
    if config == model.config:
        return model
    device = next(model.parameters()).device
    other = build(config, device=device)
    other.value_head = model.value_head
    other.load_state_dict(model.state_dict())
    return other


def close(source: Source) -> None:
    """End the thread that reads ahead, if there is one."""
    if end := getattr(source, "close", None):
        end()


def resume(options: TrainOptions, run: Run, ema: EMA | None, checkpoints: Checkpoints) -> Path | None:
    """Put the run where its newest whole checkpoint was; None if it starts afresh."""
    if options.resume == "never":
        return None
    newest = checkpoints.newest()
    if newest is None:
        log = Path(options.out) / "log.jsonl"
        every = resolved(Path(options.out)).loop.save_every if begun(Path(options.out)) else 0
        done = max((row["step"] for row in read_jsonl(log)), default=0) if log.exists() else 0
        if every and done > every:
            raise UserError(f"{options.out} has a log of {done} steps and no checkpoint any more: put its checkpoints "
                            "back, or start anew with another --out")
        return None
    path, saved = newest
    restore(run, ema, saved)
    return path


def validation(options: TrainOptions, backend: NativeBackend, objective: Objective, data: Data, ema: EMA | None):
    """Bits per byte on held-out documents: of each entry by name, and over all bytes. With another method than
    fine-tuning what its loss says of held-out rows."""
    def judged(step: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        with ema.applied() if ema and step else contextlib.nullcontext(), backend.whole():
            for name, rows in data.heldout.items():
                found = measure(backend, objective, rows, backend.device)
                values |= {f"heldout/{key}" + (f"/{name}" if len(data.heldout) > 1 else ""): value
                           for key, value in found.items()}
        if len(data.heldout) > 1:
            values["heldout/loss"] = sum(values[f"heldout/loss/{name}"] for name in data.heldout) / len(data.heldout)
        return values

    def bits(step: int) -> dict[str, Any]:
        values, bits, total = {}, 0.0, 0
        with ema.applied() if ema and step else contextlib.nullcontext(), backend.whole():
            for name, documents in data.heldout.items():
                result = evaluate(backend, documents, raw_bytes=documents.bytes)
                if len(data.heldout) > 1:
                    values[f"bits_per_byte/{name}"] = result["bits_per_byte"]
                bits, total = bits + result["bits_per_byte"] * documents.bytes, total + documents.bytes
        return {"bits_per_byte": bits / total, **values} if total else {}

    def remembered(step: int) -> dict[str, Any]:
        with ema.applied() if ema and step else contextlib.nullcontext(), backend.whole():
            return {f"remembered/{name}": evaluate(backend, rows, raw_bytes=rows.bytes)["bits_per_byte"]
                    for name, rows in data.remembered.items()}

    asked = bits if options.method == "sft" else judged
    return lambda step: asked(step) | remembered(step)


def forgotten(log: Path) -> None:
    """A table of what data.remember asked for: bits per byte before the first step and after the last."""
    rows = [row for row in read_jsonl(log) if any(key.startswith("remembered/") for key in row)]
    if not rows:
        return
    first, last = rows[0], rows[-1]
    table("remembered, bits per byte", ["rows", f"step {first['step']}", f"step {last['step']}", "forgotten"],
          [[key.partition("/")[2], f"{first[key]:.3f}", f"{last[key]:.3f}", f"{last[key] - first[key]:+.3f}"]
           for key in last if key.startswith("remembered/") and key in first])


def samples(backend: NativeBackend, data: Data, seed: int, *, count: int = 2, max_new: int = 48):
    """A hook that continues the beginnings of held-out documents: of text the first words, of a chat the question."""
    prompts, model = [], backend.model
    for entry in data.entries[:count]:
        documents = entry.split("heldout")
        for i in range(min(len(documents), max(1, count // len(data.entries)))):
            ids, trainable = documents.get(i)
            cut = 9 if trainable is None else int(trainable.argmax())
            if 0 < len(ids[:cut]) < model.config.seq_len:                         # else there is no room for an answer
                prompts.append([int(x) for x in ids[:cut]])

    def draw(step: int) -> dict[str, Any]:
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=seed)
        with backend.whole():
            if not dist.is_main() or not prompts:
                return {}
            done = generate(model, data.tokenizer, prompts, sampling=sampling, max_new=max_new)
        return {f"sample {i + 1}": f"{data.tokenizer.decode(p, skip_special=True)} >>> {c.text}"
                for i, (p, c) in enumerate(zip(prompts, done))}

    return draw


# -------------------------------------------------------------------------------------------------- words and records

def table_of(groups: list[Group], mesh: Mesh | None) -> list[tuple[str, ...]]:
    """Who updates what, over all stages of a pipeline; a collective call where there are several."""
    if mesh is None or mesh.sizes.pipe == 1:
        return group_table(groups)
    tensors: dict[tuple[str, ...], dict[str, int]] = {}      # by name, for the embedding may lie on two ranks
    for own in dict(dist.gather((mesh.place("pipe"), [
            (g.name, g.optimizer, f"{g.weight_decay:g}", f"{g.lr_scale:g}",
             {name: p.numel() for name, p in zip(g.names, g.params)}) for g in groups]))).values():
        for *kind, sizes in own:
            tensors.setdefault(tuple(kind), {}).update(sizes)
    return [(name, optimizer, str(len(sizes)), f"{sum(sizes.values()):,}", *rest)
            for (name, optimizer, *rest), sizes in tensors.items()]


def announce(options: TrainOptions, model: LM, data: Data, groups: list[tuple[str, ...]], folder: Path,
             device: torch.device, resumed: Path | None, step: int, cover: Coverage | None) -> None:
    """What is about to happen, before the first step: the model, the data, the optimisers, every derived value."""
    if not dist.is_main():
        return
    c, loop = model.config, options.loop
    params = count_params(c)
    active = f" ({si(params.active)} active)" if params.active != params.total else ""
    say(f"model      {si(params.total)} parameters{active}: {describe(c)}")
    if family_of(c) is None:
        warn("no other project's format can hold this shape, so only mindseed will read the model")
    if options.data.fim_rate and not any(entry.kind == "text" for entry in data.entries):
        warn("data.fim_rate has no effect: there are only conversations, and texts are what is told with the middle "
             "last")
    for name, entry in zip(data.names, data.entries):
        split = entry.split("train")
        say(f"data       {name}: {len(split):,} documents ({entry.kind}), {si(int(split.lengths.sum()))} tokens, "
            f"{bytes_text(int(split.bytes.sum()))}")
    parts = data.rows.parts if isinstance(data.rows, Mixture) else [data.rows]
    for name, part in zip(data.names, parts):
        say(f"packing    {name}: {part.stats}")
    adapter.show(cover, options.lora)
    tokens = loop.batch * options.data.seq_len
    say(f"batch      {loop.batch} rows of {options.data.seq_len} = {tokens:,} tokens a step, "
        f"in micro-batches of {loop.micro_batch}" + f" on each of {dist.row_ranks()} ranks" * (dist.row_ranks() > 1)
        + f"; {loop.steps} steps")
    passes = loop.steps * loop.batch / len(data.rows)
    say(f"passes     {passes:.3g} over the data")
    if passes > 10:
        warn(f"every document will be seen {passes:.0f} times; more text, or fewer steps (loop.steps, loop.minutes, "
             "loop.epochs), would serve the model better")
    if dist.world_size() > 1 or not options.parallel.plain:
        say(f"ranks      {shared_out(options.parallel, dist.world_size(), loop.micro_batch)}")
    say(f"rate       {options.optim.lr:g} ({options.schedule.kind}, {options.schedule.warmup_steps} steps of warm-up), "
        f"{loop.precision} on {device}")
    job = job_of(options, device, rows=loop.micro_batch, world=dist.world_size(),
                 precision=loop.precision.removesuffix("-block"))
    warn_if_too_big(memory_of(c, job).total, device)
    table("optimisers", ["group", "optimiser", "tensors", "parameters", "decay", "rate x"],
          [list(row) for row in groups])
    if resumed:
        say_changes(options, folder, step)
    say(f"going on from {resumed}" if resumed else f"writing to {folder}")


def finish(options: TrainOptions, backend: NativeBackend, model: LM, data: Data, ema: EMA | None, run: Run,
           parent: Loaded | None, folder: Path) -> Path:
    """Write the model directory, with the averaged weights if there are any."""
    out = folder / "model"
    if dist.is_main():
        forgotten(folder / "log.jsonl")
        if backend.skipped > run.step / 10:
            warn(f"{backend.skipped} of {run.step} steps were left out because fp16 overflowed; lower optim.lr, or use "
                 "bf16 or fp32")
    model.eval()
    with ema.applied() if ema else contextlib.nullcontext(), backend.to_save() as whole:
        if whole is not None:
            if options.lora.rank:
                adapter.hang_up(whole, folder, base=options.model.start, seed=options.seed)
            info = {"parent": str(options.model.start)} if parent else {}
            info |= {} if options.method == "sft" else {"method": options.method}
            save_directory(whole, data.tokenizer, out, **spoken(data, parent), info=info | {
                "data": [str(entry.folder) for entry in data.entries], "seed": options.seed, "steps": run.step,
                "tokens": run.tokens})
    dist.barrier()
    return out


def spoken(data: Data, parent: Loaded | None) -> dict[str, Any]:
    """How the new model is to be spoken to, for `save_directory`: as its parent is, if that has a chat template."""
    template, chats = data.template, any(entry.kind == "chat" for entry in data.entries)
    if parent is None:
        return {"chat_template": template.source, "marks": dict(template.marks)} if template else {}
    if parent.chat_template is None and chats:    # it has learnt our format
        return {"chat_template": JINJA, "sampling": parent.sampling or SAMPLING}
    kept, end = parent.kept, template.end(data.tokenizer) if template and chats else None
    return kept if end is None else kept | {"stop_ids": tuple(dict.fromkeys([*parent.stop_ids, end]))}
