"""torchrun's options in front of the recipe."""

import pytest

from tunesmith.cli import torchrun
from tunesmith.errors import UserError


def test_the_table_is_torchruns():
    from torch.distributed.run import get_args_parser

    arity = {}
    for action in get_args_parser()._actions:
        for name in action.option_strings:
            if name.startswith("--") and "-" not in name[2:]:
                arity[name] = action.nargs != 0
    arity.pop("--help")
    ours = dict.fromkeys(torchrun.WITH_VALUE, True) | dict.fromkeys(torchrun.WITHOUT_VALUE, False)
    ours |= {name: False for name in torchrun.REFUSED if name.startswith("--")}
    assert ours == arity


@pytest.mark.parametrize(
    ("words", "launch"),
    [
        ("sft a=b", ""),
        ("--nproc_per_node 2 sft a=b", "--nproc_per_node 2"),
        ("--nproc-per-node=2 --standalone sft a=b", "--nproc-per-node=2 --standalone"),
        (
            "--nnodes 2 --rdzv_backend c10d --rdzv-endpoint host:1 sft a=b",
            "--nnodes 2 --rdzv_backend c10d --rdzv-endpoint host:1",
        ),
        ("--nproc 2 sft a=b", "--nproc 2"),
        ("-t 3 -r 3 sft a=b", "-t 3 -r 3"),
        ("--config my.yaml", ""),
    ],
)
def test_split(words, launch):
    rest = words[len(launch) :].split()
    assert torchrun.split(words.split()) == (launch.split(), rest)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nproc_per_nod2 2 sft", "did you mean `--nproc_per_node`?"),
        ("--nproc_per_node", "wants a value"),
        ("--module x sft", "tells torchrun what to start"),
        ("-m x sft", "tells torchrun what to start"),
        ("--n 2 sft", "could be"),
        ("--batch_size=3 sft", "settings are written key=value"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UserError, match=said):
        torchrun.split(words.split())
