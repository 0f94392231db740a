"""lm-eval's model interface over ours: a model that llmquant.load gave, and a served one.

Imported only where lm-eval is installed. lm-eval's Hugging Face model takes a loaded model as it
is, packed linears and all; its log-softmax is put at float32 (it would be the model's dtype) and
its progress bars are left out, since they would be drawn across ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmquant_eval.models.endpoint import Endpoint
from llmquant_eval.models.exported import ExportedAnswers
from llmquant_eval.scoring.token_stream import prefix_token
from llmquant_eval.tasks.kept_requests import KeptRequests

_BATCH = 32  # short items: a few thousand tokens at a time
_NEW_TOKENS = 256
_CONTEXT = 2048


class LocalModel(HFLM):  # type: ignore[misc]
    """A loaded model as lm-eval's Hugging Face model."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        config = model.config
        quantization = config.__dict__.pop(
            "quantization_config", None
        )  # lm-eval would look for a quantizer of that name
        try:
            with warnings.catch_warnings(action="ignore"):
                super().__init__(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=batch_size or _BATCH,
                    softmax_dtype="float32",
                )
        finally:
            if quantization is not None:
                config.quantization_config = quantization

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        results: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        results: list[str] = super().generate_until(requests, disable_tqdm=True)
        return results

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=override_bs
        )
        return results

    def _model_call(self, *args: Any, **options: Any) -> Any:
        self._end_batch()
        return super()._model_call(*args, **options)

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        self._end_batch()
        return super()._model_generate(*args, **options)

    def _end_batch(self) -> None:
        if isinstance(self.cache_hook, KeptRequests):
            self.cache_hook.end_batch()


class ServedLM(TemplateLM):  # type: ignore[misc]
    """A served model, or an ONNX export that answers like one; ``tokenizer`` is the one that the
    model was made with."""

    def __init__(self, endpoint: Endpoint | ExportedAnswers, tokenizer: Any) -> None:
        super().__init__()
        self._endpoint, self.tokenizer = endpoint, tokenizer
        # One token less than the context: a prompt is answered with one token (see endpoint.py).
        self._longest = (endpoint.context or _CONTEXT + 1) - 1

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens with the tokenizer's default special tokens, unless the caller says otherwise or
        the text begins with the prefix itself."""
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        prompts = [(context + answer)[-self._longest :] for _, context, answer in requests]
        results = []
        for (texts, _, answer), scores in zip(
            requests, self._endpoint.score_all(prompts), strict=True
        ):
            result = sum(scores.logprobs[-len(answer) :]), all(scores.greedy[-len(answer) :])
            if texts is not None:  # None: a window of a longer text
                self._made("loglikelihood", texts, result)
            results.append(result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._longest - 1, 1
            )
            parts = self._loglikelihood_tokens(
                [(None, *make_disjoint_window(window)) for window in windows]
            )
            totals.append(sum(value for value, _ in parts))
            self._made("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for prompt, options in (request.args for request in requests):
            stop = (
                [options["until"]]
                if isinstance(options.get("until"), str)
                else list(options.get("until") or [])
            )
            new = int(options.get("max_gen_toks", _NEW_TOKENS))
            ids = self.tok_encode(prompt)[-max(1, self._longest - new) :]
            text = self._endpoint.complete(
                ids, new, stop[:4], float(options.get("temperature", 0.0))
            )
            for mark in filter(None, stop):
                text = text.split(mark)[0]
            texts.append(text)
            self._made("generate_until", (prompt, options), text)
        return texts

    def _made(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """An export answers one request at a time; a server's answers are kept by its endpoint."""
        self.cache_hook.add_partial(kind, request, answer)
        if isinstance(self.cache_hook, KeptRequests):
            self.cache_hook.end_batch()
