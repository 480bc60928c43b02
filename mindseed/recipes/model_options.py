"""The options that say what a model is made of: a preset or a depth, with whatever is given instead of its parts."""
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Iterator, Literal

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.models.config import LMConfig
from mindseed.models.extend import extended
from mindseed.models.presets import PRESETS, LatentShape, Positions, Shape, override, preset, shape_of_depth
from mindseed.nn.moe import MoEConfig


def given(options: object) -> dict[str, Any]:
    """The options of a section that were asked for: those that are not None."""
    return {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) is not None}


@dataclass(frozen=True, kw_only=True)
class MoEOptions:
    experts: int | None = option(None, help="experts of a layer; given, the feed-forward is a mixture [derived: none]",
                                 elsewhere=("num_experts", "n_routed_experts"))
    top_k: int | None = option(None, help="experts that a token visits [derived: 2]",
                               elsewhere=("num_experts_per_tok",))
    expert_dim: int | None = option(None, help="width of one expert [derived: model.ffn_dim / top_k]",
                                    elsewhere=("moe_intermediate_size",))
    shared_dim: int | None = option(None, help="width of the feed-forward that every token visits; 0: none [derived]")
    score: Literal["softmax", "sigmoid"] | None = option(None, help="how the router scores [derived: softmax]")
    renormalise: bool | None = option(None, help="weights of the chosen experts sum to 1 [derived: true]")
    scaling: float | None = option(None, help="factor on the weights [derived: 1]")
    groups: int | None = option(None, help="groups in which experts stand [derived: 1]")
    top_groups: int | None = option(None, help="groups that compete [derived: 1]")
    bias: bool | None = option(None, help="balance by moving biases, without an auxiliary loss [derived]")
    bias_rate: float | None = option(None, help="how far a bias moves in a step [derived: 0.001]")
    balance_weight: float | None = option(None, help="auxiliary loss over the global batch [derived: 0]")
    sequence_weight: float | None = option(None, help="auxiliary loss within every row [derived: 0]")
    z_weight: float | None = option(None, help="squared log partition function of the router [derived: 0]")

    def config(self, shape: Shape) -> MoEConfig | None:
        """That of the preset with what was overridden; None if nothing asks for a mixture."""
        if shape.moe is not None:
            return replace(shape.moe, **given(self))
        return self.mixture(shape.ffn_dim) if given(self) else None

    def mixture(self, ffn_dim: int) -> MoEConfig:
        """A new one in place of feed-forwards of width `ffn_dim`."""
        asked = given(self)
        if "experts" not in asked:
            raise UserError(f"model.moe.{next(iter(asked))} has no effect without model.moe.experts")
        top_k = asked.get("top_k", min(2, asked["experts"]))
        if top_k < 1:
            raise UserError(f"model.moe.experts={asked['experts']} and model.moe.top_k={top_k} must be at least 1")
        balance = {} if asked.get("bias") or "balance_weight" in asked else {"balance_weight": 0.01}
        return MoEConfig(**{"top_k": top_k, "expert_dim": max(1, ffn_dim // max(1, top_k))} | balance | asked)


@dataclass(frozen=True, kw_only=True)
class MLAOptions:
    kv_rank: int | None = option(None, help="width of the latent; given, attention is latent [derived: none]")
    q_rank: int | None = option(None, help="width of the queries' bottleneck [derived: none]")
    rope_dim: int | None = option(None, help="width of the rotated part of keys [derived: head_dim / 2]")

    def shape(self, shape: Shape) -> LatentShape | None:
        asked = given(self)
        if shape.latent is not None:
            return replace(shape.latent, **asked)
        if not asked:
            return None
        if "kv_rank" not in asked:
            raise UserError(f"model.mla.{next(iter(asked))} has no effect without model.mla.kv_rank")
        return LatentShape(**{"rope_dim": max(2, shape.head_dim // 4 * 2)} | asked)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    start: str | None = option(None, help="model directory to start from, for more pretraining or for fine-tuning; "
                                          "none: random weights", alias="init",
                               elsewhere=("from_weight", "init_from", "model_name_or_path"))
    extend: bool = option(False, help="stretch the rotary positions of model.start (YaRN) to a data.seq_len longer "
                                      "than it was trained on")
    preset: str | None = option(None, help=f"named shape: {', '.join(PRESETS)} [derived: toy, or from --depth]",
                                elsewhere=("use_moe minimind-moe",))
    layers: int | None = option(None, help="number of blocks [derived]", elsewhere=("num_hidden_layers", "n_layer"))
    dim: int | None = option(None, help="width of the residual stream [derived]", elsewhere=("hidden_size", "n_embd"))
    heads: int | None = option(None, help="query heads [derived]", elsewhere=("num_attention_heads", "n_head"))
    kv_heads: int | None = option(None, help="key/value heads; divides heads [derived]",
                                  elsewhere=("num_key_value_heads",))
    head_dim: int | None = option(None, help="width of a head; even [derived]")
    ffn_dim: int | None = option(None, help="width of the feed-forward [derived]", elsewhere=("intermediate_size",))
    theta: float | None = option(None, help="base of the rotary wavelengths [derived]", elsewhere=("rope_theta",))
    tied: bool | None = option(None, help="the head shares the embedding's matrix [derived: true]",
                               elsewhere=("tie_word_embeddings",))
    qk_norm: bool | None = option(None, help="normalise queries and keys [derived: true]")
    pattern: str | None = option(None, help="kinds of layers, cycled: L the whole past, S a window, D linear "
                                            "attention, such as SSSL [derived: L]")
    window: int | None = option(None, help="tokens that a windowed layer sees [derived]")
    positions: Positions | None = option(None, help="how order is known; nope: not at all [derived: rope]")
    norm: Literal["rms", "layer"] | None = option(None, help="kind of normalisation [derived: rms]")
    placement: Literal["pre", "post", "sandwich"] | None = option(None, help="where it stands [derived: pre]")
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2"] | None = option(
        None, help="of the feed-forward [derived: swiglu]")
    mtp: int | None = option(None, help="further tokens to predict while training [derived: 0]")
    mtp_weight: float | None = option(None, help="weight of their mean loss [derived: 0.3]")
    dropout: float = option(0.0, help="dropout on the embedding and on what each half of a block adds")
    moe: MoEOptions = field(default_factory=MoEOptions)
    mla: MLAOptions = field(default_factory=MLAOptions)

    def shape(self, depth: int | None) -> Shape:
        """The decoder these options ask for: a preset or a depth, with what was overridden."""
        if depth is not None and self.preset is not None:
            raise UserError(f"--depth {depth} and --model.preset {self.preset} both choose a shape; give one of them")
        base = shape_of_depth(depth) if depth is not None else preset(self.preset or "toy")
        if self.extend and self.start is None:
            raise UserError("model.extend has no effect without model.start")
        apart = ("start", "extend", "preset", "moe", "mla")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        shape = override(base, **plain)
        try:
            shape = override(shape, moe=self.moe.config(shape), latent=self.mla.shape(shape))
        except ValueError as error:
            raise UserError(f"this model cannot be built: {error}") from None
        for name, why in self.idle(shape, base):
            raise UserError(f"model.{name} has no effect: {why}")
        return shape

    def going_on(self, config: LMConfig, seq_len: int) -> LMConfig:
        """What becomes of the config of `start` when it is trained on rows of `seq_len`; a mixture is asked for apart.
        """
        config = replace(config, dropout=self.dropout)
        if self.extend:
            config = extended(config, seq_len)
        return replace(config, seq_len=max(config.seq_len, seq_len))

    def upcycling(self) -> MoEConfig | None:
        """The mixture into which the dense layers of `start` are to be made, if they are."""
        if self.moe.expert_dim is not None:
            raise UserError(f"model.moe.expert_dim={self.moe.expert_dim} has no effect on a model that is there: its "
                            "experts begin as copies of its feed-forwards, as wide as they are")
        return self.moe.mixture(ffn_dim=1) if self.moe != MoEOptions() else None

    def idle(self, shape: Shape, base: Shape) -> Iterator[tuple[str, str]]:
        """Options that were given and change nothing about `shape`, which came from `base`, and why."""
        kinds = set((shape.pattern * max(shape.layers, 1))[:max(shape.layers, 1)]) | set("L" if shape.mtp else "")
        attends, latent, moe = bool(kinds & set("LS")), shape.latent is not None, shape.moe
        mixed = moe is not None and not shape.dense_layers
        rules = (
            ("theta", shape.positions != "rope" or not attends, "no layer has rotary positions"),
            ("qk_norm", latent or not attends, f"{'latent' if latent else 'linear'} attention norms in its own way"),
            ("kv_heads", latent and "D" not in kinds, "latent attention gives every query head its keys and values"),
            ("positions", not attends and shape.positions != "learned", "linear attention knows order by itself"),
            ("activation", mixed, "every feed-forward is a mixture, and experts are SwiGLU"),
            ("ffn_dim", mixed and (base.moe is not None or self.moe.expert_dim is not None),
             "every feed-forward is a mixture; say model.moe.expert_dim"),
            ("mtp_weight", not shape.mtp, "nothing further is predicted; say model.mtp"))
        yield from ((name, why) for name, idle, why in rules if idle and getattr(self, name) is not None)
        if moe is not None and self.moe.bias_rate is not None and not moe.bias:
            yield "moe.bias_rate", "no biases balance the experts; say model.moe.bias"
