"""Which tasks are evaluated: names of lm-evaluation-harness, files and folders of tasks. Imports lm_eval, which takes seconds."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tunesmith.configs._suggest import did_you_mean
from tunesmith.configs.evaluate import is_task_path
from tunesmith.errors import UserError

_DEFINITION = re.compile(r"""^['"]?(?:task|group)['"]?:[ \t]*['"]?([^\s'"#\[{]+)""", re.MULTILINE)
_TAGS = re.compile(r"""^['"]?tag['"]?:[ \t]*(.*(?:\n[ \t]*-[ \t]*\S+)*)""", re.MULTILINE)
_INCLUDE = re.compile(r"""^include:[ \t]*['"]?([^\s'"]+)""", re.MULTILINE)
_WORD = re.compile(r"""[^\s'",\[\]#-][^\s'",\[\]#]*""")
_NO_TASKS = (".py", ".pyc", ".md", ".txt", ".json", ".jsonl", ".csv", ".png", ".sh")

Loaded = dict[str, Any]
"""What the harness calls a task dict: its tasks by name, and groups of them."""


def load_tasks(names: Sequence[str], include_path: str | None = None, runs_unsafe_code: bool = False) -> Loaded:
    """The tasks and their data.

    Args:
        names: of tasks, groups and tags of the harness; paths of YAML files, and of folders, all tasks of which are taken.
        include_path: folder of task files that `names` may name as well.
        runs_unsafe_code: let tasks execute what the model wrote.

    Raises UserError for a name that is none, a file that is missing or wrong, data that cannot be had, and code that may
    not be run.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells what it does in many warnings
    folders = [Path(name).expanduser() for name in names if Path(name).expanduser().is_dir()]
    own = [*folders, *([Path(include_path).expanduser()] if include_path else [])]
    for folder in own:
        _check_folder(folder)
    wanted = [name for name in names if not is_task_path(name)]
    manager = _manager(wanted, own)
    specs = [spec for name in names for spec in _specs(name, manager)]
    unsafe = sorted({name for spec in specs for name in _unsafe(spec, manager)})
    if unsafe and not runs_unsafe_code:
        raise UserError(
            f"`tasks`: {unsafe[0]} executes the code that the model writes, on this machine and as you: "
            "set `confirm_run_unsafe_code=true` if you want that, or leave it out"
        )
    if unsafe:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # or the metric refuses
    return _loaded(manager, specs)


def _specs(name: str, manager: TaskManager) -> Iterator[str]:
    """What the harness is asked for."""
    path = Path(name).expanduser()
    if path.is_dir():
        inside = {name: entry for name, entry in manager.task_index.items() if _is_in(entry.yaml_path, path)}
        grouped = {child for entry in inside.values() for child in _children(entry.cfg or {})}
        yield from (name for name in inside if name not in grouped)
    elif is_task_path(name):
        _read(path)
        yield str(path)
    elif name in manager.task_index:
        yield name
    else:
        raise UserError(
            f"`tasks`: no task {name}{did_you_mean(name, {*_places(), *manager.task_index})} (`lm-eval ls tasks` lists them; "
            "a task of your own is named by its file, such as ./my_task.yaml)"
        )


def _is_in(file: Path | None, folder: Path) -> bool:
    return file is not None and file.resolve().is_relative_to(folder.resolve())


def _loaded(manager: TaskManager, specs: list[str]) -> Loaded:
    try:
        loaded: Loaded = dict(manager.load(specs))
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a task's file or its data may do
        raise UserError(f"`tasks`: {in_words(error)} (while {', '.join(specs[:3])} was loaded)") from error
    for name, task in loaded["tasks"].items():
        _check_metrics(name, task)
    return loaded


def _check_metrics(name: str, task: Any) -> None:
    """Raise UserError for what a task is to be scored by and the harness doesn't know: it leaves it out, or fails at the end."""
    has_own_way = task.get_config("process_results") is not None
    for metric, function in () if has_own_way else getattr(task, "_metric_fn_list", {}).items():
        if function is None:
            meant = did_you_mean(metric, set(METRIC_REGISTRY) - {metric})
            raise UserError(f"`tasks`: the metric {metric} of {name} is unknown, or can't be fetched{meant}")
    for metric, function in task.aggregation().items():
        if function is None:
            known = ", ".join(sorted(AGGREGATION_REGISTRY))
            raise UserError(f"`tasks`: {name} aggregates {metric} in a way that is unknown; there are {known}")


def in_words(error: Exception) -> str:
    """An error in a task's file, its data or its code, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = type(error).__name__
    if kind == "KeyError":
        return f"there is no {text}; is a split or a field misspelled?"
    if kind in ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"):
        return f"the data could not be fetched: {text}"
    return text if isinstance(error, ValueError | FileNotFoundError) else f"{kind}: {text}"


# --- files -------------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    """The harness passes over files that it cannot read; a user wants to know of them."""
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UserError(f"`tasks`: there is no task file (*.yaml) in {folder}")
    for file in files:
        _read(file)


def _read(file: Path) -> dict[str, Any]:
    """A task's file without the functions that it names. Raises UserError where it is none."""
    try:
        content = load_yaml(file, resolve_func=False)
    except yaml.YAMLError as error:
        raise UserError(f"`tasks`: {file} is no YAML: {' '.join(str(error).split())}") from error
    except FileNotFoundError as error:
        raise UserError(f"`tasks`: {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.keys() & {"task", "group", "class"}:
        raise UserError(f"`tasks`: {file} is no task file: it has neither `task` nor `group`")
    return content


def _unsafe(spec: str, manager: TaskManager) -> Iterator[str]:
    """The tasks behind a spec that run what the model writes. Looked up before any of their own code is imported."""
    entry = manager.task_index.get(spec)
    if entry is not None and entry.tags and entry.yaml_path is None:
        for name in entry.tags:
            yield from _unsafe(name, manager)
        return
    content = (entry.cfg or {}) if entry is not None else _read(Path(spec)) if is_task_path(spec) else {}
    if content.get("unsafe_code"):
        yield str(content.get("task", spec))
    for child in _children(content):
        yield from _unsafe(child, manager)


def _children(content: dict[str, Any]) -> Iterator[str]:
    """Names of what a group holds."""
    listed = content.get("task")
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and isinstance(item.get("task"), str):
            yield item["task"]
        elif isinstance(item, dict):
            yield from [item["group"]] if isinstance(item.get("group"), str) else []
            yield from _children(item)


# --- the harness's own -------------------------------------------------------------------------------


def _manager(names: Iterable[str], own: list[Path]) -> TaskManager:
    """One that knows `names` and what they consist of. To read all 14,000 of the harness's tasks takes a quarter of a minute, so
    only folders that hold what is wanted are read."""
    manager = TaskManager(include_path=list(own), include_defaults=False)
    done: set[Path] = set()
    while missing := _missing(names, manager):
        wanted = {folder for name in missing for folder in _places().get(name, ())} - done
        if not wanted:
            break  # what is still missing is defined by the group that names it, or unknown
        for folder in sorted(wanted):
            _add(manager.task_index, TaskManager(include_path=folder, include_defaults=False).task_index)
        done |= wanted
    return manager


def _add(index: dict[str, Any], more: dict[str, Any]) -> None:
    """Tasks that are not known yet, and to tags those that bear them."""
    for name, entry in more.items():
        known = index.setdefault(name, entry)
        if known.yaml_path is None and entry.yaml_path is None:
            known.tags |= entry.tags


def _missing(names: Iterable[str], manager: TaskManager) -> set[str]:
    """Names, and those they consist of, that the manager does not know."""
    missing, seen, waiting = set(), set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        entry = manager.task_index.get(name)
        if entry is None:
            missing.add(name)
        else:
            waiting += [*_children(entry.cfg or {}), *(entry.tags if entry.yaml_path is None else ())]
    return missing


@functools.cache
def _places() -> dict[str, set[Path]]:
    """{task, group or tag of the harness: folders in which all of it is}; found by looking at files as text, which is fast."""
    root = Path(lm_eval.tasks.__file__).parent
    places: dict[str, set[Path]] = defaultdict(set)
    tags: dict[Path, list[str]] = {}
    includes: dict[Path, Path] = {}
    for path in sorted(root.rglob("*"), key=Path.as_posix):
        if path.suffix in _NO_TASKS or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for name in _DEFINITION.findall(text) if path.suffix == ".yaml" else ():
            if name not in places:  # the harness takes the first
                places[name].add(path.parent)
        tags[path] = [name for found in _TAGS.findall(text) for name in _WORD.findall(found)]
        for name in _INCLUDE.findall(text):
            includes[path] = Path(os.path.normpath(path.parent / name))
    for path in tags:
        source: Path | None = path
        while source is not None:
            for name in tags.get(source, ()):
                places[name].add(root / path.relative_to(root).parts[0])
            source = includes.get(source)
    return dict(places)
