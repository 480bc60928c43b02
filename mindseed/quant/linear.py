"""A Linear whose weight is kept in NF4: the frozen base of QLoRA (2305.14314).

The packed codes are all that stays in memory. A product unpacks the matrix, multiplies and throws it away; what
autograd keeps for the backward pass is the codes again, so the dense matrix lives twice for a moment instead of all the
time. The weight takes no gradient; x does, and an adapter beside it learns (`Linear.adapter`).

    print(quantize_model(model))                  first
    add_adapter(model, LoRAConfig(rank=8))        then what learns
    unquantize(model)                             dense again: to merge the adapter, to save, to decode fast

In a state dict such a Linear is `weight` (codes, uint8), `scales`, and under double quantisation `spread` and `mean`,
as nf4.Packed has them. Casts of the model (`model.bfloat16()`) leave them alone.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mindseed.base.errors import UserError
from mindseed.base.log import bytes_text
from mindseed.models.lm import LM
from mindseed.nn.linear import Linear, WideProduct, product_dtype
from mindseed.nn.linear_attention import DeltaNet
from mindseed.nn.moe import MoE
from mindseed.quant.nf4 import Packed, dequantize, quantize

READ = {MoE: ("router",), DeltaNet: ("a", "b")}   # tiny Linears whose weights are read by those who own them


class NF4Linear(Linear):
    """What `linear` computes, with its weight in four bits. The adapter goes along."""

    def __init__(self, linear: Linear, *, double: bool = True) -> None:
        nn.Module.__init__(self)                  # Linear's would make a dense weight
        self.in_features, self.out_features, self.role = linear.in_features, linear.out_features, linear.role
        self.adapter = linear.adapter
        for name, x in zip(("weight", "scales", "spread", "mean"), quantize(linear.weight, double=double)):
            self.register_parameter(name, None if x is None else nn.Parameter(x, requires_grad=False))
        self.register_parameter("bias", None)
        self.times = torch.compiler.disable(NF4Product.apply)      # tables and buffers are nothing to compile
        self.train(linear.training)

    @property
    def packed(self) -> Packed:
        return Packed(self.weight, self.scales, self.spread, self.mean)

    def product(self, x: Tensor) -> Tensor:
        return self.times(x, (self.out_features, self.in_features), *self.packed)

    def matrix(self) -> Tensor:
        """(out_dim, in_dim) in float32, made anew at every call."""
        return dequantize(self.packed, (self.out_features, self.in_features))

    def _apply(self, fn, recurse: bool = True):
        """Moves to other devices are for all parts, casts for none."""
        before = {name: p.data for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype != before[name].dtype:
                p.data = before[name].to(p.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"


class NF4Product(torch.autograd.Function):
    """x W^T with W unpacked anew in both directions: to the bit what training computes with the dense W."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int], *packed: Tensor | None) -> Tensor:
        kind = x.device.type
        ctx.shape, ctx.dtype = shape, product_dtype(x)
        ctx.save_for_backward(*packed)
        weight = dequantize(Packed(*packed), shape, ctx.dtype, passing=True)
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            if ctx.dtype != narrow:
                return WideProduct.apply(x, weight, narrow)
            return F.linear(x.to(narrow), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        weight = dequantize(Packed(*ctx.saved_tensors), ctx.shape, ctx.dtype, passing=True)
        return (g.to(ctx.dtype) @ weight).to(g.dtype), *(None,) * 5


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """What a model was made of and is made of now. `rows` are for `base.log.table`, under `HEADER`."""

    rows: list[list[str]]
    matrices: int
    before: int                                   # bytes of all weights
    after: int

    HEADER = ["matrices", "quantised", "bytes before", "after", "bits per weight"]

    def __str__(self) -> str:
        return (f"{self.matrices} matrices in NF4; all weights: {bytes_text(self.before)} before, "
                f"{bytes_text(self.after)} now")


def quantisable(model: LM) -> dict[str, Linear]:
    """Every Linear of the blocks and of the modules for further tokens, by name, but for those in READ. Stacked experts
    are none: what multiplies with them wants them whole."""
    found = {}
    for name, module in model.named_modules():
        place, _, last = name.rpartition(".")
        if type(module) is Linear and name.startswith(("blocks.", "mtp.")) and (
                last not in READ.get(type(model.get_submodule(place)), ())):
            found[name] = module
    return found


def quantize_model(model: LM, targets: tuple[str, ...] = (), *, double: bool = True) -> Quantised:
    """Put Linears into NF4 where they are, and freeze them. `targets` are last names (q, gate) or patterns of whole
    names (blocks.*.mixer.q) [all that can be].

    Before adapters are added and before optimisers are made, which would hold on to the dense weights. UserError for a
    target that matches nothing, for a model with adapters, and for weights that cannot be quantised.
    """
    there, before, kinds = quantisable(model), weight_bytes(model), {}
    for target in targets:
        if not any(meant(name, target) for name in there):
            raise UserError(f"the target {target!r} matches no matrix that can be quantised; there are "
                            f"{', '.join(dict.fromkeys(map(general, there))) or 'none'}")
    if adapted := [name for name, linear in there.items() if linear.adapter is not None]:
        raise UserError(f"{adapted[0]} has an adapter already; quantise the base first, then add adapters")
    for name, linear in there.items():
        kind = kinds.setdefault(general(name), [0, 0, 0, 0, 0])                   # quantised, of, weights, bytes, bytes
        now: Linear = linear
        if not targets or any(meant(name, target) for target in targets):
            try:
                now = NF4Linear(linear, double=double)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            put(model, name, now)
        new = (now is not linear, 1, linear.weight.numel(), linear.weight.nbytes, weight_bytes(now))
        kinds[general(name)] = [a + b for a, b in zip(kind, new)]
    rows = [[kind, f"{done} of {of}", bytes_text(then), bytes_text(now), f"{8 * now / count:.2f}"]
            for kind, (done, of, count, then, now) in kinds.items()]
    after = weight_bytes(model)
    left = before - sum(then for *_, then, _ in kinds.values())
    rows.append(["embeddings, head, norms, routers, experts", "never", bytes_text(left), bytes_text(left), ""])
    return Quantised(rows=rows, matrices=sum(kind[0] for kind in kinds.values()), before=before, after=after)


@torch.no_grad()
def unquantize(model: LM, dtype: torch.dtype | None = None) -> int:
    """Dense weights again [in the dtype of the embedding], adapters kept; returns how many. What quantising took off
    them does not come back. A weight with an adapter stays frozen."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    for name, linear in found.items():
        with torch.device("meta"):
            dense = Linear(linear.in_features, linear.out_features, role=linear.role)
        dense.weight = nn.Parameter(linear.matrix().to(dtype or model.embed.weight.dtype),
                                    requires_grad=linear.adapter is None)
        dense.adapter = linear.adapter
        put(model, name, dense.train(linear.training))
    return len(found)


def put(model: LM, name: str, linear: Linear) -> None:
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, linear)


def weight_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def meant(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or name.rpartition(".")[2] == target


def general(name: str) -> str:
    """blocks.3.mixer.q -> blocks.*.mixer.q"""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
