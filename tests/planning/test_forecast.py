"""What a plan says a run needs, against what the kernel counted in real runs, and how the parts
behave."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import EXAMPLE, save

from llmquant.models.experts import passes_of
from llmquant.planning.forecast import LIBRARIES, Forecast, forecast, running_bytes
from llmquant.planning.preview import make_plan
from llmquant.planning.timing import Timing, time_blocks
from llmquant.quantization import memory as spilling
from llmquant.quantization.blocks.hidden_states import IN_MEMORY, Placement
from llmquant.quantization.memory import placement
from llmquant.quantization.prepare import calibration_of, prepare, selected
from llmquant.recipe import Recipe

TEXT = {
    "calibration": {"source": f"file:{EXAMPLE / 'calibration.txt'}", "nsamples": 16, "seqlen": 64}
}
GPTQ = Recipe().updated(TEXT)
RTN = Recipe(method="rtn")
# Prints the most bytes the process had, which its own start counts from: what its parent had does
# not matter.
RUN = """
import sys
from llmquant.recipe import load_recipe
from llmquant.quantization.run import quantize
quantize(sys.argv[1], sys.argv[2], load_recipe(sys.argv[3]))
(line,) = (l for l in open("/proc/self/status") if l.startswith("VmHWM:"))
print(int(line.split()[1]) * 1024)
"""


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    """Wide enough that what is worked on outweighs what was imported, and that a linear in float32
    is more than the 32 MB up to which glibc may keep what was freed: with narrower ones the same
    run has had 600 to 810 MB. One block, since further ones add time and no memory."""
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 4608,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return make_model(**sizes, num_hidden_layers=1, initializer_range=0.02)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        pytest.param(RTN, {"scales.steps": 0}, id="RTN"),
        pytest.param(GPTQ, {"scales.steps": 0}, id="GPTQ"),
        pytest.param(
            RTN,
            {"weights.bits": 8, "weights.activations": "int8-dynamic", "weights.group_size": -1},
            id="INT8",
        ),
        pytest.param(
            GPTQ,
            {
                "scales.steps": 0,
                "overrides": (
                    {"match": "*.down_proj", "bits": 8},
                    {"match": "*.o_proj", "group_size": 32},
                ),
            },
            id="mixed",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_peak_is_within_a_quarter_of_what_the_kernel_counted(
    wide: Path, tmp_path: Path, recipe: Recipe, changes: dict[str, object]
) -> None:
    chosen = recipe.updated(changes)
    (tmp_path / "recipe.yaml").write_text(chosen.to_yaml(), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        RUN,
        str(wide),
        str(tmp_path / "q"),
        str(tmp_path / "recipe.yaml"),
    ]
    counted = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    told = forecast(make_plan(wide, chosen), chosen)
    print(f"counted {counted / 1e6:.0f} MB, told {told.peak / 1e6:.0f} MB, {dict(told.phases)}")
    assert told.peak == pytest.approx(counted, rel=0.25)


def of(model: Path, recipe: Recipe, **changes: object) -> Forecast:
    chosen = recipe.updated({key.replace("__", "."): value for key, value in changes.items()})
    return forecast(make_plan(model, chosen), chosen)


def test_the_parts_grow_with_what_they_depend_on(wide: Path) -> None:
    base = of(wide, GPTQ)
    more = of(wide, GPTQ, calibration__nsamples=160)
    assert more.states == 10 * base.states == 10 * 16 * 64 * 2048 * 4
    assert more.disk - base.disk == 2 * (more.states - base.states)
    assert of(wide, GPTQ, gptq__asymmetric=0.5).states == 3 * base.states
    assert of(wide, RTN).states == 0
    assert of(wide, RTN).peak < base.peak
    assert of(wide, GPTQ, tune={"steps": 1}).peak > base.peak
    chosen = GPTQ.updated({})
    assert forecast(make_plan(wide, chosen), chosen, itemsize=2).states == base.states // 2


@pytest.mark.parametrize(
    ("tokens", "length"), [(None, 128), (40, 40)], ids=["a whole context", "40 tokens"]
)
def test_running_takes_libraries_weights_and_a_context(
    model: Path, tokens: int | None, length: int
) -> None:
    # two layers, two heads of 16, keys and values, two bytes each
    assert running_bytes(model, 1000, tokens) == LIBRARIES + 1000 + 2 * 2 * 2 * 16 * length * 2


@pytest.mark.parametrize("inner", [16, 160], ids=["wide in", "wide out"])
def test_the_hessians_of_experts_are_those_that_one_pass_gathers(
    tmp_path: Path, inner: int
) -> None:
    recipe = GPTQ.updated({"weights.group_size": 16})
    plan = prepare(save("mixtral", tmp_path / "model", intermediate_size=inner), recipe)
    block = plan.model.get_submodule("model.layers.0")
    experts = [f"block_sparse_moe.experts.{i}" for i in range(plan.model.config.num_local_experts)]
    sets: list[tuple[str, ...]] = [("self_attn.q_proj",), ("self_attn.o_proj",)]
    sets += [(f"{e}.w1", f"{e}.w3") for e in experts] + [(f"{e}.w2",) for e in experts]
    widths = {
        name: plan.reader.info(f"model.layers.0.{name}.weight").shape[1] for s in sets for name in s
    }
    passes = passes_of(block, sets, sum(p.numel() for p in block.parameters()))
    gathered = max(sum(widths[members[0]] ** 2 for members in together) for together in passes)
    phases = of(tmp_path / "model", recipe).phases
    assert phases["statistics"] - phases["pass"] == pytest.approx(4 * gathered, rel=0.3)
    assert phases["statistics"] - phases["pass"] >= 4 * gathered


@pytest.mark.parametrize(
    "changes", [{}, {"tune": {"steps": 1}}, {"gptq": {"asymmetric": 0.5}}], ids=str
)
def test_hidden_states_go_to_files_when_a_plan_says_that_they_do_not_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    recipe = GPTQ.updated({"weights.group_size": 32} | changes)
    plan = selected(prepare(model, recipe))
    monkeypatch.setattr(spilling, "resident_bytes", lambda: 0)
    calibration = calibration_of(plan)
    assert calibration is not None
    work = spilling._work(plan, calibration.windows)
    least, most = (max(phases.values()) for phases in (work.phases, work.phases_with_replay))
    assert most + LIBRARIES == of(model, recipe).peak
    assert most >= least
    assert placement(plan, calibration.windows, int(1.26 * most)) == Placement(
        spill=False, replays=True
    )
    assert not placement(plan, calibration.windows, int(1.24 * most)).replays
    assert not placement(plan, calibration.windows, int(1.26 * least)).spill
    assert placement(plan, calibration.windows, int(1.24 * least)) == Placement(
        spill=True, replays=False
    )
    assert placement(plan, calibration.windows, None) == IN_MEMORY, (
        "the machine has room for so little"
    )
    assert placement(plan, (), 1) == IN_MEMORY, "without a text there are no hidden states"


def test_blocks_add_disk_and_no_memory(make_model: Callable[..., Path]) -> None:
    two, four = (make_model(num_hidden_layers=n) for n in (2, 4))
    changes = {"weights.group_size": 32}
    few, many = of(two, GPTQ.updated(changes)), of(four, GPTQ.updated(changes))
    assert few.phases == many.phases
    assert few.output < many.output


def test_the_time_is_of_two_blocks_and_leaves_nothing(model: Path) -> None:
    before = sorted(model.parent.rglob("*"))
    timing = time_blocks(model, GPTQ.updated({"weights.group_size": 32}))
    assert timing.blocks == 2
    assert timing.first > 0
    assert timing.later > 0
    assert timing.total == timing.first + timing.later
    assert sorted(model.parent.rglob("*")) == before
    assert Timing(3.0, 2.0, 5).total == 11.0
