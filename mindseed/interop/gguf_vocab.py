"""The tokenizer inside a GGUF file, and the Modelfile that tells Ollama how to talk to the model.

llama.cpp knows the regular expressions that cut text before merging by name only, so a tokenizer that cuts in another
way is refused. Markup such as `<think>` is of its type "user defined", which it shows in answers, and, unlike us,
also recognises in plain text; control tokens arise there only where a program asks for it. It composes no characters
first (NFC), which changes the ids of text that is not composed yet.
"""
from __future__ import annotations

import json
from typing import Any

from mindseed.base.errors import UserError
from mindseed.core import Tokenizer
from mindseed.interop.directory import Loaded
from mindseed.tokenizers.base import BOS, EOS, PAD
from mindseed.tokenizers.bpe import spell_bytes
from mindseed.tokenizers.chat import JINJA
from mindseed.tokenizers.split import GPT2, QWEN, by_pattern

LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {                                # (regular expression, whole words first) -> llama.cpp's name for both
    (QWEN, False): "qwen2", (GPT2, False): "gpt-2", (LLAMA3, True): "llama-bpe", (LLAMA3, False): "smaug-bpe"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5            # its types of tokens
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "repeat_penalty"}           # ours -> Ollama's


def pre_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the way the tokenizer cuts text. UserError for one that it does not know."""
    spec = tokenizer.spec()
    known = {(canonical([by_pattern(pattern)]), whole): name for (pattern, whole), name in PRE_TOKENIZERS.items()}
    name = known.get((canonical(spec["splits"]), spec["whole_words"]))
    if name is None:
        raise UserError("llama.cpp does not know how this tokenizer cuts text before merging; it knows "
                        f"{', '.join(PRE_TOKENIZERS.values())}")
    return name


def canonical(steps: list[dict[str, Any]]) -> str:
    return json.dumps(steps, sort_keys=True)


def ends(loaded: Loaded) -> list[int]:
    """Ids that end an answer. UserError if there is none: llama.cpp would take some ordinary word for it."""
    known = loaded.tokenizer.specials
    found = list(loaded.stop_ids) or [known[spelling] for spelling in (EOS, PAD) if spelling in known]
    if not found:
        raise UserError("nothing says which token ends an answer, and llama.cpp would take token 11 for it; name it as "
                        "eos_token_id in generation_config.json")
    return found


def add_vocabulary(writer: Any, loaded: Loaded, rows: int) -> None:
    """Tokens, merges, special ids and chat template of a model with `rows` rows in its embedding."""
    tokenizer, pre, stop = loaded.tokenizer, pre_tokenizer(loaded.tokenizer), ends(loaded)
    spelling = {id: spell_bytes(token) for id, token in tokenizer.tokens.items()}
    kinds = dict.fromkeys(spelling, NORMAL)
    for text, id in tokenizer.specials.items():
        spelling[id], kinds[id] = text, USER_DEFINED if text in tokenizer.visible else CONTROL
    spellings = [spelling.get(id, f"<|unused_{id}|>") for id in range(rows)]
    if twice := [text for text in tokenizer.specials if spellings.count(text) > 1]:
        raise UserError(f"the special token {twice[0]!r} is spelt like another token, and llama.cpp keeps one of each "
                        "spelling")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(spellings)
    writer.add_token_types([kinds.get(id, UNUSED) for id in range(rows)])
    writer.add_token_merges([f"{spelling[a]} {spelling[b]}" for a, b in tokenizer.spec()["merges"]])
    bos = loaded.bos_id if loaded.bos_id is not None else tokenizer.specials.get(BOS)
    pad = tokenizer.specials.get(PAD)
    for id, tell in ((bos, writer.add_bos_token_id), (pad, writer.add_pad_token_id),
                     *zip(stop, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id))):
        if id is not None:
            tell(id)
    writer.add_add_bos_token(False)
    if loaded.chat_template is not None:
        writer.add_chat_template(loaded.chat_template)


def modelfile(file: str, loaded: Loaded) -> str:
    """For `ollama create NAME -f Modelfile`. Ollama has a template language of its own: ours is written in it, for
    messages without tools; others it must know by itself, from the template inside the file."""
    words = {id: text for text, id in loaded.tokenizer.specials.items()}
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {loaded.model.config.seq_len}"]
    lines += [f"PARAMETER {theirs} {loaded.sampling[ours]}" for ours, theirs in SAMPLING.items()
              if loaded.sampling.get(ours) is not None]
    lines += [f'PARAMETER stop "{words[id]}"' for id in ends(loaded) if id in words]
    if loaded.chat_template == JINJA:
        lines.append('TEMPLATE """{{- range .Messages }}' + BOS + "{{ .Role }}\n{{ .Content }}" + EOS + "\n{{ end }}"
                     + BOS + 'assistant\n"""')
    return "\n".join(lines) + "\n"
