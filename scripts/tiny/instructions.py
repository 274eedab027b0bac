"""The quickstart's instruction set: questions and answers about words and numbers, in a training and a held-out part.

What a prompt asks about (its argument: a row of words, a sum, a country, …) is in one part only. No word of a held-out row of
words occurs in any row of the training part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from tiny import words
from tiny.text import MAX_NUMBER, listed

Item = tuple[Any, list[str], str]
"""What is asked about, ways to ask, the answer."""


def rows_of_words(rng: random.Random, vocabulary: list[str], low: int, high: int) -> Iterator[list[str]]:
    while True:
        yield rng.sample(vocabulary, rng.randint(low, high))


def backwards(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for row in rows_of_words(rng, vocabulary, 2, 5):
        there = " ".join(row)
        yield (
            row,
            [f"Write these words backwards: {there}", f"Reverse the order of these words: {there}"],
            " ".join(reversed(row)),
        )


def nth(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for row in rows_of_words(rng, vocabulary, 3, 5):
        index, there = rng.randrange(len(row)), " ".join(row)
        places = [words.ORDINALS.split()[index]] + (["last"] if index == len(row) - 1 else [])
        place = rng.choice(places)
        yield (place, row), [f"What is the {place} word of: {there}", f"Give me the {place} word: {there}"], row[index]


def capitals(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for row in rows_of_words(rng, vocabulary, 1, 2):
        low = " ".join(row)
        yield row, [f"Write in capital letters: {low}", f"Turn into capital letters: {low}"], low.upper()


def spelled(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for (word,) in rows_of_words(rng, vocabulary, 1, 1):
        yield word, [f"Spell the word {word}.", f"How is {word} spelled?"], " ".join(word)


def letter(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for (word,) in rows_of_words(rng, vocabulary, 1, 1):
        place, answer = rng.choice([("first", word[0]), ("last", word[-1])])
        yield (
            (place, word),
            [f"What is the {place} letter of {word}?", f"Give me the {place} letter of {word}."],
            answer,
        )


def counted(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for row in rows_of_words(rng, vocabulary, 2, 8):
        there = " ".join(row)
        yield row, [f"How many words are these: {there}", f"Count the words: {there}"], words.NUMBERS.split()[len(row)]


def repeated(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for (word,) in rows_of_words(rng, vocabulary, 1, 1):
        times = rng.randint(2, 6)
        number = words.NUMBERS.split()[times]
        yield (
            (word, times),
            [f"Write {word} {number} times.", f"Repeat the word {word} {number} times."],
            " ".join([word] * times),
        )


def joined(rng: random.Random, vocabulary: list[str]) -> Iterator[Item]:
    for row in rows_of_words(rng, vocabulary, 2, 4):
        there = " ".join(row)
        yield (
            row,
            [f"Make a list with commas and the word and: {there}", f"Put commas and the word and between: {there}"],
            listed(row),
        )


def total(rng: random.Random, part: list[int]) -> Iterator[Item]:
    while True:
        result = rng.randint(2, MAX_NUMBER - 1)
        left = rng.randint(1, result - 1)
        right = result - left
        if (min(left, right) * 7 + max(left, right)) % 5 in part:
            yield (left, right), [f"What is {left} + {right}?", f"Add {left} and {right}."], str(result)


def neighbour(rng: random.Random, part: list[int]) -> Iterator[Item]:
    while True:
        number, (side, step) = rng.randint(1, MAX_NUMBER - 2), rng.choice([("after", 1), ("before", -1)])
        if number % 5 in part:
            yield (
                (side, number),
                [f"What number comes {side} {number}?", f"Give me the number {side} {number}."],
                str(number + step),
            )


def opposite(rng: random.Random, facts: list[tuple[str, str]]) -> Iterator[Item]:
    while True:
        left, right = rng.sample(rng.choice(facts), 2)
        yield left, [f"What is the opposite of {left}?", f"Give me the opposite of {left}."], right


def asking(*forms: str) -> Callable[[random.Random, list[tuple[str, str]]], Iterator[Item]]:
    def ask(rng: random.Random, facts: list[tuple[str, str]]) -> Iterator[Item]:
        while True:
            known, answer = rng.choice(facts)
            yield known, [form.format(known=known, a_known=words.called(known)) for form in forms], answer

    return ask


def tasks() -> dict[str, tuple[Callable[..., Iterator[Item]], list[Any]]]:
    """{task: (who writes its items, what it may ask about)}."""
    nouns = words.nouns()
    return {
        "backwards": (backwards, nouns),
        "nth word": (nth, nouns),
        "capital letters": (capitals, nouns),
        "spelling": (spelled, nouns),
        "letter": (letter, nouns),
        "counting": (counted, nouns),
        "repeating": (repeated, nouns),
        "list": (joined, nouns),
        "sum": (total, list(range(5))),
        "next number": (neighbour, list(range(5))),
        "opposite": (opposite, words.pairs(words.OPPOSITES)),
        "past tense": (
            asking("What is the past tense of {known}?", "Give me the past tense of {known}."),
            words.pairs(words.PAST_TENSES),
        ),
        "plural": (asking("What is the plural of {known}?", "Give me the plural of {known}."), words.plurals()),
        "kind": (asking("What is {a_known}?", "What kind of thing is {a_known}?"), words.kinds()),
        "capital": (
            asking("What is the capital of {known}?", "Name the capital of {known}."),
            words.pairs(words.CAPITALS),
        ),
    }


def write_part(seed: int, count: int, is_test: bool) -> Iterator[dict[str, Any]]:
    """At most `count` rows a task (fewer where there are no more facts): {"task": …, "messages": [user, assistant]}."""
    for task, (ask, material) in tasks().items():
        mine = [item for item, held_out in divided(material) if held_out == is_test]
        rng = random.Random(f"{seed} {task} {is_test}")
        seen = set()
        items = ask(rng, mine)
        for _ in range(count * 20):
            if len(seen) == count:
                break
            about, forms, answer = next(items)
            if str(about) not in seen:
                seen.add(str(about))
                yield row(task, rng.choice(forms), answer)


def divided(material: list[Any]) -> list[tuple[Any, bool]]:
    """Each item of the material, and whether it is held out: two of five."""
    order = list(material)
    random.Random(0).shuffle(order)
    held_out = {str(item) for item in order[: len(order) * 2 // 5]}
    return [(item, str(item) in held_out) for item in material]


def row(task: str, prompt: str, answer: str) -> dict[str, Any]:
    return {"task": task, "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
