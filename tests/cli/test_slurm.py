"""`tune slurm`, and the examples for other clusters."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import yaml

from tunesmith.cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "job.sbatch"
EXAMPLES = Path(__file__).parents[2] / "examples"

SRUN = """#!/bin/bash
# Starts the command once for each node, here, and hands SIGTERM on, as srun does.
while [[ $1 == --* ]]; do case $1 in --nodes=*) nodes=${1#--nodes=};; esac; shift; done
pids=()
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; one=$?
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; one=$?; done
    ((one > code)) && code=$one
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue*) echo "$2" > requeued ;;
esac
"""


def written(capsys, *words: str) -> str:
    assert main(["slurm", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> dict[str, str]:
    """The environment of a job whose two nodes are this machine."""
    monkeypatch.chdir(tmp_path)
    bin = tmp_path / "bin"
    bin.mkdir()
    tune = f'#!/bin/bash\nexec {sys.executable} -m tunesmith "$@"\n'
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("tune", tune)):
        (bin / name).write_text(content)
        (bin / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    return {**os.environ, **job, "PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_the_script(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my chats.jsonl").write_text('{"text": "ab"}')
    words = "--nodes 4 --gpus-per-node 8 --partition a100 --time=12:00:00 --setup".split()
    recipe = ["sft", "+lora", "model=Qwen/Qwen3-8B", "dataset.source=my chats.jsonl", "output_dir=/shared/run"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    script = written(capsys, *words, "source .venv/bin/activate", *recipe)
    if os.environ.get("TUNESMITH_WRITE_GOLDEN"):
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "two", "sft"], "`--nodes two`: a number from 1 on"),
        (["--requeue=", "sft"], "is set by `tune slurm` itself"),
        (["--nodes", "2", "stf"], "stf"),
        (["generate", "model=some/model", "prompt=x"], "is for recipes that train"),
        (["--nodes=3", "--gpus-per-node=2", "sft", "tensor_parallel_dim=4"], "needs a multiple of 4 processes, but 6 were"),
    ],
)  # fmt: skip
def test_mistakes(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    Path("chats.jsonl").write_text('{"text": "ab"}')
    more = ["model=some/model", "dataset.source=chats.jsonl"] if words[-1].partition("=")[0] != "prompt" else []
    assert main(["slurm", *words, *more]) == 2
    assert said in capsys.readouterr().err


def _job(capsys, tmp_path, model, data, *more: str) -> list[str]:
    words = launching.words(tmp_path, model, data, *more)
    Path("job.sbatch").write_text(written(capsys, "--nodes", "2", "--gpus-per-node", "0", *words))
    return ["bash", "job.sbatch"]


@pytest.mark.slow
def test_two_agents_of_a_job(capsys, tmp_path, cluster, tiny_model, chat_file):
    command = _job(capsys, tmp_path, tiny_model, chat_file)
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in launching.metrics(tmp_path / "run")] == list(range(1, 7))
    assert done.stderr.count("saved after step 6") == 1 and not Path("requeued").exists()


@pytest.mark.slow
def test_the_time_limit(capsys, tmp_path, cluster, tiny_model, chat_file):
    """SLURM tells the script alone; all ranks save, the job goes back into the queue, and goes on from there."""
    command = _job(capsys, tmp_path, tiny_model, chat_file)
    job = subprocess.Popen(command, env={**cluster, "TROUBLE": "wait:1:3"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    launching.wait_for((tmp_path / "run.trouble").exists)
    job.send_signal(signal.SIGTERM)
    code, output, errors = launching.finish(job, 240)
    assert code == 143 and Path("requeued").read_text() == f"{cluster['SLURM_JOB_ID']}\n", (output, errors)
    assert errors.count("stopped and saved after step") == 1
    again = subprocess.run(command, env={**cluster, "SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True, timeout=240)  # fmt: skip
    assert again.returncode == 0 and again.stdout.count("resumed after step") == 1, again.stderr
    assert [row["step"] for row in launching.metrics(tmp_path / "run")] == list(range(1, 7))


def test_the_page_on_many_devices_is_true(monkeypatch, tmp_path):
    """Its commands have options and settings that exist."""
    import re
    import shlex

    from tunesmith.cli import slurm, torchrun
    from tunesmith.config import load

    page = (EXAMPLES.parent / "docs" / "distributed.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^tune (run|validate|slurm) (.*)$", page, re.MULTILINE)
    assert len(commands) == 7
    for verb, text in commands:
        words = shlex.split(text.partition(" > ")[0])
        rest = slurm._split(words)[-1] if verb == "slurm" else torchrun.split(words)[1]
        assert load(rest).recipe.name in ("sft", "pretrain")


def _commands(node):
    """Every text of a YAML document that runs `tune`."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    found = [text for child in children for text in _commands(child)]
    return found + ([node] if isinstance(node, str) and "tune run" in node else [])


@pytest.mark.parametrize("name", ["kubernetes.yaml", "skypilot.yaml"])
def test_examples_are_well_formed_and_their_commands_are_understood(name, monkeypatch, tmp_path):
    """YAML that parses, shell that parses, and options that torchrun and the recipe know."""
    import shlex

    from tunesmith.cli import torchrun
    from tunesmith.config import load

    documents = list(yaml.safe_load_all((EXAMPLES / name).read_text()))
    commands = [text for document in documents for text in _commands(document)]
    assert commands
    for text in commands:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        _, _, words = text.replace("\\\n", " ").partition("tune run")
        options, rest = torchrun.split(shlex.split(words.splitlines()[0]))
        assert options and load(rest).config.resume_from_checkpoint
    if name == "kubernetes.yaml":
        (job,) = documents
        master, worker = (job["spec"]["pytorchReplicaSpecs"][kind] for kind in ("Master", "Worker"))
        assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
        for pod in (master, worker):
            (container,) = pod["template"]["spec"]["containers"]
            assert container["name"] == "pytorch"  # the operator looks for that name
    else:  # a bucket mounted as a folder shows files of other nodes late
        [task] = documents
        assert (
            list(task["volumes"]) == ["/shared"]
            and "file_mounts" not in task
            and "output_dir=/shared/run" in task["run"]
        )
