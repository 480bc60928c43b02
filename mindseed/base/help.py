"""The pages of `--help`, which tyro lays out: every option with its help and its default.

A default of None is not shown, since None only says that the option was not given: its help tells what follows then,
`[derived: one per core]`.
"""
from __future__ import annotations

import typing
from dataclasses import fields, is_dataclass
from typing import Any


def show_help(cls: type, *, prog: str, description: str | None, default: Any = None) -> None:
    """Print the page of a dataclass of options, with the defaults of `default` (an instance), and exit."""
    import tyro
    from tyro import conf, constructors
    registry, hint = constructors.ConstructorRegistry(), conf.arg(help_behavior_hint=told)

    @registry.struct_rule
    def options(info: constructors.StructTypeInfo) -> constructors.StructConstructorSpec | None:
        if not is_dataclass(info.type):
            return None
        hints, values = typing.get_type_hints(info.type), info.default
        values = values if isinstance(values, info.type) else info.type()
        hints = {name: kind if is_dataclass(kind) else typing.Annotated[kind, hint] for name, kind in hints.items()}
        return constructors.StructConstructorSpec(instantiate=info.type, fields=tuple(
            constructors.StructFieldSpec(name=f.name, type=hints[f.name], default=getattr(values, f.name),
                                         helptext=f.metadata.get("help")) for f in fields(info.type) if f.init))

    tyro.cli(cls, args=["--help"], prog=prog, description=description, use_underscores=True, registry=registry,
             config=(conf.AvoidSubcommands,), default=cls() if default is None else default)


def told(default: str) -> str:
    """What is said of a default, after the option's help."""
    return "" if default == "None" else f"(default: {default})"
