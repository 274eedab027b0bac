"""The rules inside the option classes, for those who build them in Python."""

import pytest

from tunesmith.configs.data import ChatData
from tunesmith.configs.export import Export
from tunesmith.configs.optimizers import AdamW
from tunesmith.configs.schedule import Cosine
from tunesmith.configs.weights import LoRAWeights


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: LoRAWeights(rank=0, dropout=1.0),
            "`rank` must be at least 1, got 0\n`dropout` must be at least 0 and below 1, got 1.0",
        ),
        (lambda: LoRAWeights(target_modules=[]), "`target_modules` names no layer"),
        (lambda: AdamW(betas=(0.9, 1.0)), "`betas` must be at least 0 and below 1, got 1.0"),
        (lambda: Cosine(warmup_ratio=0.1, num_warmup_steps=5), "give `num_warmup_steps` or `warmup_ratio`, not both"),
        (lambda: Cosine(min_lr_ratio=1.5), "`min_lr_ratio` must be between 0 and 1, got 1.5"),
        (lambda: ChatData(source="", weight=0), "`weight` must be above 0, got 0\n`source` is empty"),
        (
            lambda: Export(model="m", output_dir="o", max_shard_size="big"),
            "`max_shard_size` must be a size such as 500MB",
        ),
        (
            lambda: Export(model="m", output_dir="o", format="gguf", dtype="bf16"),
            "not for gguf: leave it out",
        ),
        (lambda: Export(model="m", output_dir="o", tolerance=0.0), "`tolerance` must be above 0, got 0.0"),
    ],
)
def test_rule(make, said):
    with pytest.raises(ValueError) as raised:
        make()
    assert said in str(raised.value)
