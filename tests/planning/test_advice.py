"""``llmquant advise``: what fits, what to try first, and models that are not this tool's."""

from __future__ import annotations

import importlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from small_kinds import small
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM, DynamicCache

from llmquant import QuantizeOptions, load, quantize
from llmquant.errors import LayoutError, UsageError
from llmquant.planning import defaults
from llmquant.planning.advice import ORIGINAL, Advice, Target, advise, other_kind
from llmquant.planning.advice.widths import measure_widths
from llmquant.planning.costs import size_classes
from llmquant.planning.forecast import cache_bytes, loaded_bytes
from llmquant.planning.preview import Plan, make_plan
from llmquant.recipe import Recipe, load_recipe
from llmquant.runtime.devices import parse_dtype
from llmquant.spec import QuantSpec

FLOOR = 1000  # bytes of a process


def advice_of(model: Path, memory_bytes: int = 10**12, **how: Any) -> Advice:
    return advise(model, Target("cpu", memory_bytes, "as given", False, FLOOR), **how)


def test_sizes_are_those_of_the_plan(model: Path) -> None:
    advice = advice_of(model, context=100, batch_size=3)
    plan = make_plan(model, load_recipe("gptq-w8"))
    eight = next(o for o in advice.options if o.name == "gptq-w8")
    weights = loaded_bytes(plan, parse_dtype(advice.dtype).dtype)
    assert eight.weight_bytes == weights
    assert eight.total_bytes == weights + advice.cache_bytes + FLOOR
    assert advice.options[0].name == ORIGINAL
    assert advice.options[0].weight_bytes == advice.default.parameters * 4
    assert len({o.name for o in advice.options}) == len(advice.options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "how",
    [{}, {"tie_word_embeddings": True}, {"dtype": torch.float32}],
    ids=["untied", "tied", "stored float32"],
)
def test_weights_are_counted_as_they_are_once_loaded(
    make_model: Any, rtn: Recipe, tmp_path: Path, how: Any, dtype: str
) -> None:
    """Embeddings that are not packed become float32 where that is computed in, but for those that
    are tied to a head."""
    folder = make_model(**how)
    quantize(folder, tmp_path / "q", rtn, QuantizeOptions(store_dtype="auto"))
    loaded = load(tmp_path / "q", dtype=dtype)
    held = {t.data_ptr(): t.nbytes for t in (*loaded.parameters(), *loaded.buffers())}
    counted = loaded_bytes(make_plan(folder, rtn, "auto"), parse_dtype(dtype).dtype)
    assert counted == pytest.approx(sum(held.values()), rel=0.02)


def test_a_float32_model_is_counted_as_the_commands_store_it(make_model: Any) -> None:
    half, full = (advice_of(make_model(dtype=d)) for d in (torch.float16, torch.float32))
    sizes = ({o.name: o.weight_bytes for o in advice.options} for advice in (half, full))
    assert next(sizes) == next(sizes)


@pytest.mark.parametrize(
    ("max_kl", "first"),
    [(1.0, "best-w2g32"), (0.1, "gptq-w3g32"), (0.012, "gptq-w4g128"), (0.008, "gptq-w4g32-asym"),
     (1e-4, "gptq-w8"), (0.0, "gptq-w4g128")],
)  # fmt: skip
def test_the_smallest_that_is_close_enough_comes_first(
    model: Path, max_kl: float, first: str
) -> None:
    advice = advice_of(model, max_kl=max_kl)
    assert advice.first is not None
    assert advice.first.name == first
    assert first not in advice.then
    assert advice.then[-1] == ORIGINAL


def test_what_is_to_be_tried_next_loses_less(model: Path) -> None:
    """As far as was measured on a model of its size; else it has as many bits."""
    measured = advice_of(model, max_kl=0.008)
    assert measured.first is not None
    assert measured.first.name == "gptq-w4g32-asym"  # KL 0.0079; best-w4g128 has 0.0097
    assert measured.then == ("best-w4g32-asym", "gptq-w8", ORIGINAL)


def test_what_was_not_measured_is_to_be_tried_next_if_it_has_as_many_bits(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = next(c for c in size_classes() if c.name == "small")
    monkeypatch.setattr(defaults, "class_of", lambda *_: small)
    assert getattr(advice_of(model).first, "name", None) == "gptq-w8"
    without = replace(small, costs={n: c for n, c in small.costs.items() if n != "gptq-w8"})
    monkeypatch.setattr(defaults, "class_of", lambda *_: without)
    advice = advice_of(model)
    assert advice.first is not None
    assert advice.first.name == "awq-gptq-w4g32-asym"
    assert advice.then == ("best-w4g32-asym", "gptq-w8", ORIGINAL)
    unmeasured = replace(small, costs={})
    monkeypatch.setattr(defaults, "class_of", lambda *_: unmeasured)
    assert advice_of(model).then == (
        "gptq-w4g32-asym", "best-w4g128", "best-w4g32-asym", "gptq-w8", ORIGINAL,
    )  # fmt: skip


def test_what_does_not_fit_is_not_advised(model: Path) -> None:
    sizes = {o.name: o.total_bytes for o in advice_of(model).options}
    tight = advice_of(model, sizes["gptq-w3g32"], max_kl=1e-4)
    assert {o.name for o in tight.options if o.fits} == {
        n for n, size in sizes.items() if size <= sizes["gptq-w3g32"]
    }
    assert tight.first is not None
    assert tight.first.total_bytes <= sizes["gptq-w3g32"]
    assert ORIGINAL not in tight.then
    nothing = advice_of(model, FLOOR)
    assert (nothing.first, nothing.then) == (None, ())
    assert "nothing fits" in nothing.why


def test_a_recipe_that_the_model_cannot_have_is_named(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {2, 8}

    def planned(path: Path, recipe: Recipe, *how: Any) -> Plan:
        if recipe.weights.bits in bits:
            raise LayoutError("no place for that")
        return make_plan(path, recipe, *how)

    module = importlib.import_module("llmquant.planning.advice.advise")
    monkeypatch.setattr(module, "make_plan", planned)
    told = json.loads(run("advise", model, "--no-measure", "--json").out)
    assert told["refused"] == dict.fromkeys(["gptq-w8", "best-w2g32"], "no place for that")
    assert "best-w2g32: not for this model: no place for that" in run("advise", model).out
    bits |= {3, 4}
    done = run("advise", model)
    assert (done.code, done.out, "no place for that" in done.err) == (2, "", True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_cache_is_what_a_run_fills(kind: str) -> None:
    config = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    model(torch.zeros(2, 20, dtype=torch.int64), past_key_values=cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(config, 20, 2, torch.float32) == held
    assert cache_bytes(config, 20, 2, torch.bfloat16) == held // 2


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "nemotron_h", "bamba"])
def test_the_cache_of_a_model_with_states_is_what_a_run_fills(kind: str) -> None:
    config = small(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(2, 20, dtype=torch.int64)
    model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    held = [t for layer in cache.layers for t in vars(layer).values()]
    floats = [t for t in held if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert cache_bytes(config, 20, 2, torch.float32) == 4 * sum(t.numel() for t in floats)


def test_a_cache_that_cannot_be_counted_is_taken_for_a_whole_one() -> None:
    """MiniMax has a class of its own for its states, and refuses any other."""
    config = small("minimax")
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    whole = 2 * config.num_hidden_layers * width * 2 * 20 * 4
    assert cache_bytes(config, 20, 2, torch.float32) == whole


def test_a_context_beyond_the_model_is_misuse(model: Path) -> None:
    with pytest.raises(UsageError, match="--context 129: the model takes 128 tokens"):
        advice_of(model, context=129)
    assert advice_of(model).context == 128


def test_widths_are_measured_beside_dense_layers() -> None:
    specs = [QuantSpec(4, 32), QuantSpec(8, 32), QuantSpec(4, 32)]
    found = measure_widths((64, 64), specs, torch.float32)
    assert list(found) == specs[:2]
    assert all(s.one_row > 0 and s.many_rows > 0 and s.kernel == "cpu" for s in found.values())


@pytest.mark.parametrize(
    ("load", "measure", "measured", "busy"),
    [(0.0, None, True, False), (9.0, None, False, True), (9.0, True, True, True), (0.0, False, False, False)],
)  # fmt: skip
def test_a_busy_machine_is_not_timed_unless_asked(
    model: Path,
    load: float,
    measure: bool | None,
    measured: bool,
    busy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    here = Target("cpu", 10**12, "as given", True, FLOOR)
    advice = advise(model, here, measure=measure)
    assert (any(o.speed for o in advice.options), advice.busy) == (measured, busy)


OTHERS: list[tuple[dict[str, Any], str | None]] = [
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "an encoder"),
    ({"architectures": ["BertModel"], "model_type": "bert"}, "an encoder"),
    ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "an encoder"),
    ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "an encoder-decoder"),
    ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, "a speech"),
    ({"architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2"}, "a speech"),
    ({"model_type": "marian"}, "an encoder-decoder"),
    ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, "a vision"),
    ({"architectures": ["ResNetForImageClassification"], "model_type": "resnet"}, "a vision"),
    ({"architecture": "efficientnet_b0", "num_classes": 1000}, "a vision"),
    ({"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.31.0"}, "a diffusion"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, None),
    ({"architectures": ["LlamaModel"], "model_type": "llama"}, None),
    ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, None),
    ({"model_type": "bert", "is_decoder": True}, None),
    ({"architectures": None, "model_type": "qwen2"}, None),
    ({"architectures": ["MyOwn"], "model_type": "my_own"}, None),
]


@pytest.mark.parametrize(("config", "name"), OTHERS, ids=str)
def test_what_a_folder_holds(tmp_path: Path, config: dict[str, Any], name: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = other_kind(tmp_path)
    if name is None:
        assert kind is None
    else:
        assert kind is not None
        assert kind.name.startswith(name)


@pytest.mark.parametrize("file", ["model.onnx", "model_index.json", "net.tflite"])
def test_folders_without_a_config(run: Run, tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    done = run("advise", tmp_path, "--json")
    assert done.code == 0
    assert json.loads(done.out)["this_tool"] is False
    assert "llmquant is not the tool for it" in run("advise", tmp_path).out


def test_from_the_command_line(run: Run, model: Path) -> None:
    done = run("advise", model, "--memory", "8GiB", "--context", "64")
    assert (done.code, done.err) == (0, "")
    for words in (
        "try first",
        "if it misses",
        "gptq-w4g128",
        f"llmquant quantize {model} -o",
        "llmquant auto",
    ):
        assert words in done.out, words
    told = json.loads(run("advise", model, "--no-measure", "--json").out)
    assert told["options"][1]["speed"] is None
    measured = json.loads(run("advise", model, "--measure", "--json").out)
    assert measured["options"][1]["speed"]["kernel"] == "cpu"


def test_the_commands_can_be_pasted_whatever_the_model_is_called(
    run: Run, model: Path, tmp_path: Path
) -> None:
    named = tmp_path / "my model.gguf"
    named.symlink_to(model)
    told = run("advise", named, "--memory", "8GiB", "--context", "64", "--no-measure").out
    words = [shlex.split(line) for line in told.splitlines() if line.startswith("llmquant ")]
    first = words[0][words[0].index("--recipe") + 1]
    assert [w[1] for w in words] == ["quantize", "eval", "bench", "serve", "auto"]
    assert words[0][:5] == ["llmquant", "quantize", str(named), "-o", f"my model-{first}"]
    assert words[3] == ["llmquant", "serve", f"my model-{first}"]
    assert words[4][-1] == "my model-small"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--memory", "many"), "--memory 'many' is not a size"), (("--memory", "0"), "--memory 0 holds no model"),
     (("--context", "500"), "the model takes 128 tokens"), (("--device", "tpu"), "tpu")],
    ids=str,
)  # fmt: skip
def test_misuse(run: Run, model: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("advise", model, *arguments)
    assert (done.code, done.out, says in done.err) == (2, "", True), done.err


def test_a_quantized_model_is_misuse(run: Run, quantized: Path) -> None:
    done = run("advise", quantized)
    assert (done.code, done.out) == (2, "")
    assert "quantized" in done.err
