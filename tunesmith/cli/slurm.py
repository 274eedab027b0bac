"""`tune slurm`: write an sbatch script that runs a recipe on the nodes of a SLURM job."""

from __future__ import annotations

import os
import shlex
import sys

from tunesmith.errors import UserError

HELP = """\
usage: tune slurm [--nodes N] [--gpus-per-node N] [sbatch options] RECIPE|FILE [+overlay …] [key=value …] > job.sbatch

Writes an sbatch script for what `tune run` takes: one `tune run` per node, which meet on the job's first node.
Before the time limit SLURM sends SIGTERM: a checkpoint is saved on all ranks and the job is put into the queue again, where
it goes on from that checkpoint; so it does after a lost node. The recipe and its settings are checked now, as by `tune validate`.

  --nodes N           nodes of the job (default 1)
  --gpus-per-node N   GPUs of a node, one process for each (default 8); 0: processes on CPUs, see --nproc_per_node
  --nproc_per_node N  processes of a node, if not one for each GPU
  --max_restarts N    how often the processes are started again within the job (default 3)
  --signal-seconds N  how long before the time limit to save and leave (default 300)
  --setup COMMAND     a line of shell to run first on every node, such as 'source .venv/bin/activate'; may be repeated
  --OPTION VALUE      any other goes to sbatch: --partition, --time, --account, --job-name, --output …

examples:
  tune slurm --nodes 4 --gpus-per-node 8 --partition a100 --time 12:00:00 sft +lora model=Qwen/Qwen3-8B dataset.source=chats.jsonl > job.sbatch
  sbatch job.sbatch
"""

OWN = {"nodes": "1", "gpus-per-node": "8", "nproc-per-node": "", "max-restarts": "3", "signal-seconds": "300"}

SCRIPT = r"""#!/bin/bash
# Written by `tune slurm`. Each node runs one launcher; they meet on the first node of the job.
{directives}

set -uo pipefail
{setup}nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=$(head -n 1 <<< "$nodes")
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"

# SLURM tells this script of the time limit; srun hands it on, and every rank saves.
leaving="" step=""
leave() {{
    leaving=yes
    kill -TERM "$step" 2> /dev/null
}}
trap leave TERM

srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    tune run \
    --nnodes {nodes} --nproc_per_node {processes} --max_restarts {restarts} \
    --rdzv_backend c10d --rdzv_endpoint "$first:$port" --rdzv_id "$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" \
    {words} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2> /dev/null; do # the signal ended `wait`, not the run
    wait "$step"
    code=$?
done

if [ -n "$leaving" ] && [ "$code" -eq 143 ]; then
    echo "the time limit is near: saved, and put into the queue again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def main(words: list[str]) -> int:
    options, more, setup, rest = _split(words)
    if not rest or rest[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    nodes, gpus = _number(options, "nodes", 1), _number(options, "gpus-per-node", 0)
    processes = _number(options, "nproc-per-node", 1) if options["nproc-per-node"] else max(gpus, 1)
    _check(rest, nodes * processes)
    resuming = [*rest, "resume_from_checkpoint=true"]
    print(script(nodes, gpus, processes, options, more, setup, resuming), end="")
    return 0


def script(
    nodes: int, gpus: int, processes: int, options: dict[str, str], more: list[str], setup: list[str], words: list[str]
) -> str:
    """The sbatch script."""
    own = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    if gpus:
        own.append(f"--gpus-per-node={gpus}")
    if not any(option.startswith(("--job-name=", "-J=")) for option in more):
        own.append("--job-name=tune")
    if not any(option.startswith("--output=") for option in more):
        own.append("--output=%x-%j.log")
    own += [*more, "--requeue", "--open-mode=append", f"--signal=B:TERM@{_number(options, 'signal-seconds', 1)}"]
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in own),
        setup="".join(f"{line}\n" for line in setup),
        nodes=nodes,
        processes=processes,
        restarts=_number(options, "max-restarts", 0),
        threads=f"$((${{SLURM_CPUS_ON_NODE:-{processes}}} / {processes}))",
        words=shlex.join(words),
    )


def _split(words: list[str]) -> tuple[dict[str, str], list[str], list[str], list[str]]:
    """(our options, sbatch's, lines of setup, the recipe and what follows it)."""
    options, more, setup, index = dict(OWN), [], [], 0
    while index < len(words) and words[index].startswith("--") and words[index] != "--help":
        name, equals, value = words[index][2:].partition("=")
        if not equals:
            if index + 1 >= len(words):
                raise UserError(f"`--{name}` wants a value behind it; what takes none is written --{name}=")
            value = words[index + 1]
        index += 1 if equals else 2
        if name.replace("_", "-") in OWN:
            options[name.replace("_", "-")] = value
        elif name == "setup":
            setup.append(value)
        elif name in ("requeue", "signal", "ntasks-per-node"):
            raise UserError(f"`--{name}` is set by `tune slurm` itself: leave it out, or edit the script")
        else:
            more.append(f"--{name}={value}" if value else f"--{name}")
    return options, more, setup, words[index:]


def _number(options: dict[str, str], name: str, least: int) -> int:
    if not options[name].isdecimal() or int(options[name]) < least:
        raise UserError(f"`--{name} {options[name]}`: a number from {least} on is wanted")
    return int(options[name])


def _check(words: list[str], processes: int) -> None:
    """Say what is wrong now, not after a night in the queue. What only the nodes see is not looked at."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from tunesmith.config import load
    from tunesmith.training import preflight

    loaded = load(words)
    if not hasattr(loaded.config, "resume_from_checkpoint"):
        raise UserError(f"`tune slurm` is for recipes that train; run `{loaded.recipe.name}` with srun and `tune run`")
    preflight.check(loaded.config, processes, folder_is_checked_later=True)
