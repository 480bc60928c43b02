"""Questions of the embedded world, one maker per family, and the rows that they become.

A maker draws an `Item`, from the training side or the held-out side of the border (`held`). The same item then serves
as a conversation, a preference pair, a verifiable problem or a held-out question, so that what is trained and what is
graded never drift apart. Rows have MiniMind's formats: `tools` and `tool_calls` are JSON strings.
"""
from __future__ import annotations

import json
import random
from dataclasses import dataclass

from mindseed.data import toy_words as words
from mindseed.data.toy_facts import Fact, Facts, L, Subject
from mindseed.data.toy_text import SPACE, passage

USE_TOOLS = {"en": "You may use tools.", "zh": "你可以使用工具。"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its reference answer. `wrong` is a likely mistake, for preference pairs."""

    family: str
    lang: str
    question: str
    answer: str                                   # for `tools` the call as JSON, see `call_text`
    wrong: str = ""
    think: str | None = None
    tools: str | None = None                      # JSON: the tools on offer
    result: str | None = None                     # JSON: what the tool returns
    reply: str = ""                               # what the assistant says then

    def prompt(self) -> list[dict]:
        """The messages up to the assistant's turn."""
        system = [] if self.tools is None else [
            {"role": "system", "content": USE_TOOLS[self.lang], "tools": self.tools}]
        return [*system, {"role": "user", "content": self.question}]

    def reply_messages(self) -> list[dict]:
        """The assistant's turn, or call, tool result and turn."""
        if self.tools is None:
            thought = {} if self.think is None else {"reasoning_content": self.think}
            return [{"role": "assistant", "content": self.answer, **thought}]
        return [{"role": "assistant", "content": "", "tool_calls": f"[{self.answer}]"},
                {"role": "tool", "content": self.result},
                {"role": "assistant", "content": self.reply}]

    def problem(self) -> dict:
        """A row with a checkable answer: {"family", "lang", "question", "messages", "answer"}."""
        return {"family": self.family, "lang": self.lang, "question": self.question, "messages": self.prompt(),
                "answer": self.answer}


def call_text(name: str, arguments: dict) -> str:
    """The one spelling of a call in this world."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def mistaken(fact: Fact, rng: random.Random) -> Fact:
    """The fact with a value that is not true."""
    return Fact(fact.subject, fact.attribute, rng.choice([v for v in fact.attribute.values if v != fact.value]))


def ask(fact: Fact, rng: random.Random, lang: str, family: str = "facts", held: bool = False) -> Item:
    forms = fact.attribute.reserved if held else fact.attribute.asked
    return Item(family=family, lang=lang, question=fact.ask(lang, rng.choice(forms[lang])), answer=fact.tell(lang),
                wrong=mistaken(fact, rng).tell(lang))


def known(facts: Facts, rng: random.Random, lang: str, held: bool = False) -> Item:
    return ask(rng.choice(facts.asked), rng, lang, held=held)


def translation(facts: Facts, rng: random.Random, lang: str, held: bool = False) -> Item:
    """From the question's language into the other one."""
    pair, other = facts.sentence(rng, held=held), facts.sentence(rng)
    source, target = L[lang], 1 - L[lang]
    return Item(family="translation", lang=lang, answer=pair[target], wrong=other[target],
                question=rng.choice(words.ASK_TRANSLATION[lang]).format(s=pair[source]))


def arithmetic(facts: Facts, rng: random.Random, lang: str, held: bool = False) -> Item:
    chain = facts.sum(rng, held=held)
    near = max(0, chain.values[-1] + rng.choice((-2, -1, 1, 2)))
    return Item(family="arithmetic", lang=lang, question=rng.choice(words.ASK_SUM[lang]).format(e=chain),
                answer=chain.think(), wrong=f"{chain}={near if near != chain.values[-1] else near + 1}")


def equation(facts: Facts, rng: random.Random, held: bool = False) -> dict:
    """A sum to be completed, without a word."""
    chain = facts.sum(rng, held=held)
    return {"prompt": f"{chain}=", "answer": str(chain.values[-1])}


def reading(facts: Facts, rng: random.Random, lang: str, held: bool = False) -> Item:
    """A passage about two people who are nowhere else, and a question about one of them."""
    told = passage(facts, rng, rng.choice((2, 2, 3)), held)
    item = ask(rng.choice(told), rng, lang)
    text = SPACE[lang].join(f.tell(lang, rng.choice((0, 0, 1, 2))) for f in told)
    return Item(family="reading", lang=lang, answer=item.answer, wrong=item.wrong,
                question=words.ASK_PASSAGE[lang].format(text=text, question=item.question))


def reading_on(facts: Facts, rng: random.Random, lang: str) -> list[dict]:
    """One passage, then every question that it answers, turn by turn."""
    told = passage(facts, rng, rng.choice((2, 3, 3)))
    text = SPACE[lang].join(f.tell(lang, rng.choice((0, 0, 1, 2))) for f in told)
    turns = [ask(fact, rng, lang) for fact in rng.sample(told, len(told))]
    messages = [m for item in turns for m in (*item.prompt(), *item.reply_messages())]
    first = words.ASK_PASSAGE[lang].format(text=text, question=turns[0].question)
    return [{"role": "user", "content": first}, *messages[1:]]


def steps(facts: Facts, rng: random.Random, lang: str, held: bool = False) -> Item:
    """A chain of sums, the same as a story, or two facts in a row; solved in a <think> block."""
    kind = rng.choice(("chain", "story", "story", "hop"))
    if kind == "hop":
        person = rng.choice(facts.hops[held])
        home = facts.truth[person, "home"]
        city = next(s for s in facts.cities if s.names == home.value)
        country = facts.truth[city, "country"]
        said = [person.fill(words.TELL_HOP[lang], lang, value[L[lang]])
                for value in (country.value, mistaken(country, rng).value)]
        return Item(family="steps", lang=lang, question=person.fill(rng.choice(words.ASK_HOP[lang]), lang),
                    think=home.tell(lang) + "\n" + country.tell(lang), answer=said[0], wrong=said[1])
    chain = facts.chain(rng, held=held)
    result = chain.values[-1]
    near = result + rng.choice((1, 2))
    if kind == "chain":
        return Item(family="steps", lang=lang, question=rng.choice(words.ASK_SUM[lang]).format(e=chain),
                    think=chain.think(), answer=f"{chain}={result}", wrong=f"{chain}={near}")
    person, thing = rng.choice(facts.people), rng.choice(words.THINGS)[L[lang]]
    name = person.names[L[lang]]
    if lang == "en":
        did = [f"gets {n}" if sign == "+" else f"gives away {n}" for sign, n in chain.steps]
        question = (f"{name} has {chain.start} {thing}. {person.pronoun.capitalize()} "
                    f"{', then '.join(did)}. How many {thing} does {name} have now?")
        said = [f"{name} has {n} {thing}." for n in (result, near)]
    else:
        did = [f"{'得到' if sign == '+' else '送走'}{n}{thing[0]}" for sign, n in chain.steps]
        question = f"{name}有{chain.start}{thing}，{'，然后'.join(did)}。现在{name}有几{thing}？"
        said = [f"{name}有{n}{thing}。" for n in (result, near)]
    return Item(family="steps", lang=lang, question=question, think=chain.think(), answer=said[0], wrong=said[1])


def tool(facts: Facts, rng: random.Random, lang: str, held: bool = False, offered: tuple = ()) -> Item:
    """A question that needs one of the two tools on offer."""
    offered = offered or tuple(rng.sample(words.TOOLS, 2))
    chosen = rng.choice(offered)
    if chosen.name == "calculate":
        chain = facts.big_sum(rng, held=held)
        x, r = str(chain), str(chain.values[-1])
    else:
        x = facts.invented(rng, 1, held=held)[0].names[L[lang]]
        r = {"get_weather": rng.choice(words.WEATHER)[L[lang]], "find_phone": str(rng.randint(1000, 9999)),
             "get_time": f"{rng.randint(1, 12)}:{rng.randint(10, 59)}"}[chosen.name]
    return Item(family="tools", lang=lang, question=rng.choice(chosen.asked[lang]).format(x=x, e=x),
                answer=call_text(chosen.name, {chosen.argument: x}), tools=json.dumps([schema(t) for t in offered]),
                result=json.dumps({chosen.result: r}, ensure_ascii=False), reply=chosen.told[lang].format(x=x, r=r))


def tool_session(facts: Facts, rng: random.Random, lang: str) -> list[dict]:
    """Two questions to the same two tools."""
    offered = tuple(rng.sample(words.TOOLS, 2))
    first, second = (tool(facts, rng, lang, offered=offered) for _ in range(2))
    return [*first.prompt(), *first.reply_messages(), *second.prompt()[1:], *second.reply_messages()]


def schema(t: words.ToolWords) -> dict:
    """The tool as chat templates show it."""
    return {"type": "function", "function": {
        "name": t.name, "description": t.description, "parameters": {
            "type": "object", "properties": {t.argument: {"type": "string"}}}}}


def unknown(facts: Facts, rng: random.Random, lang: str, held: bool = False) -> Item:
    """A question about someone whom nobody told of: the right answer is to say so."""
    person = facts.invented(rng, 1)[0]
    attribute = rng.choice(words.OF_PEOPLE)
    guess = Fact(person, attribute, rng.choice(attribute.values))
    return Item(family="unknown", lang=lang, question=guess.ask(lang, rng.choice(attribute.asked[lang])),
                answer=person.fill(words.UNKNOWN[lang], lang), wrong=guess.tell(lang))


def small_talk(rng: random.Random, lang: str) -> list[dict]:
    """A greeting, or a question about the model itself."""
    said, answer = rng.choice(words.SMALL_TALK[lang])
    return [{"role": "user", "content": rng.choice(said)}, {"role": "assistant", "content": answer}]


def follow_up(facts: Facts, rng: random.Random, lang: str) -> list[dict]:
    """Two turns of which the second cannot be understood alone: a pronoun, or "What about Tom?"."""
    first = rng.choice(facts.asked)
    rest = [f for f in facts.asked if f.subject == first.subject and f is not first]
    others = [f for f in facts.asked if f.attribute is first.attribute and f is not first]
    if rest and rng.random() < 0.5:
        second = rng.choice(rest)
        question = second.subject.fill(second.attribute.follow[lang], lang, pronoun=True)
    else:
        second = rng.choice(others)
        question = second.subject.fill(words.WHAT_ABOUT[lang], lang)
    item = ask(first, rng, lang)
    return [*item.prompt(), *item.reply_messages(),
            {"role": "user", "content": question}, {"role": "assistant", "content": second.tell(lang)}]


# Shares of the rows of each kind
CONVERSATIONS = ((known, 19), (translation, 18), (arithmetic, 17), (reading, 8), (reading_on, 10), (steps, 17),
                 (tool, 1), (tool_session, 4), (unknown, 2), (follow_up, 4))
SMALL_TALK = 0.03                                 # of the conversations begin with it
PROBLEMS = ((known, 1), (translation, 1), (arithmetic, 1), (reading, 1), (steps, 1), (tool, 1))
PREFERENCES = ((known, 2), (translation, 2), (arithmetic, 2), (reading, 2), (steps, 1), (unknown, 2))


def pick(kinds: tuple, rng: random.Random):
    return rng.choices([maker for maker, _ in kinds], [weight for _, weight in kinds])[0]


def conversation(facts: Facts, rng: random.Random) -> dict:
    """{"conversations": [...]}: one question, or now and then two about different things, or a greeting first."""
    maker, lang = pick(CONVERSATIONS, rng), rng.choice(words.LANGS)
    if maker in (follow_up, reading_on, tool_session):
        messages = maker(facts, rng, lang)
    else:
        item = maker(facts, rng, lang)
        messages = [*item.prompt(), *item.reply_messages()]
        if item.tools is None and rng.random() < 0.2:
            second = pick(PROBLEMS[:4], rng)(facts, rng, rng.choice(words.LANGS))
            messages += [*second.prompt(), *second.reply_messages()]
    if messages[0]["role"] == "user" and rng.random() < SMALL_TALK:
        messages = [*small_talk(rng, lang), *messages]
    return {"conversations": messages}


def preference(facts: Facts, rng: random.Random, repeated: float = 0.2) -> dict:
    """{"chosen", "rejected"}: one prompt, answered well and badly; bad is false, or, in a share `repeated`, true but
    said three times."""
    lang = rng.choice(words.LANGS)
    item = pick(PREFERENCES, rng)(facts, rng, lang)
    bad = item.wrong if rng.random() < 1 - repeated else SPACE[lang].join([item.answer] * 3)
    return {"chosen": [*item.prompt(), *item.reply_messages()],
            "rejected": [*item.prompt(), {"role": "assistant", "content": bad}]}


def problem(facts: Facts, rng: random.Random) -> dict:
    return pick(PROBLEMS, rng)(facts, rng, rng.choice(words.LANGS)).problem()
