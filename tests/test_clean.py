"""Answers that nobody should learn from, texts that were there before, and a file that grows through kills."""
from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.base.journal import Journal, beside
from mindseed.data.clean import fault, loops
from mindseed.data.dedup import Seen
from mindseed.data.toy import World


@pytest.mark.parametrize("message, finish, why", [
    ({"content": "Fine."}, "stop", ""), ({"content": "Fine."}, "length", "unfinished"),
    ({"content": "Fine."}, "context", "unfinished"), ({"content": "Fine."}, None, "unfinished"),
    ({"content": " \n"}, "stop", "empty"), ({"content": "", "reasoning_content": "hm"}, "stop", "empty"),
    ({"content": "a </think> b"}, "stop", "stray tag"),
    ({"content": "", "tool_calls": [{"name": "f"}]}, "stop", "stray tag"),
    ({"content": "x" * 201 + "."}, "stop", "too long"), ({"content": "I am here. " * 9}, "stop", "loop"),
    ({"content": "ok", "reasoning_content": "wait, no, " * 9}, "stop", "loop")])
def test_faults(message, finish, why):
    assert fault(message, finish, longest=200) == why
    assert fault({"content": "", "tool_calls": [{"name": "f"}]}, "stop", tools=True) == ""


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), st.text("abc ，。xyz", max_size=80),
       st.integers(4, 9))
def test_a_unit_said_over_and_over_is_a_loop_wherever_it_stands(unit, around, times):
    loop = around + unit * times + around[::-1]
    if any(c.isalnum() for c in unit) and len(unit) * times >= 48:
        assert loops(loop)


def test_texts_of_sense_and_tables_are_no_loops():
    world = World(seed=1)
    answers = [m["content"] + (m.get("reasoning_content") or "") for row in list(world.conversations(300))
               for m in row["conversations"] if m["role"] == "assistant"]
    assert len(answers) > 300 and not any(map(loops, answers))
    assert not loops("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|") and not loops("")
    assert not loops("-" * 200 + "\nname\n" + "=" * 200) and loops("ha" * 30) and loops("0" * 60)


def test_near_duplicates():
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    text = "The quick brown fox jumps over the lazy dog while the cat looks on and says nothing at all about it."
    exact, near = Seen(), Seen(0.8)
    for seen in (exact, near):
        assert seen.add(text) and not seen.add("  THE quick  brown" + text[15:]) and seen.add("something else")
    changed = text.replace("lazy", "lazier")
    assert exact.add(changed) and not near.add(changed)
    assert near.add(text.replace("dog while the cat", "ox; later a horse came by, who"))
    assert near.add("短") and not near.add("短") and near.add("今天白马跟着蓝猫。")
    with pytest.raises(UserError, match="near=1.5 is a share"):
        Seen(1.5)


def test_a_journal_keeps_whole_results_and_refuses_other_settings(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    journal = Journal(path, {"n": 1})
    journal.add([], {"kept": 0})
    journal.add(["one", "two"], {"kept": 2})
    journal.add(["three"], {"kept": 3})
    journal.close()
    path.write_bytes(path.read_bytes()[:-2])                               # the disk lost the end
    again = Journal(path, {"n": 1})
    assert again.done == 2 and again.figures == {"kept": 2} and path.read_text() == "one\ntwo\n"
    again.add([], {"kept": 2})
    again.add(["four"], {"kept": 3})
    again.close()
    assert path.read_text() == "one\ntwo\nfour\n" and Journal(path, {"n": 1}).done == 4
    with pytest.raises(UserError, match=r"begun otherwise \(n was 1, is 2\)"):
        Journal(path, {"n": 2})
    beside(path).write_text('{"about": {"n": 1}}\n{"done": "x"}\n')
    with pytest.raises(UserError, match="damaged"):
        Journal(path, {"n": 1})
