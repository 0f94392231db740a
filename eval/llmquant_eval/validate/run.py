"""A run: what is asked of the model, what it answered, the scores, the results.

Answers are the part that costs time. They go into the journal beside the output as they are done,
in units whose results depend on nothing else, and scores are computed from them. So the same
command resumes, and ends with the same bytes as one that was never stopped; a scorer or a pattern
that was mended finds the answers that are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llmquant import DriftObservation, DriftProfile, make_drift_profile
from llmquant.errors import LlmquantError
from llmquant_eval.decide.results import Item, ItemResults
from llmquant_eval.models.journal import Journal, key_of, opened
from llmquant_eval.validate.answers import Measured, Task, Unit
from llmquant_eval.validate.data import Data
from llmquant_eval.validate.engines.engine import Engine, Generation, TaskError
from llmquant_eval.validate.examples import Example
from llmquant_eval.validate.metrics import right
from llmquant_eval.validate.metrics.metric import Metric
from llmquant_eval.validate.metrics.own import Scorer
from llmquant_eval.validate.metrics.registry import continuations
from llmquant_eval.validate.summary import length_note

Progress = Callable[[str, int, int], None]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured.

    Attributes:
        metrics: of ours.
        scorers: of the user's.
        lower: names of the user's metrics of which less is better.
        observe: answers are observed, for a drift profile.
    """

    metrics: Sequence[Metric]
    generation: Generation
    scorers: Sequence[Scorer] = ()
    lower: Sequence[str] = ()
    observe: bool = False


def journal_of(output: Path) -> Path:
    """Where the answers of an unfinished run are."""
    return output.with_name(f"{output.name}.journal")


class Run:
    """One model on the data.

    Args:
        progress: gets the stage, how many items are done, and how many there are.
        tell: gets sentences for people.
    """

    def __init__(
        self, engine: Engine, data: Data, wanted: Wanted, progress: Progress, tell: Tell
    ) -> None:
        self.engine, self.data, self.wanted = engine, data, wanted
        self._progress, self._tell = progress, tell
        self._observed: dict[str, DriftObservation] = {}  # by id
        self._tasks = [self._task(example) for example in data.examples]
        asked = [task for task in self._tasks if task.asks]
        size = engine.together
        self._units: list[Unit] = [asked[i : i + size] for i in range(0, len(asked), size)]
        remarks = engine.check(asked, lambda task: self._where(task.example))
        self._notes = (f"generated: {wanted.generation}", *remarks)
        for remark in remarks:
            tell(f"warning: {remark}")

    def _task(self, example: Example) -> Task:
        metrics = [m for m in self.wanted.metrics if m.applies(example)]
        own = bool(self.wanted.scorers) or self.wanted.observe
        generate = own or any(m.generates for m in metrics)
        texts = continuations(example, self.wanted.metrics) if self.engine.scores else ()
        return Task(example, generate, texts)

    def _where(self, example: Example) -> str:
        return f"{self.data.source}, line {example.line}"

    def results(
        self,
        output: Path,
        *,
        restart: bool,
        text: bool,
        reference: ItemResults | None,
        profile: Path | None = None,
    ) -> ItemResults:
        """Measure what is not measured yet, and write the results to ``output``.

        Args:
            restart: delete what an unfinished run left.
            text: prompts and answers go into the results.
            reference: what the lengths of answers are compared with.
            profile: where the drift profile goes.

        Raises:
            LlmquantError: a model, a server or a scorer failed; names the line. What was measured
                is kept.
        """
        from llmquant import write_file

        with opened(journal_of(output), restart=restart) as journal:
            items = self._items(journal)
            if not text:
                items = [i.model_copy(update={"prompt": None, "answer": None}) for i in items]
            results = ItemResults(
                model=self.engine.label,
                data=self.data.source,
                data_sha256=self.data.sha256,
                lower_is_better=self._lower(items),
                items=tuple(items),
                notes=(*self._notes, *self._never_given(items)),
                conditions=self.wanted.generation.conditions(self.data.system),
                computing=dict(self.engine.computing()),
            )
            if reference is not None and (longer := length_note(results, reference)):
                results = results.model_copy(update={"notes": (*results.notes, longer)})
            if profile is not None:
                write_file(profile, self._profile().to_json())
            write_file(output, results.to_json())
        return results

    def _profile(self) -> DriftProfile:
        """What the answers were like, when all are measured.

        Raises:
            UsageError: they are too few.
        """
        order = (self._observed.get(example.id) for example in self.data.examples)
        seen = [each for each in order if each is not None]
        return make_drift_profile(seen, self.engine.label, self.engine.observes or "")

    def _items(self, journal: Journal) -> list[Item]:
        """Of all examples, in the data's order; each is scored as soon as it is measured."""
        identity = self.engine.identity()
        keys = [key_of(identity, [t.identity() for t in unit]) for unit in self._units]
        kept = self._resumed(journal, keys)
        items: dict[str, Item] = {}
        missing = [place for place in range(len(keys)) if place not in kept]
        for place, measured in kept.items():
            items |= self._scored(journal, self._units[place], measured)
        for example in (t.example for t in self._tasks if not t.asks):
            items[example.id] = self._item(journal, example, Measured())
        self._progress("items", len(items), len(self._tasks))
        try:
            for place, measured in self.engine.measure([self._units[i] for i in missing]):
                journal.add(keys[missing[place]], [m.model_dump(mode="json") for m in measured])
                items |= self._scored(journal, self._units[missing[place]], measured)
                self._progress("items", len(items), len(self._tasks))
        except TaskError as e:
            code = e.why if isinstance(e.why, LlmquantError) else LlmquantError(str(e.why))
            raise type(code)(f"{self._where(e.task.example)}: {e.why}. {self._kept(items)}") from e
        return [items[example.id] for example in self.data.examples]

    def _resumed(self, journal: Journal, keys: Sequence[str]) -> dict[int, list[Measured]]:
        """Units that an earlier run measured, by place, after asking whether it was this model;
        says what there is."""
        known = {i: found for i, key in enumerate(keys) if (found := _read(journal.get(key)))}
        if known:
            first = min(known)
            if not self.engine.same(self._units[first], known[first]):
                journal.discard()
                self._tell(
                    f"{self.engine.label} answers otherwise than in an earlier run, whose answers are not used"
                )
                return {}
            done = sum(len(self._units[i]) for i in known)
            self._tell(f"resumes: {done:,} of {len(self._tasks):,} items are measured")
        elif len(journal):
            self._tell(
                f"{journal.path} has answers of another model, other options or other prompts; they are not used, "
                "and deleted when this run is done"
            )
        return known

    def _kept(self, items: Mapping[str, Item]) -> str:
        return f"{len(items):,} of {len(self._tasks):,} items are measured and kept; the same command resumes"

    def _scored(
        self, journal: Journal, unit: Unit, measured: Sequence[Measured]
    ) -> dict[str, Item]:
        return {
            task.example.id: self._item(journal, task.example, found)
            for task, found in zip(unit, measured, strict=True)
        }

    def _item(self, journal: Journal, example: Example, measured: Measured) -> Item:
        scores: dict[str, float] = {}
        if measured.answer is not None and measured.answer.observed is not None:
            self._observed[example.id] = measured.answer.observed
        try:
            for metric in self.wanted.metrics:
                has = measured.answer is not None if metric.generates else measured.scored
                if has and metric.applies(example):
                    score = metric.score(example, measured)
                    scores |= {} if score is None else {metric.name: score}
            for scorer in self.wanted.scorers:
                scores |= self._own(journal, scorer, example, right.final(measured))
        except LlmquantError as e:
            raise type(e)(f"{self._where(example)}: {e}; answers so far are kept") from e
        return Item(
            id=example.id,
            group=example.group,
            scores=scores,
            prompt=example.prompt,
            answer=_shown(example, measured),
        )

    def _own(
        self, journal: Journal, scorer: Scorer, example: Example, answer: str
    ) -> dict[str, float]:
        """What a scorer of the user's gives; kept too, because it may cost as much as an answer."""
        key = key_of("scorer", scorer.sha256, scorer.name, example.row, answer)
        kept = journal.get(key)
        if isinstance(kept, dict):
            return {str(name): float(value) for name, value in kept.items()}
        scores = scorer.scores(example, answer)
        journal.add(key, scores)
        return scores

    def _never_given(self, items: Sequence[Item]) -> Iterator[str]:
        """Names that were said to be metrics of a scorer's, and are of none."""
        names = {name for item in items for name in item.scores}
        for name in self.wanted.lower:
            if name not in names:
                yield f"--lower-is-better {name}: no scorer gave a metric of that name"

    def _lower(self, items: Sequence[Item]) -> tuple[str, ...]:
        names = {name for item in items for name in item.scores}
        lower = {m.name for m in self.wanted.metrics if m.lower} | set(self.wanted.lower)
        return tuple(sorted(names & lower))


def _read(kept: object) -> list[Measured] | None:
    """What the journal has for a unit."""
    try:
        return [Measured.model_validate(m) for m in kept] if isinstance(kept, list) else None
    except ValidationError:  # another version's
        return None


def _shown(example: Example, measured: Measured) -> str | None:
    """The answer for people: what was generated, calls included, or the choice that was made."""
    answer = measured.answer
    if answer is None:
        return example.choices[right.chosen(example, measured)] if example.choices else None
    calls = json.dumps(list(answer.calls), ensure_ascii=False) if answer.calls else ""
    return "\n".join(filter(None, (answer.marked or answer.text, calls)))
