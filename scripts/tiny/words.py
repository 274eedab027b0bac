"""The words and facts that the tiny model's text is made of: common English, written down by hand for this project."""

from __future__ import annotations

KINDS: dict[str, tuple[str, str]] = {
    "animal": ("an animal", "cat dog horse cow sheep goat pig fox wolf bear lion tiger mouse rabbit deer"),
    "bird": ("a bird", "eagle crow owl duck goose swan hawk robin"),
    "fish": ("a fish", "salmon trout tuna shark carp cod"),
    "insect": ("an insect", "ant bee wasp moth beetle flea"),
    "fruit": ("a fruit", "apple pear plum cherry lemon peach grape mango"),
    "vegetable": ("a vegetable", "carrot onion potato bean cabbage leek"),
    "tree": ("a tree", "oak pine birch maple willow elm"),
    "flower": ("a flower", "rose lily tulip daisy violet poppy"),
    "color": ("a color", "red blue green yellow black white brown pink"),
    "tool": ("a tool", "hammer saw axe spade drill rake"),
    "drink": ("a drink", "milk tea coffee juice wine"),
    "food": ("a food", "bread cheese rice soup cake butter"),
    "garment": ("a garment", "coat shirt hat sock shoe glove scarf"),
    "furniture": ("a piece of furniture", "chair table bed sofa desk shelf"),
    "vehicle": ("a vehicle", "car bus train boat truck wagon"),
    "instrument": ("an instrument", "piano violin drum flute guitar harp"),
    "metal": ("a metal", "iron gold silver copper tin zinc"),
    "building": ("a building", "house church school castle tower barn"),
    "body": ("a part of the body", "hand foot arm leg head nose ear"),
    "job": ("a job", "baker farmer teacher doctor nurse painter"),
}
"""{kind: (how a sentence calls it, its members)}."""

THINGS = (
    "river stone lamp door window road hill moon star sun bell book key box cup wheel rope wall gate field lake sea rain snow wind "
    "fire leaf seed nest egg bag ball coin clock map paper pen ring sand ship bridge song story garden forest island cloud candle "
    "bottle basket blanket mirror needle pillow ladder button"
)
"""Words without a kind, for exercises with lists of words."""

OPPOSITES = (
    "hot cold, big small, old new, fast slow, high low, long short, hard soft, light dark, wet dry, full empty, open closed, early late, "
    "rich poor, strong weak, happy sad, loud quiet, clean dirty, near far, thick thin, wide narrow, deep shallow, sharp blunt, "
    "sweet sour, smooth rough, young aged, good bad, right wrong, true false, first last, up down, "
    "in out, above below, before after, inside outside, always never, all none, more less, many few, day night, summer winter, "
    "north south, east west, front back, top bottom, start end, love hate, friend enemy, question answer, war peace, push pull, "
    "give take, buy sell, win lose, come go, laugh cry, remember forget, find miss, rise fall, sink float, teach learn, "
    "cheap costly, brave timid, calm angry, kind cruel, polite rude, simple complex, alive dead, awake asleep, safe dangerous, "
    "tight loose, straight crooked, proud humble, public private, guilty innocent, ancient modern, major minor, odd even"
)
"""Pairs, each way round true."""

PAST_TENSES = (
    "go went, see saw, eat ate, take took, give gave, come came, run ran, write wrote, speak spoke, break broke, drive drove, "
    "ride rode, rise rose, sing sang, swim swam, drink drank, begin began, ring rang, sink sank, fly flew, grow grew, know knew, "
    "throw threw, blow blew, draw drew, buy bought, bring brought, think thought, catch caught, teach taught, fight fought, "
    "sell sold, tell told, find found, hold held, keep kept, sleep slept, feel felt, leave left, lose lost, send sent, spend spent, "
    "build built, make made, say said, stand stood, sit sat, win won, hear heard, meet met, walk walked, talk talked, play played, "
    "work worked, jump jumped, look looked, help helped, wash washed, cook cooked, paint painted, open opened, close closed, "
    "love loved, move moved, live lived, like liked, stop stopped, plan planned, carry carried, study studied, cry cried, try tried"
)

IRREGULAR_PLURALS = (
    "mouse mice, goose geese, foot feet, tooth teeth, man men, woman women, child children, person people, wolf wolves, leaf leaves, "
    "knife knives, wife wives, life lives, shelf shelves, half halves, sheep sheep, deer deer, cherry cherries, daisy daisies, "
    "lily lilies, poppy poppies, story stories, city cities, berry berries, baby babies, lady ladies, fly flies, potato potatoes, "
    "tomato tomatoes, hero heroes, church churches, box boxes, bus buses, fox foxes, dish dishes, brush brushes, peach peaches, "
    "bench benches, glass glasses, scarf scarves, leaf leaves"
)

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, England London, Ireland Dublin, Norway Oslo, Sweden Stockholm, "
    "Finland Helsinki, Denmark Copenhagen, Poland Warsaw, Austria Vienna, Hungary Budapest, Greece Athens, Portugal Lisbon, "
    "Belgium Brussels, Russia Moscow, Japan Tokyo, China Beijing, India Delhi, Egypt Cairo, Kenya Nairobi, Cuba Havana, Peru Lima, "
    "Chile Santiago, Canada Ottawa, Iceland Reykjavik, Turkey Ankara, Iran Tehran, Iraq Baghdad, Syria Damascus, Ghana Accra, "
    "Vietnam Hanoi, Scotland Edinburgh, Wales Cardiff, Ukraine Kyiv, Romania Bucharest, Serbia Belgrade, Croatia Zagreb, Tunisia Tunis"
)

NAMES = "Mira Tom Anna Ben Lena Paul Nora Max Ida Karl Ella Finn Rosa Hugo Clara Otto"
PLACES = "river hill forest lake garden barn castle market school bridge"
ADJECTIVES = "old big small red blue green white black new round warm quiet"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
ORDINALS = "first second third fourth fifth"


def pairs(text: str) -> list[tuple[str, str]]:
    """[("hot", "cold"), …] from "hot cold, …", each pair once."""
    return list(dict.fromkeys((left, right) for left, right in (item.split() for item in text.split(","))))


def nouns() -> list[str]:
    """Every noun that lists of words are drawn from, in a fixed order."""
    members = " ".join(names for _, names in KINDS.values())
    return list(dict.fromkeys(f"{members} {THINGS}".split()))


def plurals() -> list[tuple[str, str]]:
    """Nouns with their plurals: the irregular ones, and the regular ones of things that can be counted."""
    irregular = pairs(IRREGULAR_PLURALS)
    known = {one for one, _ in irregular}
    uncounted = {
        *"milk tea coffee juice wine bread cheese rice soup butter rain snow wind sand paper salmon trout tuna carp cod".split()
    }
    for kind in ("color", "metal", "furniture"):
        uncounted |= set(KINDS[kind][1].split()) - {"chair", "table", "bed", "sofa", "desk"}
    return irregular + [(noun, noun + "s") for noun in nouns() if noun not in known | uncounted]


def kinds() -> list[tuple[str, str]]:
    """[("eagle", "a bird"), …]."""
    return [(member, phrase) for phrase, members in KINDS.values() for member in members.split()]


def article(word: str) -> str:
    """The word with a or an."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def called(noun: str) -> str:
    """How a sentence calls a noun: a or an in front of what can be counted, nothing before milk, red or iron."""
    stuff = {name for kind in ("color", "drink", "food", "metal") for name in KINDS[kind][1].split()}
    return noun if noun in stuff else article(noun)
