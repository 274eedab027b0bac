"""Rows to batches: sources -> formats -> tokenizer and chat templates -> documents (cached) -> packing -> loader.

sources, files, parts, splits, named    where rows come from: whole (sources) or as a stream (parts)
formats                                 a row as a conversation or a text
tokenizer, chat, templates/             conversations and texts as ids and loss mask
documents, cache                        the rows of a source, tokenized and kept
packing, collate                        which documents share a row; rows as tensors
indexed, streamed                       which rows each step sees
loader, report, preview                 what recipes and people see of it
"""
