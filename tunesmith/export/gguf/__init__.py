"""GGUF files, for llama.cpp and what is built on it (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
