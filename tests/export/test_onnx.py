"""ONNX models: ONNX Runtime says what the engine says, alone and for several sequences at once."""

import numpy as np
import pytest
import torch

from tests.export.greedy import FAMILIES, PROMPT, STEPS, expected_tokens, export_to, program_tokens, save_model
from tunesmith.configs.export import ProgramFile
from tunesmith.export import onnx

onnxruntime = pytest.importorskip("onnxruntime")
FAST = ("qwen3",)


class Session:
    """Calls a model as program.json describes it; knows nothing of tunesmith."""

    def __init__(self, folder, facts):
        self.session = onnxruntime.InferenceSession(folder / facts["file"], providers=["CPUExecutionProvider"])
        self.past = {one["name"]: one for one in facts["inputs"][3:]}

    def begin(self, batch_size: int) -> None:
        sizes = {"B": batch_size, "P": 0}
        self.state = {
            name: np.zeros([sizes.get(size, size) for size in one["shape"]], one["dtype"])
            for name, one in self.past.items()
        }

    def run(self, ids, mask, positions) -> torch.Tensor:
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        logits, *present = self.session.run(None, {**given, **self.state})
        self.state = dict(zip(self.past, present))
        return torch.from_numpy(logits)

    def __call__(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        if position == 0:
            self.begin(1)
        end = position + tokens.shape[1]
        return self.run(tokens, torch.ones(1, end, dtype=torch.long), torch.arange(position, end)[None])[0]


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES]
)
def test_greedy_tokens_are_the_engines(case, tmp_path):
    model = save_model(case, tmp_path / "model")
    session = Session(tmp_path / "out", export_to(tmp_path / "out", model, "onnx"))
    assert program_tokens(session) == expected_tokens(model)
    assert batch_tokens(session, [PROMPT, PROMPT[3:]]) == [expected_tokens(model), expected_tokens(model, PROMPT[3:])]


def batch_tokens(session: Session, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of prompts of unequal length, padded at the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = []
    session.begin(len(prompts))
    while len(found) < STEPS:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        ids = session.run(ids, mask, positions)[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        found.append(ids)
    return torch.cat(found, 1).tolist()


@pytest.mark.slow
def test_half_precision(tmp_path):
    model = save_model("llama", tmp_path / "model")
    facts = export_to(tmp_path / "out", model, "onnx", dtype="fp16", program=ProgramFile(max_length=32))
    assert facts["outputs"][0]["dtype"] == "float16"


@pytest.mark.slow
def test_weights_beside_the_model(tmp_path, monkeypatch):
    """As for those that are more than a protocol buffer holds."""
    monkeypatch.setattr(onnx, "LARGEST_FILE", 1000)
    model = save_model("llama", tmp_path / "model")
    session = Session(tmp_path / "out", export_to(tmp_path / "out", model, "onnx"))
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 1e5
    assert program_tokens(session) == expected_tokens(model)


@pytest.mark.slow
def test_real_model(assets, tmp_path):
    model, prompt = assets / "models" / "stories260K", [1, 403, 407, 261, 378]
    session = Session(tmp_path / "out", export_to(tmp_path / "out", model, "onnx"))
    assert program_tokens(session, prompt, 60) == expected_tokens(model, prompt, 60)
