"""Training on a mesh, told in a few words: what tests/test_parallel.py runs on several ranks and on one."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mindseed.base import dist
from mindseed.base.mesh import ParallelOptions
from mindseed.core import Batch
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM, build
from mindseed.nn.moe import MoE
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.parallel.mesh import Mesh, make_mesh
from mindseed.parallel.parallelize import parallelize
from mindseed.train.balance import Balance
from mindseed.train.native import NativeBackend
from mindseed.train.pipelined import PipelinedBackend
from mindseed.train.step import Run, train_step

ROWS = 8                                          # of a step, over all ranks
TAG = (1, 2)                                      # a run of ids that counts more


class Dealt:
    """Rows that follow from the number of the step alone, with an uneven number of tokens, dealt to the ranks."""

    def __init__(self, vocab: int, width: int, accumulate: int, seed: int = 0) -> None:
        self.vocab, self.width, self.accumulate, self.seed, self.drawn = vocab, width, accumulate, seed, 0

    def rows(self, step: int) -> Batch:
        g = torch.Generator().manual_seed(1000 * self.seed + step)
        ids = torch.randint(self.vocab, (ROWS, self.width + 1), generator=g)
        ids[::2, self.width // 4:self.width // 4 + 2] = torch.tensor(TAG)         # where a ring of two cuts the targets
        weights = (torch.rand(ROWS, self.width, generator=g) < torch.rand(ROWS, 1, generator=g)).double()
        cuts = torch.rand(ROWS, self.width, generator=g) < 0.1                    # where documents begin
        cuts[:, 0] = True
        at = torch.arange(self.width)
        positions = at - torch.where(cuts, at, 0).cummax(1).values
        return Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=weights, positions=positions)

    def __next__(self) -> Batch:
        step, part = divmod(self.drawn, self.accumulate)
        self.drawn += 1
        size = ROWS // (self.accumulate * dist.row_ranks())
        first = (part * dist.row_ranks() + dist.row_rank()) * size
        rows = self.rows(step)
        return Batch(**{name: getattr(rows, name)[first:first + size]
                        for name in ("ids", "targets", "weights", "positions")},
                     extra={"row": torch.arange(first, first + size)})

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn // self.accumulate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"] * self.accumulate


@dataclass(frozen=True, kw_only=True)
class Case:
    config: LMConfig
    options: ParallelOptions = ParallelOptions()
    accumulate: int = 2
    width: int = 24
    optim: OptimConfig = OptimConfig(lr=1e-2)
    recompute: bool | str = False
    dtype: torch.dtype = torch.float64
    precision: str = "fp32"
    bf16: bool = False                            # weights that ZeRO gathers travel in it


def randomised(config: LMConfig, dtype: torch.dtype) -> LM:
    model = build(config).to(dtype).train()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=dtype)
    for module in model.modules():
        if isinstance(module, MoE):
            module.load.last = torch.full((module.config.experts,), 1 / module.config.experts)
    return model


def prepare(case: Case) -> tuple[Run, Mesh | None]:
    mesh = make_mesh(case.options, torch.device("cpu"))
    model = randomised(case.config, case.dtype)
    model.recompute = case.recompute
    parallelize(model, mesh, bf16=case.bf16)
    groups = parameter_groups(model, case.optim)
    objective = SFT(z_loss=1e-3, tags=(TAG,), tag_weight=3.0)
    kind = PipelinedBackend if mesh and mesh.sizes.pipe > 1 else NativeBackend
    backend = kind(model, objective, build_optimizers(groups, case.optim), max_norm=0.5, mesh=mesh,
                   precision=case.precision)
    source = Dealt(case.config.vocab_size, case.width, case.accumulate)
    return Run(source, objective, backend, schedule=lambda step: case.optim.lr, accumulate=case.accumulate,
               balance=Balance(model, mesh and mesh.pipeline)), mesh


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
            for name, p in model.named_parameters()}


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """Of the whole weights, after rounding: what ranks that train together must agree on."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained(case: Case, steps: int = 5) -> dict[str, Any]:
    """Figures of every step, and the weights at the end, as every rank knows them."""
    run, mesh = prepare(case)
    figures = []
    for step in range(steps):
        if case.precision == "fp16":              # one step overflows, the others do not
            run.backend.scaler.scale = 2.0 ** (100 if step == 1 else 10)
        figures.append(train_step(run))
    weights = whole_weights(run.backend.model)
    dist.share(None)
    return {"loss": [f["loss"] for f in figures], "norm": [f["grad_norm"] for f in figures],
            "figures": figures, "skipped": run.backend.skipped, "hash": fingerprint(weights),
            "weights": {name: x.numpy() for name, x in weights.items()}}


def single(case: Case) -> Case:
    """The same on one process."""
    return replace(case, options=ParallelOptions())
