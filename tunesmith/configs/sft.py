"""Options of `tune run sft`."""

from dataclasses import field

from tunesmith.configs._section import section
from tunesmith.configs.data import ChatData
from tunesmith.configs.shared import TrainSettings


@section(kw_only=True)
class SFT(TrainSettings):
    """Supervised fine-tuning: raise the likelihood of the answers."""

    model: str
    """Folder with config.json and safetensors, or a Hub id."""
    dataset: ChatData | list[ChatData]
    """Conversations to train on: one source, or a list drawn by weight."""
    dataset_val: ChatData | list[ChatData] | None = None
    """Conversations for the validation loss."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers before and after training; shown in report.html."""
