"""The studio's frame, which Streamlit runs: logo, pages, the state of the server, the language."""
from __future__ import annotations

import html
import sys
from pathlib import Path

import streamlit as st

from mindseed.ui import mark

VIEWS = Path(__file__).with_name("views")      # "pages" would be taken for pages by Streamlit itself
WAITING = (f'<div style="text-align:center;padding-top:22vh"><img src="{mark.ICON}" alt="" width="72" height="72"/>'
           '<p style="opacity:.6">mindseed …</p></div>')


def main() -> None:
    st.set_page_config(page_title="mindseed", page_icon=mark.ICON, layout="wide")
    place = st.empty()
    if "mindseed.ui.session" not in sys.modules:              # seconds pass until all is imported, the first time
        place.html(WAITING)
    from mindseed.ui import look, session
    from mindseed.ui.words import gettext as _

    place.html(look.CSS)
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
    """Whether the server answers, and where it is; looks again while it does not."""
    from mindseed.base.errors import UserError
    from mindseed.ui import look, session
    from mindseed.ui.words import gettext as _

    server = session.studio().server
    if not server:
        return
    state = session.state(ask=False)
    if state == "up":
        try:
            session.served()
        except UserError:
            state = "silent"
    else:
        session.names_of.clear()
    colour, words = {"up": (look.colours()[2], _("serving at")), "silent": (look.colours()[1], _("no answer from")),
                     "ended": (look.colours()[4], _("ended:"))}[state]
    place = server.split("://", 1)[-1]
    st.html(f'<div class="seed-caption"><span class="seed-dot" style="background:{colour}"></span>'
            f"{html.escape(words)} {html.escape(place)}</div>")
    if state != "up":                             # no timer beside an answer that is being written
        session.look_again(state)


if __name__ == "__main__":
    main()
