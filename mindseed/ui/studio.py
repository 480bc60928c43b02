"""What the studio was started with, and what lies on the disk for it to show.

`mindseed ui` is one process that starts two more: the server, unless there is one already, and Streamlit, which runs
app.py anew for every click. What the first knows reaches the last through one environment variable, as JSON.
"""
from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from mindseed.base.files import folders_with

VARIABLE = "MINDSEED_STUDIO"


def data_folder() -> Path:
    """Where programs keep what belongs to this user, by the custom of the system."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "mindseed"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "mindseed"
    return Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "mindseed"


@dataclass(frozen=True, kw_only=True)
class Studio:
    models: tuple[str, ...] = ()                  # model directories on this machine
    server: str = ""                              # the API's address up to /v1; "": there is none
    log: str = ""                                 # what the server says, if the studio started it
    data: str = ""                                # the folder of conversations and settings
    runs: tuple[str, ...] = ("runs",)             # folders in which runs lie

    def spell(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def here(cls) -> Studio:
        """The studio that this process belongs to; one with defaults where nobody started it."""
        told = json.loads(os.environ.get(VARIABLE, "{}"))
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        return cls(**{"data": str(data_folder())} | told)


def find_models(below: Path) -> list[Path]:
    """Model directories under a folder, the one written last first; those inside checkpoints and data do not count."""
    found = [p for p in [below, *folders_with("config.json", below)]
             if (p / "config.json").exists() and (p / "tokenizer.json").exists()]
    return sorted(found, key=lambda p: (p / "config.json").stat().st_mtime, reverse=True)


def short_names(paths: tuple[str, ...] | list[str]) -> dict[str, str]:
    """path -> the fewest last parts of it that tell it from the others; a last part "model" says nothing."""
    parts = {path: [p for p in Path(path).absolute().parts if p != os.sep] for path in paths}
    for words in parts.values():
        if len(words) > 1 and words[-1] == "model":
            del words[-1]
    names = {}
    for path, words in parts.items():
        others = [other for name, other in parts.items() if name != path]
        length = next((n for n in range(1, len(words)) if all(words[-n:] != other[-n:] for other in others)),
                      len(words))
        names[path] = "/".join(words[-length:])
    return names
