"""What the studio was started with, and what lies on the disk for it to show.

`mindseed ui` is one process that starts two more: the server, unless there is one already, and Streamlit, which runs
app.py anew for every click. What the first knows reaches the last through one environment variable, as JSON. Later
they talk through two files beside the server's log: ENDED, with why the server has ended, and AGAIN, by which a page
asks for another.
"""
from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindseed.base.files import folders_with

VARIABLE = "MINDSEED_STUDIO"
ENDED, AGAIN, ERRORS = "ended.json", "again", "server.err"


def data_folder() -> Path:
    """Where programs keep what belongs to this user, by the custom of the system."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "mindseed"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "mindseed"
    return Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "mindseed"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended."""

    code: str                                     # its exit code, and the signal that ended it
    words: str                                    # the last lines of stderr


@dataclass(frozen=True, kw_only=True)
class Studio:
    models: tuple[str, ...] = ()                  # model directories on this machine
    server: str = ""                              # the API's address up to /v1; "": there is none
    log: str = ""                                 # what the server says, if the studio started it
    data: str = ""                                # the folder of conversations and settings
    runs: tuple[str, ...] = ("runs",)             # folders in which runs lie

    def spell(self) -> str:
        return json.dumps(asdict(self))

    def beside_log(self, name: str) -> Path:
        return Path(self.log).with_name(name)

    def ended(self) -> Ended | None:
        """Why the server has ended that the studio started; None while it runs."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Ended(**json.loads(self.beside_log(ENDED).read_text(encoding="utf-8"))) if self.log else None
        return None

    def start_again(self) -> None:
        """Ask `mindseed ui` for another server."""
        self.beside_log(AGAIN).touch()
        self.beside_log(ENDED).unlink(missing_ok=True)

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


def converses(folder: Path | str, *, depth: int = 8) -> bool:
    """Whether a model has learnt from conversations, as far as its directory says: it has a chat template, and the
    data of its training, or of the models it was made from, are more than texts. What nobody says counts as yes."""
    folder = Path(folder)
    tokenizer, ours = json_of(folder / "tokenizer_config.json"), json_of(folder / "mindseed.json")
    if not tokenizer.get("chat_template") and not (folder / "chat_template.jinja").exists():
        return False
    info = ours.get("info") if isinstance(ours.get("info"), dict) else {}
    places = info.get("data") if isinstance(info.get("data"), list) else []
    kinds = [json_of(Path(place) / "manifest.json").get("kind")
             or json_of(folder.parent / "data" / Path(place).name / "manifest.json").get("kind")     # it was moved
             for place in map(str, places)]
    if not kinds or any(kind != "text" for kind in kinds):
        return True
    parent = info.get("parent")
    return bool(depth and isinstance(parent, str) and Path(parent).is_dir() and converses(parent, depth=depth - 1))


def json_of(file: Path) -> dict[str, Any]:
    """What a file of JSON says; empty where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(file.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def served_names(places: tuple[str, ...]) -> dict[str, str]:
    """path -> what the studio's own server calls the model there."""
    return {place: name.replace("=", "-") for place, name in short_names(places).items()}


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
