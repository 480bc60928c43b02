"""The building code: floors, lengths, lean imports, an index without dead entries, documented commands that work."""
from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mindseed import cli
from mindseed.base.config import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mindseed"

FLOORS = {
    6: ["cli", "recipes"],
    5: ["rl", "evals", "serve", "ui"],
    4: ["train", "infer", "adapt"],
    3: ["parallel", "quant", "interop", "plan", "tasks"],
    2: ["models", "data"],
    1: ["nn", "tokenizers", "optim", "objectives", "agents"],
    0: ["core", "base"],
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
NO_TORCH = ["agents", "infer/blocks.py", "infer/scheduler.py", "base/config.py", "base/errors.py", "base/files.py",
            "cli.py", "__main__.py", "__init__.py"]
APART = ("mindseed.serve", "mindseed.ui")          # rooms about one extra, which may import it at the top
CORE_DEPENDENCIES = ["torch", "numpy", "safetensors", "tokenizers", "jinja2", "filelock", "tyro", "rich"]


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> list[str]:
    """Every module named by an import anywhere in the file, inside functions too; `from a import b` names a.b if that
    is a module and a otherwise."""
    known, out = modules(), []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            out += [name if name in known else node.module for name in whole]
    return out


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


# ------------------------------------------------------------------------------------------------------------- floors

def test_modules_import_only_lower_floors():
    bad = []
    for name, path in modules().items():
        here = room(name)
        if here in ("", "__main__"):
            continue
        assert here in FLOOR, f"{here} has no floor: add it to docs/ARCHITECTURE.md and to FLOORS"
        for other in (m for m in imports(path) if m.startswith("mindseed.")):
            there = room(other)
            own = there == here or (here, there) == ("cli", "recipes")
            core = there == "core" and here != "base"
            if not own and not core and FLOOR.get(there, 99) >= FLOOR[here]:
                bad.append(f"{name} (floor {FLOOR[here]}) imports {other} (floor {FLOOR.get(there)})")
    assert not bad, "\n".join(bad)


def test_objectives_import_only_core():
    for name, path in modules().items():
        if room(name) == "objectives":
            assert {room(m) for m in imports(path) if m.startswith("mindseed.")} <= {"core", "objectives"}, name


def test_modules_that_promise_to_need_no_torch():
    for place in NO_TORCH:
        path = PACKAGE / place
        files = path.rglob("*.py") if path.is_dir() else [path] if path.exists() else []
        for file in files:
            top = [node for node in tree(file).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
            assert not {"torch", "mindseed.core"} & {*names, *(n.split(".")[0] for n in names)}, file


def test_no_circular_imports():
    graph = {name: {m for m in imports(path) if m in modules() and m != name and room(m)}
             for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_architecture_lists_the_same_floors():
    block = re.search(r"^6  cli\.py.*?^0 .*?$", read("docs/ARCHITECTURE.md"), re.M | re.S).group()
    listed = {int(line[0]): [word.strip("/").removesuffix(".py") for word in line[1:].split()]
              for line in block.splitlines()}
    assert listed == FLOORS


# --------------------------------------------------------------------------------------------------------------- files

def python_files() -> list[Path]:
    return [p for folder in ("mindseed", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_long():
    long = {str(p.relative_to(ROOT)): n for p in python_files() if (n := len(p.read_text().splitlines())) > 500}
    assert not long, long


def test_no_line_is_wide():
    wide = [f"{p.relative_to(ROOT)}:{i}" for p in python_files()
            for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not wide, wide


def test_every_module_opens_by_saying_what_it_is():
    silent = [name for name, path in modules().items() if tree(path).body and not ast.get_docstring(tree(path))]
    assert not silent, silent


def test_every_module_imports_with_only_the_core_dependencies():
    """In a process where every other distribution is hidden, as on a fresh `pip install mindseed`."""
    code = f"""
import importlib, importlib.abc, importlib.metadata as md, re, sys
wanted, todo = set(), {CORE_DEPENDENCIES!r}
while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name not in wanted:
        wanted.add(name)
        try:
            needs = md.requires(name) or []
        except md.PackageNotFoundError:      # for another platform
            continue
        todo += [re.match(r"[A-Za-z0-9._-]+", need).group() for need in needs if "extra ==" not in need]
hidden = {{top for top, dists in md.packages_distributions().items()
          if not any(re.sub(r"[-_.]+", "-", d).lower() in wanted | {{"mindseed"}} for d in dists)}}
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"{{name}} is not a core dependency", name=name)
sys.meta_path.insert(0, Hide())
assert {{"pytest", "hypothesis"}} <= hidden, "nothing is hidden: this test cannot fail"
for name in {list(modules())!r}:
    if name != "mindseed.__main__" and not name.startswith({APART!r}):
        importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dependencies_are_those_of_the_project_file():
    import tomllib
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert [re.match(r"[\w-]+", need).group() for need in project["dependencies"]] == CORE_DEPENDENCIES


def tracked() -> list[Path]:
    """The files of the repository; the test is skipped where there is none."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w.~-])/(?:work|root|home/\w|Users/\w|tmp/\w)[\w/.-]*")
    allowed = {Path(__file__)}
    found = [f"{p.relative_to(ROOT)}: {hit}" for p in tracked() if p not in allowed and p.suffix != ".png"
             for hit in pattern.findall(p.read_text(encoding="utf-8", errors="replace"))]
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------------------- documentation

def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pages() -> list[Path]:
    return [p for p in [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))] if p.exists()]


def code_lines(page: Path) -> list[str]:
    """The lines of fenced blocks, joined where a backslash continues them, and the spans of inline code."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    fenced = [line for block in fences for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip().removeprefix("$ ") for line in fenced] + inline


def examples(text: str) -> list[str]:
    """The commands in a text of `--help`: indented lines, up to two spaces that begin a remark, and inline code."""
    indented = re.findall(r"^ +((?:torchrun .* -m )?mindseed .*)", text, re.M)
    return [re.split(r"\s{2,}", line)[0] for line in indented] + re.findall(r"`([^`]+)`", text)


def commands() -> list[tuple[str, str]]:
    """(page, arguments of mindseed) of every command in the documentation and in the program's own help; a sketch with
    <...> or ... is not one."""
    lines = [(page.name, line) for page in pages() for line in code_lines(page)]
    lines += [("cli", line) for line in examples(cli.EXAMPLES)]
    lines += [(name, line) for name in cli.RECIPES for line in examples(cli.load(name).__doc__)]
    found = []
    for place, line in lines:
        m = re.match(r"(?:\w+=\S+ )*(?:\S*/)?(?:python -m )?(?:torchrun .* -m )?mindseed ([a-z].*)", line)
        if m and "..." not in line and "<" not in line.split("|")[0]:
            found.append((place, re.split(r"\s[|>&;#]|\s2>", m.group(1))[0].strip()))
    return found


def check_command(line: str) -> None:
    """Parse the recipe's options without running it."""
    name, *rest = shlex.split(line)
    assert name in cli.RECIPES, f"{name} is not a recipe"
    recipe = cli.load(name)
    try:
        parse(recipe.Options, rest, prog=name)
    except SystemExit as left:                    # --help
        assert not left.code


@pytest.mark.parametrize("page, line", commands())
def test_commands_in_the_documentation_parse(page, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_command(line)


def test_the_examples_of_help_are_found():
    found = {place: [line for where, line in commands() if where == place] for place in ("cli", *cli.RECIPES)}
    assert len(found["cli"]) == 3 and len(found["convert"]) == 4 and len(found["train"]) >= 4
    assert examples("Say `mindseed chat DIR`:\n\n  mindseed plan --dept 3    the dial\n") == [
        "mindseed plan --dept 3", "mindseed chat DIR"]


def test_a_wrong_command_in_the_documentation_would_be_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in ("trian --depth 3", "plan --dept 3"):
        with pytest.raises(Exception):
            check_command(line)


def test_make_targets_in_the_documentation_exist():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    used = {(page.name, m) for page in pages() for line in code_lines(page)
            for m in re.findall(r"^make ([a-z-]+)", line)}
    assert {target for _, target in used} <= targets, used
    assert {"demo", "test", "bench", "clean", "help"} <= targets


def test_every_path_of_the_index_exists():
    spans = re.findall(r"`([^`\s]+)`", read("docs/INDEX.md"))
    paths = {s for s in spans if "/" in s or re.search(r"\.(py|md|toml|txt|html)$", s)}
    missing = [p for p in paths if not any((base / p).exists() for base in (ROOT, PACKAGE))]
    assert paths and not missing, missing


def test_every_module_is_in_the_index():
    index = read("docs/INDEX.md")
    unlisted = [str(p.relative_to(PACKAGE)) for p in modules().values()
                if p.name not in ("__init__.py", "__main__.py") and f"`{p.relative_to(PACKAGE)}`" not in index]
    assert not unlisted, unlisted


@pytest.mark.parametrize("name", cli.RECIPES)
def test_every_recipe_can_be_called(name):
    recipe = importlib.import_module(f"mindseed.recipes.{name.replace('-', '_')}")
    assert recipe.__doc__ and callable(recipe.main)
    assert parse(recipe.Options, [], prog=name)
