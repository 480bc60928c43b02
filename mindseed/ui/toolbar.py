"""The bar above a conversation: which model, whether it thinks, its tools, how it chooses its words."""
from __future__ import annotations

from dataclasses import replace
from typing import Callable

import streamlit as st

from mindseed.ui.store import Conversation
from mindseed.ui.talk import Settings
from mindseed.tasks.tools import TOOLS
from mindseed.ui.words import gettext as _


def toolbar(settings: Settings, served: dict[str, int | None], conversation: Conversation | None, *,
            menu: Callable[[], None]) -> Settings:
    """The settings as they stand after what the user has just done to them."""
    key = f"{conversation.id if conversation else 'new'}"
    chosen = sum(st.session_state.get(f"tool_{name}_{key}", name in settings.tools) for name in TOOLS)
    with st.container(horizontal=True, key="toolbar"):
        names = list(served)
        model = st.selectbox(_("Model"), names, index=names.index(settings.model) if settings.model in served else 0,
                             key=f"model_{key}", label_visibility="collapsed", width="stretch")
        with st.popover(_("Tools") + f" · {chosen}" * bool(chosen), icon=":material/build:", key="tools"):
            settings = tools(settings, key)
        with st.popover(_("Settings"), icon=":material/tune:", key="settings"):
            settings = sampling(think(settings, key), key, served.get(model or ""))
        with st.popover("", icon=":material/more_horiz:", help=_("Export, rename, delete"), key="menu"):
            menu()
    return replace(settings, model=model or "")


def think(settings: Settings, key: str, *, disabled: bool = False) -> Settings:
    names = {"auto": _("as it likes"), "on": _("always"), "off": _("never")}
    chosen = st.segmented_control(_("Thinks first"), list(names), default=settings.thinking, key=f"thinking_{key}",
                                  format_func=names.__getitem__, required=True, disabled=disabled)
    return replace(settings, thinking=chosen or "auto")


def tools(settings: Settings, key: str) -> Settings:
    told = {
        "calculate": _("sums and formulas"), "get_time": _("the time in a city"), "get_date": _("today's date"),
        "convert_units": _("one unit into another"), "roll_dice": _("dice"),
        "get_weather": _("the weather in a city of the toy world (invented)"),
        "find_phone": _("a phone number of the toy world (invented)")}
    chosen = tuple(name for name, tool in TOOLS.items() if st.checkbox(
        f":material/{tool.icon}: **{name}** — {told[name]}", name in settings.tools, key=f"tool_{name}_{key}"))
    must = st.toggle(_("Its answer must begin with a call"), settings.must_call, key=f"must_{key}",
                     disabled=not chosen)
    return replace(settings, tools=chosen, must_call=must)


def sampling(settings: Settings, key: str, context: int | None) -> Settings:
    """`context` of the model, in tokens, is what no answer is longer than; None: nobody says."""
    own = _("the model's own")
    system = st.text_area(_("System prompt"), settings.system, key=f"system_{key}", height=80,
                          placeholder=_("What the model should know or be before the first question"))
    left, right = st.columns(2)
    with left:
        temperature = st.number_input(_("Temperature"), 0.0, 5.0, settings.temperature, 0.1, key=f"temperature_{key}",
                                      placeholder=own, help=_("0: always the likeliest token; higher: bolder"))
        top_k = st.number_input("Top-k", 0, 1_000_000, settings.top_k, 1, key=f"top_k_{key}", placeholder=own,
                                help=_("choose among the k likeliest tokens; 0: all"))
        seed = st.number_input(_("Seed"), 0, 2**53 - 1, settings.seed, 1, key=f"seed_{key}",
                               placeholder=_("random"), help=_("the same seed gives the same answers"))
    with right:
        top_p = st.number_input("Top-p", 0.01, 1.0, settings.top_p, 0.05, key=f"top_p_{key}", placeholder=own,
                                help=_("choose among the likeliest tokens with this much probability together"))
        turns = st.number_input(_("Questions sent along"), 1, 1000, settings.turns or None, 1, key=f"turns_{key}",
                                placeholder=_("all of them"), help=_("of the past, with their answers"))
        limit, name = context or 1_000_000, f"max_tokens_{key}"
        allowed = min(settings.max_tokens, limit)
        if (st.session_state.get(name) or 0) > limit:             # another model was chosen
            st.session_state[name] = limit
        longest = st.number_input(_("Longest answer, in tokens"), 1, limit, allowed, 64, key=name,
                                  help=_("at most the model's context, {n}", n=context) if context else None)
        longest = settings.max_tokens if longest == allowed else longest          # of a larger model it still holds
    return replace(settings, system=system.strip(), turns=turns or 0, temperature=temperature, top_p=top_p, top_k=top_k,
                   max_tokens=longest or 512, seed=seed)
