"""A model's architecture in words, for the first lines of a run: one phrase per kind of layer."""
from __future__ import annotations

from mindseed.models.config import FFNConfig, LMConfig, MixerConfig
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import RopeConfig


def describe(config: LMConfig) -> str:
    """'4 layers, dim 192, ...' and, where layers differ, each kind with the layers it stands in."""
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(config.layers):
        kinds.setdefault(f"{mixer_words(layer.mixer)}, {ffn_words(layer.ffn)}", []).append(i)
    body = "; ".join(words if len(kinds) == 1 else f"layers {ranges(at)}: {words}" for words, at in kinds.items())
    extras = [f"{config.norm} norm", f"{config.placement}-norm"] if (config.norm, config.placement) != (
        "rms", "pre") else []
    extras += ["learned positions"] if config.learned_positions else []
    extras += [f"predicts {len(config.mtp)} further token{'s' * (len(config.mtp) > 1)}"] if config.mtp else []
    return ", ".join([f"{len(config.layers)} layers, dim {config.dim}, {body}", *extras,
                      f"vocabulary {config.vocab_size}, context {config.seq_len}"])


def mixer_words(c: MixerConfig) -> str:
    if isinstance(c, MLAConfig):
        widths = f"{c.heads} heads of {c.plain_dim}+{c.rope_dim}, latent {c.kv_rank}"
        return f"latent attention, {widths}{rope_words(c.rope)}"
    if isinstance(c, DeltaConfig):
        rule = "gated delta rule" if c.delta else "gated linear attention"
        return f"{rule}, {c.heads} heads of {c.key_dim}x{c.value_dim}"
    assert isinstance(c, GQAConfig)
    words = f"{c.heads} heads of {c.head_dim} ({c.kv_heads} kv)"
    words += f", window {c.window}" if c.window else ""
    return words + (", ALiBi" if isinstance(c.positions, AlibiConfig) else rope_words(c.rope))


def rope_words(c: RopeConfig | None) -> str:
    if c is None:
        return ", no rotation"
    kind = type(c.scaling).__name__.removesuffix("Scaling").lower()
    return "" if c.scaling is None else f", {kind} x{c.scaling.factor:g}"


def ffn_words(c: FFNConfig) -> str:
    if isinstance(c, MoEConfig):
        shared = f" + shared {c.shared_dim}" if c.shared_dim else ""
        return f"{c.top_k} of {c.experts} experts of {c.expert_dim}{shared} ({c.score})"
    return f"ffn {c.ffn_dim}" + (f" ({c.activation})" if isinstance(c, MLPConfig) else "") if isinstance(
        c, (SwiGLUConfig, MLPConfig)) else type(c).__name__


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)
