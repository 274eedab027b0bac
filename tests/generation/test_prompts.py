"""How prompts become token ids."""

from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.generation.completions import _encode


def test_a_chat_prompt_asks_for_no_loss_mask(tiny_model, monkeypatch):
    """A template whose mask can't be told from its text may still be generated with."""
    tokenizer = load_tokenizer(tiny_model)
    messages = [{"role": "user", "content": "the quick brown fox"}]
    expected = tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), add_special_tokens=False)

    def refuse(*args, **kwargs):
        raise AssertionError("the loss mask was asked for")

    monkeypatch.setattr(Tokenizer, "encode_chat", refuse)
    assert _encode(tokenizer, "the quick brown fox", True) == expected
    assert _encode(tokenizer, messages, None) == expected
