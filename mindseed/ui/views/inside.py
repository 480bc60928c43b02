"""Inside: what a model attends to, what each of its layers would say next, which experts it asks (models/probe.py)."""
from __future__ import annotations

import html

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from mindseed.base.errors import UserError
from mindseed.interop.directory import Loaded
from mindseed.models.probe import Probe, probe
from mindseed.nn.moe import MoE
from mindseed.tokenizers.chat import encode_chat
from mindseed.ui import look, session
from mindseed.ui.anatomy import mixing_words, shape_words
from mindseed.ui.views.tokens import readable, visible
from mindseed.ui.words import gettext as _

PROMPT = {"en": "Where does Anna live?", "zh": "安娜住在哪里？"}
MOST = 160                                        # tokens that are looked at, the last ones
WIDE = 48                                         # tokens of a picture whose names can still be read


def show() -> None:
    look.head(_("Inside"), _("what happens between the prompt and the next token"))
    path = session.choose_directory("inside_directory")
    if not path:
        look.empty(_("No model yet"), _("This page opens a model directory itself. Name one:"),
                   "`mindseed ui runs/demo/fine-tune/model`")
        return
    loaded = session.load_model(path)
    st.caption(shape_words(loaded.model.config))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input(_("Prompt"), PROMPT[st.session_state.get("language", "en")], key="inside_text",
                             persist_state="session", width="stretch")
        kinds = {"chat": _("a question"), "text": _("a plain text")}
        how = st.segmented_control(_("The prompt is"), list(kinds), default="chat", key="inside_how", required=True,
                                   format_func=kinds.__getitem__, persist_state="session")
    ids = encode(loaded, text, how == "chat")
    limit = min(MOST, loaded.model.config.seq_len)
    if len(ids) > limit:
        st.caption(_("The prompt has {n} tokens; the last {m} are looked at.", n=len(ids), m=limit))
    if not ids:
        st.caption(_("Type something."))
        return
    ids = ids[-limit:]
    key = (id(loaded), tuple(ids))
    if st.session_state.get("probed", (None,))[0] != key:
        st.session_state.probed = key, probe(loaded.model, ids)
    seen: Probe = st.session_state.probed[1]
    names = [readable(loaded.tokenizer.token_bytes(id)) for id in ids]
    attention, lens, experts = st.tabs([_("Attention"), _("Layer by layer"), _("Experts")], key="inside_tab")
    with attention:
        show_attention(seen, names)
    with lens:
        show_lens(seen, names, loaded)
    with experts:
        show_experts(seen, names)


def encode(loaded: Loaded, text: str, chat: bool) -> list[int]:
    """The ids that the model would read. A model whose format tells no conversation reads the text alone."""
    if not text:
        return []
    if chat:
        try:
            return encode_chat(loaded.tokenizer, [{"role": "user", "content": text}], generation_prompt=True,
                               template=loaded.template)[0]
        except UserError as error:
            st.caption(str(error))
    begin = [loaded.bos_id] if loaded.bos_id is not None else []
    return [*begin, *loaded.tokenizer.encode(text)]


def labels(names: list[str], longest: int = 16) -> list[str]:
    """Tokens as they stand on an axis; the number before keeps two alike apart, and in order."""
    return [f"{i} {name if len(name) <= longest else name[:longest - 1] + '…'}" for i, name in enumerate(names)]


def part(count: int, key: str) -> tuple[int, int]:
    """Which tokens to show: all, or a stretch that can be read."""
    if count <= WIDE:
        return 0, count
    start, end = st.slider(_("Tokens"), 1, count, (count - WIDE + 1, count), key=key)
    return start - 1, end


# ----------------------------------------------------------------------------------------------------------- attention

def show_attention(seen: Probe, names: list[str]) -> None:
    blocks, T = seen.model.blocks, len(names)
    maps = {i: weights for i in range(len(blocks)) if (weights := seen.attention(i)) is not None}
    linear = [i for i in range(len(blocks)) if i not in maps]
    if linear:
        st.info(_("Layers {layers}: linear attention keeps a fading memory of fixed size instead of looking back at "
                  "single tokens, so there is no map to show.", layers=", ".join(map(str, linear))),
                icon=":material/waves:")
    if not maps:
        return
    with st.container(key="stack_attention"):
        left, right = st.columns([1, 1.25], gap="large")
    with left:
        layer = st.select_slider(_("Layer"), list(maps), value=max(maps), key="layer") if len(maps) > 1 else max(maps)
        st.caption(mixing_words(seen.model.config.layers[layer].mixer))
        heads = len(maps[layer])
        with st.container(key="heads"):
            head = st.segmented_control(_("Head"), ["mean", *range(heads)], default="mean", key=f"head_{heads}",
                                        required=True, format_func=lambda h: _("mean") if h == "mean" else str(h))
        weights = (maps[layer].mean(0) if head == "mean" else maps[layer][head]).float().cpu().numpy()
        at = st.select_slider(_("Looking from"), range(T), value=T - 1, key=f"query_{T}",
                              format_func=lambda t: f"{t} {names[t]}") if T > 1 else 0
        st.html(f'<div class="seed-tokens" id="looks">{looked_at(names, weights[at], at)}</div>')
        st.caption(_("The stronger its colour, the more the chosen token looks at it."))
    with right:
        start, end = part(T, f"attention_{T}")
        heat_map(weights, names, start, end, at)
    st.markdown(f"**{_('All heads of this layer')}**")
    thumbnails(maps[layer].float().cpu().numpy())


def looked_at(names: list[str], row: np.ndarray, at: int) -> str:
    """The text, every token as strong as it is looked at."""
    strongest, colour, out = max(row.max(), 1e-9), look.colours()[2], []
    for t, name in enumerate(names):
        share = 90 * row[t] / strongest
        ring = f";outline:2px solid {colour}" if t == at else ""
        out.append(f'<span class="seed-token" title="{t}: {row[t]:.3f}" style="background:color-mix(in srgb, {colour} '
                   f'{share:.0f}%, transparent){ring}">{visible(name.replace("↵", chr(10)).replace("·", " "))}</span>')
    return "".join(out)


def heat_map(weights: np.ndarray, names: list[str], start: int, end: int, at: int) -> None:
    """Rows look at columns."""
    marks = labels(names)
    rows = [{"from": marks[t], "to": marks[s], "weight": float(weights[t, s])}
            for t in range(start, end) for s in range(start, min(t, end - 1) + 1)]
    axis = alt.Axis(labelFontSize=10, labelLimit=90, labelOverlap=False, labelFlush=False, labelFont="monospace")
    picture = alt.Chart(pd.DataFrame(rows)).mark_rect().encode(
        x=alt.X("to:N", sort=marks[start:end], title=_("looked at"), axis=axis.copy()),
        y=alt.Y("from:N", sort=marks[start:end], title=_("looking"), axis=axis.copy()),
        color=alt.Color("weight:Q", scale=look.heatmap_scale(0, max(1e-9, min(1, float(weights[start:end].max())))),
                        legend=None),
        tooltip=[alt.Tooltip("from:N", title=_("looking")), alt.Tooltip("to:N", title=_("looked at")),
                 alt.Tooltip("weight:Q", title=_("weight"), format=".4f")])
    look.chart(picture, height=max(300, min(17 * (end - start) + 100, 780)))


def thumbnails(maps: np.ndarray) -> None:
    """Every head's map as a small picture."""
    per_row = 8
    for start in range(0, len(maps), per_row):
        with st.container(key=f"thumbs_{start}"):
            columns = st.columns(per_row)
        for i, column in enumerate(columns):
            if start + i < len(maps):
                column.image(picture_of(maps[start + i]), caption=_("head {n}", n=start + i), width="stretch",
                             output_format="PNG")


def picture_of(weights: np.ndarray) -> np.ndarray:
    """(T, S) weights in the colours of heat, as a picture; large enough that pixels stay sharp."""
    stops = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in look.heat()], float)
    shade = np.sqrt(weights / max(weights.max(), 1e-9)) * (len(stops) - 1)
    low = np.floor(shade).astype(int).clip(0, len(stops) - 2)
    mix = (shade - low)[..., None]
    pixels = (stops[low] * (1 - mix) + stops[low + 1] * mix).astype(np.uint8)
    times = max(1, 240 // len(weights))
    return pixels.repeat(times, 0).repeat(times, 1)


# ---------------------------------------------------------------------------------------------------------- logit lens

def show_lens(seen: Probe, names: list[str], loaded: Loaded) -> None:
    """What the model would say after each layer."""
    T, depth = len(names), len(seen.model.blocks)
    st.caption(_("The last norm and the head, put on after every layer: what would come next if the model ended there? "
                 "The top row is what it does say."))
    start = max(0, T - 12)
    if T > 12:
        start = st.slider(_("From token"), 0, T - 12, T - 12, key=f"lens_{T}")
    end, known, rows = min(T, start + 12), loaded.tokenizer, []
    words = {0: _("embedding")} | {d: _("layer {n}", n=d - 1) for d in range(1, depth + 1)}
    order, tops = [words[d] for d in range(depth, -1, -1)], {}
    marks = labels(names, 5)

    def spell(id: int) -> str:
        try:
            return readable(known.token_bytes(id))
        except UserError:                         # a row of the embedding to spare
            return f"#{id}"

    for d in range(depth + 1):
        best = seen.lens(d)[start:end].exp().topk(min(8, seen.model.config.vocab_size), dim=-1)
        tops[d] = best
        rows += [{"layer": words[d], "token": marks[start + i], "next": spell(int(best.indices[i, 0])),
                  "p": float(best.values[i, 0])} for i in range(end - start)]
    data = pd.DataFrame(rows)
    base = alt.Chart(data).encode(
        x=alt.X("token:N", sort=marks[start:end], title=None, axis=alt.Axis(
            labelAngle=0, labelFont="monospace", orient="top", labelLimit=80, labelOverlap=False, labelFlush=False)),
        y=alt.Y("layer:N", sort=order, title=None),
        tooltip=[alt.Tooltip("token:N", title=_("after")), alt.Tooltip("layer:N", title=_("layer")),
                 alt.Tooltip("next:N", title=_("would say")), alt.Tooltip("p:Q", title=_("probability"), format=".3f")])
    ink = ("#e6e8eb", "#14171b") if look.is_dark() else ("#1d2126", "#ffffff")
    cells = base.mark_rect(stroke="transparent").encode(color=alt.Color(
        "p:Q", title=_("probability"), scale=look.heatmap_scale(0, 1), legend=alt.Legend(
            format="%", gradientLength=28 * depth, tickCount=3)))
    text = base.mark_text(font="monospace", fontSize=11, limit=58).encode(text="next:N", color=alt.condition(
        "datum.p > 0.55", alt.value(ink[1]), alt.value(ink[0])))
    look.chart(alt.layer(cells, text), height=34 * (depth + 1) + 40)

    at = st.select_slider(_("Next token after"), range(start, end), value=end - 1, key=f"lens_at_{T}_{start}",
                          format_func=lambda t: f"{t} {names[t]}") if end - start > 1 else start
    after = st.select_slider(_("as seen by"), range(depth + 1), value=depth, key="lens_depth",
                             format_func=words.__getitem__)
    best = tops[after]
    ids = best.indices[at - start].tolist()
    bars = pd.DataFrame({"token": [spell(id) for id in ids], "rank": range(len(ids)),
                         "p": best.values[at - start].tolist()})
    twice = bars["token"].duplicated(keep=False)                                  # the same text, other bytes
    bars.loc[twice, "token"] = [f"{spell(id)} #{id}" for id, also in zip(ids, twice) if also]
    picture = alt.Chart(bars).encode(
        x=alt.X("p:Q", title=_("probability"), scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        y=alt.Y("token:N", sort=alt.SortField("rank"), title=None, axis=alt.Axis(
            labelFont="monospace", labelFontSize=12)))
    look.chart(alt.layer(picture.mark_bar(color=look.colours()[0], cornerRadiusEnd=3, height={"band": 0.7}),
                         picture.mark_text(align="left", dx=5, color=ink[0]).encode(
                             text=alt.Text("p:Q", format=".1%"))), height=26 * len(bars) + 30)


# ------------------------------------------------------------------------------------------------------------- experts

def show_experts(seen: Probe, names: list[str]) -> None:
    blocks = seen.model.blocks
    layers = [i for i, block in enumerate(blocks) if isinstance(block.ffn, MoE)]
    if not layers:
        look.empty(_("No mixture of experts"), _("Every layer of this model has one feed-forward, which all tokens "
                                                 "pass. Make a mixture of it:"),
                   "`mindseed train --init DIR --model.moe.experts 4 --data.train FILE --out runs/mixture`")
        return
    layer = st.select_slider(_("Layer"), layers, value=layers[-1], key="expert_layer") if len(layers) > 1 else layers[0]
    routes, config = seen.routes(layer), blocks[layer].ffn.config
    st.caption(_("{k} of {e} experts per token", k=config.top_k, e=config.experts)
               + (" · " + _("and one that all tokens pass") if config.shared_dim else ""))
    chosen, weights = routes.chosen.cpu().numpy(), routes.weights.float().cpu().numpy()
    start, end = part(len(names), f"experts_{len(names)}")
    marks = labels(names)
    rows = [{"token": marks[t], "expert": int(e), "weight": float(w)}
            for t in range(start, end) for e, w in zip(chosen[t], weights[t])]
    with st.container(key="stack_experts"):
        left, right = st.columns([1.7, 1], gap="large")
    with left:
        st.markdown(f"**{_('Which token goes where')}**")
        look.chart(alt.Chart(pd.DataFrame(rows)).mark_rect(cornerRadius=2).encode(
            x=alt.X("expert:O", title=_("expert"), scale=alt.Scale(domain=list(range(config.experts))),
                    axis=alt.Axis(labelAngle=0, orient="top")),
            y=alt.Y("token:N", sort=marks[start:end], title=None, axis=alt.Axis(
                labelFont="monospace", labelLimit=110, labelOverlap=False, labelFlush=False)),
            color=alt.Color("weight:Q", title=_("weight"), scale=look.heatmap_scale(0, float(weights.max()))),
            tooltip=[alt.Tooltip("token:N", title=_("token")), alt.Tooltip("expert:O", title=_("expert")),
                     alt.Tooltip("weight:Q", title=_("weight"), format=".3f")]),
            height=max(160, 17 * (end - start) + 50))
    with right:
        st.markdown(f"**{_('How often each is asked')}**")
        counts = np.bincount(chosen.flatten(), minlength=config.experts) / chosen.size
        look.chart(alt.Chart(pd.DataFrame({"expert": range(config.experts), "share": counts})).mark_bar(
            color=look.colours()[0], cornerRadiusEnd=3).encode(
            x=alt.X("share:Q", title=None, axis=alt.Axis(format="%")), y=alt.Y("expert:O", title=_("expert")),
            tooltip=[alt.Tooltip("expert:O", title=_("expert")),
                     alt.Tooltip("share:Q", title=_("share"), format=".1%")]),
            height=max(140, 26 * config.experts + 40))
        st.html("".join(f'<div class="seed-step"><b>{_("expert")} {e}</b><span>{tokens_of(names, chosen, e)}</span>'
                        "</div>" for e in range(config.experts)))


def tokens_of(names: list[str], chosen: np.ndarray, expert: int) -> str:
    """The tokens whose first choice an expert is, the most frequent first."""
    mine = pd.Series([names[t] for t in range(len(names)) if chosen[t, 0] == expert], dtype=object).value_counts()
    return " ".join(f'<span class="seed-token" style="--c:{look.colours()[2]}">{html.escape(name)}</span>'
                    for name in mine.index[:14])


if __name__ == "__main__":
    show()
