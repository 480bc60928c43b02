"""Tools that a model may call, from the studio or while it is trained. All are safe: none reads a file, opens a
connection or runs code.

The first four are those of the embedded world, word for word, since a small model knows only what it was taught; two
of them are true (sums, the time) and two are about people and cities that do not exist, so their answers are invented,
but always the same. A tool answers with JSON; for what it cannot do, {"error": ...}, which the model gets to read.
"""
from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import json
import math
import operator
import random
import re
import zoneinfo
from dataclasses import dataclass
from typing import Any, Callable

from mindseed.data import toy_words

WORLD = {tool.name: tool for tool in toy_words.TOOLS}


@dataclass(frozen=True, kw_only=True)
class SafeTool:
    """A core.Tool."""

    name: str
    description: str
    schema: dict[str, Any]
    icon: str                                     # the name of a Material symbol
    run: Callable[..., dict[str, Any]]

    def call(self, arguments: dict[str, Any]) -> str:
        """The result as JSON, whatever the model sends."""
        try:
            unknown = sorted(arguments.keys() - self.schema["properties"].keys())
            missing = sorted(set(self.schema.get("required", self.schema["properties"])) - arguments.keys())
            if unknown or missing:
                raise ValueError(f"unknown argument {unknown[0]}" if unknown else f"argument {missing[0]} is missing")
            result = self.run(**arguments)
        except Exception as error:                # of the model's making: it may learn from the message
            result = {"error": str(error) or type(error).__name__}
        return json.dumps(result, ensure_ascii=False)

    def openai(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": self.schema}}


# ---------------------------------------------------------------------------------------------------------- arithmetic

BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
          ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS = {"sqrt": math.sqrt, "abs": abs, "round": lambda x: round(x), "min": min, "max": max, "sin": math.sin,
             "cos": math.cos, "tan": math.tan, "log": math.log, "exp": math.exp, "floor": math.floor, "ceil": math.ceil}
NAMES = {"pi": math.pi, "e": math.e}
SPELT = str.maketrans("×÷−（），＋＊／．０１２３４５６７８９", "*/-(),+*/.0123456789")
MOST_BITS = 2000                                  # of a whole number on the way


def calculate(text: str) -> int | float:
    """The value of an arithmetic expression. Its syntax tree may hold numbers, signs and the functions above, and
    nothing else; ValueError for all the rest, and for numbers that grow too large to be written down."""
    text = text.translate(SPELT).strip().rstrip("=?").replace("^", "**").strip()
    if len(text) > 300:
        raise ValueError("the expression is too long")
    try:
        return bounded(value_of(ast.parse(text, mode="eval").body))
    except SyntaxError:
        raise ValueError(f"{text!r} is no sum") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (OverflowError, RecursionError, MemoryError):
        raise ValueError("the numbers are too large") from None


def value_of(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return bounded(node.value)
    if isinstance(node, ast.Name) and node.id in NAMES:
        return NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = value_of(node.left), value_of(node.right)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MOST_BITS:                        # before it is computed
                raise ValueError("the numbers are too large")
        return bounded(BINARY[type(node.op)](left, right))
    if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
            and not node.keywords):
        return bounded(FUNCTIONS[node.func.id](*map(value_of, node.args)))
    raise ValueError("only numbers, + - * / // % ** and a few functions are allowed")


def bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    if value.bit_length() > MOST_BITS if isinstance(value, int) else not math.isfinite(value):
        raise ValueError("the numbers are too large")
    return value


def figure(value: int | float) -> str:
    """A number without the noise of its last bits."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 or isinstance(value, int) else f"{value:.12g}"


# ------------------------------------------------------------------------------------------------- time, units, chance

@functools.cache
def zones() -> dict[str, str]:
    """City -> time zone, by the names in the system's database of them."""
    return {name.rpartition("/")[2].replace("_", " ").lower(): name for name in sorted(zoneinfo.available_timezones())
            if "/" in name and not name.startswith(("Etc/", "SystemV/", "US/"))}


def get_time(city: str) -> dict[str, Any]:
    """Now, in a city that has given its name to a time zone. Cities of the embedded world have clocks of their own,
    some whole hours off: always the same ones."""
    if zone := zones().get(city.strip().lower()):
        now = datetime.datetime.now(zoneinfo.ZoneInfo(zone))
    elif any(city in names for names in toy_words.CITIES):
        now = datetime.datetime.now(datetime.timezone(datetime.timedelta(hours=chance(city, 23) - 11)))
    else:
        raise ValueError(f"no time zone is named after {city}")
    return {"time": f"{now.hour}:{now.minute:02}"}


def get_date() -> dict[str, Any]:
    now = datetime.datetime.now().astimezone()
    return {"date": now.date().isoformat(), "weekday": f"{now:%A}", "time": f"{now:%H:%M}", "zone": now.tzname() or ""}


UNITS = {                                         # how many of the first one each is
    "length": {"m": 1, "km": 1e3, "cm": 0.01, "mm": 1e-3, "mile": 1609.344, "yard": 0.9144, "foot": 0.3048,
               "inch": 0.0254, "nautical mile": 1852},
    "mass": {"kg": 1, "g": 1e-3, "mg": 1e-6, "t": 1e3, "pound": 0.45359237, "ounce": 0.028349523125},
    "time": {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800},
    "volume": {"l": 1, "ml": 1e-3, "m3": 1e3, "gallon": 3.785411784, "cup": 0.2365882365},
    "area": {"m2": 1, "km2": 1e6, "ha": 1e4, "acre": 4046.8564224, "square foot": 0.09290304},
    "speed": {"m/s": 1, "km/h": 1 / 3.6, "mph": 0.44704, "knot": 1852 / 3600},
    "data": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "temperature": {"C": 1, "F": 1, "K": 1}}
TO_KELVIN = {"C": lambda x: x + 273.15, "F": lambda x: (x + 459.67) / 1.8, "K": lambda x: x}
FROM_KELVIN = {"C": lambda x: x - 273.15, "F": lambda x: x * 1.8 - 459.67, "K": lambda x: x}
NAMES_OF_UNITS = [name for kind in UNITS.values() for name in kind]


def convert_units(value: float, source: str, target: str) -> dict[str, Any]:
    kind = next((k for k, units in UNITS.items() if source in units), None)
    if kind is None or target not in UNITS[kind]:
        raise ValueError(f"{source} cannot be converted into {target}; the units are {', '.join(NAMES_OF_UNITS)}")
    if kind == "temperature":
        result = FROM_KELVIN[target](TO_KELVIN[source](value))
    else:
        result = value * UNITS[kind][source] / UNITS[kind][target]
    return {"value": figure(bounded(float(f"{result:.12g}"))), "unit": target}


def roll_dice(count: int, sides: int) -> dict[str, Any]:
    if not 1 <= count <= 100 or not 2 <= sides <= 1000:
        raise ValueError("from 1 to 100 dice of 2 to 1000 sides")
    rolls = [random.SystemRandom().randint(1, sides) for _ in range(count)]
    return {"rolls": rolls, "sum": sum(rolls)}


# ------------------------------------------------------------------------------------------------ of the embedded world

def chance(text: str, sides: int) -> int:
    """A number from 0 that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % sides


def get_weather(city: str) -> dict[str, Any]:
    language = 1 if re.search(r"[\u4e00-\u9fff]", city) else 0
    return {"weather": toy_words.WEATHER[chance(city, len(toy_words.WEATHER))][language]}


def find_phone(person: str) -> dict[str, Any]:
    return {"phone": str(1000 + chance(person, 9000))}


def of_world(name: str, icon: str, run: Callable[..., dict[str, Any]]) -> SafeTool:
    """A tool as the embedded world describes it to its models."""
    words = WORLD[name]
    return SafeTool(name=name, description=words.description, icon=icon, run=run,
                      schema={"type": "object", "properties": {words.argument: {"type": "string"}}})


def sum_of(sum: str) -> dict[str, Any]:
    return {"value": figure(calculate(sum))}


TOOLS = {tool.name: tool for tool in (
    of_world("calculate", "calculate", sum_of),
    of_world("get_time", "schedule", get_time),
    SafeTool(name="get_date", description="today's date, weekday and local time", icon="calendar_today",
               schema={"type": "object", "properties": {}}, run=get_date),
    SafeTool(name="convert_units", description="convert a quantity into another unit", icon="straighten",
               run=convert_units, schema={
                   "type": "object", "required": ["value", "source", "target"], "properties": {
                       "value": {"type": "number"}, "source": {"type": "string", "enum": NAMES_OF_UNITS},
                       "target": {"type": "string", "enum": NAMES_OF_UNITS}}}),
    SafeTool(name="roll_dice", description="roll dice", icon="casino", run=roll_dice, schema={
        "type": "object", "required": ["count", "sides"], "properties": {
            "count": {"type": "integer", "enum": list(range(1, 11))},
            "sides": {"type": "integer", "enum": [2, 4, 6, 8, 10, 12, 20, 100]}}}),
    of_world("get_weather", "partly_cloudy_day", get_weather),
    of_world("find_phone", "call", find_phone),
)}


def execute(name: str, arguments: Any) -> str:
    """Call a tool by its name, as a model asked for it."""
    if name not in TOOLS:
        return json.dumps({"error": f"there is no tool {name}"})
    if not isinstance(arguments, dict):
        return json.dumps({"error": "the arguments are no JSON object"})
    return TOOLS[name].call(arguments)
