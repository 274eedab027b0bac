"""Weights in and out: model repositories, PEFT adapters, Meta's layout, checkpoints of a run."""
