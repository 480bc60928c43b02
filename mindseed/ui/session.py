"""What the pages share while somebody is looking: the studio's parts, the language, and what is kept in memory.

Streamlit runs a page anew from top to bottom at every click. What must outlive that is kept here: models and
tokenizers once per process, the client of the server, the logs of runs.
"""
from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import openai
import streamlit as st

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import ByteLevel
from mindseed.tokenizers.hf_json import load_tokenizer
from mindseed.ui import look, talk
from mindseed.ui.look import empty
from mindseed.ui.runs import Log
from mindseed.ui.store import Store
from mindseed.ui.studio import Studio, short_names
from mindseed.ui.words import LANGUAGES
from mindseed.ui.words import gettext as _

if TYPE_CHECKING:
    from mindseed.interop.directory import Loaded         # brings torch, for which most pages need not wait


def studio() -> Studio:
    return Studio.here()


@st.cache_resource(show_spinner=False)
def open_store(folder: str) -> Store:
    return Store(folder)


def store() -> Store:
    return open_store(studio().data)


@st.cache_resource(show_spinner=False)
def open_client(server: str) -> openai.OpenAI:
    return talk.connect(server, key=os.environ.get("MINDSEED_API_KEY", ""))


def client() -> openai.OpenAI:
    return open_client(studio().server)


@st.cache_data(ttl=10, show_spinner=False)
def names_of(server: str) -> list[str]:
    return talk.models(open_client(server))


def served() -> list[str]:
    """The models of the server; raises Unreachable."""
    if not studio().server:
        raise talk.Unreachable(_("There is no server."))
    return names_of(studio().server)


# ------------------------------------------------------------------------------------------------------------ language

def begin() -> None:
    """Choose the language: the one chosen last, else the browser's."""
    if "language" not in st.session_state:
        with contextlib.suppress(UserError):
            st.session_state.language = store().get("language")
        if st.session_state.get("language") not in LANGUAGES:
            st.session_state.language = "zh" if (st.context.locale or "").lower().startswith("zh") else "en"


def choose_language() -> None:
    """The switch; the choice is remembered."""
    def remember() -> None:
        st.session_state.language = st.session_state.language_switch or st.session_state.language
        with contextlib.suppress(UserError):
            store().put("language", st.session_state.language)

    st.session_state.language_switch = st.session_state.language
    st.segmented_control("Language", list(LANGUAGES), format_func=LANGUAGES.__getitem__, key="language_switch",
                         on_change=remember, label_visibility="collapsed")


def sidebar() -> st.delta_generator.DeltaGenerator:
    """The part of the sidebar that belongs to the page."""
    return st.session_state.get("_sidebar") or st.sidebar


# -------------------------------------------------------------------------------------------------- what goes wrong

@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """A mistake of the user's, or of the place, becomes a message on the page."""
    try:
        yield
    except talk.Unreachable:
        no_server()
    except UserError as error:
        st.error(told(error), icon=":material/error:")


def told(error: Exception) -> str:
    """An error in the reader's language, as far as it is one of the server's."""
    if isinstance(error, talk.Refused) and error.code == "context_length_exceeded":
        return _("The question alone does not fit into the model's context. Shorten it, or lower the longest answer.")
    if isinstance(error, talk.Unreachable):
        return _("The connection to {server} failed ({what}). Ask again; if it fails again, see whether the server "
                 "still runs.", server=studio().server, what=look.plain(str(error)))
    if isinstance(error, talk.Garbled):
        return _("What came from {server} is not the answer of a model server ({what}). Check the address, and that "
                 "`mindseed serve` or another server of the OpenAI API runs there.",
                 server=error.server, what=_(error.what) + look.plain(error.piece))
    return str(error)


def no_server() -> None:
    """The page of a server that does not answer; looks again every other second."""
    here = studio()
    names_of.clear()
    if not here.server:
        empty(_("No model is being served"), _("Name a model directory, or the address of a server:"),
              "`mindseed ui runs/demo/fine-tune/model`", "`mindseed ui --server http://127.0.0.1:8998`",
              _("No model yet? `mindseed demo` grows one in a few minutes."))
        return
    if here.log:
        empty(_("The server is starting"), _("It loads the models and will answer at `{server}`.", server=here.server))
    else:
        empty(_("The server does not answer"), _("Nothing answers at `{server}`.", server=here.server),
              _("Start it: `mindseed serve DIR`. This page looks for it again by itself."))
    said = tail(here.log)
    if said:
        with st.expander(_("What the server says"), icon=":material/terminal:"):
            st.code(said, language=None)
    look_again()


@st.fragment(run_every=2)
def look_again() -> None:
    try:
        talk.models(client())
    except UserError:
        return
    names_of.clear()
    st.rerun()


def tail(path: str, lines: int = 20) -> str:
    """The last lines of a file; empty if there is none."""
    try:
        return "\n".join(Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if path else ""
    except OSError:
        return ""


# -------------------------------------------------------------------------------------------------- model directories

@st.cache_resource(show_spinner=False, max_entries=3)
def loaded(path: str, stamp: float) -> Loaded:
    from mindseed.interop.directory import load_directory
    return load_directory(path)


@st.cache_resource(show_spinner=False, max_entries=8)
def tokenizer_of(path: str, stamp: float) -> ByteLevel:
    return load_tokenizer(path)


def load_model(path: str) -> Loaded:
    """The model of a directory, read once, and again when the directory has changed."""
    from mindseed.interop.directory import require_folder
    folder = require_folder(Path(path))
    with st.spinner(_("Loading the model ...")):
        return loaded(str(folder), (folder / "config.json").stat().st_mtime)


def load_tokens(path: str) -> ByteLevel:
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        raise UserError(_("{path} has no tokenizer.json; name a model directory or that of a tokenizer.", path=path))
    return tokenizer_of(path, file.stat().st_mtime)


def choose_directory(key: str) -> str | None:
    """A model directory of this machine: one that the studio was given, or a path that is typed; None: none yet."""
    given = list(studio().models)
    names = short_names(given)
    return st.selectbox(_("Model directory"), given, format_func=lambda p: names.get(p, p), key=key,
                        accept_new_options=True, placeholder=_("Choose one, or type a path"),
                        index=0 if given else None, persist_state="session")


@st.cache_resource(show_spinner=False, max_entries=64)
def log_of(folder: str) -> Log:
    return Log(folder)
