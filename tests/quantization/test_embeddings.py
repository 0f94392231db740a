"""``--embeddings``: token embeddings and heads packed, from the command line to what loads."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from children import Run
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader, sha256_file
from llmquant.conversion import ConvertOptions, convert
from llmquant.conversion.gguf.file import export_gguf
from llmquant.errors import ArchitectureError, LayoutError, UsageError
from llmquant.kernels.embedding.packed_embedding import PackedEmbedding
from llmquant.planning.preview import make_plan
from llmquant.quantization.blocks.hidden_states import StateStore
from llmquant.quantization.options import Events
from llmquant.quantization.plan import Progress
from llmquant.quantization.prepare import calibration_of, prepare, selected
from llmquant.quantization.run import quantize
from llmquant.quantization.walk import walk
from llmquant.recipe import Recipe
from llmquant.recipe_sections import Embeddings
from llmquant.runtime.yaml_files import read_yaml

EMBED = "model.embed_tokens"
GRIDS = {"8": "W8 row sym", "4": "W4 g32 sym"}
IDS = torch.tensor([[7, 300, 4095, 0, 12], [5, 5, 81, 16, 15]])


@pytest.fixture(scope="module")
def tied(make_model: Callable[..., Path]) -> Path:
    return make_model(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folders(
    model: Path, tied: Path, gptq: Recipe, rtn: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embeddings")
    return {
        "tied": quantize(tied, root / "tied", gptq.updated({"embeddings": {}})).path,
        "untied": quantize(model, root / "untied", gptq.updated({"embeddings": {"bits": 4}})).path,
        "data-free": quantize(tied, root / "free", rtn.updated({"embeddings": {"bits": 4}})).path,
    }


@pytest.mark.parametrize("bits", GRIDS)
@pytest.mark.parametrize("which", ["tied", "untied"])
def test_from_the_command_line(
    run: Run, model: Path, tied: Path, which: str, bits: str, tmp_path: Path
) -> None:
    """What ``plan`` announces is what is written, and ``inspect`` finds it."""
    source = str(tied if which == "tied" else model)
    options = ["--method", "rtn", "--group-size", "32", "--embeddings", bits]
    announced = json.loads(run("plan", source, *options, "--json").out)
    made = run("quantize", source, "-o", "out", *options, "--json")
    assert made.code == 0, made.said
    file = tmp_path / "out" / "model.safetensors"
    assert announced["bytes_on_disk"] == file.stat().st_size
    found = json.loads(run("inspect", "out", "--verify", "--json").out)
    assert found["embeddings"] == GRIDS[bits]
    assert found["linears"] == found["quantized"] == (14 if which == "tied" else 15)
    schemes = {m["name"]: m["scheme"] for m in announced["modules"]}
    assert schemes[EMBED] == GRIDS[bits]
    assert schemes.get("lm_head") == (None if which == "tied" else GRIDS[bits])
    shared = "its weights are the packed embeddings'"
    assert json.loads(made.out)["skipped"] == ({"lm_head": shared} if which == "tied" else {})


def test_none_is_as_if_nothing_was_said(run: Run, model: Path, tmp_path: Path) -> None:
    options = ["--method", "rtn", "--group-size", "32", "-q"]
    assert run("quantize", str(model), "-o", "with", *options, "--embeddings", "none").code == 0
    assert run("quantize", str(model), "-o", "without", *options).code == 0
    hashes = [
        {p.name: sha256_file(p) for p in sorted((tmp_path / f).iterdir())}
        for f in ("with", "without")
    ]
    assert hashes[0] == hashes[1]
    assert "embeddings" not in (tmp_path / "with" / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("which", ["tied", "untied", "data-free"])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_what_loads_computes_what_a_dense_copy_does(
    folders: dict[str, Path], which: str, kernel: str, tmp_path: Path
) -> None:
    dense = convert(
        folders[which], "dense", tmp_path / "dense", ConvertOptions(dtype="float32")
    ).path
    packed = llmquant.load(folders[which], dtype="float32", kernel=kernel)
    embedding, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert (embedding.table is head) == (which != "untied")
    plain = llmquant.load(dense, dtype="float32")
    looked_up = plain.get_input_embeddings()(IDS)
    assert torch.equal(embedding(IDS), looked_up)
    logits, expected = packed(IDS).logits, plain(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert CheckpointReader(dense).config["tie_word_embeddings"] == (which != "untied")


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_transformers_with_our_quantizer_loads_the_same(
    folders: dict[str, Path], which: str
) -> None:
    llmquant.register_with_transformers(kernel="reference")
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folders[which], dtype=torch.float32)
    finally:
        llmquant.unregister_from_transformers()
    ours = llmquant.load(folders[which], dtype="float32", kernel="reference")
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_transformers_alone_refuses_it_as_the_table_says(
    folders: dict[str, Path], which: str
) -> None:
    (reason,) = llmquant.inspect(folders[which]).engines["transformers"]
    assert "fails at a packed one" in reason
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(folders[which], dtype=torch.float32)


def test_a_tied_head_adds_no_tensor(folders: dict[str, Path]) -> None:
    stored = CheckpointReader(folders["tied"]).tensors
    assert not any(n.startswith("lm_head") for n in stored)
    assert {n.removeprefix(f"{EMBED}.") for n in stored if n.startswith(EMBED)} == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
    }


def test_a_tied_weight_that_is_stored_twice_is_packed_once(
    tied: Path, rtn: Recipe, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    twice = Path(shutil.copytree(tied, tmp_path / "twice"))
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors[f"{EMBED}.weight"].clone()
    save_file(tensors, twice / "model.safetensors", {"format": "pt"})
    recipe = rtn.updated({"embeddings": {}})
    once, made = (
        quantize(tied, tmp_path / "once", recipe),
        quantize(twice, tmp_path / "out", recipe),
    )
    assert once.bytes_written == made.bytes_written
    assert "lm_head.weight" not in CheckpointReader(made.path)
    assert make_plan(twice, recipe).tensor_bytes == made.bytes_written


@pytest.mark.parametrize("grid", [{"bits": 8}, {"bits": 4, "group_size": 16}], ids=["8", "4 g16"])
def test_its_numbers_are_those_of_rounding_to_nearest(
    tied: Path, rtn: Recipe, grid: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece or in slices."""
    from llmquant.quantization.steps import embedding

    monkeypatch.setattr(embedding, "SLICE", 64 * 100)
    recipe = rtn.updated({"embeddings": grid, "scales.steps": 6})
    folder = quantize(tied, tmp_path / "out", recipe).path
    stored = PackedCheckpoint(CheckpointReader(folder)).weight(EMBED)
    original = CheckpointReader(tied).read(f"{EMBED}.weight").float()
    assert recipe.embeddings is not None
    expected = llmquant_rtn(original, recipe)
    assert stored.digest() == expected.digest()


def llmquant_rtn(weight: torch.Tensor, recipe: Recipe) -> llmquant.QuantizedWeight:
    from llmquant.algorithms import ScaleSearch, rtn

    assert recipe.embeddings is not None
    s = recipe.scales
    search = ScaleSearch(s.steps, s.smallest, s.norm, s.weighted)
    return rtn(weight, recipe.embeddings.weights.spec, search)


@pytest.mark.parametrize("asymmetric", [0.0, 0.5], ids=["one stream", "two streams"])
def test_blocks_are_calibrated_behind_the_packed_embeddings(
    tied: Path, gptq: Recipe, asymmetric: float
) -> None:
    """The quantized model's stream begins with the packed embeddings, the original's with its
    own."""
    recipe = gptq.updated({"embeddings": {"bits": 4}, "gptq.asymmetric": asymmetric})
    plan = selected(prepare(tied, recipe))
    calibration = calibration_of(plan)
    assert calibration is not None
    seen: dict[str, torch.Tensor] = {}

    class Watching(StateStore):
        def name(self, name: str, stream: Any) -> None:
            seen.setdefault(name, stream[0].clone())
            super().name(name, stream)

    steps = walk(plan, calibration.windows, lambda _: None, Watching(plan.device))
    rounded = next(steps).weights[EMBED][0]
    next(steps)
    ids = torch.stack(calibration.windows)
    assert torch.equal(seen["hidden"], rounded.dequantize()[ids])
    if asymmetric:
        original = CheckpointReader(tied).read(f"{EMBED}.weight").float()
        assert torch.equal(seen["reference"], original[ids])


@pytest.mark.parametrize("step", range(4), ids=["embeddings", "block 0", "block 1", "head"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_resumes_at_every_step(
    model: Path, gptq: Recipe, method: str, step: int, tmp_path: Path
) -> None:
    recipe = gptq.updated({"embeddings": {"bits": 4}, "method": method})

    def stop(where: Progress) -> None:
        assert where.blocks == 4
        if where.block == step:
            raise KeyboardInterrupt

    def hashes(folder: Path) -> dict[str, str]:
        return {p.name: sha256_file(p) for p in sorted(folder.iterdir())}

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", recipe, events=Events(on_progress=stop))
    assert quantize(model, tmp_path / "out", recipe).resumed == step
    quantize(model, tmp_path / "whole", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("width", "wanted", "used", "why"),
    [
        pytest.param(172, 32, -1, "32 does not divide 172 columns", id="a row"),
        pytest.param(96, 128, 32, "128 does not divide 96 columns", id="groups"),
    ],
)
def test_a_group_size_that_does_not_divide_is_fitted(
    run: Run,
    make_model: Callable[..., Path],
    tied: bool,
    width: int,
    wanted: int,
    used: int,
    why: str,
) -> None:
    """As those of linears are: plan, screen, manifest and recipe say so, and packed is dense."""
    source = make_model(hidden_size=width, head_dim=16, tie_word_embeddings=tied)
    text = f"method: rtn\nembeddings: {{bits: 4, group_size: {wanted}}}\n"
    Path("mine.yaml").write_text(text, encoding="utf-8")
    planned = json.loads(run("plan", source, "--recipe", "mine.yaml", "--json").out)
    made = run("quantize", source, "-o", "out", "--recipe", "mine.yaml")
    assert made.code == 0, made.said
    size = "one scale per row" if used == -1 else f"groups of {used}"
    told = f"{size} instead of {wanted} for the embeddings (embed_tokens): {why}"
    assert told in made.err
    assert "for the embeddings (embed_tokens)" in " ".join(made.out.split())
    record = json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))
    assert record["regrouped"] == planned["regrouped"]
    ours = [r for r in record["regrouped"] if "layers" not in r["linears"][0]]
    assert [r["linears"] for r in ours] == [[EMBED]] + ([] if tied else [["lm_head"]])
    assert [r.get("embeddings", False) for r in ours] == [True] + ([] if tied else [False])
    scheme = "W4 row sym" if used == -1 else f"W4 g{used} sym"
    assert record["modules"][EMBED]["spec"] == scheme
    assert Recipe.model_validate(read_yaml(Path("out/recipe.yaml"))).embeddings == Embeddings(
        bits=4, group_size=used
    )
    again = run("quantize", source, "-o", "again", "--recipe", "out/recipe.yaml")
    assert (again.code, "instead of" in again.said) == (0, False)
    convert("out", "dense", "dense", ConvertOptions(dtype="float32"))
    plain = llmquant.load("dense", dtype="float32")
    for kernel in ("reference", "auto"):
        packed = llmquant.load("out", dtype="float32", kernel=kernel)
        assert torch.equal(packed.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
        torch.testing.assert_close(packed(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_size_of_the_command_line_is_the_linears(
    run: Run, make_model: Callable[..., Path]
) -> None:
    """It does not make that of the embeddings a strict one, which no option could change."""
    source = make_model(hidden_size=172, head_dim=16)
    asked = ("--method", "rtn", "--group-size", "-1", "--embeddings", "4", "--json")
    planned = run("plan", source, *asked)
    assert planned.code == 0, planned.said
    assert {m["scheme"] for m in json.loads(planned.out)["modules"]} == {"W4 row sym"}


REFUSED = [
    pytest.param(
        {"format": "gptq"},
        LayoutError,
        "format gptq cannot hold this recipe's mix: its readers look for packed linears only, "
        "and model.embed_tokens is an embedding; use compressed-tensors",
        id="a layout of linears",
    ),
    pytest.param(
        {"format": "awq", "embeddings": {"bits": 8}},
        LayoutError,
        "its readers look for packed linears only",
        id="another layout of linears, which has not these bits either",
    ),
    pytest.param(
        {"embeddings": {"bits": 4, "group_size": 48, "strict_groups": True}},
        UsageError,
        "model.embed_tokens: group_size=48 does not divide its 64 .*sizes that do: 8, 16, 32, 64, "
        "or -1 .* or leave out strict_groups of the recipe's embeddings$",
        id="a group that does not divide and is meant",
    ),
    pytest.param(
        {"ignore": [], "embeddings": None},
        UsageError,
        "lm_head shares its weights with the embeddings, which stay unquantized; add it to "
        "--ignore, or pack both with --embeddings 8",
        id="a tied head alone",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_what_cannot_be(
    tied: Path, rtn: Recipe, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    recipe = rtn.updated({"embeddings": {}, **changes})
    with pytest.raises(error, match=message):
        make_plan(tied, recipe)


def test_embeddings_that_do_more_than_a_look_up_are_refused(
    tied: Path, rtn: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    class Squared(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).square()

    before = modeling_llama.LlamaModel.__init__

    def init(self: Any, config: Any) -> None:
        before(self, config)
        self.embed_tokens = Squared(config.vocab_size, config.hidden_size)

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", init)
    with pytest.raises(ArchitectureError, match="is a Squared, which does more than look up rows"):
        make_plan(tied, rtn.updated({"embeddings": {}}))


def test_an_untied_head_may_stay_or_have_its_own_grid(model: Path, rtn: Recipe) -> None:
    def head(**changes: Any) -> str | None:
        plan = make_plan(model, rtn.updated(changes))
        return next((str(m.scheme) for m in plan.modules if m.name == "lm_head"), None)

    assert head(embeddings={"bits": 8}) == "W8 row sym"
    assert head(embeddings={"bits": 8, "head": False}) is None
    assert head(embeddings={"bits": 8}, ignore=()) == "W4 g32 sym"


def test_the_config_names_what_is_no_linear(folders: dict[str, Path]) -> None:
    groups = CheckpointReader(folders["tied"]).config["quantization_config"]["config_groups"]
    targets = {g["weights"]["num_bits"]: g["targets"] for g in groups.values()}
    assert targets == {8: [EMBED], 4: ["Linear"]}
    one = CheckpointReader(folders["untied"]).config["quantization_config"]["config_groups"]
    assert [sorted(g["targets"]) for g in one.values()] == [["Linear", "lm_head", EMBED]]


def test_gguf_holds_rows_of_8_bits_exactly(folders: dict[str, Path], tmp_path: Path) -> None:
    exported = export_gguf(folders["tied"], tmp_path / "m.gguf")
    assert exported.types["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in exported.types
    tensor = next(
        t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "token_embd.weight"
    )
    found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    expected = PackedCheckpoint(CheckpointReader(folders["tied"])).weight(EMBED).dequantize()
    assert torch.equal(found, expected)


def test_scaled_embeddings_keep_their_scale(rtn: Recipe, tmp_path: Path) -> None:
    """Gemma 3 multiplies the rows that it looks up, and not the tied head."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["gemma3_text"])
    config.tie_word_embeddings = True
    config.pad_token_id = 3
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "source")
    recipe = rtn.updated({"weights.group_size": 16, "embeddings": {"bits": 8}})
    folder = quantize(tmp_path / "source", tmp_path / "out", recipe).path
    packed = llmquant.load(folder, dtype="float32", kernel="reference")
    embedding = packed.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert embedding.scale == pytest.approx(config.hidden_size**0.5)
    assert packed.get_output_embeddings() is embedding.table
    dense = convert(folder, "dense", tmp_path / "dense", ConvertOptions(dtype="float32")).path
    ids = IDS % config.vocab_size
    expected = packed(ids).logits
    assert torch.equal(llmquant.load(dense, dtype="float32")(ids).logits, expected)
    llmquant.register_with_transformers(kernel="reference")
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        llmquant.unregister_from_transformers()
    assert torch.equal(theirs(ids).logits, expected)
