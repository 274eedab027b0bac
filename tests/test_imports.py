"""The package is layered: a module imports its own package and the layers below it, never up, never sideways."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent

LAYERS = [  # top to bottom
    {"cli"},
    {"recipes"},
    {"rl", "eval", "export"},
    {"training", "generation"},
    {"checkpoint", "data", "losses"},
    {"models", "parallel"},
    {"nn"},
    {"configs", "config", "errors", "hub", "remote"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
TORCH_FREE = [
    "configs",
    "config.py",
    "errors.py",
    "hub.py",
    "remote.py",
    "cli",
    "models/families.py",
    "models/family.py",
    "training/preflight",
]


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tunesmith":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tunesmith."):
            yield node.lineno, node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("tunesmith."))


def test_imports_point_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for line, other in imported(path):
            base = {"configs", "config", "errors", "hub", "remote"}
            sideways = (
                other != package and DEPTH.get(other, 99) <= DEPTH.get(package, -1) and not {package, other} <= base
            )
            if package in DEPTH and other in DEPTH and sideways:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports tunesmith.{other}")
    assert not wrong, "imports that point up or sideways:\n" + "\n".join(wrong)


def test_recipes_do_not_import_each_other():
    recipes = {path.stem for path in (PACKAGE / "recipes").glob("*.py")}
    for path in (PACKAGE / "recipes").glob("*.py"):
        names = {
            node.module.split(".")[2]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tunesmith.recipes.")
        }
        assert not names & recipes, f"{path.name} imports another recipe: {names & recipes}"


def test_torch_free_modules_import_no_torch():
    files = []
    for entry in TORCH_FREE:
        path = PACKAGE / entry
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    files += sorted((PACKAGE / "models").glob("*/family.py"))
    modules = [
        ".".join(("tunesmith", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for f in files
    ]
    modules = [module for module in modules if not module.endswith(("__main__", "cli.worker"))]
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        ("--help", "dataclasses pathlib yaml argparse"),
        ("ls", "yaml argparse shutil difflib json"),
        ("ls sft", "yaml argparse shutil difflib json"),
        ("cat sft", "argparse shutil difflib json tunesmith.models tunesmith.data"),
        ("cp sft x.yaml", "argparse shutil difflib json tunesmith.models tunesmith.data"),
    ],
)
def test_quick_verbs_import_little(tmp_path, words, unwanted):
    """What takes milliseconds to import and is not needed must not come back unnoticed."""
    code = f"""
import sys
before = set(sys.modules)
from tunesmith.cli.main import main
assert main({words.split()!r}) == 0
found = set({unwanted.split()!r}) & (set(sys.modules) - before)
assert not found, found
"""
    path = os.pathsep.join([str(PACKAGE.parent), str(Path(yaml.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}  # and -S: an editable installation imports a good deal at start
    command = [sys.executable, "-S", "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
