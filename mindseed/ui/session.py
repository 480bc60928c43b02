"""What the pages share while somebody is looking: the studio's parts, the language, and what is kept in memory.

Streamlit runs a page anew from top to bottom at every click. What must outlive that is kept here: models and
tokenizers once per process, the client of the server, the logs of runs.
"""
from __future__ import annotations

import contextlib
import os
import re
import threading
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
from mindseed.ui.studio import ERRORS, Ended, Studio, converses, served_names, short_names
from mindseed.ui.words import LANGUAGES
from mindseed.ui.words import gettext as _

if TYPE_CHECKING:
    from mindseed.interop.directory import Loaded         # brings torch, for which most pages need not wait

PATIENCE_S = 5.0                                  # with the page's run before this one, which is to keep its answer


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
def names_of(server: str) -> dict[str, int | None]:
    return talk.models(open_client(server))


def served() -> dict[str, int | None]:
    """The models of the server, and the context of each, if it says that; raises Unreachable."""
    if not studio().server:
        raise talk.Unreachable(_("There is no server."))
    return names_of(studio().server)


def directory_of(model: str) -> str | None:
    """Where a model of the server lies, if it is the studio's own server."""
    here = studio()
    names = served_names(here.models) if here.log else {}
    return next((place for place, name in names.items() if name == model), None)


@st.cache_data(ttl=60, show_spinner=False)
def learnt_to_converse(path: str) -> bool:
    return converses(path)


def reads_only(model: str) -> bool:
    """Whether a model has never seen a conversation, as far as that is known: it goes on with texts."""
    place = directory_of(model)
    return place is not None and not learnt_to_converse(place)


def say_reads_only() -> None:
    st.caption(":material/menu_book: " + _("This model has read texts only: it goes on with them, it does not answer."))


# ------------------------------------------------------------------------------------------------------------ language

def begin() -> None:
    """Choose the language: the one chosen last, else the browser's."""
    if "language" not in st.session_state:
        with contextlib.suppress(UserError):
            st.session_state.language = store().get("language")
        if st.session_state.get("language") not in LANGUAGES:
            st.session_state.language = "zh" if (st.context.locale or "").lower().startswith("zh") else "en"


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """While an answer is written and kept. A click begins the page's next run at once, while this one may still be at
    its last steps; `wait_until_kept` is what that run does first."""
    kept = st.session_state.kept = threading.Event()
    try:
        yield
    finally:
        kept.set()


def wait_until_kept() -> None:
    if (kept := st.session_state.get("kept")) is not None:
        kept.wait(PATIENCE_S)


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
        return too_long(str(error))
    if isinstance(error, talk.Unreachable):
        return _("The connection to {server} failed ({what}). Ask again; if it fails again, see whether the server "
                 "still runs.", server=studio().server, what=look.plain(str(error)))
    if isinstance(error, talk.Garbled):
        return _("What came from {server} is not the answer of a model server ({what}). Check the address, and that "
                 "`mindseed serve` or another server of the OpenAI API runs there.",
                 server=error.server, what=_(error.what) + look.plain(error.piece))
    return str(error)


def too_long(said: str) -> str:
    """What the server says of a text without room, in the reader's language; as it is if it says it in other words."""
    if found := re.search(r"has (\d+) tokens and the (?:model's )?context (?:of .+ )?is (\d+)", said):
        return _("The question, with the system prompt and the tools, has {n} tokens; the model's context is {m}, and "
                 "the answer needs room in it, too. Shorten it.", n=found[1], m=found[2])
    return _("The question alone does not fit into the model's context. Shorten it.") + f" ({look.plain(said)})"


def no_server() -> None:
    """The page of a server that does not answer; looks again every other second."""
    here = studio()
    names_of.clear()
    if not here.server:
        empty(_("No model is being served"), _("Name a model directory, or the address of a server:"),
              "`mindseed ui runs/demo/fine-tune/model`", "`mindseed ui --server http://127.0.0.1:8998`",
              _("No model yet? `mindseed demo` grows one in a few minutes."))
        return
    if here.log and (how := here.ended()):
        has_ended(here, how)
    elif here.log:
        empty(_("The server is starting"), _("It loads the models and will answer at `{server}`.", server=here.server))
    else:
        empty(_("The server does not answer"), _("Nothing answers at `{server}`.", server=here.server),
              _("Start it: `mindseed serve DIR`. This page looks for it again by itself."))
    said = "\n".join(filter(None, [tail(here.log), tail(str(here.beside_log(ERRORS)))])) if here.log else ""
    if said:
        with st.expander(_("What the server says"), icon=":material/terminal:"):
            st.code(said, language=None)
    look_again(state(ask=False).replace("up", "silent"))


def has_ended(here: Studio, how: Ended) -> None:
    """The page of a server that has died, and how to get another."""
    empty(_("The server has ended"), _("Its exit code is {code}.", code=how.code), *(
        () if how.words else (_("It said nothing of why. The system may have ended it for want of memory."),)))
    if how.words:
        st.caption(_("Its last words:"))
        st.code(how.words, language=None, wrap_lines=True)
    with st.container(horizontal=True, horizontal_alignment="center"):
        st.button(_("Start again"), icon=":material/restart_alt:", type="primary", key="start_again",
                  on_click=here.start_again)


def state(*, ask: bool) -> str:
    """How the server is; without asking it, as far as files tell."""
    if studio().log and studio().ended():
        return "ended"
    if not ask:
        return "up"
    with contextlib.suppress(UserError):
        talk.models(client())
        return "up"
    return "silent"


@st.fragment(run_every=2)
def look_again(was: str) -> None:
    """Draw the page anew when the server has come, or has gone."""
    if state(ask=was != "up") != was:
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
