"""Run by the vLLM environment's Python, never imported by ours: prompt log-probabilities of one model, as JSON on the last line.

    python probe.py FOLDER DTYPE '[[ids], [ids], …]'
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, dtype, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=20, temperature=0.0)
    results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    told = [[{str(k): v.logprob for k, v in position.items()} for position in r.prompt_logprobs[1:]] for r in results]
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
