"""What the shell is offered behind the cursor."""

import shutil
import subprocess
import sys

import pytest

from tunesmith.cli.completion import BASH, ZSH, candidates


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tune r", ["run"]),
        ("tune run ", ["sft", "pretrain", "generate", "export"]),
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
        ("tune run sft +q", ["+qdora", "+qlora"]),
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
        ("tune run x --config gemma2/9B_l", ["gemma2/9B_lora", "gemma2/9B_lora_single_device"]),
        ("tune cat sft --s", ["--schema", "--sort"]),
        ("tune ls pre", ["pretrain"]),
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


def test_zsh_script_parses():
    zsh = shutil.which("zsh")
    if zsh is None:
        assert "compdef _tune tune" in ZSH
        return
    assert subprocess.run([zsh, "-n"], input=ZSH, text=True, capture_output=True).returncode == 0
