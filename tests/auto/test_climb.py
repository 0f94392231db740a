"""Which rungs are tried and which is chosen, by a table of what each would lose."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from auto_kit import ZERO, model_result
from tiny_models import save

import llmquant
from llmquant_eval.auto.bounds import Bounds
from llmquant_eval.auto.climb import Climb
from llmquant_eval.auto.ladder import STRENGTH, Step, make_ladder
from llmquant_eval.auto.request import AutoRequest
from llmquant_eval.auto.schema import Measured, Spent
from llmquant_eval.auto.trials.watch import BudgetSpentError

# Cheap to dear: stage, bits, KL.
LADDER = {
    "rtn4": ("rtn", 4.125, 0.044),
    "gptq4": ("gptq", 4.125, 0.012),
    "awq4": ("awq", 4.125, 0.036),
    "gptq3": ("gptq", 3.5, 0.040),
    "gptq4g32": ("gptq", 4.625, 0.008),
    "best4": ("tune", 4.125, 0.0095),
    "best3": ("tune", 3.125, 0.039),
    "best2": ("tune", 2.5, 0.17),
    "mixed5": ("mixed", 5.0, 0.005),
    "int8": ("gptq", 8.125, 0.00005),
}


@dataclass
class Tried:
    """Stands in for the trial: answers from the table, and notes what was asked."""

    request: AutoRequest
    seconds: float = 10.0
    broken: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    speeds: dict[str, float] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def work(self):
        return self

    @property
    def screen(self):
        return self

    def done(self, rung) -> None:
        self.last = rung

    def drop(self, name: str) -> None:
        self.dropped.append(name)

    def measured(self, step: Step) -> Measured | None:
        return self._result(step) if step.name in self.cached else None

    def run(self, step: Step, baseline, elsewhere: float) -> Measured:
        budget = self.request.time_budget
        if budget is not None and elsewhere + self.seconds > budget:
            raise BudgetSpentError(f"the time budget ended during {step.name}")
        self.tried.append(step.name)
        return self._result(step)

    def _result(self, step: Step) -> Measured:
        if step.name in self.broken:
            return Measured(key=ZERO, quantizing=Spent(wall=self.seconds), failure="NaN")
        model = model_result(step.nbytes, LADDER[step.name][2], 0.0001, self.speeds.get(step.name))
        return Measured(key=ZERO, quantizing=Spent(wall=self.seconds), model=model)


@dataclass
class Original:
    spent: Spent = field(default_factory=Spent)


def climbed(bound: float, refused=(), trial_of=None, **request: object) -> tuple[Climb, Tried]:
    asked = AutoRequest("m", Path("o"), ("d",), Bounds(kl=bound), **request)
    steps = [
        Step(
            name,
            stage,
            llmquant.Recipe(),
            nbytes=int(bits * 1e6),
            bits=bits,
            refused="no" if name in refused else None,
        )
        for name, (stage, bits, _) in LADDER.items()
    ]
    trial = Tried(asked, **(trial_of or {}))
    climb = Climb(trial, Original(), steps, {}, 0.005)
    climb.run()
    return climb, trial


@pytest.mark.parametrize(
    ("bound", "chosen", "tried"),
    [
        pytest.param(0.3, "best2", ["rtn4", "gptq3", "best3", "best2"], id="very loose"),
        pytest.param(0.05, "best3", ["rtn4", "gptq3", "best3", "best2"], id="loose"),
        pytest.param(
            0.02, "gptq4", ["rtn4", "gptq4", "gptq3", "best3"], id="what GPTQ meets at four bits"
        ),
        pytest.param(
            0.0105,
            "best4",
            ["rtn4", "gptq4", "awq4", "gptq4g32", "best4", "best3"],
            id="what only tuning meets at four bits, in the end",
        ),
        pytest.param(
            0.006,
            "mixed5",
            ["rtn4", "gptq4", "awq4", "gptq4g32", "best4", "mixed5"],
            id="what a mix of widths meets",
        ),
        pytest.param(
            0.001,
            "int8",
            ["rtn4", "gptq4", "awq4", "gptq4g32", "best4", "mixed5", "int8"],
            id="what eight bits meet",
        ),
        pytest.param(
            1e-6,
            None,
            ["rtn4", "gptq4", "awq4", "gptq4g32", "best4", "mixed5", "int8"],
            id="impossible",
        ),
    ],
)
def test_the_smallest_that_meets_the_bound(bound, chosen, tried):
    climb, trial = climbed(bound)
    assert trial.tried == tried
    assert (None if climb.best is None else climb.best[0].name) == chosen
    assert [r.name for r in climb.rungs] == list(LADDER)


def test_a_folder_is_dropped_once_it_cannot_be_chosen():
    climb, trial = climbed(0.0105)
    assert trial.dropped == ["rtn4", "gptq4", "awq4", "gptq4g32", "best3"]
    assert climb.best is not None


def test_a_folder_gives_way_to_a_smaller_one():
    _, trial = climbed(0.05)
    assert trial.dropped == ["rtn4", "gptq3", "best2"]


def test_candidates_can_be_kept():
    assert climbed(0.05, keep_candidates=True)[1].dropped == []


def test_the_fastest_is_chosen_by_speed_whatever_its_size():
    speeds = {"rtn4": 20.0, "gptq4": 21.0, "int8": 30.0}
    climb, trial = climbed(0.05, fastest=True, trial_of={"speeds": speeds})
    assert climb.best is not None
    assert climb.best[0].name == "int8"
    assert len(trial.tried) == len(LADDER)  # none is too large, and only best2 loses too much


def test_a_cached_rung_is_not_tried_and_counts():
    climb, trial = climbed(0.05, trial_of={"cached": ("rtn4", "gptq3", "best3")})
    assert trial.tried == ["best2"]
    assert climb.best is not None
    assert climb.best[0].name == "best3"
    assert [r.cached for r in climb.rungs if r.measured] == [True, True, True, False]


def test_a_rung_that_cannot_be_made_does_not_stop_the_search():
    climb, _ = climbed(0.02, trial_of={"broken": ("gptq4",)})
    outcomes = {r.name: r.outcome for r in climb.rungs}
    assert outcomes["gptq4"] == "failed"
    assert climb.best is not None
    assert climb.best[0].name == "best4"


def test_an_excluded_rung_is_not_tried():
    climb, trial = climbed(0.02, refused=("gptq4",))
    assert "gptq4" not in trial.tried
    assert climb.rungs[1].outcome == "excluded"


def test_the_budget_stops_the_climb_and_keeps_what_was_found():
    climb, trial = climbed(0.05, time_budget=25.0)
    assert trial.tried == ["rtn4", "gptq3"]
    assert climb.best is not None
    assert climb.best[0].name == "gptq3"
    assert climb.stopped is not None
    assert "time budget of 25 s" in climb.stopped
    assert {r.name for r in climb.rungs if r.outcome == "not reached"} == {"best3", "best2"}


def test_cached_rungs_cost_the_budget_what_they_took():
    cached = {"cached": ("rtn4", "gptq3")}
    climb, trial = climbed(0.05, time_budget=25.0, trial_of=cached)
    assert trial.tried == []
    assert climb.best is not None
    assert climb.best[0].name == "gptq3"


def step(stage: str, bits: float) -> Step:
    return Step("s", stage, llmquant.Recipe(), nbytes=1, bits=bits)


@pytest.mark.parametrize(
    ("failed", "other", "hopeless"),
    [
        pytest.param(("gptq", 4.125), ("gptq", 3.5), True, id="fewer bits"),
        pytest.param(("gptq", 3.5), ("gptq", 4.125), False, id="more bits"),
        pytest.param(("tune", 4.125), ("gptq", 4.125), True, id="a weaker method"),
        pytest.param(("gptq", 4.125), ("tune", 4.125), False, id="a stronger method"),
        pytest.param(("gptq", 4.125), ("awq", 4.125), False, id="another method"),
        pytest.param(("gptq", 4.625), ("awq", 4.125), True, id="another method of fewer bits"),
        pytest.param(("rtn", 8.0), ("gptq", 3.5), False, id="rounding tells nothing of GPTQ"),
        pytest.param(("tune", 4.0), ("mixed", 3.5), True, id="a mix below tuned blocks"),
    ],
)
def test_what_a_failure_says_of_others(failed, other, hopeless):
    assert step(*other).hopeless_after(step(*failed)) is hopeless


def test_training_takes_no_more_of_a_text_than_there_is():
    from llmquant_eval.auto.ladder import _training

    text = {
        "calibration.source": "file:x",
        "calibration.nsamples": 6,
        "calibration.seqlen": 128,
    }
    assert _training(llmquant.load_recipe("best-w4g128"), text) == {}
    changes = _training(llmquant.load_recipe("qat-w4g128"), text)
    assert changes["qat.seqlen"] == 128
    assert changes["qat.heldout"] + changes["qat.batch_size"] <= 6
    recipe = llmquant.load_recipe("qat-w4g128").updated(text | changes)
    assert recipe.qat.source == "file:x"


@pytest.mark.parametrize(
    ("kind", "refused"), [("llama", set()), ("gemma2", {"rotate-gptq-w4g128"})]
)
def test_a_model_that_cannot_be_rotated_has_the_other_rungs(kind, refused, tmp_path):
    request = AutoRequest(
        model=str(save(kind, tmp_path / "model", tie_word_embeddings=True)),
        output=tmp_path / "out",
        data=("file:x",),
        bounds=Bounds(kl=0.02),
        rungs=("gptq-w4g128", "rotate-gptq-w4g128", "rtn-w4g128"),
    )
    text = {"calibration.source": "file:x", "calibration.nsamples": 2, "calibration.seqlen": 16}
    steps = make_ladder(request, text)
    assert {step.name for step in steps if step.refused is not None} == refused
    assert all("cannot be rotated" in step.refused for step in steps if step.name in refused)
    sizes = {step.name: step.nbytes for step in steps}
    if not refused:  # the head is tied, and rotation gives it a tensor of its own
        assert sizes["rotate-gptq-w4g128"] > sizes["gptq-w4g128"]


@pytest.mark.parametrize(("named", "made"), [(True, True), (False, True), (True, False)])
def test_a_model_that_cannot_be_calibrated_has_the_rung_that_rounds(
    named, made, tmp_path, monkeypatch
):
    whole = llmquant.make_plan

    def plan(model, recipe, *more):
        if recipe.needs_text or not made:
            raise llmquant.errors.ArchitectureError("not block by block")
        return whole(model, recipe, *more)

    monkeypatch.setattr(llmquant, "make_plan", plan)
    request = AutoRequest(
        model=str(save("llama", tmp_path / "model")),
        output=tmp_path / "out",
        data=("file:x",),
        bounds=Bounds(kl=0.02),
        rungs=("gptq-w4g128", "rtn-w4g128") if named else (),
    )
    text = {"calibration.source": "file:x", "calibration.nsamples": 8, "calibration.seqlen": 16}
    if not made:
        with pytest.raises(llmquant.errors.ArchitectureError, match="not block by block"):
            make_ladder(request, text)
        return
    steps = make_ladder(request, text)
    assert [step.name for step in steps if step.refused is None] == ["rtn-w4g128"]
    others = [step for step in steps if step.name != "rtn-w4g128"]
    assert {step.refused for step in others} == {"cannot be made: not block by block"}


def test_every_shipped_rung_has_a_known_stage():
    from llmquant_eval.auto.ladder import LADDER as SHIPPED
    from llmquant_eval.auto.ladder import stage_of

    recipes = [n for n in SHIPPED if not n.startswith("mixed:")]
    assert {stage_of(llmquant.load_recipe(n)) for n in recipes} == set(STRENGTH) - {"mixed"}
