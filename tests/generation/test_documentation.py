"""The example in docs/generation.md runs, and says what it is there for."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example_runs(capsys, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], found := {})
    lines = capsys.readouterr().out.splitlines()
    assert "The number of words" in lines[0]
    assert re.match(r"' (red|green|blue)' stop", lines[1]) and lines[2].startswith("' cold' stop")
    ended = [line for line in lines[3:] if re.match(r"\d+ [01] (stop|length) ", line)]
    assert len(ended) == 2 and 7 <= len(found["late"].ids) < 30 and found["late"].finish_reason is None
