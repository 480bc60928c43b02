"""What is true in the embedded world, and which part of it training never sees.

`Facts(seed)` draws the world (who lives where) and cuts every held-out family out BY CONSTRUCTION: a sampler is asked
for the training side or the held-out side (`held`), and the two sides never meet.

    facts        the wordings in `Attribute.reserved`
    told         all facts of five quiet people: told in text, in both languages and all wordings, never asked about
    arithmetic   unordered pairs of numbers up to 20, kept out of every sum in every kind of row
    translation  (adjective, noun) pairs, kept out of every sentence in both languages
    reading      invented names; tools use held-out names and held-out pairs of three-digit numbers
    steps        whole chains of numbers, and people whose country is never asked for
"""
from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from mindseed.data import toy_words as words
from mindseed.data.toy_words import Attribute, Word

LARGEST = 20                                      # operands of a sum, and every value on the way of a chain
L = {"en": 0, "zh": 1}
POSSESSIVE = {"she": "her", "he": "his", "it": "its"}
CHINESE_PRONOUN = {"she": "她", "he": "他", "it": "它"}


@dataclass(frozen=True)
class Subject:
    """A person or a city, known or invented: names by language and the English pronoun."""

    names: Word
    pronoun: str = "it"

    def fill(self, wording: str, lang: str, value: str = "", pronoun: bool = False) -> str:
        """The wording with this subject in it, as a name or as a pronoun, beginning with a capital."""
        if pronoun:
            n = self.pronoun if lang == "en" else CHINESE_PRONOUN[self.pronoun]
            p = POSSESSIVE[self.pronoun] if lang == "en" else n + "的"
        else:
            n = self.names[L[lang]]
            p = n + ("'s" if lang == "en" else "的")
        text = wording.format(n=n, p=p, v=value)
        return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Fact:
    """One truth: this subject's attribute has this value."""

    subject: Subject
    attribute: Attribute
    value: Word

    def tell(self, lang: str, wording: int = 0, pronoun: bool = False) -> str:
        """A statement; wording 0 is the canonical one, which answers use."""
        forms = self.attribute.told[lang]
        return self.subject.fill(forms[wording % len(forms)], lang, self.value[L[lang]], pronoun)

    def ask(self, lang: str, wording: str) -> str:
        return self.subject.fill(wording, lang)


@dataclass(frozen=True)
class Chain:
    """start, then (sign, number) steps: 5+3-2. Written without spaces, which would cost a third more tokens."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def values(self) -> list[int]:
        """The start and the value after each step."""
        out = [self.start]
        for sign, n in self.steps:
            out.append(out[-1] + n if sign == "+" else out[-1] - n)
        return out

    def __str__(self) -> str:
        return "".join([str(self.start), *(f"{sign}{n}" for sign, n in self.steps)])

    def think(self) -> str:
        """One line per step: 5+3=8."""
        return "\n".join(f"{a}{sign}{n}={b}" for a, (sign, n), b in zip(self.values, self.steps, self.values[1:]))


class Facts:
    """The truths of one world and the border between training and held-out; all samplers take their own `rng`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng("truth")
        self.people = [Subject((en, zh), pronoun) for en, zh, pronoun in words.PEOPLE]
        self.cities = [Subject(city) for city in words.CITIES]
        self.facts = [*self._deal(self.people, words.OF_PEOPLE, rng), *self._deal(self.cities, words.OF_CITIES, rng)]
        self.truth = {(f.subject, f.attribute.name): f for f in self.facts}

        rng = self.rng("border")
        self.quiet = rng.sample(self.people, 5)
        self.told_only = [f for f in self.facts if f.subject in self.quiet]
        self.asked = [f for f in self.facts if f not in self.told_only]
        pairs = [(a, b) for a in range(LARGEST + 1) for b in range(a, LARGEST + 1)]
        self.held_pairs = frozenset(rng.sample(pairs, len(pairs) // 9))
        couples = list(product(range(len(words.ADJECTIVES)), range(len(words.NOUNS))))
        self.held_couples = frozenset(rng.sample(couples, len(couples) // 9))
        self.couples = {held: [c for c in couples if (c in self.held_couples) == held] for held in (False, True)}
        hops = [f.subject for f in self.asked if f.attribute is words.HOME]
        held_hops = rng.sample(hops, 6)
        self.hops = {True: held_hops, False: [s for s in hops if s not in held_hops]}
        self.names = {False: [], True: []}
        known = {name for s in self.people + self.cities for name in s.names} | {c[1] for c in words.COUNTRIES}
        english = [f"{a} {b}" for a, b in product(words.FIRST_NAMES, words.LAST_NAMES)]
        chinese = [a + b for a, b in product(words.CHARACTERS, repeat=2) if a != b]
        english = rng.sample(english, 300)
        chinese = [n for n in rng.sample(chinese, 340) if n not in known][:300]
        for i, names in enumerate(zip(english, chinese)):
            self.names[i % 5 == 0].append(Subject(names, ("she", "he")[i % 2]))

    def rng(self, purpose: str) -> random.Random:
        """A generator that depends on the seed and this purpose only."""
        return random.Random(f"mindseed toy world/{self.seed}/{purpose}")

    @staticmethod
    def _deal(subjects: list[Subject], attributes: tuple[Attribute, ...], rng: random.Random) -> list[Fact]:
        """Every value of an attribute goes to the same number of subjects, so that guessing pays 1 / len(values)."""
        facts = []
        for attribute in attributes:
            values = [attribute.values[i % len(attribute.values)] for i in range(len(subjects))]
            rng.shuffle(values)
            facts += [Fact(s, attribute, v) for s, v in zip(subjects, values)]
        return facts

    def about(self, subject: Subject) -> list[Fact]:
        return [f for f in self.facts if f.subject == subject]

    def invented(self, rng: random.Random, count: int, *, held: bool = False) -> list[Subject]:
        """People (or cities) that are not of this world; held-out ones exist in held-out items only."""
        return rng.sample(self.names[held], count)

    def is_held(self, a: int, b: int) -> bool:
        return (min(a, b), max(a, b)) in self.held_pairs

    def sum(self, rng: random.Random, *, held: bool = False) -> Chain:
        """a+b or a-b, with operands up to LARGEST and no negative result."""
        while True:
            sign, a, b = rng.choice("+-"), rng.randint(0, LARGEST), rng.randint(0, LARGEST)
            if (sign == "+" or a >= b) and self.is_held(a, b) == held:
                return Chain(a, ((sign, b),))

    def chain(self, rng: random.Random, *, held: bool = False) -> Chain:
        """Two or three steps whose sums are all trained and whose values stay within 1 to LARGEST."""
        while True:
            signs = [rng.choice("+-") for _ in range(rng.choice((2, 2, 3)))]
            chain = Chain(rng.randint(2, 12), tuple((sign, rng.randint(1, 9)) for sign in signs))
            if not all(1 <= v <= LARGEST for v in chain.values):
                continue
            numbers = [chain.start, *(n for _, n in chain.steps)]
            neighbours = [*zip(chain.values, numbers[1:]), *zip(numbers, numbers[1:])]     # as computed, as written
            if not any(self.is_held(a, b) for a, b in neighbours) and self.drawn(f"chain {chain}", 0.1) == held:
                return chain

    def big_sum(self, rng: random.Random, *, held: bool = False) -> Chain:
        """A sum of three-digit numbers, for the calculator tool."""
        while True:
            a, b = sorted((rng.randint(100, 999), rng.randint(100, 999)), reverse=True)
            if self.drawn(f"big {a} {b}", 0.1) == held:
                return Chain(a, ((rng.choice("+-"), b),))

    def drawn(self, what: str, share: float) -> bool:
        """A coin that always falls the same way for the same text."""
        return self.rng(what).random() < share

    def sentence(self, rng: random.Random, *, held: bool = False) -> Word:
        """A sentence of the grammar in both languages; a held-out one has a held-out (adjective, noun) pair."""
        first = rng.choice(self.couples[held])
        second = rng.choice(self.couples[held and rng.random() < 0.5])
        if rng.random() < 0.5:
            first, second = second, first
        verb, when = rng.choice(words.VERBS), rng.choice(words.TIMES)
        a, n, b, m = (words.ADJECTIVES[first[0]], words.NOUNS[first[1]],
                      words.ADJECTIVES[second[0]], words.NOUNS[second[1]])
        return (f"The {a[0]} {n[0]} {verb[0]} the {b[0]} {m[0]}{when[0]}.",
                f"{when[1]}{a[1]}{n[1]}{verb[1]}{b[1]}{m[1]}。")
