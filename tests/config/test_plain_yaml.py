"""Plain YAML read without PyYAML: the same trees, and nothing that PyYAML would read otherwise or refuse."""

import pytest

from tunesmith.config import dump, load_config
from tunesmith.configs import _layers as layers
from tunesmith.configs._plain_yaml import plain_mapping, plain_scalar
from tunesmith.configs.recipes import FOLDER

SHIPPED = sorted(FOLDER.rglob("*.yaml"))


def tree(node):
    value = node.value
    if isinstance(value, dict):
        value = {key: tree(child) for key, child in value.items()}
    elif isinstance(value, list):
        value = [tree(child) for child in value]
    return type(value).__name__, value, node.text, node.place


def by_pyyaml(read, *arguments):
    """What `read` gives where nothing counts as plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "plain_mapping", lambda *_: None)
        patch.setattr(layers, "plain_scalar", lambda *_: None)
        return read(*arguments)


def read(text):
    problems = []
    node = layers.parse_text(text, "a.yaml", 3, problems)
    return node and tree(node), [str(problem) for problem in problems]


def is_plain(text):
    return plain_mapping(text, lambda value, *_: value) is not None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_plain_and_read_alike(path):
    text = path.read_text(encoding="utf-8")
    assert is_plain(text) and read(text) == by_pyyaml(read, text)


@pytest.mark.parametrize("words", [["sft"], ["sft", "+qlora"], ["pretrain"], ["generate"], ["export", "output_dir=x"]])
def test_written_configs_read_alike(words):
    more = ["model=some/model", *(["dataset.source=~/a b.jsonl"] if words[0] in ("sft", "pretrain") else [])]
    text = dump(load_config(*words, *more))
    assert read(text) == by_pyyaml(read, text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "# only a comment", "a: 1", "a:", "a:\nb: 2", "a:\n  b: 1\n  c:\n    d: x\ne: z\n", "\n\na: b  # why\n"),
        *(
            "a:\n    b: 1\n    c: 2",
            "a:   x   ",
            'a: "b # c"  # d',
            'a: ""',
            "a: []",
            "a: {}",
            "a: [0.9,  b/c ] # d",
            "a:  # open\n  b: 1",
        ),
        "a: 1\n  # deeper comment\nb: 2",
    ],
)
def test_plain_texts(text):
    assert is_plain(text) and read(text) == by_pyyaml(read, text)


@pytest.mark.parametrize(
    "text",
    [
        *("- a", "a: [1, [2]]", "a: [1, 2,]", "a: [1, ]", "a: [ ]", "a: ['b']", "a: [b c]", "a: [1]x", "a: [1", "a: [a: b]", "a: {b: 1}", "a: &x 1", "a: *x", "a: !!str 1", "a: |\n  b", "a: 'b'", 'a: "b\\n"', "a: b c"),
        *("a: 1\na: 2", "a:\n  b: 1\n c: 2", "  a: 1\nb: 2", "a: 1\n  b: 2", "a:\n\tb: 1", "a:1", "a: b: c", "? a", "a: b\n  c"),
        *("1: a", "on: 1", "yes: 1", "null: 1", "a.b: 1", "---\na: 1", "a: 1\n...", "<<: {a: 1}", "text", "a: 'x", "a: x\u0085b: y"),
    ],
)  # fmt: skip
def test_other_texts_are_left_to_pyyaml(text):
    assert not is_plain(text) and read(text) == by_pyyaml(read, text)


SCALARS = """
1 0 -1 01 -0 007 1_000 0x1F 0b1 0o7 1:30 190:20:30 1.0 1. .5 -.5 1.5e-3 1e3 2e-5 2.0e-5 1.0E+2 +1 +1.5 00.5 1.5e3 e5 -e5 .e5
true True TRUE false yes no Yes on off ON y n null Null NULL ~ none None .inf -.inf .nan .NaN . .. ... .5a a b-c a/b ./a ../a _x a+b
2024-01-01 = << < [ { @ ` % & * ! | > " ' # a#b #a a: :a a:b - -- --- --a ? ?a , a,b é 1a 1-2 1.2.3 nan inf
""".split()


@pytest.mark.parametrize("text", [*SCALARS, "", " ", "a b", "1 ", " 1"])
def test_scalars_are_taken_alike(text):
    place = layers.Place(1, "command line")
    assert tree(layers.parse_value(text, place)) == tree(by_pyyaml(layers.parse_value, text, place))
    assert read(f"a: {text}") == by_pyyaml(read, f"a: {text}")


def test_what_people_write_is_plain():
    for text in (
        "1",
        "2.0e-5",
        "0.1",
        "true",
        "null",
        "Qwen/Qwen3-0.6B",
        "run/checkpoints/latest",
        "adamw",
        "some.dotted.Path",
    ):
        assert plain_scalar(text) is not None, text
