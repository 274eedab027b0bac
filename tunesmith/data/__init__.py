"""Rows to batches: sources -> formats -> tokenizer and chat templates -> documents (cached) -> packing -> loader.

sources, files, parts, splits, named    where rows come from: whole (sources) or as a stream (parts)
formats, preference_formats             a row as a conversation or a text; as a prompt with answers, or what is scored
tokenizer, chat, templates/             conversations and texts as ids and loss mask
units                                   preference data as documents that share a row
documents, cache                        the rows of a source, tokenized and kept
segments, packing, collate              what of a document is trained on; which share a row; rows as tensors
indexed, streamed                       which rows each step sees
loader, report, preview                 what recipes and people see of it
"""
