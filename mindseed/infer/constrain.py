"""Answers that cannot leave a grammar: before every token, which ids may follow is known, and no other can be chosen.

A grammar speaks of bytes, a model of tokens. So the vocabulary is laid out as a trie of byte strings and walked beside
a parser of the grammar: a token may follow if the parser survives all of its bytes. The parser, with the regular
expressions and JSON schemas it knows, is the library llguidance; here it learns our vocabularies, and when to hold:
`tool_calls` binds only what stands between <tool_call> and </tool_call>, `after("</think>")` only what comes after a
thought. Three things follow from how models are trained. JSON is written as json.dumps writes it, ", " and ": " and
no other space, as small models love endless white space. Where only one text can follow, only its usual tokens are
allowed, not any spelling of the same bytes. And special tokens never count as text.

Guided generation as a walk of the vocabulary through an automaton: 2307.09702.
"""
from __future__ import annotations

import json
import math
import re
import threading
import weakref
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.tokenizers.base import ByteLevel, require_unicode
from mindseed.tokenizers.chat import to_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}       # that of json.dumps
EXACT = STYLE | {"lenient": False, "coerce_one_of": False}          # what can't be guaranteed is refused
LOOSE = STYLE | {"lenient": True, "coerce_one_of": True}            # what can't be guaranteed is let pass
MOST_REMAINDERS = 50_000                          # of multipleOf: an automaton holds a state for each
MOST_MEMBERS, MOST_PARTS = 1_000, 10_000          # of one object in a schema, and of all: their cost is quadratic
MOST_AT_ONCE = 10                                 # conditions of an allOf: their cost may double with each
MOST_STATES = 50_000                              # of the automaton of one answer: up to 100 MB
MOST_FORCED, FORESIGHT = 20_000, 1_000            # characters that must follow: at most; seen as usual tokens
OPEN_BY = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}

_known: weakref.WeakKeyDictionary[ByteLevel, LLTokenizer] = weakref.WeakKeyDictionary()
_escapes: weakref.WeakKeyDictionary[ByteLevel, tuple[np.ndarray, np.ndarray]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Grammar:
    """What an answer may be, compiled for a tokenizer; immutable, and shared by requests and threads.

    Every way to make one raises UserError for what can't be compiled, in the library's words.
    """

    def __init__(self, tokenizer: ByteLevel, first: LLMatcher, gates: tuple[tuple[int, bool], ...] = (),
                 again: bool = False, json: bool = False) -> None:
        self.tokenizer = tokenizer
        self.first = first                        # at its beginning; only ever copied
        self.gates = gates                        # (special id, may the answer end before it): all is free until each
        self.again = again                        # once the grammar is through, wait at the last gate again
        self.json = json                          # what it says is JSON

    @classmethod
    def json_object(cls, tokenizer: ByteLevel) -> Grammar:
        """Any JSON object."""
        return cls.json_schema(tokenizer, {"type": "object"})

    @classmethod
    def json_schema(cls, tokenizer: ByteLevel, schema: dict[str, Any]) -> Grammar:
        """JSON that follows a schema; its keywords are all kept or the schema is refused. Properties come in the
        order in which the schema names them. Numbers are exact decimals: 0.9999... with enough digits is below 1,
        though a program that reads it as a float gets 1."""
        what = "the JSON schema"
        written = schema_json(schema, EXACT, what)
        return cls(tokenizer, compiled(tokenizer, f"start: %json {written}", what), json=True)

    @classmethod
    def regex(cls, tokenizer: ByteLevel, pattern: str) -> Grammar:
        """Text that matches as a whole. The syntax is Rust's: no look-around, no back-references; \\d is 0 to 9."""
        require_unicode(pattern)
        grammar = f"start: /{library().regex_to_lark(pattern, 'd')}/"
        return cls(tokenizer, compiled(tokenizer, grammar, f"the regular expression {to_json(shortened(pattern))}"))

    @classmethod
    def choice(cls, tokenizer: ByteLevel, texts: list[str]) -> Grammar:
        """One of several texts."""
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"a choice needs a list of texts to choose from, not {shortened(repr(texts))}")
        for text in texts:
            require_unicode(text)
        pattern = "|".join("".join(f"\\u{{{ord(c):x}}}" for c in text) for text in texts)
        return cls(tokenizer, compiled(tokenizer, f"start: /({pattern})/", "the choice"))

    @classmethod
    def tool_calls(cls, tokenizer: ByteLevel, tools: list[dict[str, Any]], *, choice: str = "auto",
                   parallel: bool = True) -> Grammar:
        """Calls in the form of `chat.call_json`, each between <tool_call> and </tool_call>.

        "auto": text is free until <tool_call> is said, and again after </tool_call> (with `parallel`; without it the
        answer then ends). "required", or the name of the only function that may be called: the answer is a call, or
        with `parallel` several, a line end between two. Arguments follow the function's `parameters`: to the letter
        with `"strict": true` beside its name, otherwise without the keywords that the library does not know. They
        are an object, and where `parameters` lists properties and does not speak of others, there are no others.
        """
        names = [function(tool, i).get("name") for i, tool in enumerate(tools)]
        if not tools:
            raise UserError("there are no tools to call")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two tools have the name {repeated[0]!r}")
        if choice not in ("auto", "required", *names):
            raise UserError(f"{choice!r} is no function of this request; there are {', '.join(names)}")
        opening, closing = special(tokenizer, "<tool_call>"), special(tokenizer, "</tool_call>")
        rules, calls = [], []
        for i, (tool, name) in enumerate(zip(tools, names)):
            if choice in ("auto", "required", name):
                start = f'{{"name": {to_json(name)}, "arguments": '
                rules += [f'call_{i}: {to_json(start)} arguments_{i} "}}"',
                          f"arguments_{i}: %json {parameters(tool, i)}"]
                calls.append(f"call_{i}")
        rules += [rf'body: "\n" ({" | ".join(calls)}) "\n" <[{closing}]>']
        free = choice == "auto"
        rules += ["start: body" if free else "start: call" + r' ("\n" call)*' * parallel, f"call: <[{opening}]> body"]
        first = compiled(tokenizer, "\n".join(rules), "the tools")
        return cls(tokenizer, first, ((opening, True),) if free else (), again=free and parallel, json=True)

    def after(self, spelling: str) -> Grammar:
        """The same, but free until the special token `spelling` has been said. Until then the answer may end only if
        the grammar would allow an empty one."""
        gate = (special(self.tokenizer, spelling), self.start().may_stop)
        return Grammar(self.tokenizer, self.first, (gate, *self.gates), self.again, self.json)

    def start(self) -> Matcher:
        return Matcher(self)


class Matcher:
    """Where one answer stands in its grammar; for one thread at a time."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._gate = 0                            # the gate that it waits at; len(gates): the grammar holds
        self._escaped = False                     # a backslash was said, and what it escapes was not
        self._body = None if grammar.gates else grammar.first.deep_copy()

    def allowed(self) -> Tensor | None:
        """Which ids may follow: bool (vocab_size,), a fresh one, or None if any may and the answer may end as well.
        UserError where the library gives up on a grammar that is too complex."""
        tokenizer = self.grammar.tokenizer
        if self._body is None:
            if self.may_stop:
                return None
            mask = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
            mask[[*tokenizer.tokens, *tokenizer.specials.values()]] = True
            return mask
        if self._body.is_stopped():
            self._check()
            return torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        bits = np.zeros(tokenizer.vocab_size // 32 + 1, dtype=np.int32)         # one more than the vocabulary: the end
        self._body.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()
        mask = np.unpackbits(bits.view(np.uint8), count=tokenizer.vocab_size, bitorder="little").view(np.bool_)
        if self.grammar.json:
            plain = mask & ~escapes(tokenizer)[int(self._escaped)]
            mask = plain if plain.any() else mask
        return torch.from_numpy(mask)

    def advance(self, id: int) -> None:
        """The token that was chosen. ValueError if it was not allowed, UserError as in `allowed`."""
        gates = self.grammar.gates
        if self._body is None:
            if id == gates[self._gate][0]:
                self._gate += 1
            if self._gate == len(gates):
                self._body = self.grammar.first.deep_copy()
            return
        if self.done or not self._body.consume_token(id) and "doesn't satisfy" in self._body.get_error():
            raise ValueError(f"id {id} was not allowed by the grammar here")
        self._check()
        if self.grammar.json and id in self.grammar.tokenizer.tokens:
            self._escaped = follow(self.grammar.tokenizer.tokens[id], self._escaped)[1]
        if self.grammar.again and self._body.is_stopped():
            self._gate, self._body = len(gates) - 1, None

    @property
    def done(self) -> bool:
        """Nothing may follow but the end."""
        return self._body is not None and self._body.is_stopped() and not self._body.is_error()

    @property
    def may_stop(self) -> bool:
        """The answer may end here."""
        if self._body is None:
            return self.grammar.gates[self._gate][1]
        return self._body.is_accepting() and not self._body.is_error()

    def fork(self) -> Matcher:
        """An independent copy, which goes on from here."""
        other = Matcher.__new__(Matcher)
        other.grammar, other._gate, other._escaped = self.grammar, self._gate, self._escaped
        other._body = None if self._body is None else self._body.deep_copy()
        return other

    def _check(self) -> None:
        if self._body.is_error():
            raise UserError(f"the grammar can't be followed from here: {reason(self._body.get_error())}")


# ------------------------------------------------------------------------------------------------- towards the library

def library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(f"constrained answers need the package llguidance: {install('[serve]')}") from None
    return llguidance


def compiled(tokenizer: ByteLevel, grammar: str, what: str) -> LLMatcher:
    """A matcher at the beginning of a grammar, which is in Lark's syntax. UserError if nothing can be begun."""
    llguidance = library()
    matcher = llguidance.LLMatcher(vocabulary(tokenizer), grammar, log_level=0,
                                   limits=llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=MOST_STATES))
    first = matcher.deep_copy()
    if not matcher.is_error():
        matcher.compute_bitmask()                 # some grammars show only here that they are empty or too large
    if matcher.is_error():
        raise UserError(f"{what} can't be used: {reason(matcher.get_error())}")
    return first


def vocabulary(tokenizer: ByteLevel) -> LLTokenizer:
    """The library's view of a tokenizer, made once for each."""
    with _lock:
        if tokenizer not in _known:
            _known[tokenizer] = library().LLTokenizer(Vocabulary(tokenizer))
        return _known[tokenizer]


def escapes(tokenizer: ByteLevel) -> tuple[np.ndarray, np.ndarray]:
    """Which ids write a character of JSON in a longer way than needed, as \\u and its number or as \\/: bool (V,), in
    general and after an escaping backslash. With them a key can be said twice: as "a" it has the type that the schema
    gives it, as "\\u0061" it would pass for another."""
    with _lock:
        if tokenizer not in _escapes:
            found = np.zeros((2, tokenizer.vocab_size), np.bool_)
            for id, token in tokenizer.tokens.items():
                found[:, id] = [follow(token, escaped)[0] for escaped in (False, True)]
            _escapes[tokenizer] = found[0], found[1]
        return _escapes[tokenizer]


def follow(text: bytes, escaped: bool) -> tuple[bool, bool]:
    """(whether JSON so far holds such an escape in this part, whether its last character escapes what follows)."""
    found = escaped and text[:1] in (b"u", b"/")
    if b"\\" in text:
        for byte in text:
            found = found or escaped and byte in b"u/"
            escaped = byte == 0x5C and not escaped
        return found, escaped
    return found, escaped and not text


class Vocabulary:
    """What the library asks of a tokenizer. The id after the last stands for the end of the answer, so that which ids
    end one in truth is the engine's business. Ids without a token, and tokens with the byte FF, which no text holds
    and by which the library tells special tokens, are empty: they never may follow."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: ByteLevel) -> None:
        V = tokenizer.vocab_size
        self.tokens = [b""] * V + [b"<|end|>"]
        for id, token in tokenizer.tokens.items():
            self.tokens[id] = b"" if b"\xff" in token else token
        for spelling, id in tokenizer.specials.items():
            self.tokens[id] = spelling.encode()
        self.special_token_ids = [*tokenizer.specials.values(), V]
        self.eos_token_id = V
        self._bytes = {token[0]: id for id, token in tokenizer.tokens.items() if len(token) == 1}
        self._tokenizer = weakref.ref(tokenizer)  # or the cache, weak in the tokenizer, would keep it alive

    def __call__(self, text: str) -> list[int]:
        """Usual ids of a text that must follow; byte by byte what is far off, as this is asked before every token,
        and where the tokenizer would normalise the text."""
        if len(text) > MOST_FORCED:
            raise ValueError(f"a text of {len(text)} characters would have to follow")
        tokenizer, near, far = self._tokenizer(), text[:FORESIGHT], text[FORESIGHT:]
        ids = tokenizer.encode_plain(near) if tokenizer else []
        if b"".join(self.tokens[id] for id in ids) != near.encode():
            ids = [self._bytes[b] for b in near.encode()]
        return ids + [self._bytes[b] for b in far.encode()]


def reason(error: str) -> str:
    """The library's message in one line: what a parser of patterns calls the error, or the first line, without its
    place in the grammar that we wrote around."""
    if error.startswith("NoExtension"):
        return "no text fulfils it"
    if ours := re.search(r"ValueError\('(.*?)'\)", error):            # raised by Vocabulary, on the way through
        return ours[1]
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no reason given"]
    named = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return shortened(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", (named or lines)[0]), 200)


def shortened(text: str, chars: int = 60) -> str:
    return text if len(text) <= chars else text[:chars - 3] + "..."


def special(tokenizer: ByteLevel, spelling: str) -> int:
    if spelling not in tokenizer.specials:
        raise UserError(f"the tokenizer has no special token {spelling}, which this grammar needs")
    return tokenizer.specials[spelling]


# ------------------------------------------------------------------------------------------------------------- schemas

def schema_json(schema: Any, options: dict[str, Any], what: str) -> str:
    """A schema as JSON in one line, with the library's `options`. UserError for what would take it hours."""
    if not isinstance(schema, dict):
        raise UserError(f"{what} must be an object, not {shortened(repr(schema))}")
    try:
        written = json.dumps({**schema, "x-guidance": options}, allow_nan=False)
    except RecursionError:
        raise UserError(f"{what} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is not JSON: {reason(str(error))}") from None
    remainders, parts, inside = 1, 0, [schema]
    while inside:
        part = inside.pop()
        if isinstance(part, dict):
            divisor, parts = part.get("multipleOf"), parts + len(part)
            if isinstance(divisor, (int, float)) and divisor > 0:
                digits = Decimal(str(divisor)).normalize().as_tuple().digits
                remainders = math.lcm(remainders, int("".join(map(str, digits))))
            if len(part) > MOST_MEMBERS or parts > MOST_PARTS:
                raise UserError(f"{what} is too large: at most {MOST_MEMBERS} members in one object and "
                                f"{MOST_PARTS} in all")
            required = part.get("required") if isinstance(part.get("required"), list) else []
            least = part.get("minProperties")
            if not options["lenient"] and isinstance(least, (int, float)) and least > len(required):
                raise UserError(f"{what} asks for at least {least:g} properties and requires {len(required)} by name: "
                                "that can't be guaranteed, since a key may be said twice; name them as required")
            if isinstance(part.get("allOf"), list) and len(part["allOf"]) > MOST_AT_ONCE:
                raise UserError(f"{what} has an allOf of more than {MOST_AT_ONCE}, which can be too costly to follow; "
                                "write fewer conditions")
            if remainders > MOST_REMAINDERS:
                raise UserError(f"{what} asks for multiples that are too costly to follow: use smaller or fewer values "
                                "of multipleOf")
        inside += part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return written


def function(tool: Any, i: int) -> dict[str, Any]:
    """The inner object of a tool, which may be in OpenAI's form."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise UserError(f'tool {i} must be {{"name": ..., "parameters": {{...}}}}, not {shortened(repr(tool))}')
    require_unicode(inner["name"])
    return inner


def parameters(tool: dict[str, Any], i: int) -> str:
    """The schema of a tool's arguments, as JSON."""
    inner = function(tool, i)
    what, schema = f"the parameters of {inner['name']}", inner.get("parameters")
    schema = {} if schema is None else schema
    if isinstance(schema, dict):
        schema = {"type": "object"} | schema
        if schema["type"] != "object":
            raise UserError(f"{what} must have the type object, not {shortened(repr(schema['type']))}")
        if "properties" in schema and not OPEN_BY & schema.keys():
            schema["additionalProperties"] = False
    return schema_json(schema, EXACT if inner.get("strict") else LOOSE, what)
