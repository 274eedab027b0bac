"""Loading half a billion bf16 parameters: time with and without imports, and memory, until every weight has been touched."""

from __future__ import annotations

from pathlib import Path

import material
from measure import Options, Table, be_contender, mark, median, ratio, run_contender


def measure(folder: Path, options: Options) -> list[Table]:
    material.write_model(folder / "model", material.SMALL if options.quick else material.HALF_BILLION, "bfloat16")
    outcomes = {name: [] for name in CONTENDERS}
    for number in range(options.rounds + 1):
        for name in CONTENDERS:
            one = run_contender(__file__, name, folder, options, model=str(folder / "model"))
            if number:  # the first round fills the page cache and compiles bytecode
                outcomes[name].append(one)
    columns = {
        name: [
            [one.value("touched") for one in ones],
            [one.value("touched") - one.value("imported") for one in ones],
            [one.value("computed") - one.value("imported") for one in ones],
            [one.peak_gib for one in ones],
        ]
        for name, ones in outcomes.items()
    }
    rows = []
    for name, values in columns.items():
        row = [name]
        for mine, theirs in zip(columns["tunesmith"], values):
            row += [median(theirs), ratio(mine, theirs)]
        rows.append(row)
    headers = ["", "from process start s", "ours ×", "without imports s", "ours ×", "and first forward s", "ours ×", "peak GiB", "ours ×"]  # fmt: skip
    parameters = outcomes["tunesmith"][0].value("touched", "parameters")
    raw = {name: [vars(one) for one in ones] for name, ones in outcomes.items()}
    return [Table(f"load: {parameters / 1e6:,.0f}M parameters in bf16, every weight touched", headers, rows, raw)]


def _touch(network, logits) -> None:
    import torch

    seen, pages = 0, 0
    for parameter in network.parameters():
        seen += parameter.numel()
        pages += int(parameter.detach().view(-1).view(torch.uint8)[::4096].sum())  # one byte of every page
    mark("touched", parameters=seen, pages=pages)
    with torch.inference_mode():
        total = float(logits(torch.arange(1, 17)[None]).float().sum())
    mark("computed", total=total)


def ours(model: str) -> None:
    from tunesmith import load_model

    mark("imported")
    network = load_model(model)
    mark("loaded", dtype=str(network.model.norm.weight.dtype))
    _touch(network, network.logits)


def theirs(model: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaForCausalLM  # noqa: F401  otherwise imported while loading

    mark("imported")
    network = AutoModelForCausalLM.from_pretrained(model)
    mark("loaded", dtype=str(network.dtype))
    _touch(network, lambda ids: network(ids).logits)


CONTENDERS = {"tunesmith": ours, "transformers": theirs}

if __name__ == "__main__":
    be_contender(CONTENDERS)
