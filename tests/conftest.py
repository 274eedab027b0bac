"""Fixtures for all tests. Nothing here needs a network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real tokenizers, a real tiny model and real data; tests that use them skip where they are absent."""
    folder = Path(os.environ.get("TUNESMITH_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip("the folder of real tokenizers, models and data is not here")
    return folder
