"""What only a process of its own shows: no torch, a closed pipe, several ranks."""

import os
import subprocess
import sys
from pathlib import Path


def tune(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tunesmith", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=120, env={**os.environ, **environment}
    )


HEAVY = ("torch", "transformers", "datasets", "huggingface_hub", "numpy", "rich", "safetensors", "tokenizers", "jinja2")


def test_quick_verbs_import_nothing_heavy(tmp_path, tiny_model):
    """The budget of 100 ms, held by what is imported instead of by a clock."""
    (tmp_path / "chats.jsonl").write_text('{"text": "ab"}')
    verbs = [
        ["--help"], ["--version"], ["ls"], ["ls", "sft"], ["cat", "sft", "--schema"], ["cat", "llama3_1/8B_full"], ["cp", "sft", "x.yaml"],
        ["validate", "sft", f"model={tiny_model}", "dataset.source=chats.jsonl"], ["completion", "bash"], ["download", "--help"], ["run", "--help"],
    ]  # fmt: skip
    script = f"""
import sys
from tunesmith.cli.main import main
for words in {verbs!r}:
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    assert not code, (words, code)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (words, heavy)
print(len(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 320, "modules imported by all verbs together"


def test_help_imports_next_to_nothing():
    script = "import sys; from tunesmith.cli.main import main; main([]); print(len(sys.modules))"
    bare = subprocess.run([sys.executable, "-c", "import sys; print(len(sys.modules))"], capture_output=True, text=True)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(result.stdout.splitlines()[-1]) - int(bare.stdout) < 40


def test_a_mistake_is_one_line_and_exit_code_2():
    result = tune("run", "stf")
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_crash():
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "ls", "sft"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
    process.stderr.close()


OWN = """
import os
from tunesmith.configs.sft import SFT
from tunesmith.errors import UserError

def main(config: SFT):
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "batch", config.batch_size, flush=True)
    if config.batch_size == 9:
        raise UserError("nine is too many")
"""


def test_several_ranks_say_it_once(tmp_path, tiny_model):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "chats.jsonl").write_text('{"text": "ab"}')
    words = ["--nproc_per_node", "2", "own.py", f"model={tiny_model}", "dataset.source=chats.jsonl", "batch_size=9"]
    result = tune("run", *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert (result.returncode, result.stderr) == (2, "nine is too many\n")
    # The first rank that fails ends the others, perhaps before they come to speak.
    assert set(result.stdout.splitlines()) <= {f"rank {rank} of 2 batch 9" for rank in range(2)} and result.stdout


def test_the_rank_that_failed_first_is_blamed():
    from types import SimpleNamespace as Failure

    from tunesmith.cli.launch import _cause

    killed, mistake = Failure(exitcode=-15, timestamp=7), Failure(exitcode=2, timestamp=7)
    assert _cause({0: killed, 1: mistake}) == (1, mistake)
    assert _cause({0: killed}) == (0, killed)
