"""Pretraining text of the embedded world: short documents, each made by one small function of (facts, rng, lang).

A fact is learnt by meeting it often and in many wordings, so most documents restate the truths of the world. The
others teach what questions will need later: sums, sentence pairs, and copying names that were never seen before.
"""
from __future__ import annotations

import random

from mindseed.data import toy_words as words
from mindseed.data.toy_facts import CHINESE_PRONOUN, Fact, Facts, L, LARGEST

SPACE = {"en": " ", "zh": ""}


def portrait(facts: Facts, rng: random.Random, lang: str) -> str:
    """Everything about one person (or city), in a random order and wording; often with pronouns."""
    subject = rng.choice(facts.people if rng.random() < 0.8 else facts.cities)
    known = facts.about(subject)
    pronouns = subject.pronoun != "it" and rng.random() < 0.4
    told = [fact.tell(lang, rng.randrange(9), pronoun=pronouns and i > 0)
            for i, fact in enumerate(rng.sample(known, len(known)))]
    return SPACE[lang].join(told)


def gathering(facts: Facts, rng: random.Random, lang: str) -> str:
    """Unrelated facts about several subjects: a name must do without its context."""
    return SPACE[lang].join(fact.tell(lang, rng.choice((0, 0, 1, 2, 3))) for fact in rng.sample(facts.facts, 4))


def company(facts: Facts, rng: random.Random, lang: str) -> str:
    """All who share a value, with the value said first: knowledge is also needed backwards."""
    fact = rng.choice(facts.facts[:len(facts.people) * len(words.OF_PEOPLE)])
    same = [f for f in facts.facts if f.attribute is fact.attribute and f.value == fact.value]
    rng.shuffle(same)
    names = (", " if lang == "en" else "、").join(f.subject.names[L[lang]] for f in same)
    head = f"{fact.value[L[lang]]}: {names}." if lang == "en" else f"{fact.value[L[lang]]}：{names}。"
    return head + SPACE[lang] + SPACE[lang].join(f.tell(lang) for f in same)


def both_ways(facts: Facts, rng: random.Random, lang: str) -> str:
    """One fact in both languages, so that the two names and the two values meet."""
    pairs = [(fact.tell("en"), fact.tell("zh")) for fact in rng.sample(facts.facts, 2)]
    return "\n".join(f"{en} {zh}" if lang == "en" else f"{zh} {en}" for en, zh in pairs)


def pairs(facts: Facts, rng: random.Random, lang: str) -> str:
    """Sentences of the grammar in both languages."""
    lines = [facts.sentence(rng) for _ in range(3)]
    return "\n".join(f"{en} {zh}" if lang == "en" else f"{zh} {en}" for en, zh in lines)


def glossary(facts: Facts, rng: random.Random, lang: str) -> str:
    """Single words beside their translation."""
    table = words.ADJECTIVES + words.NOUNS + words.VERBS + words.TIMES[2:]
    chosen = [(en.strip(), zh) for en, zh in rng.sample(table, 6)]
    return "\n".join(f"{en} = {zh}" if lang == "en" else f"{zh} = {en}" for en, zh in chosen)


def sums(facts: Facts, rng: random.Random, lang: str) -> str:
    """Equations, drawn freely or as a ladder in which one number climbs; held-out pairs are left out of both."""
    chains = [facts.sum(rng) for _ in range(8)]
    if rng.random() < 0.4:
        sign, fixed = chains[0].steps[0][0], chains[0].start
        ladder = [n for n in range(LARGEST + 1) if not facts.is_held(fixed, n) and (sign == "+" or n <= fixed)]
        at = rng.randrange(len(ladder))
        return "\n".join(f"{fixed}{sign}{n}={fixed + n if sign == '+' else fixed - n}" for n in ladder[at:at + 8])
    lines = []
    for chain in chains:
        (sign, b), = chain.steps
        word = {"en": {"+": "plus", "-": "minus"}, "zh": {"+": "加", "-": "减"}}[lang][sign]
        equals = " is " if lang == "en" else "等于"
        gap = SPACE[lang]
        symbolic = rng.random() < 0.85
        lines.append(chain.think() if symbolic else f"{chain.start}{gap}{word}{gap}{b}{equals}{chain.values[-1]}")
    return "\n".join(lines)


def counting(facts: Facts, rng: random.Random, lang: str) -> str:
    """A stretch of the number line, up or down."""
    start = rng.randint(0, 30)
    run = list(range(start, start + 10))
    return ", ".join(map(str, run if rng.random() < 0.6 else run[::-1]))


def story(facts: Facts, rng: random.Random, lang: str) -> str:
    """Someone with something to count meets an animal; the count changes once."""
    person = rng.choice(facts.people)
    home = facts.truth[person, "home"]
    thing = rng.choice(words.THINGS)[L[lang]]
    while True:
        chain = facts.sum(rng)
        (sign, n), = chain.steps
        if min(chain.start, n, chain.values[-1]) >= 2 and chain.values[-1] <= LARGEST:
            break
    a, r, name = chain.start, chain.values[-1], person.names[L[lang]]
    couple = rng.choice(facts.couples[False])
    animal = words.ADJECTIVES[couple[0]][L[lang]] + SPACE[lang] + words.NOUNS[couple[1]][L[lang]]
    if lang == "en":
        change = f"finds {n} more" if sign == "+" else f"gives away {n}"
        return (f"{name} is in {home.value[0]} with {a} {thing}. There {person.pronoun} meets a {animal}. "
                f"Then {name} {change}. Now {person.pronoun} has {r} {thing}.")
    change = f"又找到{n}{thing}" if sign == "+" else f"送走{n}{thing}"
    he = CHINESE_PRONOUN[person.pronoun]
    return f"{name}在{home.value[1]}，有{a}{thing}。{he}遇见一只{animal}。然后{name}{change}。现在{he}有{r}{thing}。"


def strangers(facts: Facts, rng: random.Random, lang: str) -> str:
    """Invented people, told of twice: the second telling can be copied from the first, and only from there."""
    first = passage(facts, rng, rng.choice((2, 3)))
    again = rng.sample(first, len(first))
    return SPACE[lang].join([*(f.tell(lang, rng.randrange(9)) for f in first), *(f.tell(lang) for f in again)])


def passage(facts: Facts, rng: random.Random, sentences: int, held: bool = False) -> list[Fact]:
    """`sentences` facts about two invented people; no two answer the same question about the same person."""
    two = facts.invented(rng, 2, held=held)
    options = [(s, a) for s in two for a in words.OF_PEOPLE]
    chosen = rng.sample(options, sentences)
    return [Fact(s, a, rng.choice(a.values)) for s, a in chosen]


def listing(facts: Facts, rng: random.Random, lang: str) -> str:
    """Invented names, listed again and again in other orders: spelling, and nothing but spelling."""
    names = [s.names[L[lang]] for s in facts.invented(rng, 3)]
    return "\n".join(f"{a}, {b}, {c}" if i % 2 else f'"{a}", "{b}", "{c}"'
                     for i, (a, b, c) in enumerate(rng.sample(names, 3) for _ in range(4)))


# (maker, weight): the share of documents, not of tokens
KINDS = ((portrait, 24), (gathering, 8), (company, 3), (both_ways, 8), (pairs, 16), (glossary, 3),
         (sums, 19), (counting, 1), (story, 3), (strangers, 12), (listing, 3))
MAKERS, WEIGHTS = [maker for maker, _ in KINDS], [weight for _, weight in KINDS]


def document(facts: Facts, rng: random.Random) -> str:
    """One document of pretraining text, of 20 to 90 tokens."""
    maker = rng.choices(MAKERS, WEIGHTS)[0]
    return maker(facts, rng, rng.choice(words.LANGS))
