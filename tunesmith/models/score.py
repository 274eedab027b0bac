"""Reward models and classifiers: a decoder of any family with a head that gives a few scores in place of words.

B batch, T tokens, M documents of a row, D hidden, L labels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.decoder import CausalLM
from tunesmith.models.family import DecoderConfig, Family, Scored
from tunesmith.models.weights import Drop, Operator
from tunesmith.nn.score import ScoreHead


class ScoreModel(CausalLM):
    """What transformers calls …ForSequenceClassification, or …ForTokenClassification where `scored.per_token`.

    Mixed into a family's language model, whose layers it has.
    """

    head_name = "score"
    score: ScoreHead
    scored: Scored

    def __init__(self, config: DecoderConfig, family: Family, hf_config: dict[str, Any]):
        scored = family.scores(hf_config)
        assert scored is not None, "config.json describes no classifier"
        self.__dict__["scored"] = scored  # before nn.Module's own __init__, which makes the head
        super().__init__(replace(config, tie_word_embeddings=False, final_logit_softcap=None), family, hf_config)

    def build_head(self) -> ScoreHead:
        return ScoreHead(self.config.hidden_size, self.scored.num_labels, self.scored.bias)

    @property
    def num_outputs(self) -> int:
        return self.scored.num_labels

    @property
    def architectures(self) -> tuple[str, ...]:
        return (self.family.classifier(self.scored.per_token),)

    @property
    def weights(self) -> tuple[Operator, ...]:
        return (*self.family.weights, Drop("lm_head.*"))

    def scores(self, input_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> float32 scores: (B, L) of each row or, with documents, (B, M, L) of each of them; (B, T, L)
        of each token where the model scores tokens (`scored.per_token`).

        As in transformers, the score of a text is read at its last token that isn't config.json's `pad_token_id`.
        documents: (B, T), number of each token's document in its row, -1 for padding; None: each row is one.
        """
        every = self.logits(input_ids, None if documents is None else _positions(documents), documents)
        if self.scored.per_token:
            return every.float()
        last = last_tokens(input_ids, documents, self.config.pad_token_id)
        found = every.float().gather(1, last[..., None].expand(-1, -1, every.shape[-1]))
        return found.squeeze(1) if documents is None else found


def last_tokens(input_ids: Tensor, documents: Tensor | None, pad_token_id: int | None) -> Tensor:
    """(B, M) where each document's last token that isn't padding stands; 0 where there is none."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    documents = torch.zeros_like(input_ids) if documents is None else documents.long()
    is_text = documents >= 0 if pad_token_id is None else (documents >= 0) & (input_ids != pad_token_id)
    last = input_ids.new_zeros(len(input_ids), max(int(documents.max()) + 1, 1))
    return last.scatter_reduce(1, documents.clamp(min=0), places.where(is_text, 0), "amax")


def _positions(documents: Tensor) -> Tensor:
    """(B, T) position of each token within its document."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - places.where(begins, 0).cummax(1).values
