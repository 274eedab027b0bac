"""torchrun's options as a table of our own, so that reading them needs no torch; a test compares it with torchrun's parser."""

from __future__ import annotations

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
