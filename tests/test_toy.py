"""The embedded world: the same bytes for a seed, nothing held out in any training row, valid rows, a strict grader."""
import hashlib
import json
import re
from itertools import chain

import pytest

from mindseed.base.errors import UserError
from mindseed.data import toy_words as words
from mindseed.data.toy import HELDOUT, ROWS, World, write_world
from mindseed.tasks.toy import FAMILIES, ToyTask, score_table
from mindseed.tokenizers.chat import normalise, parse_answer, render

SMALL = {"pretrain": 6000, "conversations": 6000, "preferences": 1500, "problems": 1500, "sums": 600}
PAIR = re.compile(r"(?<![\d.])(\d{1,2}) ?(?:\+|-|plus|minus|加|减) ?(\d{1,2})(?!\d)")


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def rows(world: World) -> dict[str, list[dict]]:
    return {kind: list(getattr(world, kind)(n)) for kind, n in SMALL.items()}


@pytest.fixture(scope="module")
def corpus(rows) -> str:
    """Every training row of every kind, one per line, escapes undone."""
    lines = (json.dumps(row, ensure_ascii=False).replace('\\"', '"').replace("\\n", "\n") for row in
             chain.from_iterable(rows.values()))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def heldout(world: World) -> list[dict]:
    return world.heldout()


def questions(rows: dict[str, list[dict]]) -> set[str]:
    """Everything a user says in training."""
    turns = chain(chain.from_iterable(r["conversations"] for r in rows["conversations"]),
                  chain.from_iterable(r["chosen"] + r["rejected"] for r in rows["preferences"]),
                  chain.from_iterable(r["messages"] for r in rows["problems"]))
    return {m["content"] for m in turns if m["role"] == "user"}


# -- the same seed, the same bytes

def test_bytes_are_a_function_of_the_seed(tmp_path):
    first, second, other = (write_world(tmp_path / name, seed, scale=0.01) for name, seed in
                            (("a", 3), ("b", 3), ("c", 4)))
    for kind in first:
        assert first[kind].read_bytes() == second[kind].read_bytes()
        assert first[kind].read_bytes() != other[kind].read_bytes()
    assert set(first) == {*ROWS, "heldout", "sums-heldout"}


def test_bytes_are_known(tmp_path):
    """A change of this digest changes everyone's data and every recorded result: do it knowingly."""
    digests = {True: hashlib.sha256(), False: hashlib.sha256()}
    for name, path in write_world(tmp_path, seed=0, scale=0.02).items():
        digests["sums" in name].update(path.read_bytes())
    assert digests[False].hexdigest() == "d1d1f571b1bba8eee1518e0dda3843818795a4628a544e2ec384c9d6e8145822"
    assert digests[True].hexdigest() == "087b33073c162b6fa2622574309640a175f05cce24e30ed5fe1ce94f3b3b1b64"


def test_more_rows_only_append(world):
    for kind in ROWS:
        assert list(getattr(world, kind)(20)) == list(getattr(world, kind)(40))[:20]


# -- nothing held out is trained

def test_no_heldout_question_is_asked_in_training(rows, heldout):
    assert not questions(rows) & {item["question"] for item in heldout}


def test_reserved_wordings_are_absent(world, corpus):
    """Each wording of `facts`, with every subject in it, as a line of its own or anywhere else."""
    for fact in world.facts.facts:
        for lang in words.LANGS:
            for wording in fact.attribute.reserved[lang]:
                assert fact.ask(lang, wording) not in corpus
                assert fact.subject.fill(wording, lang, pronoun=True) not in corpus


def test_told_facts_are_told_but_never_asked(world, rows):
    text = "\n".join(row["text"] for row in rows["pretrain"])
    asked = questions(rows)
    turns = [[m for m in r["conversations"]] for r in rows["conversations"]]
    answers = {m["content"] for turn in turns for m in turn if m["role"] == "assistant"}
    for fact in world.facts.told_only:
        for lang in words.LANGS:
            assert text.count(fact.tell(lang)) >= 3
            assert fact.tell(lang) not in answers                        # follow-ups included
            assert not asked & {fact.ask(lang, wording) for wording in fact.attribute.asked[lang]}


def test_known_facts_are_asked_in_several_wordings(world, rows):
    asked = questions(rows)
    for fact in world.facts.asked:
        for lang in words.LANGS:
            assert len(asked & {fact.ask(lang, wording) for wording in fact.attribute.asked[lang]}) >= 2


def test_heldout_sums_are_nowhere(world, corpus, heldout):
    met = {(min(pair), max(pair)) for pair in ((int(a), int(b)) for a, b in PAIR.findall(corpus))}
    assert not met & world.facts.held_pairs
    assert len({pair for pair in met if pair[1] <= 20}) == 231 - len(world.facts.held_pairs)        # all others are
    for item in heldout:
        if item["family"] == "arithmetic":
            (a, b), = PAIR.findall(item["question"])
            assert (min(int(a), int(b)), max(int(a), int(b))) in world.facts.held_pairs


def test_heldout_couples_are_nowhere(world, corpus, heldout):
    couples = [(words.ADJECTIVES[i], words.NOUNS[j]) for i, j in world.facts.held_couples]
    for adjective, noun in couples:
        assert f"{adjective[0]} {noun[0]}" not in corpus
        assert adjective[1] + noun[1] not in corpus
    for item in heldout:
        if item["family"] == "translation":
            assert any(f"{a[0]} {n[0]}" in item["question"] + item["answer"] for a, n in couples)


def test_heldout_names_are_nowhere(world, corpus, heldout):
    english, chinese = zip(*(s.names for s in world.facts.names[True]))
    assert not [name for name in english + chinese if name in corpus]
    for item in heldout:
        if item["family"] in ("reading", "tools") and not re.search(r"\d{3}", item["answer"]):
            assert any(name in item["question"] for name in english + chinese)


def test_heldout_tool_arguments_are_nowhere(corpus, heldout):
    for item in heldout:
        if item["family"] == "tools":
            argument, = json.loads(item["answer"])["arguments"].values()
            assert argument not in corpus or (
                argument.isascii() and not re.search(rf"\b{re.escape(argument)}\b", corpus))


def test_the_border_holds_for_other_seeds():
    for seed in (1, 2):
        world = World(seed)
        rows = {kind: list(getattr(world, kind)(400)) for kind in SMALL}
        assert not questions(rows) & {item["question"] for item in world.heldout()}


# -- the rows

def check_messages(messages: list[dict]) -> None:
    roles = [m["role"] for m in messages]
    assert roles[-1] == "assistant"
    for before, message in zip([None, *messages], messages):
        assert set(message) <= {"role", "content", "reasoning_content", "tools", "tool_calls"}
        assert isinstance(message["content"], str)
        if message["role"] == "system":
            assert before is None
            for tool in json.loads(message["tools"]):
                assert set(tool["function"]) == {"name", "description", "parameters"}
        elif message["role"] == "user":
            assert message["content"] and (before is None or before["role"] in ("system", "assistant"))
        elif message["role"] == "tool":
            assert before["tool_calls"] and isinstance(json.loads(message["content"]), dict)
        else:
            assert before["role"] in ("user", "tool")
            if "tool_calls" in message:
                offered = {t["function"]["name"] for t in json.loads(messages[0]["tools"])}
                for call in json.loads(message["tool_calls"]):
                    assert call["name"] in offered and isinstance(call["arguments"], dict)
            else:
                assert message["content"]


def test_rows_have_the_formats_they_claim(rows):
    for row in rows["pretrain"]:
        assert set(row) == {"text"} and 5 <= len(row["text"]) <= 400
    for row in rows["conversations"]:
        assert set(row) == {"conversations"}
        check_messages(row["conversations"])
    for row in rows["preferences"]:
        assert set(row) == {"chosen", "rejected"}
        check_messages(row["chosen"])
        check_messages(row["rejected"])
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["chosen"][-1]["content"] != row["rejected"][-1]["content"]
    for row in rows["problems"]:
        assert set(row) == {"family", "lang", "question", "messages", "answer"}
        assert row["messages"][-1] == {"role": "user", "content": row["question"]} and row["answer"]


def test_rows_render_and_parse_back(rows):
    for row in rows["conversations"][:500]:
        messages, tools = normalise(row)
        render(messages, tools=tools)
        for message in messages:
            if message["role"] == "assistant":
                spans = render([message])[2:]
                said = parse_answer("".join(span.text for span in spans if span.trainable))
                assert said["content"] == message["content"]
                assert said["reasoning_content"] == message.get("reasoning_content")
                assert said["tool_calls"] == message.get("tool_calls", [])


def test_every_kind_of_conversation_occurs(rows):
    turns = [row["conversations"] for row in rows["conversations"]]
    assert any("reasoning_content" in m for t in turns for m in t)
    assert any(m["role"] == "tool" for t in turns for m in t)
    assert any("I do not know" in m["content"] for t in turns for m in t)
    assert any("我不认识" in m["content"] for t in turns for m in t)
    assert any(m["content"].startswith("What about") for t in turns for m in t)


def test_both_languages_have_their_half(rows, heldout):
    chinese = re.compile("[\u4e00-\u9fff]")
    with_chinese = sum(bool(chinese.search(row["text"])) for row in rows["pretrain"]) / len(rows["pretrain"])
    assert 0.4 < with_chinese < 0.8
    for family, count in HELDOUT.items():
        for lang in words.LANGS:
            assert sum(i["family"] == family and i["lang"] == lang for i in heldout) == count // 2
    assert min(HELDOUT["told"], HELDOUT["steps"]) >= 0.1 * len(heldout)
    assert len({item["question"] for item in heldout}) == len(heldout)


def test_reference_answers_are_true(world, heldout):
    for item in heldout:
        if item["family"] == "arithmetic":
            left, right = item["answer"].split("=")
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) and left in item["question"]
        if item["family"] in ("facts", "told"):
            assert item["answer"] in {f.tell(item["lang"]) for f in world.facts.facts}
        if item["family"] == "reading":
            assert item["answer"].rstrip(".。")[-1:] in item["question"]


def test_bad_arguments_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="whole number"):
        World("0")
    for scale in (0, -1, float("nan"), 1e-9, float("inf")):
        with pytest.raises(UserError, match="scale"):
            write_world(tmp_path, scale=scale)
    assert not list(tmp_path.iterdir())


# -- the grader

def say(item: dict, answer: str | None = None, think: str = "1 + 1 = 2") -> str:
    """The raw assistant turn that gives this answer."""
    answer = item["answer"] if answer is None else answer
    if item["family"] == "tools":
        return f"<tool_call>\n{answer}\n</tool_call>"
    return f"<think>\n{think}\n</think>\n\n{answer}" if item["family"] == "steps" else answer


def test_grader_takes_the_reference_and_nothing_else(world, heldout):
    task = ToyTask(world)
    assert list(task.examples()) == heldout
    by_family: dict[str, list[dict]] = {}
    for item in heldout:
        by_family.setdefault(item["family"], []).append(item)
        assert task.grade(item, say(item)) == {"score": 1.0, "format": 1.0}
        assert task.grade(item, say(item) + "<|im_end|>")["score"] == 1
        assert task.grade(item, "")["score"] == 0 and task.grade(item, "")["format"] == 0
    for items in by_family.values():
        for item, other in zip(items, items[1:]):
            if item["answer"] != other["answer"]:
                assert task.grade(item, say(item, other["answer"])) == {"score": 0.0, "format": 1.0}


def test_grader_forgives_only_what_it_says(heldout):
    task = ToyTask(heldout)
    fact = next(i for i in heldout if i["family"] == "facts" and i["lang"] == "en")
    assert task.grade(fact, "  " + fact["answer"].rstrip(".").replace(" ", "  ") + "\n")["score"] == 1
    for wrong in (fact["answer"].lower(), fact["answer"] + " Yes.", fact["answer"][4:], fact["answer"] * 2):
        assert task.grade(fact, wrong)["score"] == 0
    step = next(i for i in heldout if i["family"] == "steps")
    assert task.grade(step, step["answer"]) == {"score": 1.0, "format": 0.0}           # right, but without a trace
    assert task.grade(step, "<think>\n" + step["answer"])["score"] == 0                # never left its thoughts
    tool = next(i for i in heldout if i["family"] == "tools")
    wanted = json.loads(tool["answer"])
    spelt = json.dumps({"arguments": wanted["arguments"], "name": wanted["name"]})     # other order, ASCII escapes
    assert task.grade(tool, say(tool, spelt)) == {"score": 1.0, "format": 1.0}
    assert task.grade(tool, tool["answer"])["score"] == 0                              # bare JSON is not a call
    assert task.grade(tool, say(tool) + "\n" + say(tool))["score"] == 0
    assert task.grade(tool, "<tool_call>\n{broken\n</tool_call>")["score"] == 0
    assert [t["function"]["name"] for t in task.tools(tool)].count(wanted["name"]) == 1 and task.tools(fact) is None


def test_score_table_weighs_items(heldout):
    results = [(item, {"score": float(item["family"] == "told"), "format": 1.0}) for item in heldout]
    table = score_table(results)
    assert table["families"] == {f: 100.0 if f == "told" else 0.0 for f in FAMILIES}
    assert table["overall"] == round(100 * HELDOUT["told"] / sum(HELDOUT.values()), 1) and table["counts"] == HELDOUT


def test_greetings_come_first_and_change_nothing_else(world, monkeypatch):
    said = {q for lang in words.LANGS for questions, _ in words.SMALL_TALK[lang] for q in questions}
    rows = list(world.conversations(2000))
    with_talk = [row for row in rows if row["conversations"][0]["content"] in said]
    assert 0.015 < len(with_talk) / len(rows) < 0.045
    assert {row["conversations"][0]["content"].isascii() for row in with_talk} == {True, False}
    monkeypatch.setattr("mindseed.data.toy_chat.SMALL_TALK", 0.0)
    for row, plain in zip(rows, world.conversations(2000)):
        assert plain["conversations"] == row["conversations"][2 if row in with_talk else 0:]
