"""A demo's folder as one web page: scores, curves, answers, timings, and what to type next.

The page is a single file that needs nothing else, not even a network: its style and its charts are inside it. What a
model answered is arbitrary text, so everything is escaped on its way into the page, characters that no page may hold
are replaced, and the page forbids itself to run scripts or to load anything.

Names of stages, families and logged values are taken as they come; the tables here only add Chinese names and units
for those they know, so that a stage, a family or a metric invented later appears without a change.
"""
from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mindseed.base.errors import UserError
from mindseed.base.files import read_json, write_text
from mindseed.base.log import bytes_text, duration, read_jsonl, si
from mindseed.recipes.charts import Curve, bars, line_chart, smooth

STYLES = 8                                        # colours s0 ... s7 in the template; stages beyond begin anew
SHOWN = 4                                         # answers shown per family, half of them wrong where possible
LONGEST, EARLIER = 400, 100                       # characters shown of the last stage's answer, of one before it
ANSWER = {"stage", "family", "question", "expected", "answer", "score"}
LANGS = {"en": "English", "zh": "Chinese"}
STAGES = {"untrained": "未训练", "pretrain": "预训练", "fine-tune": "微调", "dpo": "偏好优化", "grpo": "强化学习"}
FAMILIES = {
    "facts": ("known facts, asked in a wording never trained on", "已知事实，换一种问法"),
    "translation": ("sentences never seen, from known words", "没见过的句子的互译"),
    "arithmetic": ("sums with numbers never seen together", "没见过的加减法"),
    "reading": ("the answer stands in a given passage", "从短文里找答案"),
    "told": ("told in the texts, never asked about in training (hard)", "只在文本里出现过，从未提问（难）"),
    "steps": ("several steps, thought through one by one (hard)", "多步推理（难）"),
    "tools": ("calls of tools with arguments never seen", "用没见过的参数调用工具"),
}
# key in the log -> name, Chinese name, unit, whether its axis begins at zero
METRICS = {
    "loss": ("Training loss", "训练损失", "nats per token", False),
    "bits_per_byte": ("Bits per byte, held-out text", "验证集每字节比特数", "bits", False),
    "lr": ("Learning rate", "学习率", "", True),
    "tokens_per_s": ("Speed", "训练速度", "tokens/s", True),
}
UNDRAWN = {"step", "time", "elapsed_s", "nll", "mfu", "grad_norm", "supervised", "memory_bytes"}
EXACT = {"bits_per_byte", "lr"}                   # all others are drawn smoothed, the logged values faint behind


def write_report(folder: Path) -> Path:
    """Write folder/report.html from folder/summary.json, details.json and the logs of the runs; return its path.

    Only summary.json must be there; whatever else is missing is left out, or named on the page where a reader would
    look for it. Raises UserError if a file is there but is not what it should be.
    """
    folder = Path(folder)
    stages = read_stages(folder / "summary.json")
    details = read_details(folder / "details.json")
    styles = {stage["name"]: f"s{i % STYLES}" for i, stage in enumerate(stages)}
    answers, last = details["answers"], stages[-1]["name"]
    out = folder / "report.html"
    write_text(out, template().render(
        stages=stages, styles=styles, names_zh=STAGES, details=details, families=family_rows(stages, styles, answers),
        languages=language_rows(stages, answers), count=sum(a["stage"] == last for a in answers),
        runs=[run_charts(folder, name, log, styles.get(name, "s1")) for name, log in details["runs"].items()],
        samples=samples(stages, answers), timings=timings(stages, details["timings"]), machine=machine(details),
        facts=facts(stages, details), next=commands(folder, details)))
    return out


def template(name: str = "report.html.j2") -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=True,
        undefined=jinja2.StrictUndefined, finalize=lambda value: visible(value) if isinstance(value, str) else value)
    environment.filters |= {"duration": duration}
    return environment.get_template(name)


def visible(text: str) -> str:
    """Text with U+FFFD for what a page may not hold: control characters, halves of surrogate pairs, noncharacters."""
    if isinstance(text, Markup):
        return text
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)


# --------------------------------------------------------------------------------------------------------------- input

def read_stages(path: Path) -> list[dict[str, Any]]:
    """The stages of summary.json, oldest first."""
    stages = read_json(path)
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path} holds no list of stages; finish the demo first")
    for i, stage in enumerate(stages):
        if not isinstance(stage, dict) or not {"name", "seconds", "exact_match", "families"} <= set(stage):
            raise UserError(f"{path}: stage {i} needs name, seconds, exact_match and families")
    return [{"bits_per_byte": None} | stage for stage in stages]


def read_details(path: Path) -> dict[str, Any]:
    """details.json with every part that the page asks for, empty where it is missing; all empty if there is no file."""
    details = read_json(path) if path.exists() else {}
    if not isinstance(details, dict):
        raise UserError(f"{path} holds no JSON object; run the demo again to write it anew")
    parts = {"machine": {}, "model": {}, "tokenizer": {}, "timings": {}, "runs": {}, "answers": []}
    details = details | {name: details.get(name) or empty for name, empty in parts.items()}
    for name, empty in parts.items():
        if type(details[name]) is not type(empty):
            raise UserError(f"{path}: {name} should be {'a list' if empty == [] else 'an object'}")
    for i, answer in enumerate(details["answers"]):
        if not isinstance(answer, dict) or not ANSWER <= set(answer):
            raise UserError(f"{path}: answer {i} needs {', '.join(sorted(ANSWER))}")
    return details


def number(value: Any) -> float | None:
    """A finite number of a log, or None; a log holds infinities and NaN as strings."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


# -------------------------------------------------------------------------------------------------------------- scores

def family_rows(stages: list[dict], styles: dict[str, str], answers: list[dict]) -> list[dict[str, Any]]:
    """A row per family, the overall score first: its names, how many questions, its score and a bar per stage."""
    last = stages[-1]["name"]
    names = dict.fromkeys(family for stage in stages for family in stage["families"])
    rows = [row("all questions", "总分", "", "", len([a for a in answers if a["stage"] == last]), stages, styles,
                [stage["exact_match"] for stage in stages])]
    for name in names:
        note, zh = FAMILIES.get(name, ("", ""))
        count = len([a for a in answers if a["stage"] == last and a["family"] == name])
        rows.append(row(name, "", note, zh, count, stages, styles, [stage["families"].get(name) for stage in stages]))
    return rows


def row(name: str, name_zh: str, note: str, note_zh: str, count: int, stages: list[dict], styles: dict[str, str],
        scores: list[float | None]) -> dict[str, Any]:
    drawn = [(f"{name}, {stage['name']}", styles[stage["name"]], score) for stage, score in zip(stages, scores)]
    return {"name": name, "name_zh": name_zh, "note": note, "note_zh": note_zh, "count": count, "scores": scores,
            "bars": bars(drawn, most=100.0)}


def language_rows(stages: list[dict], answers: list[dict]) -> list[dict[str, Any]]:
    """Percent right per language and stage, if the answers name their language."""
    rows = []
    for lang in dict.fromkeys(a["lang"] for a in answers if a.get("lang")):
        scores = [[a["score"] for a in answers if a["stage"] == stage["name"] and a.get("lang") == lang]
                  for stage in stages]
        rows.append({"lang": LANGS.get(lang, lang), "scores": [100 * sum(s) / len(s) if s else None for s in scores]})
    return rows if len(rows) > 1 else []


# -------------------------------------------------------------------------------------------------------------- curves

def run_charts(folder: Path, name: str, log: str, style: str) -> dict[str, Any]:
    """The charts of one run's log, and a line of figures; `problem` says why there are none."""
    run = {"name": name, "log": log, "style": style, "charts": [], "problem": "", "summary": ""}
    try:
        rows = read_jsonl(folder / log)
    except (OSError, UserError) as error:
        return run | {"problem": f"{log} could not be read: {error}"}
    if not rows:
        return run | {"problem": f"{log} is empty"}
    found = dict.fromkeys(key for r in rows for key, value in r.items() if number(value) is not None)
    metrics = [*(m for m in METRICS if m in found),
               *sorted({key.split("/")[0] for key in found} - set(METRICS) - UNDRAWN)]
    charts = [metric_chart(rows, metric, list(found), style) for metric in metrics]
    steps = rows[-1]["step"]
    memory = max((v for r in rows if (v := number(r.get("memory_bytes"))) is not None), default=None)
    took = number(rows[-1].get("elapsed_s"))
    words = [f"{steps:,} steps", took is not None and duration(took), memory and f"peak memory {bytes_text(memory)}"]
    return run | {"charts": charts, "summary": " · ".join(word for word in words if word)}


def metric_chart(rows: list[dict], metric: str, keys: list[str], style: str) -> dict[str, Any]:
    """One chart: the values logged as `metric`, and beside them those logged as `metric/part`."""
    title, zh, unit, from_zero = METRICS.get(metric, (metric.replace("_", " "), "", "", False))
    curves, mine = [], [key for key in keys if key == metric or key.startswith(metric + "/")]
    for key in mine:
        points = sorted({r["step"]: v for r in rows if (v := number(r.get(key))) is not None}.items())
        own = style if key == metric else f"s{(int(style[1:]) + 2 + len(curves)) % STYLES}"
        part = key.partition("/")[2]
        if metric not in EXACT and len(points) > 20:
            curves += [Curve(name=f"{part} smoothed".strip(), points=smooth(points, len(points) // 20), style=own),
                       Curve(name=f"{part} each step".strip(), points=points, style=own, faint=True)]
        else:
            curves.append(Curve(name=part or ("all" if len(mine) > 1 else title), points=points, style=own))
    # A part that is the whole (one set of documents, so one curve twice) is drawn once.
    curves = [c for i, c in enumerate(curves) if c.points not in [d.points for d in curves[:i]]]
    return {"title": title, "zh": zh, "unit": unit, "curves": curves if len(curves) > 1 else [],
            "svg": line_chart(curves, label=f"{title} by step", unit=unit, from_zero=from_zero)}


# ------------------------------------------------------------------------------------------------------------- answers

def samples(stages: list[dict], answers: list[dict]) -> list[dict[str, Any]]:
    """Per family a few questions, right and wrong after the last stage, each with the answer of every stage."""
    last = stages[-1]["name"]
    asked: dict[tuple, dict[str, dict]] = {}
    for a in answers:
        asked.setdefault((a["family"], a.get("lang", ""), a["question"], a["expected"]), {})[a["stage"]] = a
    families: dict[str, dict[bool, list[tuple]]] = {}
    for key, by_stage in asked.items():
        if last in by_stage:
            families.setdefault(key[0], {True: [], False: []})[by_stage[last]["score"] >= 1].append(key)
    out = []
    for family, found in families.items():
        right, wrong = varied(found[True]), varied(found[False])
        n_wrong = max(min(len(wrong), SHOWN // 2), SHOWN - len(right))
        chosen = [*right[:SHOWN - min(n_wrong, len(wrong))], *wrong[:n_wrong]]
        items = [{"question": key[2], "expected": key[3], "right": key in right,
                  "answers": [turn(asked[key][s["name"]], LONGEST if s["name"] == last else EARLIER)
                              for s in stages if s["name"] in asked[key]]} for key in chosen]
        out.append({"family": family, "zh": FAMILIES.get(family, ("", ""))[1], "right": len(right),
                    "asked": len(right) + len(wrong), "items": items})
    return out


def varied(keys: list[tuple]) -> list[tuple]:
    """The same questions with the languages taking turns."""
    langs = sorted({key[1] for key in keys})
    turns = {lang: [key for key in keys if key[1] == lang] for lang in langs}
    return [key for i in range(len(keys)) for lang in langs for key in turns[lang][i:i + 1]]


def turn(answer: dict[str, Any], longest: int) -> dict[str, Any]:
    """What is shown of an answer: its beginning, without blank lines."""
    text = re.sub(r"\n\s*\n", "\n", answer["answer"].strip())
    return {"stage": answer["stage"], "right": answer["score"] >= 1, "text": text[:longest],
            "left_out": max(len(text) - longest, 0)}


# ------------------------------------------------------------------------------------------------- time, machine, next

def timings(stages: list[dict], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """What took how long, in order: what came before the stages, then each stage with what is named after it."""
    names = [stage["name"] for stage in stages]
    own = {s["name"]: [key for key in seconds if key.endswith(f"({s['name']})")] for s in stages}
    before = [key for key in seconds if not any(key in keys for keys in own.values())]
    parts = [(key, seconds[key], "s0") for key in before]
    for i, stage in enumerate(stages):
        parts += [(names[i], stage["seconds"], f"s{i % STYLES}")] if stage["seconds"] else []
        parts += [(key, seconds[key], "s0") for key in own[names[i]]]
    longest = max((value for _, value, _ in parts), default=0)
    return [{"name": name, "seconds": value, "bar": bars([(name, style, value)], most=longest, grid=0, text=clock)}
            for name, value, style in parts]


def clock(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"


def facts(stages: list[dict], details: dict[str, Any]) -> list[dict[str, str]]:
    """The few figures under the heading."""
    last, model, tokenizer = stages[-1], details["model"], details["tokenizer"]
    total = sum(stage["seconds"] for stage in stages)
    found = [(f"{last['exact_match']:.1f}%", "exact match", "完全匹配率")]
    if last["bits_per_byte"] is not None:
        found.append((f"{last['bits_per_byte']:.3f}", "bits per byte of unseen text", "每字节比特数"))
    if model.get("parameters"):
        found.append((si(model["parameters"]), "parameters", "参数量"))
    if tokenizer.get("vocab_size"):
        found.append((f"{tokenizer['vocab_size']:,}", "tokens in the vocabulary", "词表大小"))
    found.append((clock(total), "of training", "训练时间"))
    return [{"value": value, "name": name, "zh": zh} for value, name, zh in found]


def machine(details: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the machine, the model and the tokenizer to show; what is empty is left out."""
    known = {"cpu": "processor", "gpus": "GPUs", "memory_gb": "memory", "flags": "instruction sets"}
    shown = {known.get(key, key.replace("_", " ")): f"{value} GB" if key == "memory_gb" else value
             for key, value in details["machine"].items()}
    shown |= {f"model, {name.replace('_', ' ')}": value for name, value in details["model"].items()}
    compression = details["tokenizer"].get("bytes_per_token") or {}
    shown |= {f"tokenizer, {LANGS.get(lang, lang)}": f"{value} bytes per token" for lang, value in compression.items()}
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int)
             else str(value)) for name, value in shown.items() if value not in (None, "", [])]


def commands(folder: Path, details: dict[str, Any]) -> list[dict[str, str]]:
    """What to type next. `details["program"]` is how `mindseed` is called here, if not by that word."""
    program = details.get("program") or "mindseed"
    models = [model for log in details["runs"].values() if (model := (folder / log).parent / "model").exists()]
    out = []
    if models:
        model = shlex.quote(str(models[-1]))
        out = [{"command": f"{program} chat {model}", "en": "Talk to the model.", "zh": "和模型对话。"},
               {"command": f"echo '17 + 3 = ?' | {program} generate {model}",
                "en": "Use it from a script: questions in, JSON lines out.", "zh": "在脚本里使用。"},
               {"command": f"make serve ARGS={model}",
                "en": "Behind OpenAI's API, for any program that speaks it.", "zh": "以 OpenAI 接口提供服务。"},
               {"command": "make studio", "en": "The studio: the model, and what goes on inside, in the browser.",
                "zh": "在浏览器里打开工作室。"}]
    return out + [
        {"command": f"{program} demo --seed 1 --out {shlex.quote(f'{folder}-1')}",
         "en": "Grow another one: another world, other weights.", "zh": "换一个随机种子再训练一个。"},
        {"command": f"{program} plan --depth 8", "en": "What would a larger model cost?", "zh": "估算更大模型的开销。"},
        {"command": f"{program} train --help", "en": "Train on your own text: every option.", "zh": "用自己的数据训练。"}]
