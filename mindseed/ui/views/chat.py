"""Chat: conversations that are kept, answers that stream, thoughts, tools, and every setting of the sampler."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st

from mindseed.base.errors import UserError
from mindseed.ui import look, session, talk
from mindseed.ui.toolbar import toolbar
from mindseed.ui.store import Conversation, Entry, Gone, Store, as_markdown, as_row
from mindseed.ui.talk import Settings
from mindseed.tasks.tools import TOOLS
from mindseed.ui.turns import Live, about_line, grouped, show_answer
from mindseed.ui.words import gettext as _

SUGGESTIONS = {"en": ("Where does Anna live?", "7+8=?", "Tom has 6 books. He gets 7, then gives away 4. "
                      "How many books does Tom have now?", "Translate into Chinese: The small cat sees the red fox."),
               "zh": ("安娜住在哪里？", "7+8等于多少？", "汤姆有6本书，得到7本，然后送走4本。现在汤姆有几本书？",
                      "翻译成英文：小猫看见红狐狸。")}
STARTERS = {"en": ("Anna lives in", "7+8=", "Tom has 6 books. He gets 7, then", "The small cat sees"),
            "zh": ("安娜住在", "7+8=", "汤姆有6本书，得到7本，然后", "小猫看见")}           # of texts
PLAIN = {"en": ("Once upon a time", "The first thing to know is"), "zh": ("从前", "首先要知道的是")}
LISTED = 30                                       # conversations in the sidebar, the newest ones


def show() -> None:
    session.wait_until_kept()
    st.html(look.NARROW)
    store = session.store()
    if "conversation" not in st.session_state:
        st.session_state.conversation = number(st.query_params.get("c"))
    conversation = store.conversation(st.session_state.conversation or 0)
    if conversation is None and st.session_state.conversation is not None:
        open_conversation(None)
        st.session_state.gone = True
    st.query_params.from_dict({"c": str(conversation.id)} if conversation else {})
    with session.sidebar():
        list_conversations(store, conversation)
    served = session.served()

    entries = store.path(conversation.id) if conversation else []
    before = Settings.of(conversation.settings if conversation else store.get("chat", {}))
    own = before.model                            # what the user has chosen, some time
    before = before if own in served else replace(before, model=preferred(list(served)))
    settings = toolbar(before, served, conversation, menu=lambda: menu(store, conversation, before, entries))
    if settings != before:
        store.put("chat", settings.stored() | ({"model": own} if settings.model == before.model else {}))
        if conversation:
            store.configure(conversation.id, settings.stored())

    texts = session.reads_only(settings.model)
    if texts:
        session.say_reads_only()
    if st.session_state.get("gone"):
        st.info(_("The conversation that was here has been deleted elsewhere; this is a new one."),
                icon=":material/delete_sweep:")
    typed = st.chat_input(_("Begin a text") if texts else _("Ask something"), key="typed", submit_mode="stop")
    todo = st.session_state.pop("todo", None) or (("ask", typed) if typed and typed.strip() else None)
    if not entries and (todo is None or todo[0] != "ask"):
        return greet(settings.model, texts)
    if todo and todo[0] == "ask":
        if conversation is None:
            conversation = begin(store, settings, todo[1])
        parent = entries[-1].id if entries else None
        store.add(conversation.id, {"role": "user", "content": todo[1]}, parent=parent)
        entries = store.path(conversation.id)
    for turn in grouped(entries):
        show_turn(store, conversation, turn, busy=todo is not None)
    if trouble := st.session_state.pop("problem", None):
        st.error(trouble, icon=":material/error:")
    if entries[-1].role != "assistant" and not todo:      # stopped, or failed, before anything was written
        st.button(_("Answer"), icon=":material/refresh:", key="unanswered", on_click=do, args=("answer",))
    if todo:
        try:
            answer(store, conversation, settings, entries, texts=texts)
        except Gone:                              # deleted while it was written
            st.rerun()


def preferred(served: list[str]) -> str:
    """The model to begin with: the first that has learnt to converse."""
    return next((name for name in served if not session.reads_only(name)), served[0] if served else "")


def number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and len(text) < 18 else None


# ------------------------------------------------------------------------------------------------------- conversations

def list_conversations(store: Store, current: Conversation | None) -> None:
    st.button(_("New chat"), icon=":material/add:", width="stretch", on_click=open_conversation, args=(None,),
              key="new_chat", type="primary" if current is None else "secondary")
    found = store.conversations()
    with st.container(gap="xxsmall"):
        for conversation in found[:LISTED]:
            here = current is not None and conversation.id == current.id
            st.button(look.plain(conversation.title), key=f"{'here' if here else 'conversation'}_{conversation.id}",
                      type="tertiary", width="stretch", on_click=open_conversation, args=(conversation.id,))
    if len(found) > LISTED:
        st.caption(_("and {n} older ones", n=len(found) - LISTED))


def open_conversation(id: int | None) -> None:
    st.session_state.conversation = id
    for name in ("editing", "gone"):
        st.session_state.pop(name, None)


def begin(store: Store, settings: Settings, question: str) -> Conversation:
    """A new conversation, named after its first question."""
    words = " ".join(question.split())
    id = store.create(words if len(words) <= 48 else words[:47] + "…", settings.stored())
    st.session_state.conversation = id
    st.query_params["c"] = str(id)
    return store.conversation(id)


def menu(store: Store, conversation: Conversation | None, settings: Settings, entries: list[Entry]) -> None:
    """What can be done with the conversation as a whole."""
    if conversation is not None:
        key = f"title_{conversation.id}"
        if st.session_state.get(key) != conversation.title:       # another tab may have changed it: that one counts
            st.session_state[key] = conversation.title
        st.text_input(_("Title"), key=key, max_chars=200, on_change=rename, args=(store, conversation.id, key))
        name = f"mindseed-{conversation.id}"
        row = as_row(entries, system=settings.system, tools=[TOOLS[name].openai() for name in settings.tools])
        st.download_button(_("Export as JSON lines"), lines([row]), f"{name}.jsonl", key="export_row",
                           icon=":material/data_object:", width="stretch", disabled=row is None, on_click="ignore",
                           help=_("One row that `mindseed train` reads. Answers that are only half there stay out."))
        st.download_button(_("Export as Markdown"), as_markdown(conversation.title, entries, system=settings.system),
                           f"{name}.md", icon=":material/markdown:", width="stretch", key="export_page",
                           on_click="ignore")
    st.download_button(_("Export all conversations"), lambda: lines(all_rows(store)), "mindseed-conversations.jsonl",
                       key="export_all", icon=":material/download:", width="stretch", on_click="ignore",
                       help=_("JSON lines: a file to fine-tune on with `mindseed train`. Answers that are only half "
                              "there stay out."))
    if conversation is not None:
        sure = st.checkbox(_("Delete this conversation"), key=f"sure_{conversation.id}")
        if sure and st.button(_("Delete for good"), icon=":material/delete:", width="stretch", key="delete"):
            store.delete(conversation.id)
            open_conversation(None)
            st.rerun()


def rename(store: Store, conversation: int, key: str) -> None:
    """What was typed as its title; an empty one changes nothing."""
    if title := st.session_state[key].strip():
        store.rename(conversation, title)


def all_rows(store: Store) -> list[dict[str, Any] | None]:
    rows = []
    for conversation in reversed(store.conversations()):
        settings = Settings.of(conversation.settings)
        rows.append(as_row(store.path(conversation.id), system=settings.system,
                           tools=[TOOLS[name].openai() for name in settings.tools]))
    return rows


def lines(rows: list[dict[str, Any] | None]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row)


# --------------------------------------------------------------------------------------------------------------- turns

def greet(model: str, texts: bool) -> None:
    """An empty page, with something to begin with: questions, or beginnings of texts."""
    look.empty(_("How does the text begin?") if texts else _("What shall we talk about?"),
               _("Everything stays on this computer."))
    language, world = st.session_state.get("language", "en"), knows_the_world(model)
    suggestions = (STARTERS if world else PLAIN)[language] if texts else SUGGESTIONS[language] if world else ()
    with st.container(horizontal=True, horizontal_alignment="center", key="suggestions"):
        for i, text in enumerate(suggestions):
            st.button(text, key=f"suggest_{i}", on_click=do, args=("ask", text))


def knows_the_world(model: str) -> bool:
    """Whether the model was grown by `mindseed demo`, and so can be asked about the embedded world."""
    place = session.directory_of(model)
    folders = [Path(folder).absolute() for folder in ([place] if place else session.studio().models)]
    return any((folder.parents[1] / "world" / "conversations.jsonl").exists()
               for folder in folders if len(folder.parents) > 1)


def do(*what: Any) -> None:
    st.session_state.todo = what


def show_turn(store: Store, conversation: Conversation, turn: list[Entry], *, busy: bool) -> None:
    """One turn, and what can be done with it unless an answer is being written."""
    first = turn[0]
    if first.role == "user":
        with st.chat_message("user", avatar=":material/person:"):
            if st.session_state.get("editing") == first.id and not busy:
                return edit(store, conversation, first)
            with st.container(horizontal=True, vertical_alignment="center", wrap=False):
                st.text(first.message["content"], width="stretch")
                if not busy:
                    with actions(first, width="content"):
                        choose_version(store, conversation, first)
                        st.button("", icon=":material/edit:", type="tertiary", key=f"edit_{first.id}",
                                  help=_("Edit and ask again"), on_click=start_editing, args=(first.id,))
        return
    with st.chat_message("assistant", avatar=look.SEEDLING):
        show_answer(turn)
        if not busy:
            with actions(first):
                choose_version(store, conversation, first)
                st.button("", icon=":material/refresh:", type="tertiary", key=f"again_{first.id}",
                          help=_("Answer again"), on_click=ask_again, args=(store, conversation.id, first.parent))
                st.caption(about_line(turn))


def actions(entry: Entry, width: str = "stretch") -> Any:
    """The row of small buttons of a turn, pale until the pointer comes near."""
    return st.container(horizontal=True, gap="xxsmall", vertical_alignment="center", key=f"actions_{entry.id}",
                        width=width)


def choose_version(store: Store, conversation: Conversation, entry: Entry) -> None:
    """Go back and forth between versions of a message, if there are several."""
    if len(entry.versions) < 2:
        return
    at = entry.versions.index(entry.id)
    for step, icon in ((-1, "chevron_left"), (1, "chevron_right")):
        if step == 1:
            st.caption(f"{at + 1}/{len(entry.versions)}", width="content")
        there = at + step
        st.button("", icon=f":material/{icon}:", type="tertiary", key=f"version_{entry.id}_{step}",
                  disabled=not 0 <= there < len(entry.versions), on_click=store.choose,
                  args=(conversation.id, entry.versions[max(0, min(there, len(entry.versions) - 1))]))


def start_editing(id: int) -> None:
    st.session_state.editing = id


def edit(store: Store, conversation: Conversation, entry: Entry) -> None:
    text = st.text_area(_("Edit"), entry.message["content"], key=f"text_{entry.id}", label_visibility="collapsed")
    with st.container(horizontal=True):
        if st.button(_("Ask again"), type="primary", key="edit_done") and text.strip():
            store.add(conversation.id, {"role": "user", "content": text.strip()}, parent=entry.parent)
            start_editing(0)
            do("answer")
            st.rerun()
        st.button(_("Cancel"), key="edit_cancel", on_click=start_editing, args=(0,))


def ask_again(store: Store, conversation: int, parent: int | None) -> None:
    store.end_at(conversation, parent)
    do("answer")


def answer(store: Store, conversation: Conversation, settings: Settings, entries: list[Entry], *,
           texts: bool) -> None:
    """Have the last question answered, or text gone on with, and keep what was written even if it is stopped
    half-way."""
    parent = entries[-1].id
    settings = talk.again(settings, store.count_after(parent))
    with st.chat_message("assistant", avatar=look.SEEDLING):
        live = Live()
        st.button(_("Stop"), icon=":material/stop_circle:", type="tertiary", key="stop")
        asked = entries[-1].message["content"] if texts else [entry.message for entry in entries]
        with session.writing():
            writing = talk.Writing(session.client(), talk.continue_text if texts else talk.reply, settings, asked)
            try:
                while not writing.over:
                    event = writing.take(0.2)
                    if event is None:
                        live.wait()
                        continue
                    if event.kind == "message":
                        parent = store.add(conversation.id, event.message, parent=parent, about=event.about)
                        for result in event.results:
                            parent = store.add(conversation.id, result, parent=parent)
                    live.push(event)
            finally:
                writing.stop()
                if message := live.partial():
                    how = {"model": settings.model, "finish": "broken" if writing.failed else "stopped"}
                    store.add(conversation.id, message, parent=parent, about=how)
    if isinstance(writing.failed, talk.Unreachable):
        session.names_of.clear()                  # is it gone? The page asks anew
    if isinstance(writing.failed, UserError):
        st.session_state.problem = session.told(writing.failed)
    elif writing.failed:
        raise writing.failed
    st.rerun()


if __name__ == "__main__":
    show()
