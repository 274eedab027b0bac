"""What the shell is offered behind the cursor."""

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.cli.completion import BASH, ZSH, candidates
from tunesmith.configs.recipes import RECIPES


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tune r", ["run"]),
        ("tune run ", list(RECIPES)),
        ("tune run sf", ["sft"]),
        (
            "tune run full_",
            [
                "full_finetune_single_device",
                "full_finetune_distributed",
                "full_dpo_single_device",
                "full_dpo_distributed",
            ],
        ),
        ("tune run sft +q", ["+qat", "+qdora", "+qlora"]),
        ("tune run sft batch", ["batch_size=", "batch_size_val="]),
        ("tune run sft optimizer.l", ["optimizer.lr="]),
        (
            "tune run sft optimizer.type=a",
            ["optimizer.type=adamw", "optimizer.type=adamw_8bit", "optimizer.type=adafactor"],
        ),
        ("tune run sft weights.quantize_base=", ["weights.quantize_base=nf4", "weights.quantize_base=null"]),
        ("tune run sft compile=t", ["compile=true"]),
        ("tune run sft ~clip", ["~clip_grad_norm"]),
        ("tune run sft profi", ["profiler."]),
        ("tune run --nproc", ["--nproc_per_node"]),
        ("tune run sft --pre", ["--preview"]),
        ("tune run generate top", ["top_k=", "top_p="]),
        ("tune run my.yaml gradient", ["gradient_accumulation_steps="]),
        ("tune run x --config gemma2/9B_ql", ["gemma2/9B_qlora", "gemma2/9B_qlora_single_device"]),
        ("tune run x --config gemma2/9B_full_d", ["gemma2/9B_full_dpo"]),
        (
            "tune run x --config llama3_2/8",
            [f"llama3_2/8B_to_1B_KD_lora_{end}" for end in ("single_device", "distributed")],
        ),
        ("tune run lora_dpo_distributed refer", ["reference."]),
        ("tune run knowledge_distillation_distributed kd", ["kd_ratio="]),
        ("tune ls qat", ["qat_single_device", "qat_distributed", "qat_lora_finetune_distributed"]),
        ("tune cat sft --s", ["--schema", "--sort"]),
        ("tune ls pre", ["pretrain", "preference"]),
        ("tune download --to", ["--tokenizer-only"]),
        ("tune run sft dataset.source=", []),
        ("tune bogus ", []),
    ],
)
def test_candidates(line, found):
    assert candidates(line) == found


def test_bash_asks_and_cuts(tmp_path):
    """The script in a real bash: words that bash cuts at = are completed whole."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    (tmp_path / "tune").write_text(f'#!/bin/sh\nexec {sys.executable} -m tunesmith "$@"\n')
    (tmp_path / "tune").chmod(0o755)
    script = BASH + (
        'ask() { COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($1); COMPREPLY=(); _tune; printf "%s|" "${COMPREPLY[@]}"; echo; }\n'
        'ask "tune run sft optimizer.ty"; ask "tune run sft dtype=b"; ask "tune va"; ask "tune run sft +l"\n'
    )
    result = subprocess.run(
        [bash, "-c", script], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=60
    )
    assert result.stdout.splitlines() == ["optimizer.type=|", "bf16 |", "validate |", "+lora|+low_memory|"], (
        result.stderr
    )


ZSHRC = """
PS1='' ; setopt no_beep; unset zle_bracketed_paste
autoload -Uz compinit && compinit -u -d {folder}/dump
show() {{ print -r -- "$BUFFER" >> {folder}/lines; BUFFER= }}
zle -N show; bindkey '^X' show
"""


@pytest.mark.parametrize("installed", ["sourced", "in fpath", "sourced without compinit"])
def test_zsh_completes(tmp_path, installed):
    """The script in a real zsh on a terminal: what is on the line after a press of Tab."""
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("no zsh here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "chats.jsonl").touch()
    (tmp_path / "files" / "my.yaml").touch()
    (tmp_path / "bin" / "tune").write_text(f'#!/bin/sh\nexec {sys.executable} -m tunesmith "$@"\n')
    (tmp_path / "bin" / "tune").chmod(0o755)
    setup = ZSHRC.format(folder=tmp_path)
    if installed == "in fpath":
        (tmp_path / "functions").mkdir()
        (tmp_path / "functions" / "_tune").write_text(ZSH)
        setup = f"fpath=({tmp_path}/functions $fpath)\n{setup}"
    else:
        setup = setup.replace("autoload -Uz compinit", ": ") if installed == "sourced without compinit" else setup
        setup += "source <(tune completion zsh)\n"
    (tmp_path / ".zshrc").write_text(f"{setup}cd {tmp_path}/files\n")
    lines = {
        "tune va": "tune validate ",
        "tune run sft optimizer.ty": "tune run sft optimizer.type=",
        "tune run sft opt": "tune run sft optimizer",  # optimizer. and optimizer_in_bwd=
        "tune run sft dtype=b": "tune run sft dtype=bf16 ",
        "tune run sft +low": "tune run sft +low_memory ",
        "tune run my": "tune run my.yaml ",
        "tune run sft dataset.source=ch": "tune run sft dataset.source=chats.jsonl ",
        "cd . && tune cat sft --so": "cd . && tune cat sft --sort ",
        "tune run x --config gemma2/9B_qlora_": "tune run x --config gemma2/9B_qlora_single_device ",
    }
    assert _after_tab(zsh, tmp_path, list(lines)) == list(lines.values())


def _after_tab(zsh: str, folder: Path, lines: list[str]) -> list[str]:
    """The command line after each of `lines` and a Tab."""
    terminal, its_end = pty.openpty()
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "ZDOTDIR": str(folder), "TERM": "xterm"}
    shell = subprocess.Popen(
        [zsh, "-d", "-i"], stdin=its_end, stdout=its_end, stderr=its_end, env=environment, start_new_session=True
    )
    os.close(its_end)
    threading.Thread(target=_drain, args=(terminal,), daemon=True).start()
    shown = folder / "lines"
    shown.touch()
    try:
        for number, line in enumerate(["", *lines]):
            os.write(terminal, f"{line}{chr(9) if line else ''}\x18".encode())
            until = time.monotonic() + 60
            while shown.read_text().count("\n") <= number and time.monotonic() < until:
                time.sleep(0.05)
        return shown.read_text().split("\n")[1:-1]
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass
