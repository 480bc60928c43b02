"""The scaling law of docs/RESULTS.md, written from a finished sweep: its section and its picture.

    mindseed scaling-law configs/scaling-cpu.toml && python -m benchmarks.scaling runs/scaling
"""
from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from mindseed.base.files import make_folder, read_json, write_text
from mindseed.base.hardware import describe_machine
from mindseed.recipes.scaling_page import draw, page

NAME = "scaling"
DOCS = Path(__file__).parents[1] / "docs"


def main(folder: Path, docs: Path = DOCS) -> int:
    facts = read_json(folder / "scaling.json")
    if any("error" not in guess for guess in facts["predictions"][:1]):
        print(f"error: {facts['predictions'][0]['name']} is predicted and not trained yet; go on with the sweep",
              file=sys.stderr)
        return 2
    picture = draw(facts, make_folder(docs / "images") / "scaling.png")
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    section = (f"<!-- {NAME} -->\n## A scaling law of small models, and the run that it foretold\n\n"
               f"{page(facts, 'images/scaling.png' if picture else None)}\n"
               f"`mindseed scaling-law configs/scaling-cpu.toml`, {time.strftime('%Y-%m-%d')}, on: {machine}.\n"
               f"<!-- end {NAME} -->")
    path = docs / "RESULTS.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    there = re.compile(rf"<!-- {NAME} -->.*?<!-- end {NAME} -->", re.S)
    write_text(path, there.sub(lambda _: section, text) if there.search(text) else f"{text.rstrip()}\n\n{section}\n")
    print(f"written to {path}" + f" and {picture}" * bool(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/scaling")))
