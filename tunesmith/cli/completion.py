"""`tune completion`: a script for the shell, and the candidates it asks for."""

from __future__ import annotations

import typing

from tunesmith.cli import parser, torchrun
from tunesmith.cli.main import VERBS
from tunesmith.configs import _schema as schema
from tunesmith.configs import torchtune_names as torchtune
from tunesmith.configs.recipes import RECIPES, overlays

EXAMPLES = """\
  source <(tune completion bash)      in ~/.bashrc
  source <(tune completion zsh)       in ~/.zshrc"""

BASH = """\
_tune() {
    local current="${COMP_LINE:0:COMP_POINT}"
    current="${current##* }"
    local words=("${COMP_WORDS[@]:1}")
    local IFS=$'\\n'
    # bash cuts words at = and :, so the line itself is asked for
    local line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=($(tune completion --candidates "$line" 2>/dev/null))
    local cut="${current%"${current##*[=:]}"}"
    if [[ -n "$cut" ]]; then COMPREPLY=("${COMPREPLY[@]#"$cut"}"); fi
    if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" != *[=./] ]]; then COMPREPLY=("${COMPREPLY[0]} "); fi
    if [[ ${#COMPREPLY[@]} -eq 0 ]]; then compopt -o default 2>/dev/null; fi
}
complete -o nospace -F _tune tune
"""

ZSH = """\
#compdef tune
_tune() {
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a found
    found=("${(@f)$(tune completion --candidates "$line" 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then
        local -a open closed
        open=(${(M)found:#*[=./]})
        closed=(${found:#*[=./]})
        (( ${#open} )) && compadd -Q -S '' -- $open
        (( ${#closed} )) && compadd -Q -- $closed
    else
        compset -P '*='
        _files
    fi
}
if [[ "${funcstack[1]}" == _tune ]]; then  # loaded as a file _tune of $fpath
    _tune "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _tune tune
fi
"""

OPTIONS = {
    "run": ["--config", "--preview", "--help"],
    "ls": ["--help"],
    "cp": ["--config", "--no-clobber", "--make-parents", "--help"],
    "cat": ["--config", "--schema", "--sort", "--help"],
    "validate": ["--config", "--help"],
    "import": ["--help"],
    "download": "--output-dir --hf-token --ignore-patterns --allow-patterns --tokenizer-only --revision --source --help".split(),
    "completion": ["bash", "zsh", "--help"],
}


def main(words: list[str]) -> int:
    verb = parser("completion", "Print a script that completes `tune` in your shell.", EXAMPLES)
    verb.add_argument("shell", nargs="?", choices=["bash", "zsh"])
    verb.add_argument("--candidates", metavar="LINE", help="print what could end this line (the scripts ask for it)")
    options = verb.parse_args(words)
    if options.candidates is not None:
        print("\n".join(candidates(options.candidates)))
    elif options.shell is None:
        verb.print_help()
    else:
        print(BASH if options.shell == "bash" else ZSH, end="")
    return 0


def candidates(line: str) -> list[str]:
    """The words that could stand at the end of a command line; none where a file name is as likely as anything."""
    words = line.split()
    current = "" if not line or line[-1].isspace() else words.pop() if words else ""
    if len(words) <= 1:
        return _starting(current, [*VERBS, "--help", "--version"]) if words or current != "tune" else []
    verb, rest = words[1], words[2:]
    if verb in ("run", "cp", "cat", "validate"):
        return _of_config(verb, rest, current)
    named = [*RECIPES, *torchtune.TRAINING_RECIPES] if verb == "ls" and not rest else []
    return _starting(current, [*named, *OPTIONS.get(verb, [])]) if current or named else []


def _of_config(verb: str, rest: list[str], current: str) -> list[str]:
    recipe = next((word for word in rest if word in RECIPES or torchtune.recipe_for(word)), None)
    if rest and rest[-1] == "--config":
        return _starting(current, torchtune.config_names())
    if current.startswith("-"):
        launch = [*torchrun.WITH_VALUE, *torchrun.WITHOUT_VALUE] if verb in ("run", "validate") and not recipe else []
        return _starting(current, OPTIONS[verb] + launch)
    if current.startswith("+"):
        return _starting(current, [f"+{name}" for name in overlays()])
    files = [word for word in rest if word.endswith((".yaml", ".yml", ".py"))]
    if recipe is None and not files:
        named = torchtune.config_names() if "/" in current else []
        return _starting(current, [*RECIPES, *torchtune.recipe_names(), *named]) if current else list(RECIPES)
    cls = RECIPES[torchtune.recipe_for(recipe) or recipe if recipe else "sft"].config_class
    return _keys(cls, current)


def _keys(cls: type, current: str) -> list[str]:
    """key= and section. for the part of a key that is written; the values behind an equals sign."""
    tilde, key = ("~", current[1:]) if current.startswith("~") else ("", current)
    dotted, equals, value = key.partition("=")
    if equals:
        return [f"{dotted}={found}" for found in _starting(value, _values(cls, dotted))]
    prefix = dotted.rpartition(".")[0]
    found = []
    for name, hint in _options_below(cls, prefix).items():
        section = any(schema.is_section(member) for member in schema.members(hint)) and name != "type"
        whole = f"{prefix}.{name}" if prefix else name
        found.append(f"{tilde}{whole}" + ("." if section else "" if tilde else "="))
    return _starting(current, found)


def _options_below(cls: type, prefix: str) -> dict[str, typing.Any]:
    classes = [cls]
    for key in prefix.split(".") if prefix else []:
        hints = [schema.hints(one).get(key) for one in classes]
        classes = [member for hint in hints if hint for member in schema.members(hint) if schema.is_section(member)]
        if not classes:
            return {}
    found: dict[str, typing.Any] = (
        {"type": str} if prefix and any(schema.has_fixed_type(one) for one in classes) else {}
    )
    for one in classes:
        found |= {name: hint for name, hint in schema.hints(one).items() if name not in ("options",)}
    return found


def _values(cls: type, dotted: str) -> list[str]:
    """The values an option can have, where they are few."""
    section, _, name = dotted.rpartition(".")
    if name == "type" and section:
        above = _options_below(cls, section.rpartition(".")[0]).get(section.rpartition(".")[2])
        if above is not None and schema.choices(above):
            return list(schema.choices(above))
    hint = _options_below(cls, section).get(name)
    found: list[str] = []
    for member in schema.members(hint) if hint is not None else []:
        if typing.get_origin(member) is typing.Literal:
            found += [str(arg) for arg in typing.get_args(member)]
        elif member is bool:
            found += ["true", "false"]
    return found + ["null"] if found and schema.optional(hint) else found


def _starting(current: str, words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(current)]
