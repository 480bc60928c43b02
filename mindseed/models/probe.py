"""Looking into a model while it reads: what attends to what, what each layer would say next, which experts are asked.

Everything is measured on a plain forward pass, with nothing of the model replaced: hooks keep what goes into each
mixer and feed-forward and what comes out of each block, and from that the three pictures are drawn afterwards.

*Attention maps.* A map is what attention does to values that are all zero but for a one: so the very call that the
layer makes, `attend(q, k, v)`, with the identity matrix for `v`, returns the map itself, with the layer's own masks,
windows and biases. Linear attention weighs a fading memory and no tokens; it has no map.

*Logit lens* (nostalgebraist, 2020). Every block writes into one residual stream, so the last norm and the head can be
put on after any of them: what would the model say if it stopped here? After the last block it is what it does say.

*Routes.* The experts that the router of a mixture chooses for each token, and the weight of each one's answer.
"""
from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mindseed.models.lm import LM
from mindseed.nn.alibi import AlibiConfig, alibi_slopes
from mindseed.nn.attend import Layout, attend
from mindseed.nn.gqa import GQA
from mindseed.nn.mla import MLA
from mindseed.nn.moe import MoE
from mindseed.nn.rope import rotate

LOCK = threading.Lock()              # hooks hang on the model, which threads may share


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Of one mixture: T tokens, E experts of which k are visited."""

    chosen: Tensor                   # (T, k), the best first
    weights: Tensor                  # (T, k), of their answers
    scores: Tensor                   # (T, E)


@dataclass(kw_only=True)
class Probe:
    """What was seen in one pass over T tokens. Layers are counted from 0."""

    model: LM
    layout: Layout
    residual: list[Tensor] = field(default_factory=list)          # (T, D): the embedding, then after each block
    heard: dict[int, Tensor] = field(default_factory=dict)        # (1, T, D): what each mixer was given,
    told: dict[int, Tensor] = field(default_factory=dict)         # ... and what it answered
    thought_of: dict[int, Tensor] = field(default_factory=dict)   # (1, T, D): what each feed-forward was given

    @torch.no_grad()
    def attention(self, layer: int) -> Tensor | None:
        """(H, T, S): the weight that every head gives each key; rows sum to 1. None for linear attention."""
        mixer = self.model.blocks[layer].mixer
        if not isinstance(mixer, (GQA, MLA)):
            return None
        parts = gqa_parts if isinstance(mixer, GQA) else mla_parts
        q, k, _, asked = parts(mixer, self.heard[layer], self.layout)
        S, G = k.shape[1], k.shape[2]
        identity = torch.eye(S, dtype=q.dtype, device=q.device)[None, :, None].expand(1, S, G, S)
        return attend(q, k, identity, **asked)[0].transpose(0, 1)                 # (T, H, S) -> (H, T, S)

    @torch.no_grad()
    def values(self, layer: int) -> Tensor:
        """(S, H, V): what the map of `attention` weighs, so that map @ values, through `o`, is the mixer's answer."""
        mixer = self.model.blocks[layer].mixer
        _, _, v, _ = (gqa_parts if isinstance(mixer, GQA) else mla_parts)(mixer, self.heard[layer], self.layout)
        return v[0].repeat_interleave(mixer.config.heads // v.shape[2], dim=1)

    @torch.no_grad()
    def lens(self, depth: int) -> Tensor:
        """(T, V): log-probabilities of the next token after `depth` blocks; 0: of the embedding alone."""
        model = self.model
        logits = nn.functional.linear(model.norm(self.residual[depth]), (model.head or model.embed).weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    @torch.no_grad()
    def routes(self, layer: int) -> Routes | None:
        """The choices of a mixture of experts; None: the layer's feed-forward is one."""
        ffn = self.model.blocks[layer].ffn
        if not isinstance(ffn, MoE):
            return None
        weights, chosen, scores = ffn.route(ffn.logits(self.thought_of[layer][0]))
        return Routes(chosen=chosen, weights=weights, scores=scores)


@torch.no_grad()
def probe(model: LM, ids: list[int]) -> Probe:
    """Let the model read `ids` (at least one) and keep what its layers heard and told."""
    device = model.embed.weight.device
    positions = torch.arange(len(ids), device=device)[None]
    seen = Probe(model=model, layout=model.layout(positions, None))

    def entering(kept: dict[int, Tensor], layer: int):
        return lambda module, inputs: kept.__setitem__(layer, inputs[0])

    def leaving(layer: int):
        return lambda module, inputs, output: seen.told.__setitem__(layer, output)

    def passing(module, inputs, output):
        seen.residual += [output[0][0]] if seen.residual else [inputs[0][0], output[0][0]]

    with LOCK:
        hooks = []
        try:
            for i, block in enumerate(model.blocks):
                hooks += [block.register_forward_hook(passing), block.mixer.register_forward_hook(leaving(i)),
                          block.mixer.register_forward_pre_hook(entering(seen.heard, i)),
                          block.ffn.register_forward_pre_hook(entering(seen.thought_of, i))]
            model(torch.tensor([ids], device=device), positions)
        finally:
            for hook in hooks:
                hook.remove()
    return seen


def gqa_parts(mixer: GQA, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Queries (1, T, H, K), keys and values (1, S, G, K) as GQA.forward makes them without a cache, and what else it
    tells `attend`."""
    c, (B, T, _) = mixer.config, x.shape
    q = mixer.q_norm(mixer.q(x).view(B, T, -1, c.head_dim))
    k = mixer.k_norm(mixer.k(x).view(B, T, -1, c.head_dim))
    v = mixer.v(x).view(B, T, -1, c.head_dim)
    if c.rope:
        tables, pairs = layout.rotary[c.rope, c.head_dim], c.rope.interleaved
        q, k = rotate(q, *tables, interleaved=pairs), rotate(k, *tables, interleaved=pairs)
    slopes = alibi_slopes(c.heads).to(x.device) if isinstance(c.positions, AlibiConfig) else None
    return q, k, v, {"view": layout.views[c.window], "slopes": slopes}


def mla_parts(mixer: MLA, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, dict]:
    """The same of latent attention, expanded: every head has keys (P + R) and values (V) of its own."""
    c, (B, T, _) = mixer.config, x.shape
    tables = layout.rotary[c.rope, c.rope_dim]
    q = mixer.q(x) if c.q_rank is None else mixer.q_up(mixer.q_norm(mixer.q_down(x)))
    q_plain, q_rope = q.view(B, T, c.heads, -1).split([c.plain_dim, c.rope_dim], dim=-1)
    latent, k_rope = mixer.kv_down(x).split([c.kv_rank, c.rope_dim], dim=-1)
    k_plain, v = mixer.kv_up(mixer.kv_norm(latent)).unflatten(-1, (c.heads, -1)).split([c.plain_dim, c.value_dim], -1)
    q_rope = rotate(q_rope, *tables, interleaved=c.rope.interleaved)
    k_rope = rotate(k_rope[:, :, None], *tables, interleaved=c.rope.interleaved).expand(-1, -1, c.heads, -1)
    return (torch.cat([q_plain, q_rope], -1), torch.cat([k_plain, k_rope], -1), v,
            {"view": layout.views[None], "scale": c.scale})
