"""Linear attention with a gated delta rule (Gated DeltaNet, 2412.06464): a memory of fixed size instead of a cache.

Every head keeps a matrix S (K x V) that maps keys to values. A token first lets it fade by a gate a in (0, 1), then
corrects what it holds for the token's key k by a share b in (0, 1) of the error, and reads it with its query q:

    S <- a S + b k (v - a S^T k)^T        y = S^T q

(With `delta` off nothing is corrected, only added: S <- a S + b k v^T, gated linear attention.) That is the recurrent
form, for decoding: constant work and memory per token. Training wants products of matrices: in the *chunked* form,
C tokens at a time, the corrections u of a chunk solve a triangular system, since each depends on those before it:

    (I + A) U = b (V - e^G K S_0)         A[t, i] = b_t e^(G_t - G_i) (k_t . k_i) for i < t,    G = cumulative log a
    Y = e^G Q S_0 + (e^(G_t - G_i) (q_t . k_i) for i <= t) U
    S_C = e^(G_C) S_0 + (e^(G_C - G_i) k_i)^T U

Before that, queries, keys and values pass through a short causal convolution along time, since one matrix cannot do
without any sense of neighbourhood; there are no other positions. Afterwards heads are normalised and gated by z.
The names of the parts follow Qwen3-Next, which uses this layer.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.core import LayerState, StateSpec
from mindseed.nn.attend import Layout
from mindseed.nn.linear import Linear
from mindseed.nn.norm import RMSNorm

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    heads: int                       # value heads: each has its own memory
    key_heads: int                   # query/key heads; heads is a multiple
    key_dim: int
    value_dim: int
    conv: int = 4                    # tokens that the convolution sees
    delta: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.key_heads < 1 or self.heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of key_heads={self.key_heads}")
        if min(self.key_dim, self.value_dim, self.conv) < 1:
            raise ValueError(f"key_dim={self.key_dim}, value_dim={self.value_dim} and conv={self.conv} must be at "
                             "least 1")


class DeltaNet(nn.Module):
    """(B, T, D) -> (B, T, D). H value heads, G key heads, K key width, V value width. Pads stand behind the tokens."""

    def __init__(self, dim: int, config: DeltaConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = Linear(dim, c.key_heads * c.key_dim, role="column")
        self.k = Linear(dim, c.key_heads * c.key_dim, role="column")
        self.v = Linear(dim, c.heads * c.value_dim, role="column")
        self.z = Linear(dim, c.heads * c.value_dim, role="column")                # gate on the output
        self.a = Linear(dim, c.heads, role="column")                              # how much the memory fades
        self.b = Linear(dim, c.heads, role="column")                              # how much is corrected
        self.conv = nn.Parameter(torch.empty(2 * c.key_heads * c.key_dim + c.heads * c.value_dim, 1, c.conv))
        self.fade = nn.Parameter(torch.empty(c.heads))                            # log of the rate of fading
        self.fade_bias = nn.Parameter(torch.empty(c.heads))
        self.norm = RMSNorm(c.value_dim, c.norm_eps)
        self.o = Linear(c.heads * c.value_dim, dim, role="row")

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Rates between 1 and 16 with a step near 0.01 at first: memories of some ten to some hundred tokens."""
        self.conv.uniform_(-1, 1, generator=generator).div_(self.config.conv ** 0.5)
        self.fade.uniform_(1, 16, generator=generator).log_()
        step = torch.empty_like(self.fade_bias).uniform_(-7, -2.3, generator=generator).exp_()
        self.fade_bias.copy_(step + torch.log(-torch.expm1(-step)))               # softplus of it is `step`

    def state_spec(self) -> StateSpec:
        c = self.config
        return StateSpec(per_seq={"memory": (c.heads, c.key_dim, c.value_dim), "recent": (c.conv - 1, len(self.conv))})

    def add_to(self, layout: Layout, dtype: torch.dtype) -> None:
        """Asks nothing: positions alone say where a document begins."""

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        mixed = torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)              # (B, T, channels)
        mixed = F.silu(self.convolve(mixed, layout.positions, state))
        G, K, H, V = c.key_heads, c.key_dim, c.heads, c.value_dim
        q, k, v = mixed.split([G * K, G * K, H * V], dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            q, k = (unit(y.view(B, T, G, K).to(wide)).repeat_interleave(H // G, dim=2) for y in (q, k))
            log_a = -self.fade.to(wide).exp() * F.softplus(self.a(x.to(self.a.weight.dtype)).to(wide) + self.fade_bias)
            b = self.b(x.to(self.b.weight.dtype)).to(wide).sigmoid()              # (B, T, H)
            memory = None if state is None else state.get("memory")
            form = recurrent if T == 1 and state is not None else chunked
            y, memory = form(q * K ** -0.5, k, v.view(B, T, H, V).to(wide), log_a, b, layout.positions, memory,
                             delta=c.delta)
        if state is not None:
            state.put("memory", memory)
        return self.o((self.norm(y.to(x.dtype)) * F.silu(self.z(x).view(B, T, H, V))).reshape(B, T, -1))

    def convolve(self, x: Tensor, positions: Tensor, state: LayerState | None) -> Tensor:
        """Causal convolution along time that sees no other document: (B, T, channels) -> the same."""
        before = self.config.conv - 1
        recent = None if state is None else state.get("recent")
        if recent is None:
            recent = x.new_zeros(x.shape[0], before, x.shape[2])
        seen = torch.cat([recent, x], dim=1)                                      # (B, before + T, channels)
        weight = self.conv[:, 0].to(x.dtype)                                      # (channels, conv)
        y = x * weight[:, -1]
        for back in range(1, before + 1):
            inside = (positions >= back)[..., None]                               # the document is that old
            y = y + seen[:, before - back:seen.shape[1] - back] * inside * weight[:, -1 - back]
        if state is not None:                                                     # the last tokens that are no pads
            last = (positions >= 0).sum(1, keepdim=True) + torch.arange(before, device=x.device)
            state.put("recent", seen.gather(1, last[..., None].expand(-1, -1, x.shape[2])))
        return y


def unit(x: Tensor) -> Tensor:
    """x (..., K) at length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, positions: Tensor, memory: Tensor | None, *,
              delta: bool = True) -> tuple[Tensor, Tensor]:
    """Token by token. q, k (B, T, H, K), v (B, T, H, V), log_a, b (B, T, H), memory (B, H, K, V) or None for none yet
    -> (y (B, T, H, V), memory). A document begins at position 0; position -1 is a pad, which leaves no trace."""
    B, T, H, K = q.shape
    S = v.new_zeros(B, H, K, v.shape[-1]) if memory is None else memory
    out = []
    for t in range(T):
        real, first = (positions[:, t] >= 0)[:, None, None, None], (positions[:, t] == 0)[:, None, None, None]
        faded = torch.where(first, torch.zeros_like(S), S * log_a[:, t, :, None, None].exp())
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], faded) if delta else v[:, t]
        S = torch.where(real, faded + k[:, t, :, :, None] * (b[:, t, :, None] * error)[:, :, None], S)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(out, dim=1), S


def chunked(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, positions: Tensor, memory: Tensor | None, *,
            delta: bool = True, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The same by chunks; see the head of this file. Shapes as in `recurrent`."""
    B, T, H, K = q.shape
    n = -(-T // chunk)
    real = positions >= 0
    b, log_a = b * real[..., None], log_a * real[..., None]                       # pads change nothing
    q, k, v, log_a, b = (in_chunks(x, n, chunk) for x in (q, k, v, log_a[..., None], b[..., None]))  # (B, H, n, C, .)
    document = F.pad((positions == 0).long(), (0, n * chunk - T)).view(B, n, chunk).cumsum(-1)[:, None]  # in the chunk
    same = document[..., :, None] == document[..., None, :]                       # (B, 1, n, C, C)
    carried = (document == 0)[..., None]                                          # it began before this chunk
    lasting = (document == document[..., -1:])[..., None]                         # (B, 1, n, C, 1)

    G = log_a.cumsum(-2)                                                          # (B, H, n, C, 1)
    decay = (G - G.mT).masked_fill(~same.tril(), -torch.inf).exp()                # (B, H, n, C, C)
    from_memory = G.exp() * carried
    U, W = b * v, b * from_memory * k if delta else torch.zeros_like(k)           # corrections: U - W S_0
    if delta:
        A = (b * decay * (k @ k.mT)).tril(-1)
        U, W = torch.linalg.solve_triangular(A, torch.cat([U, W], -1), upper=False, unitriangular=True).split(
            [v.shape[-1], K], dim=-1)
    within = decay * (q @ k.mT)
    reading = from_memory * q
    keeping = ((G[..., -1:, :] - G).exp() * lasting * k).mT                       # (B, H, n, K, C)
    fading = from_memory[..., -1:, :]

    S = v.new_zeros(B, H, K, v.shape[-1]) if memory is None else memory
    out = []
    for i in range(n):
        u = U[:, :, i] - W[:, :, i] @ S                                           # (B, H, C, V)
        out.append(reading[:, :, i] @ S + within[:, :, i] @ u)
        S = fading[:, :, i] * S + keeping[:, :, i] @ u
    return torch.cat(out, dim=2).transpose(1, 2)[:, :T], S


def in_chunks(x: Tensor, n: int, chunk: int) -> Tensor:
    """(B, T, H, K) -> (B, H, n, chunk, K), with zeros after the end."""
    x = F.pad(x, (0, 0, 0, 0, 0, n * chunk - x.shape[1]))
    return x.unflatten(1, (n, chunk)).permute(0, 3, 1, 2, 4)
