"""Options: a frozen dataclass <- its defaults <- a TOML preset <- flags, each layer checked as strictly as the next.

A recipe describes itself with keyword-only dataclasses; a section of options is a field that is itself a dataclass.
The same dotted name, `optim.warmup_steps`, is the key in the preset, the flag on the command line, the line in
`--help` and the word in an error. Nothing is ignored: a key that no field has is an error with a suggestion, and all
problems of a preset are reported together.

    @dataclass(frozen=True, kw_only=True)
    class OptimOptions:
        lr: float = option(3e-4, help="peak learning rate")

TOML has no null, so `"none"` stands for None wherever the type allows None, in presets and in flags.
"""
from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import re
import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

from mindseed.base.errors import UserError
from mindseed.base.help import show_help

T = TypeVar("T")
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def option(default: Any = MISSING, *, help: str, bare: str | None = None, positional: bool = False,
           alias: str | None = None, stray: bool = False, elsewhere: tuple[str, ...] = ()) -> Any:
    """A field with help. Mutable or nested defaults are shared, so they must be frozen or tuples.

    `bare` is the value meant by the flag alone (`--resume` for `--resume newest`). A `positional` option may also be
    given without its flag, before all flags (`mindseed chat runs/demo/model`); a tuple takes all such words. An `alias`
    is a second flag for the command line alone, under the name that other projects use. A `stray` option is what an
    error suggests for a file that stands there although nothing may. By the names `elsewhere` others know it: they are
    no flags here, but an error translates them; words after a name are what to say here in place of its value.
    """
    more = (f" (the flag alone means {bare})" if bare is not None else "") + (f" (also --{alias})" if alias else "")
    return field(default=default, metadata={"help": help + more, "bare": bare, "positional": positional,
                                            "alias": alias, "stray": stray, "elsewhere": elsewhere})


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One option: where it is, what it may hold and how it is described."""

    name: str                                     # dotted, with underscores
    type: Any
    field: Field

    @property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def is_bool(self) -> bool:
        return self.type is bool

    @property
    def words(self) -> dict[str, str]:
        """Words for None, and for the booleans of a `bool | None`, in the spelling of Python."""
        booleans = {word: str(value) for word, value in WORDS.items()} if bool in typing.get_args(self.type) else {}
        return {"none": "None", **booleans}


def leaves(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """Every option of a dataclass, nested sections included, in the order of definition."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from leaves(hints[f.name], f"{prefix}{f.name}.")
        elif f.init:
            yield Leaf(name=prefix + f.name, type=hints[f.name], field=f)


def names_of(cls: type, prefix: str = "") -> set[str]:
    """The dotted names of all options and of the sections that hold them."""
    names = {leaf.name for leaf in leaves(cls, prefix)}
    return names | {n[:i] for n in names for i, c in enumerate(n) if c == "." and i >= len(prefix)}


# ---------------------------------------------------------------------------------------------- values <-> plain data

def load_toml(cls: type[T], path: Path | str) -> T:
    """A TOML file's values over the defaults of `cls`. Every problem is named in one UserError."""
    return from_dict(cls, read_toml(path), where=str(path))


def read_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file as nested dicts."""
    import tomllib
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path).parent.glob("*.toml"))
        hint = suggestion(str(path), near) or (f"; found there: {', '.join(near)}" if near else "")
        raise UserError(f"preset {path} does not exist{hint}") from None
    except RecursionError:
        raise UserError(f"{path} is not a readable TOML file: its lists are nested too deeply") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable TOML file: {error}") from None


def from_dict(cls: type[T], data: dict[str, Any], *, where: str = "options") -> T:
    """The inverse of `to_dict`, strict: one UserError names all unknown or missing keys and wrong types."""
    problems: list[str] = []
    value = build(cls, data, "", names_of(cls), problems)
    if len(problems) == 1:
        raise UserError(f"{where}: {problems[0]}")
    if problems:
        raise UserError(f"{where} has {len(problems)} problems:\n" + "\n".join(f"  {p}" for p in problems))
    return value


def build(cls: type, data: Any, prefix: str, known: set[str], problems: list[str]) -> Any:
    """One dataclass of one table; appends to `problems` and returns None where something is wrong."""
    if not isinstance(data, dict):
        problems.append(f"{prefix.rstrip('.')} is a section of options, not {describe(data)}")
        return None
    hints, before, values = typing.get_type_hints(cls), len(problems), {}
    names = {f.name for f in fields(cls) if f.init}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name in names:
            values[name] = convert(hints[name], value, prefix + name, known, problems)
        else:
            problems.append(f"{prefix}{key} is not an option{suggestion(prefix + name, known)}")
    for f in fields(cls):
        if f.init and f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            problems.append(f"{prefix}{f.name} is required")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:                   # a cross-check of __post_init__
        problems.append(f"{prefix.rstrip('.')}: {error}" if prefix else str(error))
        return None


def convert(kind: Any, value: Any, name: str, known: set[str], problems: list[str]) -> Any:
    """`value`, as TOML or JSON hold it, as an instance of the annotation `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    nested = lambda k, v, n: convert(k, v, n, known, problems)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return build(kind, value, name + ".", known | names_of(kind, name + "."), problems)
    if origin in (typing.Union, types.UnionType):
        return convert_union(args, value, name, known, problems)
    if origin is typing.Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is list or args[-1:] == (...,):
            return origin(nested(args[0], v, f"{name}[{i}]") for i, v in enumerate(value))
        if len(value) == len(args):
            return tuple(nested(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(args, value)))
    elif origin is dict and isinstance(value, dict):
        return {k: nested(args[1], v, f"{name}.{k}") for k, v in value.items()}
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    problems.append(f"{name} must be {spell(kind)}, not {describe(value)}")
    return None


def convert_union(args: tuple, value: Any, name: str, known: set[str], problems: list[str]) -> Any:
    """A value of one of several types: None first, then the first that fits; dataclasses are told apart by `type`."""
    if value is None or value == "none":
        if type(None) in args:
            return None
    classes = {a.__name__: a for a in args if is_dataclass(a)}
    if isinstance(value, dict) and (len(classes) == 1 or "type" in value):
        tag = value.get("type", next(iter(classes)))
        if tag in classes:
            rest = {k: v for k, v in value.items() if k != "type"}
            return convert(classes[tag], rest, name, known, problems)
        problems.append(f"{name}.type is {tag!r}; it may be {', '.join(classes)}")
        return None
    for kind in (a for a in args if a is not type(None) and not is_dataclass(a)):
        trial: list[str] = []
        out = convert(kind, value, name, known, trial)
        if not trial:
            return out
    problems.append(f"{name} must be {spell(typing.Union[args])}, not {describe(value)}")
    return None


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value in memory is an instance of the annotation `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        args = args[:1] * len(value) if args[-1:] == (...,) else args
        return len(value) == len(args) and all(map(is_of, value, args))
    if kind in (int, float):
        return type(value) is int or kind is float and isinstance(value, float)
    return isinstance(value, kind)


def to_dict(config: Any) -> Any:
    """Plain data (JSON's types): paths become strings, tuples lists; a union of dataclasses gets a `type`."""
    if is_dataclass(config):
        hints, out = typing.get_type_hints(type(config)), {}
        for f in fields(config):
            if f.init:
                value = to_dict(getattr(config, f.name))
                out[f.name] = tagged(getattr(config, f.name), hints[f.name], value)
        return out
    if isinstance(config, dict):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def tagged(value: Any, hint: Any, plain: Any) -> Any:
    """`plain` with the class's name where the annotation leaves open which dataclass it is, inside tuples too."""
    args = typing.get_args(hint)
    if isinstance(value, (list, tuple)) and args:
        hints = [args[0]] * len(value) if args[-1] is ... or typing.get_origin(hint) is list else args
        return [tagged(v, h, p) for v, h, p in zip(value, hints, plain)]
    if is_dataclass(value) and sum(is_dataclass(a) for a in args) > 1:
        return {"type": type(value).__name__, **plain}
    return plain


def to_toml(config: Any) -> str:
    """A TOML document that `load_toml` reads back to an equal config."""
    return "\n".join(toml_lines(to_dict(config), "")).strip() + "\n"


def toml_lines(table: dict[str, Any], prefix: str) -> Iterator[str]:
    """Plain values first, then each nested table under its own header, as TOML's grammar wants."""
    for key, value in table.items():
        if not isinstance(value, dict):
            yield f"{toml_key(key)} = {toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from ("", f"[{prefix}{toml_key(key)}]")
            yield from toml_lines(value, f"{prefix}{toml_key(key)}.")


def toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def toml_value(value: Any) -> str:
    """One value in TOML's spelling; a JSON string is a TOML string once DEL is escaped as well."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)                            # int and float: repr keeps every bit, and inf and nan are TOML words


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Plain values under dotted names: {"optim.lr": 0.0003}. Lists stay whole."""
    plain = to_dict(config) if is_dataclass(config) else config
    out: dict[str, Any] = {}
    for key, value in plain.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return out


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts of options as one; where both have a value, that of `above`."""
    out = dict(below)
    for key, value in ((key.replace("-", "_"), value) for key, value in above.items()):
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configs (or their dicts): {dotted name: (in a, in b)}; a missing value is None."""
    left, right = flatten(a), flatten(b)
    names = [*left, *(n for n in right if n not in left)]
    return {n: (left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)}


# ---------------------------------------------------------------------------------------------------- the command line

def parse(cls: type[T], argv: list[str], *, prog: str = "mindseed", description: str | None = None,
          under: Callable[[T], dict[str, Any] | None] = lambda options: None) -> T:
    """`[preset.toml] [positional ...] --section.option value ...` as an instance of `cls`.

    `under` may find, by the options as they are, values to lie beneath preset and flags: those of a run to go on with.
    Dashes and underscores are the same. Booleans: `--x`, `--no-x`, `--x true`. Raises UserError for anything it does
    not understand; `--help` prints every option with its help and default (the preset's, if one is given) and exits.
    """
    import tyro
    argv, known = list(argv), {leaf.name: leaf for leaf in leaves(cls)}
    preset = argv.pop(0) if argv and argv[0].endswith(".toml") else None
    default = load_toml(cls, preset) if preset else None
    words = [leaf for leaf in known.values() if leaf.field.metadata.get("positional")]
    args = normalise(argv, known, words, prog)
    prog = " ".join([prog, "[preset.toml]", *(f"[{leaf.name}]" for leaf in words)])
    if not any(a in ("-h", "--help") for a in args):
        options = plausible(run_tyro(tyro, cls, args, prog, description, default))
        below = under(options)
        if below is None:
            return options
        merged = from_dict(cls, merge(below, read_toml(preset) if preset else {}), where="the options of the run")
        return plausible(run_tyro(tyro, cls, args, prog, description, merged))
    return show_help(cls, prog=prog, description=description, default=default)


def plausible(options: T) -> T:
    """The options themselves; UserError for NaN, infinity and NUL, which no option of any recipe means."""
    for name, value in flatten(options).items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, float) and not math.isfinite(part):
                raise UserError(f"{name} must be a finite number, not {part}")
            if isinstance(part, str) and "\0" in part:
                raise UserError(f"{name} must not hold the character NUL")
    return options


def run_tyro(tyro: Any, cls: type[T], args: list[str], prog: str, description: str | None, default: T | None) -> T:
    """tyro's parser with its boxed messages folded into one line of a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=args, prog=prog, description=description, use_underscores=True,
                            config=(tyro.conf.AvoidSubcommands,), **({} if default is None else {"default": default}))
    except ValueError as error:                   # a cross-check of the outermost class
        raise UserError(str(error)) from None
    except SystemExit:
        boxed = "│" in said.getvalue()            # in the C locale there are only rules, and the title is a part too
        lines = [line.strip("│| ") for line in said.getvalue().splitlines() if not boxed or line.startswith("│")]
        parts = [part.strip() for part in re.split("[─-]{3,}", " ".join(lines)) if part.strip()] or [""]
        first = parts[0 if boxed or len(parts) == 1 else 1]
        what, colon, why = first.removeprefix("Error parsing ").partition(": ")
        kinds = {leaf.name: leaf.type for leaf in leaves(cls)}
        if missing := re.match(r"Missing value for argument '--([\w.]+)'", first):
            raise UserError(f"--{missing[1]} needs a value: {spell(kinds[missing[1]])}") from None
        kind = kinds.get(what.removeprefix("--"))
        if colon and kind is not None and first.startswith("Error parsing"):
            given = " ".join(args).partition(what)[2].partition(" --")[0].lstrip("= ")
            raise UserError(f"{what} must be {spell(kind)}, not {given!r}") from None
        raise UserError(why if what == cls.__name__ else first.removeprefix("Error parsing ")) from None


def normalise(argv: list[str], known: dict[str, Leaf], positional: list[Leaf], prog: str) -> list[str]:
    """The command line in tyro's spelling; every unknown option is reported, each with a suggestion."""
    out, problems, i, seen = [], [], 0, set()
    aliases = {alias: leaf.name for leaf in known.values() if (alias := leaf.field.metadata.get("alias"))}
    while i < len(argv) and not argv[i].startswith("-"):
        i += 1
    stray = [leaf.name for leaf in known.values() if leaf.field.metadata.get("stray")]
    out += place(argv[:i], positional, prog, stray)
    while i < len(argv):
        word, i = argv[i], i + 1
        if not word.startswith("--"):
            out.append(word)
            continue
        flag, eq, value = word[2:].partition("=")
        name = aliases.get(flag, flag.replace("-", "_"))
        stem, leaf_name = name.rpartition(".")[::2]
        negative = name.removeprefix("no_") if name.startswith("no_") else f"{stem}.{leaf_name.removeprefix('no_')}"
        if name == "help":
            out.append(word)
        elif name in known:
            leaf, rest = known[name], argv[i:i + 1]
            if name in seen and typing.get_origin(leaf.type) in (tuple, list):
                problems.append(f"--{flag} is given twice; give all its values after one: --{flag} A B")
            seen.add(name)
            follows = bool(rest) and (not rest[0].startswith("-") or is_number(rest[0]))
            if leaf.is_bool and (eq or (follows and rest[0].lower() in WORDS)):
                given, i = (value, i) if eq else (rest[0], i + 1)
                out.append(f"--{name}" if WORDS.get(given.lower()) else negate(name))
                if given.lower() not in WORDS:
                    problems.append(f"--{name} is true or false, not {given!r}")
            elif leaf.field.metadata.get("bare") is not None and not eq and not follows:
                out += [f"--{name}", leaf.field.metadata["bare"]]
            elif bool in typing.get_args(leaf.type) and not eq and not follows:
                out += [f"--{name}", "True"]
            elif (leaf.optional or bool in typing.get_args(leaf.type)) and (
                    given := value if eq else rest[0] if follows else "").lower() in leaf.words:
                out, i = [*out, f"--{name}", leaf.words[given.lower()]], i if eq else i + 1
            else:
                out.append(f"--{name}{eq}{value}")
        elif negative != name and negative in known and known[negative].is_bool:
            out.append(negate(negative))
        elif negative != name and negative in known and bool in typing.get_args(known[negative].type):
            out += [f"--{negative}", "False"]
        else:
            problems.append(f"--{flag} is not an option{translation(name, known) or suggestion(name, known, '--')}")
    if problems:
        raise UserError("\n".join(problems))
    return out


def place(words: list[str], positional: list[Leaf], prog: str, stray: list[str]) -> list[str]:
    """Words before the first flag become the positional options' flags, in order; a tuple takes the rest."""
    out: list[str] = []
    for leaf in positional:
        many = typing.get_origin(leaf.type) in (tuple, list)
        mine, words = (words, []) if many else (words[:1], words[1:])
        out += [f"--{leaf.name}", *mine] if mine else []
    if words:
        meant = f"did you mean --{stray[0]} {' '.join(words)}?" if stray and Path(words[0]).exists() else \
            f"see {prog} --help"
        raise UserError(f"{words[0]!r} is neither a preset (*.toml) nor an option (--name value); {meant}")
    return out


def negate(name: str) -> str:
    stem, dot, leaf = name.rpartition(".")
    return f"--{stem}{dot}no_{leaf}"              # tyro's spelling of a switched-off flag


def is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(text) is not None
    return False


# ------------------------------------------------------------------------------------------------------------ wording

def suggestion(name: str, known: Any, dashes: str = "") -> str:
    """`; did you mean optim.warmup_steps?` for the closest known name, comparing last words too; or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    if not close:                                 # right word, wrong or missing section
        last = {k.rpartition(".")[2]: k for k in known}
        close = [last[w] for w in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.8)]
    close = close or difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def translation(name: str, known: dict[str, Leaf]) -> str:
    """`; here it is called --data.train` for a flag under the name of another project; or nothing."""
    for leaf in known.values():
        for there, _, words in (other.partition(" ") for other in leaf.field.metadata.get("elsewhere", ())):
            if there == name.rpartition(".")[2]:
                return f"; here it is --{leaf.name} {words}" if words else f"; here it is called --{leaf.name}"
    return ""


def describe(value: Any) -> str:
    """A value for an error message, with its kind in plain words."""
    kinds = {str: "the string", bool: "the boolean", list: "the list", dict: "the table", int: "the number",
             float: "the number"}
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = text if len(text) < 60 else text[:57] + "..."
    return "null" if value is None else f"{kinds.get(type(value), 'the value')} {text}"


def spell(kind: Any) -> str:
    """An annotation in plain words: `a number`, `one of adamw, muon`, `a list of 2 numbers`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    words = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", Path: "a path",
             type(None): '"none"'}
    if kind in words:
        return words[kind]
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(a) for a in args)
    if origin in (tuple, list):
        many = origin is list or args[-1:] == (...,)
        return f"a list of which each is {spell(args[0])}" if many else f"a list of {len(args)} ({spell(args[0])} each)"
    return "a table" if origin is dict else f"a section of options ({getattr(kind, '__name__', kind)})"
