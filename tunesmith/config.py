"""Configs: load_config merges what was written into a checked dataclass, dump writes it out again, complete and commented.

    config = load_config("sft", "+lora", "model=Qwen/Qwen3-0.6B", "dataset.source=alpaca.jsonl")
    print(dump(config))

Layers merge in the order written: the recipe's defaults, a file (or --config FILE), +overlays, and last all key=value.
Every mistake of every source is reported at once, with its place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.configs import _layers as layers
from tunesmith.configs import _schema as schema
from tunesmith.configs._check import Check
from tunesmith.configs._interpolate import Interpolation
from tunesmith.configs._layers import NOWHERE, Node, Place, Problem
from tunesmith.configs._suggest import did_you_mean, options
from tunesmith.configs.own_recipe import own_config_class, own_module, own_module_name
from tunesmith.configs.recipes import LATER_OVERLAYS, RECIPES, Recipe, find_recipe, overlay_path, overlays
from tunesmith.errors import ConfigError, UserError

YAML_ENDINGS = (".yaml", ".yml")


class Loaded(NamedTuple):
    """A checked config, the recipe it is for, and the user's own recipe file if there is one."""

    config: Any
    recipe: Recipe
    file: Path | None = None


def load_config(recipe_or_file: str | Path, *words: str) -> Any:
    """The checked config of `tune run RECIPE_OR_FILE WORDS…`: an instance of the recipe's config class.

    Raises ConfigError with one line per mistake.
    """
    return load([str(recipe_or_file), *words]).config


def load(words: list[str], *, partial: bool = False) -> Loaded:
    """Like load_config, for the words of a command line; `partial` leaves required options open (REQUIRED)."""
    return _Loading(words).load(partial)


def load_settings(recipe: str, settings: Node) -> Any:
    """The checked config that settings read from another program's file make; what they lack stays open (REQUIRED)."""
    loading = _Loading([recipe])
    loading.layers.append(settings)
    return loading.load(partial=True).config


def run(config: Any) -> None:
    """Run the recipe of a config in this process, as `tune run` does."""
    import importlib

    own = getattr(config, "_recipe_file", None)
    module = own_module(Path(own)) if own else importlib.import_module(RECIPES[recipe_name(config)].module)
    module.main(config)


def dump_config(config: Any) -> str:
    """`dump` under the name it has in `tunesmith`."""
    return dump(config)


def dump(config: Any, *, header: str = "", sort: bool = False) -> str:
    """A complete YAML file of `config`: every option with its sentence; it reads back to the same config."""
    from tunesmith.configs._write import scalar, section_lines

    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines += [
        f"recipe: {scalar(recipe_name(config))}  # The recipe this file is for.",
        *section_lines(config, sort=sort),
    ]
    return "\n".join(lines) + "\n"


def json_schema(recipe: str) -> dict[str, Any]:
    """The JSON Schema of the recipe's config file, for editors."""
    from tunesmith.configs import _write

    return _write.json_schema(find_recipe(recipe).config_class, recipe)


def recipe_name(config: Any) -> str:
    """The recipe that a config object is for: a name, or the path of the user's own recipe file."""
    if own := getattr(config, "_recipe_file", None):
        return own
    for recipe in RECIPES.values():
        if type(config).__name__ == recipe.schema.partition(":")[2] or isinstance(config, recipe.config_class):
            return recipe.name
    raise TypeError(f"{type(config).__name__} is the config of no recipe")


# --- from words to a config ----------------------------------------------------------------------


class _Loading:
    """The words of one command line, sorted into layers, then merged and checked."""

    def __init__(self, words: list[str]):
        self.problems: list[Problem] = []
        self.recipe: str | None = None
        """A recipe's name, or the path of the user's own recipe file."""
        self.named_configs: list[tuple[Place, str]] = []
        """Config names of torchtune, such as llama3_1/8B_full."""
        self.layers: list[Node] = []
        """Files and overlays in the order written."""
        self.overlays: list[Node] = []
        self.changes: list[tuple[list[str], Node | None, Place]] = []
        """key=value, and ~key (None), in the order written."""
        self.unreadable = False
        """Whether a file or config that was named is not there to be read: what it may hold is not missed, then."""
        self._sort(list(words))

    def _sort(self, words: list[str]) -> None:
        order = 0
        while words:
            word, order = words.pop(0), order + 1
            place = Place(order, "command line")
            if word == "--config" and not words:
                self.problems.append(Problem(place, "`--config` wants a file behind it"))
            elif word == "--config":
                self._named(words.pop(0), order)
            elif word.startswith("--config="):
                self._named(word.removeprefix("--config="), order)
            elif word.startswith("-"):
                self.problems.append(
                    Problem(place, f"no option `{word}`; settings are written key=value, without dashes")
                )
            elif word.startswith("+"):
                self._overlay(word[1:], order)
            elif word.startswith("~"):
                self.changes.append((word[1:].split("."), None, place))
            elif _is_setting(word):
                self._setting(word, place)
            elif self.recipe is None and not self.layers and not self.named_configs and not _is_config_name(word):
                self.recipe = word
            else:
                self._named(word, order)

    def _setting(self, word: str, place: Place) -> None:
        dotted, _, text = word.partition("=")
        keys = dotted.split(".")
        if "" in keys:
            self.problems.append(Problem(place, f"`{word}` has an empty key; write key=value or section.key=value"))
        else:
            self.changes.append((keys, layers.parse_value(text, place), place))

    def _named(self, word: str, order: int) -> None:
        """A config file, the name of a config of torchtune or, for pre-training, a named size: the model to train from scratch."""
        path = Path(word).expanduser()
        if not path.is_file() and self.recipe == "pretrain" and _is_size_name(word):
            self.changes.insert(
                0, (["model"], Node(word, Place(order, "command line"), word), Place(order, "command line"))
            )
        elif not path.is_file() and _is_torchtune_config(word):
            self.named_configs.append((Place(order, "command line"), word))
        elif word.endswith(YAML_ENDINGS) or path.is_file():
            self._file(path, order)
        else:
            from tunesmith.configs.torchtune_names import config_names

            near = did_you_mean(word, config_names()) if "/" in word else ""
            hint = near or "; write key=value, +overlay, ~key, or the name of a YAML file"
            self.problems.append(Problem(Place(order, "command line"), f"`{word}` is no config file{hint}"))
            self.unreadable = True

    def _file(self, path: Path, order: int) -> None:
        node = layers.read_file(path, order, self.problems)
        if node is None:
            self.unreadable = True
            return
        own = node.value.pop("recipe", None)
        if own is not None and own.value is not None:
            self._recipe_of_file(str(own.value), own.place, path)
        self.layers.append(node)

    def _recipe_of_file(self, name: str, place: Place, path: Path) -> None:
        if name.endswith(".py") and not Path(name).is_file() and (path.parent / name).is_file():
            name = str(path.parent / name)
        if self.recipe is None:
            self.recipe = name
        elif self.recipe != name and self.recipe in RECIPES and not name.endswith(".py"):
            text = f"this file is for the recipe `{name}`, not `{self.recipe}`; run it alone, or change its `recipe`"
            self.problems.append(Problem(place, text))

    def _overlay(self, name: str, order: int) -> None:
        place = Place(order, "command line")
        if name.endswith(YAML_ENDINGS):
            node = layers.read_file(Path(name).expanduser(), order, self.problems)
            self.unreadable |= node is None
        elif name in LATER_OVERLAYS:
            self.problems.append(Problem(place, f"the overlay `+{name}`, {LATER_OVERLAYS[name]}, is not there yet"))
            node = None
        elif not overlay_path(name).is_file() or "/" in name:
            known = overlays()
            listed = ", ".join(f"+{other}" for other in known)
            self.problems.append(
                Problem(place, f"no overlay `+{name}`{did_you_mean(name, known, '+')}; there are {listed}")
            )
            node = None
        else:
            node = layers.read_file(overlay_path(name), order, self.problems, shipped=True)
        if node is not None:
            self.layers.append(node)
            self.overlays.append(node)

    # --- merging and checking ---

    def load(self, partial: bool) -> Loaded:
        user_tree = None
        if self._speaks_torchtune():
            user_tree = self._translate()
        if self.recipe and self.recipe.endswith(YAML_ENDINGS):
            name, self.recipe = self.recipe, None
            self._file(Path(name).expanduser(), 0)
            self.layers.insert(0, self.layers.pop()) if self.layers else None
            if self._speaks_torchtune():
                user_tree = self._translate()
        if self.recipe is None:
            self._fail_without_recipe()
        recipe, base, file = self._find_recipe()
        cls = recipe.config_class
        tree = self._merged(base, user_tree, cls)
        config = Check(cls, self.problems, partial=partial or self.unreadable).run(tree)
        self._fail_on_problems()
        if file:
            config._recipe_file = recipe.name
        return Loaded(config, recipe, file)

    def _fail_on_problems(self) -> None:
        if self.problems:
            texts = dict.fromkeys(str(problem) for problem in sorted(self.problems, key=lambda problem: problem.place))
            raise ConfigError("\n".join(texts))

    def _fail_without_recipe(self) -> None:
        self._fail_on_problems()
        file = next((layer.place.name for layer in self.layers if layer not in self.overlays), None)
        if file:
            raise ConfigError(
                f"{file}: does not say which recipe it is for; add `recipe: sft` at its top, or write `tune run sft {file}`"
            )
        raise UserError(f"name a recipe ({', '.join(RECIPES)}) or a config file")

    def _find_recipe(self) -> tuple[Recipe, Recipe | None, Path | None]:
        """The recipe, the shipped recipe whose defaults apply, and the user's own recipe file."""
        assert self.recipe is not None
        if not self.recipe.endswith(".py"):
            try:
                recipe = find_recipe(self.recipe)
            except UserError as error:
                self.problems.append(Problem(Place(0, "command line"), str(error)))
                self._fail_on_problems()
                raise
            return recipe, recipe, None
        path = Path(self.recipe).expanduser()
        cls = own_config_class(path)
        base = next((r for r in RECIPES.values() if issubclass(cls, r.config_class)), None)
        module = cls.__module__ if cls.__module__ in sys.modules else ""
        return (
            Recipe(str(path.resolve()), f"{module}:{cls.__qualname__}", own_module_name(path), schema.summary(cls)),
            base,
            path,
        )

    def _merged(self, base: Recipe | None, user_tree: tuple[Node, Node] | None, cls: type) -> Node:
        tree = Node({}, NOWHERE)
        if base is not None:
            tree = layers.read_file(base.defaults, -1, self.problems, shipped=True) or tree
        if user_tree is not None:
            shipped, written = user_tree
            for layer in (shipped, *self.overlays, written):
                tree = layers.merge(tree, self._checked_layer(layer, cls), self.problems)
            changes = [change for change in self.changes if change[1] is None]
        else:
            for layer in self.layers:
                tree = layers.merge(tree, self._checked_layer(layer, cls), self.problems)
            changes = self.changes
        for keys, node, place in changes:
            if node is not None and not self._into_a_list(keys, place, tree):
                tree = layers.merge(tree, _with_types(layers.nest(keys, node), cls), self.problems)
            elif node is not None:
                continue
            elif self._known(keys, cls, place, tree):
                tree = layers.delete(tree, keys)
        return Interpolation(tree, lambda keys: schema.default_value(cls, keys), self.problems).run()

    def _checked_layer(self, layer: Node, cls: type) -> Node:
        """Without what an overlay of ours sets and this recipe has not; that is one problem, not one per key."""
        if not layer.place.shipped or layer not in self.overlays:
            return _with_types(layer, cls)
        strange = [key for key in layer.value if key not in schema.hints(cls)]
        if strange:
            name = f"+{Path(layer.place.name).stem}"
            text = (
                f"`{name}` sets `{strange[0]}`, an option that the recipe `{self.recipe}` has not; leave `{name}` out"
            )
            self.problems.append(Problem(Place(layer.place.order, "command line"), text))
        return Node({key: node for key, node in layer.value.items() if key not in strange}, layer.place)

    def _into_a_list(self, keys: list[str], place: Place, tree: Node) -> bool:
        """Whether a setting names a key of a list instead of one of its entries; that is a problem."""
        for depth in range(1, len(keys)):
            found = layers.find(tree, keys[:depth])
            if found is not None and isinstance(found.value, list) and not keys[depth].isdigit():
                name = ".".join(keys[:depth])
                text = f"`{name}` is a list; name the entry: `{name}.0.{'.'.join(keys[depth:])}`"
                self.problems.append(Problem(place, text))
                return True
        return False

    def _known(self, keys: list[str], cls: type, place: Place, tree: Node) -> bool:
        """Whether `~keys` names an option or something that was written."""
        dotted = ".".join(key for key in keys if not key.isdigit())
        if layers.find(tree, keys) is not None:
            return True
        names = options(cls)
        if dotted not in names:
            self.problems.append(
                Problem(place, f"`~{'.'.join(keys)}` names no option{did_you_mean(dotted, names, '~')}")
            )
        return False

    # --- torchtune's words ---

    def _speaks_torchtune(self) -> bool:
        from tunesmith.configs.torchtune_names import is_recipe

        if self.named_configs or (self.recipe and is_recipe(self.recipe)):
            return True
        return any(_has_component(layer) for layer in self.layers)

    def _translate(self) -> tuple[Node, Node]:
        from tunesmith.configs.torchtune import translate

        files = [layer for layer in self.layers if layer not in self.overlays]
        translated = translate(self.recipe, self.named_configs, files, self.changes, self.problems)
        if translated.recipe:
            self.recipe = translated.recipe
        else:
            self._fail_on_problems()
        return translated.shipped, translated.written


def _is_setting(word: str) -> bool:
    """Whether a word is key=value: a key of letters, digits, dots and underscores in front of the first equals sign."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").replace("-", "").isalnum()


def _is_config_name(word: str) -> bool:
    return not word.endswith((".py", *YAML_ENDINGS)) and _is_torchtune_config(word)


def _is_torchtune_config(word: str) -> bool:
    from tunesmith.configs.torchtune_names import is_config_name

    return is_config_name(word)


def _is_size_name(word: str) -> bool:
    from tunesmith.configs.torchtune_names import is_size_name

    return is_size_name(word)


def _has_component(node: Node) -> bool:
    if isinstance(node.value, dict):
        return "_component_" in node.value or any(_has_component(child) for child in node.value.values())
    return isinstance(node.value, list) and any(_has_component(child) for child in node.value)


def _with_types(layer: Node, cls: type) -> Node:
    """`optimizer: sgd` as `optimizer: {type: sgd}`, so that it merges with what is there."""
    entries = {}
    for key, node in layer.value.items():
        hint = schema.hints(cls).get(key)
        if hint is not None and isinstance(node.value, str) and "${" not in node.value:
            outside = schema.third_party(hint) and "." in node.value and "/" not in node.value
            if node.value in schema.choices(hint) or outside:
                node = Node({"type": node}, node.place)
        entries[key] = node
    return Node(entries, layer.place)
