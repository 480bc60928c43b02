"""tokenizer.json, the file in which the Hugging Face world keeps tokenizers: in and out.

Out: `save_tokenizer` writes tokenizer.json and tokenizer_config.json, which AutoTokenizer, vLLM and the converters of
llama.cpp read. In: `load_tokenizer` takes our own files and any complete byte-level BPE (Qwen, Llama 3, GPT-2,
MiniMind), with its own way of cutting text. What changes ids and is not expressible here is refused by name: a
tokenizer that is almost right is the kind of fault nobody finds.

Added tokens of every kind become `specials`: they never arise from text. Those the file calls non-special (Qwen's
`<think>`) are our `visible` ones, which decoding keeps. Post-processors (adding a BOS) are not read: whoever builds
a document says where it begins.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindseed.base.errors import UserError
from mindseed.base.files import read_json, write_json
from mindseed.tokenizers.base import PAD, ByteLevel, document_marks
from mindseed.tokenizers.bpe import BPE, STAND_IN, spell_bytes
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.split import GPT2, Splitter, by_pattern

BYTE_OF = {char: byte for byte, char in STAND_IN.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CUTS_ONLY = {"Split", "Digits", "Punctuation"}    # pre-tokenizers that cut and keep every character


# ------------------------------------------------------------------------------------------------------------- out

def save_tokenizer(tokenizer: ByteLevel, directory: Path | str, *, chat_template: str | None = None,
                   max_len: int | None = None, marks: Mapping[str, str] | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json. `max_len` is the context in tokens that the model allows; `marks`
    are the spellings of bos_token, eos_token and so on [what stands around a document]."""
    directory = Path(directory)
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
                              "add_eos_token": False, "clean_up_tokenization_spaces": False}
    begin, end = document_marks(tokenizer.specials) or (None, None)
    for name, spelling in (marks or {"pad_token": PAD, "bos_token": begin, "eos_token": end}).items():
        if spelling in tokenizer.specials:
            config[name] = spelling
    if max_len is not None:
        config["model_max_length"] = max_len
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_json(directory / "tokenizer_config.json", config)


def tokenizer_json(tokenizer: ByteLevel) -> dict[str, Any]:
    """The content of tokenizer.json. Special tokens are also in the model's vocabulary, which fixes their ids."""
    spec = tokenizer.spec()
    spell = {id: spell_bytes(token) for id, token in tokenizer.tokens.items()}
    vocab = {**tokenizer.specials, **{spelling: id for id, spelling in spell.items()}}
    if len(vocab) < len(spell) + len(tokenizer.specials):
        raise UserError("a special token and an ordinary token have the same spelling; tokenizer.json cannot hold both")
    added = [{"id": id, "content": spelling, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": spelling not in tokenizer.visible}
             for spelling, id in sorted(tokenizer.specials.items(), key=lambda item: item[1])]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if spec["nfc"] else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*spec["splits"], BYTE_LEVEL]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": spec["whole_words"],
                  "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                  "merges": [[spell[a], spell[b]] for a, b in spec["merges"]]},
    }


# -------------------------------------------------------------------------------------------------------------- in

def load_tokenizer(path: Path | str) -> ByteLevel:
    """The tokenizer in a tokenizer.json, or in the directory that holds one.

    Its ids of plain text are those of the Rust library without special tokens; with `allow_special` they are the
    library's ids of the same text. UserError for anything but a complete byte-level BPE.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") and path.exists():
        raise UserError(f"{path} holds weights; what is wanted is a folder with a tokenizer.json. A bare state dict "
                        f"becomes a model directory by `mindseed convert {path} DIRECTORY`")
    data = read_json(path)
    try:
        tokenizer = parse_tokenizer(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer.json as we know it ({type(error).__name__}: {error})") from None
    byte = Byte(tuple(tokenizer.specials), tokenizer.visible) if not tokenizer.merges else None
    return byte if byte and byte.hash() == tokenizer.hash() else tokenizer


def parse_tokenizer(data: dict[str, Any]) -> BPE:
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"the model is {model['type']}; only byte-level BPE can be loaded")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise UserError(f"the BPE option {option}={model[option]!r} is not supported; only plain byte-level BPE is")
    specials, visible = parse_added(data.get("added_tokens") or [], nfc=data.get("normalizer") is not None)
    tokens = {id: to_bytes(spelling) for spelling, id in model["vocab"].items() if spelling not in specials}
    merges = parse_merges(model["merges"], model["vocab"])
    for rank, (a, b) in enumerate(merges):
        if a not in tokens or b not in tokens:
            raise UserError(f"merge {rank} uses a special token, so plain text could make it; remove that merge")
    return BPE(tokens, merges, specials=specials, visible=visible, splitter=parse_splitter(data),
               whole_words=bool(model.get("ignore_merges")))


def parse_added(added: list[dict[str, Any]], *, nfc: bool) -> tuple[dict[str, int], frozenset[str]]:
    """(specials, visible). What makes an added token match more or less than its spelling is refused."""
    for token in added:
        spelling = token["content"]
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")) or nfc and token.get("normalized"):
            raise UserError(f"the added token {spelling!r} matches more than its spelling (lstrip, rstrip, single_word "
                            "or normalized is set), which is not supported")
        if not token.get("special") and not spelling.strip():
            raise UserError(f"the added token {spelling!r} is ordinary text (white space), which only the model's own "
                            "vocabulary may hold here")
    specials = {token["content"]: token["id"] for token in sorted(added, key=lambda token: token["id"])}
    return specials, frozenset(token["content"] for token in added if not token.get("special"))


def parse_merges(merges: list[str | list[str]], vocab: dict[str, int]) -> list[tuple[int, int]]:
    """Merges as ids; the file has them as "a b" (older) or as ["a", "b"]."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    for rank, pair in enumerate(pairs):
        if len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab:
            raise UserError(f"merge {rank}, {merges[rank]!r}, is not a pair of tokens of the vocabulary")
    return [(vocab[a], vocab[b]) for a, b in pairs]


def parse_splitter(data: dict[str, Any]) -> Splitter:
    """The cutting steps before ByteLevel. ByteLevel with `use_regex` cuts too: it is GPT-2's pattern, then bytes."""
    normalizer = data.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise UserError(f"the normalizer {normalizer['type']} is not supported; only NFC or none is")
    pre = data.get("pre_tokenizer") or {"type": "none"}
    steps = list(pre["pretokenizers"]) if pre["type"] == "Sequence" else [pre]
    last = steps.pop() if steps else {"type": "none"}
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise UserError(f"the pre-tokenizer ends in {last['type']}; only one ending in ByteLevel "
                        "with add_prefix_space=false can be loaded")
    for step in steps:
        if step["type"] not in CUTS_ONLY or "Removed" in str(step.get("behavior")):
            raise UserError(f"the pre-tokenizer step {step['type']} is not supported; only steps that cut text "
                            f"and keep all of it are ({', '.join(sorted(CUTS_ONLY))})")
    if last.get("use_regex", True):
        steps.append(by_pattern(GPT2))
    return Splitter(tuple(steps), nfc=normalizer is not None)


def to_bytes(spelling: str) -> bytes:
    try:
        return bytes(BYTE_OF[char] for char in spelling)
    except KeyError:
        raise UserError(f"the token {spelling!r} is not spelt in byte-level characters; "
                        "only byte-level BPE can be loaded") from None
