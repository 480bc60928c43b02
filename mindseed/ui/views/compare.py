"""Compare: one prompt, two models or stages of one, side by side, both writing at once."""
from __future__ import annotations

from dataclasses import replace

import openai
import streamlit as st

from mindseed.ui import look, session, talk
from mindseed.ui.store import Entry
from mindseed.ui.talk import Event, Settings
from mindseed.ui.toolbar import sampling, think, tools
from mindseed.ui.turns import Live, about_line, show_answer
from mindseed.ui.words import gettext as _

SIDES = ("left", "right")


class Side:
    """A model that writes, and what it has written."""

    def __init__(self, client: openai.OpenAI, settings: Settings, prompt: str, chat: bool) -> None:
        self.settings, self.entries = settings, []
        asked = [{"role": "user", "content": prompt}] if chat else prompt
        self.writing = talk.Writing(client, talk.reply if chat else talk.continue_text, settings, asked)

    def keep(self, event: Event) -> None:
        """What a message event carries."""
        if event.kind == "message":
            self.entries.append(Entry(id=0, parent=None, message=event.message, about=event.about))
            self.entries += [Entry(id=0, parent=None, message=result) for result in event.results]


def show() -> None:
    look.head(_("Compare"), _("one prompt, two models"))
    served = session.served()
    if "compare" not in st.session_state:
        st.session_state.compare = Settings.of(session.store().get("compare", {}))
    before = st.session_state.compare
    names = []
    for side, column in zip(SIDES, st.columns(2, gap="large")):
        default = min(SIDES.index(side), len(served) - 1)
        names.append(column.selectbox(_("Model"), list(served), index=default, key=f"compare_{side}",
                                      persist_state="session", label_visibility="collapsed"))
        if session.reads_only(names[-1]):
            with column:
                session.say_reads_only()
    places = st.columns(2, gap="large")
    with session.sidebar():
        how = st.segmented_control(
            _("The prompt is"), ["chat", "text"], default="chat", key="compare_how", required=True,
            format_func={"chat": _("a question"), "text": _("a plain text")}.__getitem__,
            persist_state="session")
        settings = think(before, "compare", disabled=how == "text")
        with st.expander(_("Tools"), icon=":material/build:"):
            settings = tools(settings, "compare")
        with st.expander(_("Settings"), icon=":material/tune:"):
            contexts = [served.get(name) for name in names]
            settings = sampling(settings, "compare", None if None in contexts else max(contexts))
    if settings != before:
        st.session_state.compare = settings
        session.store().put("compare", settings.stored())
    prompt = st.chat_input(_("Ask both"), key="compare_prompt", submit_mode="stop")
    if prompt and prompt.strip():
        run(places, settings, names, prompt, chat=how == "chat")
        st.rerun()
    shown = st.session_state.get("compared")
    if not shown:
        look.empty(_("What does each of them say?"), _("Ask below; both answer at once, with the same settings."),
                   _("Serve two stages of a run to see what the second has learnt:"),
                   "`mindseed ui runs/demo/pretrain/model runs/demo/fine-tune/model`")
        return
    for place, side in zip(places, shown["sides"]):
        with place:
            draw_prompt(shown["prompt"])
            with st.chat_message("assistant", avatar=look.SEEDLING):
                if side.entries:
                    show_answer(side.entries)
                    st.caption(figures(side.entries))
                elif not side.writing.failed:
                    st.caption(_("stopped"))
                if failed := side.writing.failed:
                    st.error(session.told(failed))


def draw_prompt(prompt: str) -> None:
    with st.chat_message("user", avatar=":material/person:"):
        st.text(prompt)


def figures(entries: list[Entry]) -> str:
    first = next((entry.about.get("first_s") for entry in entries if entry.about.get("first_s")), None)
    return about_line(entries) + (" · " + _("first token after {n} ms", n=f"{1000 * first:.0f}") if first else "")


def run(places: list, settings: Settings, names: list[str], prompt: str, *, chat: bool) -> None:
    """Let both write, and show what comes as it comes."""
    sides = [Side(session.client(), replace(settings, model=name), prompt, chat) for name in names]
    st.session_state.compared = {"prompt": prompt, "sides": sides}                # also if it is stopped half-way
    lives = []
    for place in places:
        with place:
            draw_prompt(prompt)
            with st.chat_message("assistant", avatar=look.SEEDLING):
                lives.append(Live())
    try:
        while not all(side.writing.over for side in sides):
            for side, live in zip(sides, lives):
                if side.writing.over:
                    continue
                if event := side.writing.take(0.02):
                    side.keep(event)
                    live.push(event)
                elif not side.writing.over:
                    live.wait()
    finally:
        for side, live in zip(sides, lives):
            side.writing.stop()
            if message := live.partial():
                finish = "broken" if side.writing.failed else "stopped"
                side.entries.append(Entry(id=0, parent=None, message=message,
                                          about={"model": side.settings.model, "finish": finish}))


if __name__ == "__main__":
    show()
