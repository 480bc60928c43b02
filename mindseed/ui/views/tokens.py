"""Tokens: how a text falls into tokens, and by which merges each came about."""
from __future__ import annotations

import html

import pandas as pd
import streamlit as st

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import ByteLevel
from mindseed.tokenizers.bpe import BPE
from mindseed.tokenizers.trace import birth
from mindseed.ui import look, session
from mindseed.ui.words import gettext as _

TEXT = {"en": "Where does Anna live? Anna lives in Riva, and she keeps a cat.\n7+8=15  <|im_end|>",
        "zh": "安娜住在哪里？安娜住在里瓦，她养猫。\n7+8=15  <|im_end|>"}
MOST = 4000                                       # tokens that are drawn


def show() -> None:
    look.head(_("Tokens"), _("what a model reads instead of letters"))
    path = session.choose_directory("tokens_directory")
    if not path:
        look.empty(_("No tokenizer yet"), _("This page reads the tokenizer of a model directory. Name one:"),
                   "`mindseed ui runs/demo/fine-tune/model`")
        return
    tokenizer = session.load_tokens(path)
    text = st.text_area(_("Text"), TEXT[st.session_state.get("language", "en")], height=120, key="tokens_text",
                        persist_state="session")
    special = st.toggle(_("Spellings of special tokens become special tokens"), key="tokens_special",
                        help=_("Off, as for everything that a user or a web page writes: a text cannot spell markup."))
    if not text:
        st.caption(_("Type something."))
        return
    ids = tokenizer.encode(text, allow_special=special)
    figures(text, ids, tokenizer)
    st.html(f'<div class="seed-tokens" id="tokens">{coloured(tokenizer, ids[:MOST])}</div>')
    if len(ids) > MOST:
        st.caption(_("The first {n} are shown.", n=f"{MOST:,}"))
    with st.container(key="stack_tokens"):
        table, story = st.columns([1, 1.15], gap="large")
    with table:
        at = choose(tokenizer, ids[:MOST])
    with story:
        tell(tokenizer, ids[at])


def figures(text: str, ids: list[int], tokenizer: ByteLevel) -> None:
    size = len(text.encode())
    values = [(_("tokens"), f"{len(ids):,}"), (_("characters"), f"{len(text):,}"), (_("bytes"), f"{size:,}"),
              (_("bytes per token"), f"{size / len(ids):.2f}"), (_("different tokens"), f"{len(set(ids)):,}"),
              (_("vocabulary"), f"{tokenizer.vocab_size:,}")]
    with st.container(key="figures"):
        columns = st.columns(len(values))
    for column, (label, value) in zip(columns, values):
        column.metric(label, value)


def coloured(tokenizer: ByteLevel, ids: list[int]) -> str:
    """Tokens as coloured spans; neighbours differ, and a token has its colour everywhere."""
    out, palette, last = [], look.colours()[:7], -1
    for id in ids:
        hue = id % len(palette)
        hue = (hue + 1) % len(palette) if hue == last else hue
        out.append(span(tokenizer, id, palette[hue]))
        last = hue
    return "".join(out)


def span(tokenizer: ByteLevel, id: int, colour: str, extra: str = "") -> str:
    """One token: its text with white space made visible, or its bytes where they are no text; id and bytes on
    hovering."""
    data = tokenizer.token_bytes(id)
    hexes = " ".join(f"{b:02X}" for b in data)
    kind = "special" if id not in tokenizer.tokens else ""
    try:
        inside = visible(data.decode())
    except UnicodeDecodeError:
        kind, inside = "raw", hexes
    tip = f"id {id}\n{len(data)} {_('bytes')}: {hexes if len(data) <= 24 else hexes[:72] + ' …'}"
    return (f'<span class="seed-token {kind} {extra}" style="--c:{colour}" title="{html.escape(tip)}">{inside}</span>')


def visible(text: str) -> str:
    """HTML in which white space can be seen."""
    marks = {" ": "<i>·</i>", "\n": "<i>↵</i>\n", "\t": "<i>→</i>\t", "\r": "<i>␍</i>", "\u3000": "<i>□</i>"}
    return "".join(marks.get(c) or (html.escape(c) if c.isprintable() else f"<i>U+{ord(c):04X}</i>") for c in text)


def choose(tokenizer: ByteLevel, ids: list[int]) -> int:
    """The place of the token to tell about: the row that is selected, else the longest token."""
    spelt = [tokenizer.token_bytes(id) for id in ids]
    rows = pd.DataFrame({"token": [readable(token) for token in spelt], "id": ids, "bytes": [len(t) for t in spelt]})
    longest = max(range(len(ids)), key=lambda i: (ids[i] in tokenizer.tokens, len(spelt[i])))
    picked = st.dataframe(rows, height=330, on_select="rerun", selection_mode="single-row-required", key="tokens_table",
                          selection_default={"selection": {"rows": [longest]}},
                          column_config={"token": _("token"), "id": st.column_config.NumberColumn("id", format="%d"),
                                         "bytes": _("bytes")})
    chosen = picked.selection.rows if picked else []
    return chosen[0] if chosen and chosen[0] < len(ids) else longest


def readable(token: bytes) -> str:
    try:
        return token.decode().replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    except UnicodeDecodeError:
        return " ".join(f"{b:02X}" for b in token)


def tell(tokenizer: ByteLevel, id: int) -> None:
    """How a token came about."""
    token = tokenizer.token_bytes(id)
    st.markdown(f"{_('How this token came about')} :gray[id {id}]")
    if id not in tokenizer.tokens:
        st.caption(_("It is a special token: it was put into the vocabulary, and no text can spell it."))
        return
    if not isinstance(tokenizer, BPE):
        st.caption(_("This tokenizer has a token for every byte, and no merges."))
        return
    steps = birth(tokenizer, id)
    if steps is None:
        st.caption(_("No merges make it; it was put into the vocabulary as a whole."))
        return
    if len(steps) == 1:
        st.caption(_("It is a single byte, {byte}: where every text begins.", byte=f"{token[0]:02X}")
                   if len(token) == 1 else _("It is taken as a whole, without merges."))
        return
    palette, rows = look.colours(), []
    for step in steps:
        label = _("bytes") if step.rank is None else _("merge {n}", n=f"{step.rank + 1:,}")
        chips = "".join(span(tokenizer, part, palette[2] if i == step.at else palette[7],
                             "new" if i == step.at else "") for i, part in enumerate(step.ids))
        rows.append(f'<div class="seed-step"><b>{html.escape(label)}</b><span>{chips}</span></div>')
    st.html(f'<div id="merges">{"".join(rows)}</div>')
    st.caption(_("The merge that was learnt first goes first; this vocabulary has {n} of them.",
                 n=f"{len(tokenizer.merges):,}"))


if __name__ == "__main__":
    try:
        show()
    except UnicodeEncodeError:
        raise UserError(_("The text is not valid Unicode.")) from None
