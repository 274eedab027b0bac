"""torchrun's options as a table of our own, so that reading them needs no torch; a test compares it with torchrun's parser."""

from __future__ import annotations

import os

from tunesmith.errors import UserError

WITH_VALUE = (
    "--nnodes --nproc_per_node --rdzv_backend --rdzv_endpoint --rdzv_id --rdzv_conf --max_restarts --monitor_interval --start_method "
    "--event_log_handler --role --log_dir --redirects --tee --local_ranks_filter --duplicate_stdout_filters --duplicate_stderr_filters "
    "--node_rank --master_addr --master_port --local_addr --logs_specs --numa_binding --signals_to_handle --shutdown_timeout"
).split()
WITHOUT_VALUE = ["--standalone", "--virtual_local_rank"]
SHORT = {"-r": "--redirects", "-t": "--tee"}
REFUSED = ["--module", "-m", "--no_python", "--run_path"]
"""Options of torchrun that say what to start; tune itself knows that."""


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """(torchrun's options, the recipe and what follows it)."""
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] not in ("-h", "--help"):
        option, equals, _ = words[index].partition("=")
        name = _full_name(option)
        if name is None:
            break
        wants_value = name in WITH_VALUE and not equals
        if wants_value and index + 1 >= len(words):
            raise UserError(f"`{option}` wants a value behind it")
        index += 2 if wants_value else 1
    return words[:index], words[index:]


def is_asked_for(options: list[str]) -> bool:
    """Whether processes are to be started: by options, or by the variables in which a cluster hands them over (Kubernetes)."""
    return bool(options) or any(name in os.environ for name in ("PET_NNODES", "PET_NPROC_PER_NODE"))


def processes(options: list[str]) -> int:
    """How many processes torchrun's `options` start in all; 0 where that depends on the machine, or may change."""
    nodes, per_node = value(options, "--nnodes") or "1", value(options, "--nproc_per_node") or "1"
    least, _, most = nodes.partition(":")
    if not (least.isdecimal() and per_node.isdecimal()) or (most and most != least):
        return 0
    return int(least) * int(per_node)


def value(options: list[str], name: str) -> str | None:
    """The value of the option called `name` among torchrun's `options`, or in its variable PET_NAME; None where it is not given."""
    found = os.environ.get(f"PET_{name.lstrip('-').upper()}")
    for index, word in enumerate(options):
        option, equals, behind = word.partition("=")
        if option.startswith("-") and _full_name(option) == name:
            found = behind if equals else options[index + 1]
    return found


def _full_name(option: str) -> str | None:
    """torchrun's name of an option, written with dashes or underscores, or shortened; None for what is not torchrun's."""
    name = SHORT.get(option) or "--" + option[2:].replace("-", "_")
    if option in REFUSED or name in REFUSED:
        raise UserError(f"`{option}` tells torchrun what to start; `tune run` knows that from the recipe: leave it out")
    if name in ("--config", "--preview"):
        return None
    known = [*WITH_VALUE, *WITHOUT_VALUE]
    fitting = [name] if name in known else [other for other in known if other.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"`{option}` could be {' or '.join(fitting)}")
    from tunesmith.configs._suggest import did_you_mean

    raise UserError(
        f"torchrun has no option `{option}`{did_you_mean(name, known)}; settings are written key=value, without dashes"
    )
