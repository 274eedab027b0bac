"""The plain text that the tiny model reads: stories, facts, lists, numbers and word exercises, made of words.py by chance and a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache

from tiny import words

MAX_NUMBER = 60
"""Numbers in the text stay below this."""


class Writer:
    """Writes lines of text; everything it writes follows from its generator.

    Words of an exercise always have a space before them: the tokenizer has one token for a word with its space, but several
    for the word alone, and a model this small should not have to learn both.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng

    def lines(self) -> Iterator[str]:
        """One document's lines: a story, a page of one kind of exercise, or a mixed page."""
        form = self.rng.random()
        if form < 0.08:
            yield from self.story()
        elif form < 0.45:
            skill = self.skills(1)[0]
            yield from (skill(self) for _ in range(self.rng.randint(1, 8)))
        else:
            yield from (skill(self) for skill in self.skills(self.rng.randint(1, 10)))

    def document(self) -> str:
        return "\n".join(self.lines())

    def skills(self, count: int) -> list[Callable[[Writer], str]]:
        return self.rng.choices(list(SKILLS), list(SKILLS.values()), k=count)

    # --- words in a row ------------------------------------------------------------------------------

    def row(self, low: int, high: int) -> list[str]:
        """Different words in any order; now and then one that was made up."""
        row = self.rng.sample(nouns(), self.rng.randint(low, high))
        if self.rng.random() < 0.06:
            row[self.rng.randrange(len(row))] = self.made_up()
        return row

    def made_up(self) -> str:
        """A word that does not exist, so that copying is learnt and not only the words."""
        syllables = (
            self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(self.rng.randint(2, 3))
        )
        return "".join(syllables) + self.rng.choice(["", "", "n", "s", "r"])

    def word(self) -> str:
        return self.row(1, 1)[0]

    def backwards(self) -> str:
        row = self.row(2, 6)
        there, back = " ".join(row), " ".join(reversed(row))
        return self.one_of(
            f"The words {there} written backwards: {back}",
            f"Forwards: {there}. Backwards: {back}.",
            f"These words: {there}. In reverse order: {back}",
        )

    def nth(self) -> str:
        row = self.row(3, 6)
        index = self.rng.randrange(min(len(row), 5))
        places = [words.ORDINALS.split()[index]] + (["last"] if index == len(row) - 1 else [])
        place, there = self.rng.choice(places), " ".join(row)
        return self.one_of(
            f"In the row {there} the {place} word is {row[index]}.",
            f"The {place} word of: {there} is: {row[index]}",
            f"These words: {there}. The {place} word: {row[index]}",
        )

    def capitals(self) -> str:
        low = " ".join(self.row(1, 3))
        return self.one_of(
            f"In capital letters {low} is {low.upper()}.",
            f"Small letters: {low}. Capital letters: {low.upper()}",
            f"The same in capital letters: {low} - {low.upper()}",
        )

    def spelled(self) -> str:
        word = self.word()
        letters = " ".join(word)
        return self.one_of(
            f"The word {word} is spelled {letters}.",
            f"The letters of {word}: {letters}",
            f"To spell {word}: {letters}",
        )

    def letter(self) -> str:
        word = self.word()
        place, letter = self.rng.choice([("first", word[0]), ("last", word[-1])])
        return self.one_of(
            f"The {place} letter of {word} is {letter}.",
            f"The word {word} has the {place} letter {letter}.",
            f"The {place} letter of the word {word}: {letter}",
        )

    def counted(self) -> str:
        row = self.row(1, 8)
        number, there = words.NUMBERS.split()[len(row)], " ".join(row)
        return self.one_of(
            f"The number of words in {there} is {number}.",
            f"These words: {there}. How many words there are: {number}",
            f"To count the words: {there}. There are {number}.",
        )

    def repeated(self) -> str:
        word, times = self.word(), self.rng.randint(2, 6)
        number, result = words.NUMBERS.split()[times], " ".join([word] * times)
        return self.one_of(
            f"The word {word} written {number} times: {result}",
            f"To repeat {word} {number} times: {result}",
            f"Somebody wrote {word} {number} times: {result}",
        )

    def joined(self) -> str:
        row = self.row(2, 5)
        there, result = " ".join(row), listed(row)
        return self.one_of(
            f"These words: {there}. The same as a list with commas and the word and: {result}.",
            f"With commas and the word and between: {there} - {result}.",
        )

    # --- facts ---------------------------------------------------------------------------------------

    def opposite(self) -> str:
        left, right = self.rng.sample(self.rng.choice(words.pairs(words.OPPOSITES)), 2)
        return self.one_of(
            f"The opposite of {left} is {right}.",
            f"The words {left} and {right} are opposites.",
            f"The opposite of the word {left}: {right}",
        )

    def past(self) -> str:
        now, then = self.rng.choice(words.pairs(words.PAST_TENSES))
        return self.one_of(
            f"The past tense of {now} is {then}.",
            f"Today they {now}, yesterday they {then}.",
            f"The past tense of the word {now}: {then}",
        )

    def plural(self) -> str:
        one, many = self.rng.choice(plurals())
        return self.one_of(
            f"The plural of {one} is {many}.",
            f"One {one}, {self.rng.choice(words.NUMBERS.split()[2:])} {many}.",
            f"The plural of the word {one}: {many}",
        )

    def kind(self) -> str:
        member, phrase = self.rng.choice(kinds())
        return self.one_of(
            f"We know that {words.called(member)} is {phrase}.",
            f"The word {member} is the name of {phrase}.",
            f"What {words.called(member)} is: {phrase}",
        )

    def city(self) -> str:
        country, city = self.rng.choice(words.pairs(words.CAPITALS))
        return self.one_of(
            f"The capital of {country} is {city}.",
            f"In {country} the capital is {city}.",
            f"The name of the capital of {country}: {city}",
        )

    # --- numbers -------------------------------------------------------------------------------------

    def total(self) -> str:
        result = self.rng.randint(2, MAX_NUMBER - 1)
        left = self.rng.randint(1, result - 1)
        right = result - left
        return self.one_of(
            f"The sum {left} + {right} is {result}.",
            f"To add {left} and {right}: {result}",
            f"We know that {left} + {right} = {result}",
        )

    def neighbour(self) -> str:
        number, (side, step) = self.rng.randint(1, MAX_NUMBER - 2), self.rng.choice([("after", 1), ("before", -1)])
        return self.one_of(
            f"The number {side} {number} is {number + step}.",
            f"The number that comes {side} {number}: {number + step}",
        )

    # --- stories -------------------------------------------------------------------------------------

    def story(self) -> Iterator[str]:
        pick = self.rng.choice
        name, friend = self.rng.sample(words.NAMES.split(), 2)
        place, other = self.rng.sample(words.PLACES.split(), 2)
        thing, adjective, animal = (
            pick(words.THINGS.split()),
            pick(words.ADJECTIVES.split()),
            pick(words.KINDS["animal"][1].split()),
        )
        number = pick(words.NUMBERS.split()[2:8])
        yield pick(
            [
                f"{name} lived near the {place}.",
                f"One day {name} went to the {place}.",
                f"{name} was at the {place} early.",
            ]
        )
        yield pick(
            [
                f"{name} had {words.article(adjective)} {thing}.",
                f"There {name} found {words.article(adjective)} {thing}.",
            ]
        )
        for _ in range(self.rng.randint(1, 4)):
            yield pick(
                [
                    f"{friend} came and saw the {thing}.",
                    f"A {animal} sat by the {place} and slept.",
                    f"{name} showed the {thing} to {friend}.",
                    f"The {thing} was {pick(words.ADJECTIVES.split())}, and {friend} liked it.",
                    f"{name} and {friend} walked from the {place} to the {other}.",
                    f"They stayed for {number} days.",
                    f"The {animal} was {pick(['hungry', 'happy', 'tired', 'quiet', 'strong'])}.",
                    f'"{pick(["Good morning", "Look", "Come here", "Thank you", "Wait"])}," said {friend}.',
                ]
            )
        yield pick(
            [
                f"Then {name} went home.",
                f"{friend} gave the {thing} back to {name}.",
                "It was a good day.",
                f"{name} was happy.",
            ]
        )

    def one_of(self, *forms: str) -> str:
        return self.rng.choice(forms)


SKILLS: dict[Callable[[Writer], str], int] = {
    Writer.total: 4, Writer.backwards: 3, Writer.nth: 3, Writer.counted: 3, Writer.capitals: 2, Writer.spelled: 2, Writer.joined: 2,
    Writer.letter: 1, Writer.repeated: 1, Writer.neighbour: 1,
    Writer.opposite: 1, Writer.past: 1, Writer.plural: 1, Writer.kind: 1, Writer.city: 1,
}  # fmt: skip
"""How often each kind of line comes, relative to the others: what takes practice more often than what is only remembered."""


def listed(row: list[str]) -> str:
    """a, b and c."""
    return f"{', '.join(row[:-1])} and {row[-1]}" if len(row) > 1 else row[0]


@cache
def nouns() -> list[str]:
    return words.nouns()


@cache
def kinds() -> list[tuple[str, str]]:
    return words.kinds()


@cache
def plurals() -> list[tuple[str, str]]:
    return words.plurals()
