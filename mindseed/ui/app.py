"""The studio's frame, which Streamlit runs: logo, pages, the state of the server, the language."""
from __future__ import annotations

import html
from pathlib import Path

import streamlit as st

from mindseed.base.errors import UserError
from mindseed.ui import look, session
from mindseed.ui.words import gettext as _

VIEWS = Path(__file__).with_name("views")      # "pages" would be taken for pages by Streamlit itself


def main() -> None:
    st.set_page_config(page_title="mindseed", page_icon=look.ICON, layout="wide")
    st.html(look.CSS)
    session.begin()
    st.logo(look.logo(), size="large", icon_image=look.SEEDLING)
    page = st.navigation([
        st.Page(VIEWS / "chat.py", title=_("Chat"), icon=":material/forum:", url_path="chat", default=True),
        st.Page(VIEWS / "compare.py", title=_("Compare"), icon=":material/splitscreen_right:", url_path="compare"),
        st.Page(VIEWS / "runs.py", title=_("Runs"), icon=":material/monitoring:", url_path="runs"),
        st.Page(VIEWS / "tokens.py", title=_("Tokens"), icon=":material/token:", url_path="tokens"),
        st.Page(VIEWS / "inside.py", title=_("Inside"), icon=":material/neurology:", url_path="inside"),
    ])
    st.session_state["_sidebar"] = st.sidebar.container()
    with st.sidebar.container(key="foot"):
        server_line()
        session.choose_language()
    with session.guarded():
        page.run()


def server_line() -> None:
    """Whether the server answers, and where it is."""
    server = session.studio().server
    if not server:
        return
    try:
        session.served()
        colour, words = look.colours()[2], _("serving at")
    except UserError:
        colour, words = look.colours()[1], _("no answer from")
        session.look_again()
    place = server.split("://", 1)[-1]
    st.html(f'<div class="seed-caption"><span class="seed-dot" style="background:{colour}"></span>'
            f"{html.escape(words)} {html.escape(place)}</div>")


if __name__ == "__main__":
    main()
