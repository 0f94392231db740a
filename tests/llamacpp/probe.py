"""Runs in the environment of llama.cpp: ``python probe.py FILE.gguf IDS.json TEXT.txt OUT.npy``.

Logits after every one of the ids, float32 ``[tokens, vocabulary]``, go into OUT.npy; tokens of the
text and the chat template are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main(gguf: str, ids: str, text: str, out: str) -> None:
    llama = Llama(gguf, n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False)
    tokens = json.loads(Path(ids).read_text())
    llama.eval(tokens)
    np.save(out, np.array(llama.scores[: len(tokens)], np.float32))
    found = llama.tokenize(Path(text).read_bytes(), add_bos=False, special=False)
    print(json.dumps({"tokens": found, "template": llama.metadata.get("tokenizer.chat_template")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
