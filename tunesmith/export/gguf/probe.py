"""What llama.cpp makes of a GGUF file, computed in a process of its own: it ends the process where it finds something wrong in a file.

Reads {path, texts: [[text, whether bos goes in front], …], ids, n_ctx, lora} as JSON from standard input; writes {tokens: [[…], …], logits: base64 of float32 (T, V)} to the file in argv[1].
Imports neither torch nor the rest of tunesmith.
"""

from __future__ import annotations

import base64
import json
import os
import sys


def main() -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]  # an extra that takes a compiler to install
    import numpy as np

    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(
        asked["path"],
        n_ctx=asked["n_ctx"],
        n_threads=min(8, os.cpu_count() or 1),
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # the cache is in float16 otherwise
        type_v=llama_cpp.GGML_TYPE_F32,
        lora_path=asked.get("lora"),
        verbose=True,
    )
    tokens = [model.tokenize(text.encode(), add_bos=bos, special=True) for text, bos in asked["texts"]]
    model.eval(asked["ids"])
    logits = np.array(model.scores[: len(asked["ids"])], dtype=np.float32)
    with open(sys.argv[1], "w") as file:
        json.dump({"tokens": tokens, "logits": base64.b64encode(logits.tobytes()).decode()}, file)


if __name__ == "__main__":
    main()
