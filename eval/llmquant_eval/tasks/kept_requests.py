"""The answers of a model that this process runs, kept while lm-eval asks, so that an unfinished run
resumes.

lm-eval has a cache of its own for this (``use_cache``), a database that stays and that names no
model; its hook, which gets every answer as it is made, is what we use. Answers that are drawn are
not kept: the same request again is to be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook, hash_args

from llmquant_eval.models.kept_work import KeptWork

_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class KeptRequests(CacheHook):  # type: ignore[misc]
    """lm-eval's hook for one model, and what an unfinished run got from it. Answers go to disk a
    batch at a time, so that the batches of a resumed run are those of a whole one."""

    def __init__(self, kept: KeptWork, label: str) -> None:
        super().__init__(None)
        self._kept, self._label = kept, label
        self._answers: dict[str, Any] = {}
        self._new: list[tuple[str, Any]] = []
        self._batches = 0
        while (batch := kept.get("requests", label, self._batches)) is not None:
            self._answers.update(batch)
            self._batches += 1

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Called by lm-eval with every answer."""
        if not _drawn(req):
            self._new.append((hash_args(attr, req), res))

    def end_batch(self) -> None:
        """All answers of a batch were added."""
        if self._new:
            self._kept.add(self._new, "requests", self._label, self._batches)
            self._batches += 1
        self._new = []

    def answered(
        self, kind: str, ask: Callable[[Sequence[Instance]], Iterable[Any]], asked: list[Instance]
    ) -> list[Any]:
        """The answers to requests of one kind, in order; ``ask`` gets those that have none yet."""
        found = [self._find(kind, request.args) for request in asked]
        missing = [r for r, answer in zip(asked, found, strict=True) if answer is None]
        new = iter(ask(missing) if missing else ())
        answers = [next(new) if answer is None else answer for answer in found]
        self.end_batch()
        return answers

    def _find(self, kind: str, args: tuple[Any, ...]) -> Any:
        answer = None if _drawn(args) else self._answers.get(hash_args(kind, args))
        return tuple(answer) if isinstance(answer, list) else answer


def _drawn(args: Iterable[Any]) -> bool:
    """Whether a request asks for text with randomness in it."""
    options = [a for a in args if isinstance(a, dict)]
    return any(o.get("do_sample") or o.get("temperature") for o in options)


def keep_requests(model: LM, kept: KeptWork, label: str) -> None:
    """Keep what ``model`` answers to lm-eval, and answer from what is kept.

    Args:
        label: of the model, within ``kept``.
    """
    requests = KeptRequests(kept, label)
    model.set_cache_hook(requests)
    for kind in _KINDS:
        setattr(model, kind, partial(requests.answered, kind, getattr(model, kind)))
