"""Which models can be shared out in which way: every reason why a mesh does not suit a model, found before any process
waits for another.

A matrix is split over heads, features of a feed-forward, words of the vocabulary or experts, so each of these numbers
must be a multiple of its axis; what mixes tokens in another way than attention cannot be split by heads or by parts of
the sequence at all.
"""
from __future__ import annotations

from mindseed.base.mesh import STAGES, ParallelOptions
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.moe import MoEConfig


def splitting_problems(config: LMConfig, options: ParallelOptions, *, seq_len: int | None = None,
                       micro_batch: int | None = None) -> list[str]:
    """A line for everything in the model, its rows or its batches that does not go with the mesh."""
    found = []
    for name, layers in (("layer", config.layers), ("prediction module", config.mtp)):
        places: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            for line in layer_problems(layer, options):
                places.setdefault(line, []).append(i)
        found += [f"{name}{'s' * (len(numbers) > 1)} {spans(numbers)}: {line}" for line, numbers in places.items()]
    if options.expert > 1 and not any(isinstance(layer.ffn, MoEConfig) for layer in (*config.layers, *config.mtp)):
        found.append(f"parallel.expert={options.expert}: this model has no experts")
    seq_len, tensor = seq_len or config.seq_len, options.tensor
    if config.vocab_size % tensor:
        found.append(f"a vocabulary of {config.vocab_size} is no multiple of parallel.tensor={tensor}; where the "
                     f"tokenizer is still to be trained, data.vocab_size={config.vocab_size // tensor * tensor} is")
    if tensor > 1 and options.sequence and seq_len % tensor:
        found.append(f"rows of {seq_len} tokens are no multiple of parallel.tensor={tensor}, over which sequence "
                     "parallel cuts them; give parallel.sequence=false or another data.seq_len")
    if seq_len % (2 * options.context) and options.context > 1:
        found.append(f"rows of {seq_len} tokens are no multiple of {2 * options.context}: context parallel gives each "
                     "rank one piece from the front and one from the back")
    found += pipe_problems(config, options, micro_batch)
    return list(dict.fromkeys(found))


def spans(numbers: list[int]) -> str:
    """0 to 3, 5 and so on, the first few of them."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join(" to ".join(map(str, run)) for run in runs[:4]) + ", ..." * (len(runs) > 4)


def pipe_problems(config: LMConfig, options: ParallelOptions, micro_batch: int | None) -> list[str]:
    found, stages = [], options.pipe * STAGES[options.schedule]
    if options.pipe == 1:
        return found
    if len(config.layers) < stages:
        found.append(f"{len(config.layers)} layers are fewer than the {stages} stages of parallel.pipe={options.pipe} "
                     f"with the {options.schedule} schedule")
    pieces = options.pieces
    if micro_batch is not None and micro_batch % pieces:
        found.append(f"loop.micro_batch={micro_batch} cannot be cut into {pieces} pieces of equal size for the "
                     "pipeline (parallel.microbatches)")
    return found + pieces_problems(options)


def pieces_problems(options: ParallelOptions) -> list[str]:
    """What a schedule asks of the number of pieces."""
    pipe, pieces, schedule = options.pipe, options.pieces, options.schedule
    least = {"1f1b": pipe, "dualpipe-v": pipe * STAGES[schedule]}.get(schedule, 1)
    if pipe > 1 and pieces < least:
        return [f"the {schedule} schedule takes at least {least} pieces, as many as it has stages; "
                f"parallel.microbatches is {pieces}"]
    if pipe > 1 and schedule == "interleaved" and pieces % pipe:
        return [f"the interleaved schedule takes a number of pieces that is a multiple of parallel.pipe={pipe}; "
                f"parallel.microbatches is {pieces}"]
    return []


def reads_words(config: LMConfig) -> bool:
    """Whether the last stage needs the embedding too: as its head, or to look at the tokens ahead. Where it lies on
    another rank than the first, each has a copy; the gradients of both are summed, so that the copies stay the same."""
    return config.tied or bool(config.mtp)


def layer_problems(layer: LayerConfig, options: ParallelOptions) -> list[str]:
    found, mixer, ffn, tensor = [], layer.mixer, layer.ffn, options.tensor
    if isinstance(mixer, DeltaConfig):
        found += [f"linear attention cannot be split over parallel.{axis}" for axis in ("tensor", "context")
                  if getattr(options, axis) > 1]
    else:
        for what in ("heads", "kv_heads"):
            if getattr(mixer, what, tensor) % tensor:
                found.append(f"{what}={getattr(mixer, what)} is no multiple of parallel.tensor={tensor}")
    if isinstance(mixer, GQAConfig) and isinstance(mixer.positions, AlibiConfig):
        found += [f"ALiBi's slopes cannot be split over parallel.{axis}" for axis in ("tensor", "context")
                  if getattr(options, axis) > 1]
    if isinstance(ffn, MoEConfig):
        if ffn.experts % options.expert:
            found.append(f"experts={ffn.experts} is no multiple of parallel.expert={options.expert}")
        for what in ("expert_dim", "shared_dim"):
            if getattr(ffn, what) % tensor:
                found.append(f"{what}={getattr(ffn, what)} is no multiple of parallel.tensor={tensor}")
        if ffn.sequence_weight and options.context > 1:
            found.append(f"the balance within every row (sequence_weight) needs whole rows, which "
                         "parallel.context cuts")
    elif ffn.ffn_dim % tensor:
        found.append(f"ffn_dim={ffn.ffn_dim} is no multiple of parallel.tensor={tensor}")
    return found
