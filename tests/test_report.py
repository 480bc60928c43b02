"""The demo's report: well-formed, complete, self-contained, and safe whatever a model answered."""
from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mindseed.base.errors import UserError
from mindseed.recipes.charts import Curve, bars, line_chart, smooth, thin, tick_text, ticks
from mindseed.recipes.report import write_report

FAMILIES = {"facts": 1.0, "tools": 0.5, "<riddles>": 0.0}                   # the last one no table knows
NASTY = "</p><script>alert(1)</script> & \"quoted\" 你好 \x00\x1b[31m \ud800 \uffff {{ 7 * 7 }} <|im_end|>"


def answers(stage: str, level: float) -> list[dict]:
    return [{"stage": stage, "family": family, "lang": lang, "question": f"{family} {lang} {i}?",
             "expected": f"yes {i}", "answer": NASTY if i == 0 else f"yes {i}", "score": float(i / 6 < level * share)}
            for family, share in FAMILIES.items() for lang in ("en", "zh") for i in range(6)]


def demo(folder: Path, *, names: tuple[str, ...] = ("untrained", "pretrain", "grpo & co"), bits: bool = True) -> Path:
    """A folder such as a demo leaves."""
    stages, details = [], {"machine": {"cpu": "Chip <9>", "cores": 2, "gpus": []}, "command": "mindseed demo",
                           "version": "0.1", "commit": None, "model": {"parameters": 2_100_000}, "runs": {},
                           "tokenizer": {"vocab_size": 1280, "bytes_per_token": {"en": 4.1, "zh": 4.4}},
                           "timings": {"world": 2.0, f"grading ({names[-1]})": 3.0}, "answers": []}
    for n, name in enumerate(names):
        details["answers"] += answers(name, n / max(len(names) - 1, 1))
        mine = [a for a in details["answers"] if a["stage"] == name]
        percent = {f: round(100 * sum(a["score"] for a in mine if a["family"] == f) / 12, 1) for f in FAMILIES}
        stages.append({"name": name, "seconds": 61.0 * n, "exact_match": round(sum(percent.values()) / 3, 1),
                       "families": percent, "bits_per_byte": 3.0 / (n + 1) if bits else None})
        if n:
            details["runs"][name] = f"run{n}/log.jsonl"
            (folder / f"run{n}" / "model").mkdir(parents=True)
            rows = [{"step": 0, "bits_per_byte": 3.0}] * bits
            for step in range(1, 61):
                rows.append({"step": step, "loss": 5 / step if step != 7 else "nan", "lr": 1e-3, "tokens_per_s": 9e3,
                             "elapsed_s": step, "memory_bytes": 5e8, "reward": step / 60})
                if bits and step % 30 == 0:
                    rows[-1] |= {"bits_per_byte": 2.0, "bits_per_byte/a": 1.5, "bits_per_byte/b": 2.5}
            (folder / f"run{n}" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(stages))
    (folder / "details.json").write_text(json.dumps(details))
    return folder


def page(folder: Path) -> tuple[str, ET.Element]:
    """The report's source, and its tree: the page is XML too, so one unclosed or unescaped character fails here."""
    path = write_report(folder)
    assert path == folder / "report.html"
    source = path.read_text(encoding="utf-8")
    assert source.lstrip().startswith("<!DOCTYPE html>")
    return source, ET.fromstring(source.lstrip().removeprefix("<!DOCTYPE html>"))


def text(tree: ET.Element) -> str:
    return " ".join("".join(tree.find("body").itertext()).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, ET.Element]:
    return page(demo(tmp_path_factory.mktemp("demo")))


def test_page_loads_nothing_and_runs_nothing(made):
    source, tree = made
    assert not re.search(r"https?:|url\(|@import", source)
    assert not {"script", "link", "img", "iframe", "object", "base", "image", "use"} & {e.tag for e in tree.iter()}
    loads = [name for e in tree.iter() for name in e.attrib if name in ("src", "href", "srcset", "style", "data")
             or name.startswith("on") or ":" in name]
    assert not loads
    policy = [e.get("content") for e in tree.iter("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_answers_are_text_and_nothing_else(made):
    source, tree = made
    assert "<script" not in source.lower() and "\x00" not in source and "\x1b" not in source
    shown = [e for e in tree.iter("span") if "alert(1)" in (e.text or "")]
    assert shown and all(e.text.startswith('</p><script>alert(1)</script> & "quoted" 你好 \ufffd\ufffd[31m \ufffd \ufffd')
                         for e in shown)
    assert any("{{ 7 * 7 }} <|im_end|>" in e.text for e in shown)


def test_every_stage_family_score_and_run_is_there(made):
    _, tree = made
    said = text(tree)
    for word in ("untrained", "pretrain", "grpo & co", *FAMILIES, "known facts", "预训练", "Chip <9>", "2,100,000",
                 "4.4 bytes per token", "60 steps", "peak memory 500 MB", "mindseed chat"):
        assert word in said, word
    head = " ".join("".join(tree.find(".//h1").itertext()).split())
    assert head == "After grpo & co, the model answers 50.0% of 36 questions that it has never seen."
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in tree.findall(".//tbody/tr")}
    assert cells["all questions"] == ["0.0", "27.8", "50.0"]
    assert cells["tools"] == ["0.0", "33.3", "50.0"] and cells["<riddles>"] == ["0.0", "0.0", "0.0"]
    assert cells["in Chinese"] == ["0.0", "27.8", "50.0"] and cells["training time"] == ["–", "1:01", "2:02"]
    assert cells["bits per byte (lower is better)"] == ["3.000", "1.500", "1.000"]
    captions = ["".join(c.itertext()).split("\n")[0].strip() for c in tree.iter("figcaption")]
    assert len(captions) == 2 * 5                # loss, bits, rate, speed, and the reward that no table knows
    assert any(c.startswith("Training loss") for c in captions) and any(c.startswith("reward") for c in captions)


def test_right_and_wrong_answers_are_marked(made):
    _, tree = made
    cards = {kind: [e for e in tree.iter("article") if e.get("class") == f"card {kind}"] for kind in ("good", "bad")}
    assert len(cards["good"]) == 4 + 2 and len(cards["bad"]) == 2 + 4        # facts 4/0, tools 2/2, <riddles> 0/4
    for kind, mark in (("good", "✓"), ("bad", "✗")):
        for card in cards[kind]:
            lines = list(card.iter("li"))
            assert [line[1].text for line in lines] == ["untrained", "pretrain", "grpo & co"]
            assert lines[-1][0].text == mark and lines[0][0].text == "✗"


def test_one_stage_without_bits_logs_or_details(tmp_path):
    demo(tmp_path, names=("untrained",), bits=False)
    source, tree = page(tmp_path)
    assert "bits per byte" not in text(tree) and "none" not in text(tree).lower()
    (tmp_path / "details.json").unlink()
    source, tree = page(tmp_path)
    assert "answers 0.0% of questions that it has never seen" in text(tree)
    assert not tree.findall(".//figure") and not tree.findall(".//article")


def test_missing_and_broken_logs_are_named(tmp_path):
    demo(tmp_path, bits=False)
    (tmp_path / "run1" / "log.jsonl").unlink()
    (tmp_path / "run2" / "log.jsonl").write_text("{broken\n")
    said = text(page(tmp_path)[1])
    assert "No curves: run1/log.jsonl could not be read" in said and "No curves: run2/log.jsonl could not be" in said


@pytest.mark.parametrize("name, content, problem", [
    ("summary.json", "[]", "no list of stages"),
    ("summary.json", '[{"name": "x"}]', "stage 0 needs"),
    ("summary.json", "{", "not valid JSON"),
    ("details.json", "[]", "no JSON object"),
    ("details.json", '{"answers": {"0": 1}}', "answers should be a list"),
    ("details.json", '{"answers": [{"stage": "x"}]}', "answer 0 needs"),
    ("details.json", '{"timings": [1]}', "timings should be an object"),
])
def test_files_that_are_no_demo_are_refused(tmp_path, name, content, problem):
    demo(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_summary_is_refused(tmp_path):
    with pytest.raises(UserError, match="summary.json does not exist"):
        write_report(tmp_path)


# -------------------------------------------------------------------------------------------------------------- charts

@pytest.mark.parametrize("low, high", [(0, 1), (0.497, 0.643), (-3, 1e6), (2e-5, 3e-4), (5, 5), (0, 0), (-2, -1)])
def test_ticks_are_round_few_and_enclose(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 7
    step = found[1] - found[0]
    labels = [tick_text(t, step) for t in found]
    assert len(set(labels)) == len(labels)
    for value, label in zip(found, labels):
        scale = {"k": 1e3, "M": 1e6}.get(label[-1], 1)
        assert float(label.rstrip("kM")) * scale == pytest.approx(value, abs=step / 100)


def test_smoothing_follows_a_slope_and_keeps_a_constant():
    line = [(float(i), 3.0 * i) for i in range(50)]
    assert [y for _, y in smooth(line, 9)] == pytest.approx([y for _, y in line])
    noisy = smooth([(float(i), float((-1) ** i)) for i in range(50)], 10)
    assert max(abs(y) for _, y in noisy[5:-5]) < 0.1


def test_thinning_keeps_ends_order_and_spikes():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thin(points, 100)
    assert len(kept) <= 110 and kept[0] == points[0] and kept[-1] == points[-1]
    assert points[4321] in kept and kept == sorted(kept)


def test_a_curve_lies_where_its_values_say():
    curve = Curve(name="a", points=[(0, 0.0), (5, 5.0), (10, 10.0)])
    svg = ET.fromstring(line_chart([curve], label="<a>", unit="nats"))
    assert svg.get("aria-label") == "<a>"
    assert svg.find(".//polyline").get("points") == "0,2000 1000,1000 2000,0"
    labels = {t.text: t.get("y") for t in svg.iter("text") if t.get("class") == "tick y"}
    assert labels["0"] == "100.00%" and labels["10"] == "0.00%"
    tips = {r.get("x"): r.find("title").text for r in svg.iter("rect")}
    assert tips == {"0.00%": "step 0\na: 0 nats", "25.00%": "step 5\na: 5 nats", "75.00%": "step 10\na: 10 nats"}


def test_powers_of_two_are_steps():
    curve = Curve(name="a", points=[(64, 0.0), (96, 1.0), (256, 2.0)])
    svg = ET.fromstring(line_chart([curve], label="a", x_label="tokens", powers=True))
    labels = {t.text: t.get("x") for t in svg.iter("text") if t.get("class") == "tick x"}
    assert labels == {"64": "0.00%", "128": "50.00%", "256": "100.00%"}
    assert svg.find(".//polyline").get("points").split()[0::2] == ["0,2000", "2000,0"]
    assert "tokens 96" in svg.findall(".//rect")[1].find("title").text


def test_bars_are_as_long_as_their_values():
    svg = ET.fromstring(bars([("a", "s0", 25.0), ("b", "s1", None), ("c", "s2", 100.0)], most=100.0))
    widths = [r.get("width") for r in svg.iter("rect") if r.get("class").startswith("bar")]
    assert widths == ["25.00%", "0.00%", "100.00%"]
    assert [t.text for t in svg.iter("title")] == ["a: 25.0%", "b: –", "c: 100.0%"]
