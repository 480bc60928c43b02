"""Streamlit, as `mindseed ui` starts it: what its pages need is imported while nobody waits for them yet."""
from __future__ import annotations

import importlib
import threading

from streamlit.web.cli import main

HEAVY = ("pandas", "altair", "openai", "openai.types.chat", "markdown_it")


def prepare() -> None:
    for name in HEAVY:
        importlib.import_module(name)


if __name__ == "__main__":
    threading.Thread(target=prepare, daemon=True).start()
    main(prog_name="streamlit")
