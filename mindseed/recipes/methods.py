"""What `--method` changes in a training run: the rows it reads, the loss, and what is measured on held-out rows.

Everything else (the loop, the optimisers, checkpoints, adapters, going on) is the same for all, in train.py.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindseed.adapt.lora import base_of
from mindseed.adapt.lowrank import LowRank
from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.log import say, warn
from mindseed.core import Objective, Source
from mindseed.data.loader import Evaluation, Once, PackedRows, Rows, RowSource
from mindseed.data.mix import Mixture
from mindseed.data.preference import PairRows, TwoDocuments, UnpairedRows, fingerprint, reference_logps
from mindseed.data.prefetch import Prefetch
from mindseed.data.shards import Documents, Prepared
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.interop.directory import Loaded, context_of, load_directory
from mindseed.models.heads import add_value_head
from mindseed.models.lm import LM
from mindseed.objectives.kto import KTO
from mindseed.objectives.reward import ProcessReward, Reward
from mindseed.objectives.sft import SFT
from mindseed.recipes.options import TrainOptions
from mindseed.recipes.post_options import KTOOptions
from mindseed.rl.env import Play
from mindseed.rl.on_policy import OnPolicy
from mindseed.rl.prompts import Prompts, read_prompts
from mindseed.train.native import AUTOCAST
from mindseed.train.teacher import distillation
from mindseed.train.validate import dealt

TRAINS_ON = {"sft": ("text", "chat"), "distill": ("text", "chat"), "dpo": ("preference",), "reward": ("preference",),
             "kto": ("preference", "unpaired"), "process-reward": ("steps",)}
CALLED = {"text": "texts", "chat": "conversations", "preference": "preference pairs (chosen, rejected)",
          "unpaired": "answers judged one by one (prompt, completion, label)", "steps": "answers in judged steps"}
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VALUES = ("reward", "process-reward")             # methods whose model gives numbers, not texts


def require_kind(kind: str, where: object, method: str) -> None:
    """UserError if the method cannot learn from such rows; it says which one can."""
    if kind not in TRAINS_ON[method]:
        able = [name for name, kinds in TRAINS_ON.items() if kind in kinds]
        raise UserError(f"{where} holds {CALLED[kind]}, which --method {method} does not train on; "
                        f"--method {' or '.join(able)} does")


def rows_of(documents: Documents, options: TrainOptions) -> Rows:
    """The rows that are trained on."""
    data = options.data
    if options.method in ("dpo", "reward"):
        return PairRows(documents, seq_len=data.seq_len, seed=options.seed)
    if options.method == "kto":
        return UnpairedRows(documents, seq_len=data.seq_len, seed=options.seed)
    return PackedRows(documents, seq_len=data.seq_len, seed=options.seed, strategy=data.packing,
                      cross_documents=data.cross_documents)


def heldout_of(entry: Prepared, options: TrainOptions) -> Evaluation | Once | None:
    """A finite pass over held-out rows; None where there are too few."""
    data, documents, limit = options.data, entry.split("heldout"), options.loop.validate_documents
    if options.method in ("sft", "distill"):
        return Evaluation(documents, seq_len=data.seq_len, batch_size=max(1, 4096 // data.seq_len), limit=limit)
    kind = UnpairedRows if options.method == "kto" else PairRows
    try:
        rows = kind(documents, seq_len=data.seq_len, seed=options.seed, shuffle=False)
    except UserError as error:                    # a handful of rows of which nothing is left, or no two prompts
        warn(f"nothing is measured on the held-out rows of {entry.folder}: {error}")
        return None
    return Once(rows, batch_size=max(2, 4096 // data.seq_len), limit=limit)


def equip(model: LM, options: TrainOptions) -> None:
    """The value head that a reward model needs; what is none has none. What the loss does not read learns nothing, and
    is no parameter to optimisers, DDP and checkpoints."""
    if options.method in VALUES and model.value_head is None:
        add_value_head(model, seed=options.seed)
    elif options.method not in VALUES:
        model.value_head = None
    if options.method not in ("sft", "distill"):
        model.mtp.requires_grad_(False)
    if options.method in VALUES and model.head is not None:
        model.head.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """The loss, and the rows as it wants them: with the reference's opinion, if it was asked for in advance."""

    objective: Objective
    rows: Rows
    heldout: dict[str, Any]


def learning(options: TrainOptions, model: LM, rows: Rows, heldout: dict[str, Any], tokenizer: Any, folder: Path,
             device: torch.device) -> Learning:
    if options.method == "sft":
        given = options.objective
        tags = tuple((tokenizer.specials[tag],) if tag in tokenizer.specials else tuple(tokenizer.encode(tag))
                     for tag in TAGS)             # written out, a tag is several tokens
        return Learning(objective=SFT(**vars(given), tags=tags), rows=rows, heldout=heldout)
    if options.method == "reward":
        return Learning(objective=Reward(centre=options.reward.centre), rows=rows, heldout=heldout)
    if options.method == "process-reward":
        return Learning(objective=ProcessReward(), rows=rows, heldout=heldout)
    if options.method == "distill":
        return Learning(objective=distiller(options, model, tokenizer, device), rows=rows, heldout=heldout)
    given = options.dpo if options.method == "dpo" else options.kto
    reference = None
    if options.method == "kto" or options.dpo.needs_reference:
        reference, key = reference_of(options, given.reference, model, device)
        if given.reference_logps == "once":
            rows, heldout = asked_once(options, rows, heldout, reference, key, folder, device)
            reference = None
        else:
            reference = cast(reference, options, device)
    if options.method == "dpo":
        return Learning(objective=options.dpo.objective(reference), rows=rows, heldout=heldout)

    if dist.is_main():
        tell_kinds(rows, given)
    kto = KTO(policy=cast(model, options, device), reference=reference, beta=given.beta, desirable=given.desirable,
              undesirable=given.undesirable, over_ranks=dist.sum_over_ranks)
    return Learning(objective=kto, rows=rows, heldout=heldout)


def cast(forward: Any, options: TrainOptions, device: torch.device) -> Any:
    """The same function in the precision that the policy is trained in: or they would differ before anything is
    learnt."""
    dtype = AUTOCAST.get(options.loop.precision)

    def call(ids: torch.Tensor, positions: torch.Tensor):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return forward(ids, positions)

    return call


def tell_kinds(rows: Rows, given: KTOOptions) -> None:
    """How many answers are good and bad. A warning if one kind would outweigh the other: the paper (2402.01306) wants
    the good ones' weight together to be 1 to 4/3 of the bad ones'."""
    kinds = [part.kinds() for part in (rows.parts if isinstance(rows, Mixture) else [rows])]
    good, bad = (sum(one[name] for one in kinds) for name in ("desirable", "undesirable"))
    say(f"judged     {good:,} good answers, {bad:,} bad ones")
    share = given.desirable * good / max(given.undesirable * bad, 1e-9)
    if not 0.99 <= share <= 4 / 3 + 0.01:
        kind, weight = ("desirable", given.undesirable * bad / max(good, 1)) if share < 1 else (
            "undesirable", given.desirable * good / max(bad, 1))
        warn(f"good answers weigh {share:.3g} times as much as bad ones together, where 1 to 1.33 is advised; "
             f"--kto.{kind} {weight:.3g} would even them out")


def reference_of(options: TrainOptions, named: str | None, model: LM, device: torch.device) -> tuple[Any, str]:
    """(what answers as the reference, a key that says which one it is): a model directory, the model without its
    adapter, or a frozen copy of the model as the run begins."""
    if named:
        reference = load_directory(named, device=device).model.requires_grad_(False)
        reference.value_head = None
        return reference, fingerprint(reference)
    if any(isinstance(module, LowRank) for module in model.modules()):
        return base_of(model), fingerprint(model)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    return reference, fingerprint(reference)


def asked_once(options: TrainOptions, rows: Rows, heldout: dict[str, Any], reference: Any, key: str, folder: Path,
               device: torch.device) -> tuple[Rows, dict[str, Any]]:
    """The same rows with the reference's log-probabilities, asked for now or found in the run's folder."""
    def told(some: TwoDocuments) -> TwoDocuments:
        return some.with_reference(reference_logps(
            some, reference, max(2, 8192 // (2 * options.data.seq_len)), folder=folder / "data", key=key,
            autocast=AUTOCAST.get(options.loop.precision), device=device))

    if isinstance(rows, Mixture):
        rows = rows.mapped(told)
    else:
        rows = told(rows)
    return rows, {name: Once(told(once.rows), batch_size=once.batch_size, limit=options.loop.validate_documents)
                  for name, once in heldout.items()}


def distiller(options: TrainOptions, model: LM, tokenizer: Any, device: torch.device) -> Objective:
    given = options.distill
    if given.teacher is None:
        raise UserError("who is the teacher? give --distill.teacher DIRECTORY")
    teacher = load_directory(given.teacher, device=device)
    names = ("distance", "beta", "temperature", "hard", "states", "relations")
    settings = {name: getattr(given, name) for name in names}
    related = None if given.related is None else (given.related, len(teacher.model.config.layers) - 1)
    return distillation(model, teacher, tokenizer, seq_len=options.data.seq_len, depths=given.layers or None,
                        related=related, seed=options.seed, **settings)


def source_of(options: TrainOptions, model: LM, rows: Rows, tokenizer: Any, parent: Loaded | None) -> Source:
    """Rows in the order of the stream, read ahead; or, on-policy, what the student writes, which must not be."""
    given, ranks = options.distill, {"rank": dist.row_rank(), "world": dist.row_ranks()}
    stream = RowSource(rows, batch_size=options.loop.micro_batch, **ranks)
    if options.method != "distill" or not given.on_policy:
        return Prefetch(stream)
    prompts = Prompts(read_prompts(given.prompts or options.data.train), tokenizer, seed=options.seed,
                      longest=min(model.config.seq_len, context_of(given.teacher)) - given.max_new,
                      template=parent.template if parent else None, room="distill.max_new")
    engine = Engine(model, tokenizer, EngineConfig(max_seqs=64, max_queue=1 << 20),
                    stop_ids=parent.stop_ids or None if parent else None)
    model.train()                                 # an engine puts it into the mode of use
    how = Play(answers=given.answers, max_new=given.max_new, temperature=given.sampling_temperature)
    return OnPolicy(policy=model, engine=engine, prompts=prompts, play=how, batch_size=options.loop.micro_batch,
                    share=given.on_policy, otherwise=stream, seed=options.seed, **ranks)


@torch.no_grad()
def measure(backend: Any, objective: Objective, batches: Any, device: torch.device) -> dict[str, float]:
    """The objective's loss and metrics on held-out rows, by all ranks together."""
    sums: dict[str, torch.Tensor] = {}
    count = torch.zeros((), device=device)
    whole = dist.row_ranks() > 1 and not objective.splittable                     # every rank compares all of them
    for batch, counts in ((batch, True) for batch in list(batches)) if whole else dealt(backend, batches):
        batch = objective.prepare(batch.to(device))
        found = backend.judged(batch).items()
        for name, value in found if counts else ():
            sums[name] = sums.get(name, 0) + value
        count = count + objective.count(batch) * counts
    names = sorted({name for found in dist.gather(sorted(sums)) for name in found})
    count = dist.sum_over_ranks(count).clamp_min(1)
    zero = torch.zeros((), device=device)
    return {name: (dist.sum_over_ranks(sums.get(name, zero)) / count).item() for name in names}
