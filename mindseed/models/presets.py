"""Named shapes, and the one dial: from a depth, width, heads and feed-forward follow.

A preset is a family and a size: qwen3, llama3, qwen3-moe, deepseek-v3 and hybrid-linear come as toy (about 1-3M active
parameters), mini (about 26M) and small (about 64M), with a vocabulary of 6400. `toy`, `mini` and `small` alone are
Qwen3; `minimind-moe` is that family's mixture of 198M parameters, 64M of them active.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mindseed.base.errors import UserError
from mindseed.models.config import FFNConfig, LayerConfig, LMConfig, MixerConfig
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import RopeConfig

Positions = Literal["rope", "alibi", "learned", "nope"]      # nope: none at all (2305.19466)


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Multi-head latent attention instead of grouped queries; head_dim is the unrotated width and that of values."""

    kv_rank: int
    rope_dim: int
    q_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder in the words a user would choose; `lm_config` spells it out layer by layer.

    `pattern` is cycled over the layers: L looks at the whole past, S at a window, D keeps a memory of fixed size
    (gated delta rule), so that SSSL is three windowed layers to one full, DDDL a hybrid.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    theta: float = 10_000.0
    qk_norm: bool = True
    tied: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-6
    pattern: str = "L"
    window: int | None = None
    positions: Positions = "rope"
    norm: Literal["rms", "layer"] = "rms"
    placement: Literal["pre", "post", "sandwich"] = "pre"
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2"] = "swiglu"
    latent: LatentShape | None = None
    moe: MoEConfig | None = None
    dense_layers: int = 0                         # how many layers at the start stay dense in a mixture of experts
    mtp: int = 0                                  # further tokens predicted
    mtp_weight: float = 0.3

    def lm_config(self, *, vocab_size: int, seq_len: int) -> LMConfig:
        """The full configuration; a shape that cannot be built is a UserError that says which option to change."""
        if not self.pattern or set(self.pattern) - set("LSD"):
            raise UserError(f"model.pattern={self.pattern!r} is made of L (the whole past), S (a window) and D (linear "
                            "attention), such as SSSL")
        if "S" in self.pattern and self.window is None:
            raise UserError(f"model.pattern={self.pattern} has windowed layers; say how many tokens with model.window")
        if self.window is not None and "S" not in self.pattern:
            raise UserError(f"model.window={self.window} has no effect: no layer of model.pattern={self.pattern} is "
                            "an S")
        if self.mtp < 0:
            raise UserError(f"model.mtp={self.mtp} must not be negative: it is a number of further tokens")
        try:
            # One object for all layers that are alike: torch.compile asks for identity, and compiles others anew.
            mixers = {letter: self.mixer(letter) for letter in {*self.pattern, "L"}}
            layers = tuple(LayerConfig(mixer=mixers[self.pattern[i % len(self.pattern)]],
                                       ffn=self.ffn(i >= self.dense_layers)) for i in range(self.layers))
            ahead = LayerConfig(mixer=mixers["L"], ffn=self.ffn(True))
            return LMConfig(vocab_size=vocab_size, dim=self.dim, layers=layers, seq_len=seq_len, tied=self.tied,
                            norm=self.norm, placement=self.placement, norm_eps=self.norm_eps, dropout=self.dropout,
                            learned_positions=self.positions == "learned", mtp=(ahead,) * self.mtp,
                            mtp_weight=self.mtp_weight)
        except ValueError as error:
            raise UserError(f"this model cannot be built: {error}") from None

    def mixer(self, letter: str) -> MixerConfig:
        if letter == "D":
            return DeltaConfig(heads=self.heads, key_heads=self.kv_heads, key_dim=self.head_dim,
                               value_dim=self.head_dim, norm_eps=self.norm_eps)
        rope = RopeConfig(theta=self.theta, interleaved=self.latent is not None)
        if self.latent is not None:
            if letter == "S" or self.positions != "rope":
                raise ValueError("latent attention looks at the whole past and rotates; pattern L, positions rope")
            return MLAConfig(heads=self.heads, kv_rank=self.latent.kv_rank, q_rank=self.latent.q_rank,
                             plain_dim=self.head_dim, rope_dim=self.latent.rope_dim, value_dim=self.head_dim, rope=rope)
        positions = {"rope": rope, "alibi": AlibiConfig()}.get(self.positions)
        return GQAConfig(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, positions=positions,
                         qk_norm=self.qk_norm, window=self.window if letter == "S" else None, norm_eps=self.norm_eps)

    def ffn(self, mixture: bool) -> FFNConfig:
        if self.moe is not None and mixture:
            return self.moe
        if self.activation == "swiglu":
            return SwiGLUConfig(ffn_dim=self.ffn_dim)
        return MLPConfig(ffn_dim=self.ffn_dim, activation=self.activation)


TOY = Shape(layers=4, dim=192, heads=6, kv_heads=2, head_dim=32, ffn_dim=512)
MINI = Shape(layers=8, dim=512, heads=8, kv_heads=2, head_dim=64, ffn_dim=1408, theta=1e6)
SMALL = Shape(layers=8, dim=768, heads=8, kv_heads=4, head_dim=96, ffn_dim=2432, theta=1e6)


def mixture(shape: Shape, expert_dim: int) -> Shape:
    """Eight experts of which two are visited, softmax, balanced by the auxiliary loss of a global batch."""
    return replace(shape, moe=MoEConfig(experts=8, top_k=2, expert_dim=expert_dim, balance_weight=0.01))


def deepseek(shape: Shape, *, expert_dim: int, kv_rank: int, q_rank: int, head_dim: int, rope_dim: int) -> Shape:
    """Latent attention; sixteen fine experts in four groups, of which four are visited and one is shared, sigmoid,
    balanced by biases; one further token predicted."""
    moe = MoEConfig(experts=16, top_k=4, expert_dim=expert_dim, shared_dim=expert_dim, score="sigmoid", scaling=1.0,
                    groups=4, top_groups=2, bias=True, bias_rate=1e-3, sequence_weight=1e-4)
    return replace(shape, kv_heads=shape.heads, head_dim=head_dim, qk_norm=False, dense_layers=1, moe=moe, mtp=1,
                   latent=LatentShape(kv_rank=kv_rank, q_rank=q_rank, rope_dim=rope_dim))


PRESETS = {
    "toy": TOY,
    "mini": MINI,
    "small": SMALL,
    "qwen3-toy": TOY,
    "qwen3-mini": MINI,
    "qwen3-small": SMALL,
    "llama3-toy": replace(TOY, qk_norm=False, norm_eps=1e-5, theta=5e5),
    "llama3-mini": replace(MINI, qk_norm=False, norm_eps=1e-5, theta=5e5),
    "llama3-small": replace(SMALL, qk_norm=False, norm_eps=1e-5, theta=5e5),
    "qwen3-moe-toy": mixture(TOY, 256),
    "qwen3-moe-mini": mixture(MINI, 704),
    "qwen3-moe-small": mixture(SMALL, 1216),
    "deepseek-v3-toy": deepseek(TOY, expert_dim=104, kv_rank=64, q_rank=96, head_dim=32, rope_dim=16),
    "deepseek-v3-mini": deepseek(MINI, expert_dim=288, kv_rank=128, q_rank=192, head_dim=64, rope_dim=32),
    "deepseek-v3-small": deepseek(SMALL, expert_dim=480, kv_rank=192, q_rank=384, head_dim=96, rope_dim=32),
    "minimind-moe": replace(SMALL, moe=MoEConfig(experts=4, top_k=1, expert_dim=2432, renormalise=False,
                                                 balance_weight=5e-4)),
    "hybrid-linear-toy": replace(TOY, pattern="DDDL"),
    "hybrid-linear-mini": replace(MINI, pattern="DDDL"),
    "hybrid-linear-small": replace(SMALL, pattern="DDDL"),
}
FAMILIES = {"qwen3": "qwen3-toy", "llama3": "llama3-toy", "qwen3-moe": "qwen3-moe-toy",
            "deepseek-v3": "deepseek-v3-toy", "hybrid-linear": "hybrid-linear-toy"}


def preset(name: str) -> Shape:
    """A family without a size is the toy."""
    name = FAMILIES.get(name, name)
    if name not in PRESETS:
        raise UserError(f"model.preset={name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def shape_of_depth(depth: int) -> Shape:
    """The dial: `dim = 64 * depth`, heads of 64, one key/value head per two query heads, feed-forward 8/3 of dim.

    The ratio of width to depth is that of nanochat's dial; the feed-forward is rounded up to a multiple of 64.
    """
    if not 1 <= depth <= 1024:
        raise UserError(f"depth={depth} must lie between 1 and 1024")
    dim = 64 * depth
    kv_heads = depth // 2 if depth % 2 == 0 else depth
    return Shape(layers=depth, dim=dim, heads=depth, kv_heads=kv_heads, head_dim=64,
                 ffn_dim=-(-8 * dim // 3 // 64) * 64, theta=10_000.0 if dim < 512 else 1e6)


def override(shape: Shape, **changes: object) -> Shape:
    """`shape` with every change that is not None."""
    return replace(shape, **{key: value for key, value in changes.items() if value is not None})
