"""Packages that not everybody needs: how they are asked for where they are missing.

The command is that of the Python which runs now, and of the checkout it runs from, if it is one: copied as it stands,
it installs into the environment that lacks the package.
"""
from __future__ import annotations

import shlex
import sys
from pathlib import Path

import mindseed

CHECKOUT = Path(mindseed.__file__).resolve().parents[1]


def install(what: str) -> str:
    """The command that installs an extra of ours, "[serve]", or a package by its name."""
    pip = f"{shlex.quote(sys.executable or 'python')} -m pip install"
    if not what.startswith("["):
        return f"{pip} {what}"
    if (CHECKOUT / "pyproject.toml").exists():
        return f"{pip} -e {shlex.quote(f'{CHECKOUT}{what}')}"
    return f"{pip} 'mindseed{what}'"
