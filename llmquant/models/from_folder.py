"""What transformers reads in a model folder: config, tokenizer, generation config, and the model
without weights.

The one door to them in all three packages. No code from a folder is run, and nobody is asked
whether it should be: a folder whose model type exists only in its own code (``auto_map``) is an
error. A file that makes no sense fails somewhere inside transformers
(:mod:`llmquant.checkpoint.companions.confusion`), and here that becomes an error that names the
folder.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.checkpoint.detect import check_label
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.reader import SIDE_FILES, CheckpointReader, read_json
from llmquant.checkpoint.weights.headers import stranger
from llmquant.errors import ArchitectureError, CheckpointError, UnfitModelError
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.models.reading.tower import tower_of
from llmquant.models.tensor_check import check_side_files
from llmquant.models.unreached import pass_by

_TOKENIZER_PACKAGES = {
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "sentencepiece.bpe.model": "sentencepiece",
    "tiktoken.model": "tiktoken",
    "tekken.json": "mistral_common",
}
_NOT_ITS_OWN = ("generation_config.json", "preprocessor_config.json")
_OFFLINE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def read_config(model: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a folder or hub name as transformers understands it.

    Raises:
        CheckpointError: no such model, or no config.json in it.
        ArchitectureError: an unknown model type or impossible values.
    """
    path = resolve(model)
    raw = read_json(path / "config.json")
    check_label(path / "config.json", raw)
    _check_layers(path / "config.json", raw)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **_OFFLINE)
    except CONFUSED as e:
        plain = f"transformers cannot read {path / 'config.json'}: {first_line(e)}"
        raise ArchitectureError(_foreign(path) or plain) from e
    return config


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest input that a model was made for, in tokens; None where its config does not say.

    Args:
        config: of the whole model, or of its text part.
    """
    text = config.get_text_config()
    named = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    found = (getattr(text, name, None) for name in named)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _check_layers(file: Path, config: dict[str, Any]) -> None:
    """transformers builds a model of -1 layers, which then fails at its first token."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers < 0:
        raise ArchitectureError(f"{file}: num_hidden_layers is {layers}")


def load_tokenizer(model: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Raises:
        CheckpointError: no such model, or it has no tokenizer that can be read.
    """
    path = resolve(model)
    check_side_files(path, but=_NOT_ITS_OWN)
    _check_packages(path)
    with _Reading(path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **_OFFLINE)
        longest = tokenizer.model_max_length
        if not isinstance(longest, (int, float)):
            raise ValueError(f"model_max_length in tokenizer_config.json is {longest!r}")
        tokenizer("a")  # other values that cannot be are found only by who uses them
    return tokenizer


def _check_packages(path: Path) -> None:
    """Raises UnfitModelError where the only tokenizer file needs a package that is not
    installed."""
    if (path / "tokenizer.json").is_file():
        return
    for file, package in _TOKENIZER_PACKAGES.items():
        if (path / file).is_file() and find_spec(package) is None:
            raise UnfitModelError(
                f"{path}: its tokenizer is {file} alone, and reading that needs {package}, which is not installed; "
                f"pip install {package}"
            )


class _Reading:
    """Turns what goes wrong while a folder's tokenizer is read into an error that names the folder.

    The tokenizers library raises Exception itself, of no kind, for a file that is JSON and no
    tokenizer. Catching that would catch everything; here the kind is compared.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, _trace: object) -> None:
        if kind is None or not (kind is Exception or issubclass(kind, CONFUSED)):
            return
        strange = next(
            (f"{f} is {w}" for f in map(self._path.joinpath, SIDE_FILES) if (w := _stranger(f))),
            None,
        )
        cause = strange or _none_there(self._path) or first_line(error)
        plain = f"{self._path} has no tokenizer that transformers can read: {cause}"
        # A damaged file is to be fetched again; one of another kind asks for another request.
        problem = CheckpointError if strange else UnfitModelError
        raise problem(f"{plain}{_own_tokenizer(self._path)}") from error


def _none_there(path: Path) -> str | None:
    """What is said of a folder without any file of a tokenizer."""
    if any(path.glob("*token*")) or any(path.glob("*vocab*")) or any(path.glob("*.model")):
        return None
    return "it has no tokenizer.json, tokenizer.model or vocabulary; copy them from where the model came from"


def _stranger(file: Path) -> str | None:
    return stranger(file, but=(b"{", b"[")) if file.is_file() else None


def read_generation_config(model: str | os.PathLike[str]) -> GenerationConfig | None:
    """The generation config of a folder or hub name, None where it has none.

    Raises:
        CheckpointError: no such model, or the file cannot be read.
    """
    path = resolve(model)
    if not (path / "generation_config.json").is_file():
        return None
    read_json(path / "generation_config.json")
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(path, local_files_only=True)
    except CONFUSED as e:
        raise CheckpointError(
            f"{path / 'generation_config.json'} cannot be read: {first_line(e)}"
        ) from e
    return config


def _foreign(path: Path) -> str | None:
    """Why a folder whose model type exists only in its own code cannot be read, else None."""
    file = path / "config.json"
    if not _auto_map(file) or read_json(file).get("model_type") in CONFIG_MAPPING:
        return None
    return (
        f"{file} names code in its own folder (auto_map) for a model or tokenizer that transformers does not have; llmquant "
        "never runs code from a model folder. Use a checkpoint of a type that transformers knows"
    )


def _own_tokenizer(path: Path) -> str:
    """What is added where a tokenizer cannot be read and the folder brings code for one."""
    file = path / "tokenizer_config.json"
    if "AutoTokenizer" not in (_auto_map(file) or _auto_map(path / "config.json")):
        return ""
    return "; the folder brings code of its own for its tokenizer (auto_map), which llmquant never runs"


def _auto_map(file: Path) -> dict[str, Any]:
    """The classes that a config file takes from code in its folder; empty where there are none."""
    try:
        found = read_json(file).get("auto_map")
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}


def causal_model(reader: CheckpointReader, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' causal language model for a folder's config, on the meta device, under
    transformers' own names.

    Raises:
        ArchitectureError: not a causal language model that transformers knows.
    """
    config = read_config(reader.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tower = tower_of(reader, config)
    if tower is None:
        # A reader may have untied the head from the embeddings that the folder's own config ties
        # it to.
        config.tie_word_embeddings = reader.config.get(
            "tie_word_embeddings", getattr(config, "tie_word_embeddings", False)
        )
    text = config if tower is None else tower.config
    try:
        with init_empty_weights(include_buffers=False):
            causal = None if tower is None else tower.causal
            model = causal_of(text, causal, dtype=dtype)
    except CONFUSED as e:
        raise ArchitectureError(
            f"{reader.path} is not a causal language model that can be built: {first_line(e)}"
        ) from e
    return model


def causal_of(
    config: PreTrainedConfig, causal: type[PreTrainedModel] | None, **options: Any
) -> PreTrainedModel:
    """A causal language model of a text model's config; blocks that text passes by are not in it.

    Args:
        causal: its class where transformers has none.
        options: of transformers' ``from_config``.
    """
    result: PreTrainedModel = (
        AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        if causal is None
        else causal._from_config(config, **options)
    )
    pass_by(result)
    return result


def empty_model(reader: CheckpointReader, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model that the folder's config describes, without weights, its modules
    named as in the folder.

    Raises:
        ArchitectureError: not a causal language model that transformers knows.
    """
    model = causal_model(reader, dtype)
    model.config._name_or_path = str(reader.path)
    tower = tower_of(reader, read_config(reader.path))
    shapes = {n: i.shape for n, i in reader.tensors.items()}
    if tower is None:
        as_in_checkpoint(model, str(reader.config.get("model_type")), stored=shapes)
    else:
        named = {tower.text_name(n): shape for n, shape in shapes.items()}
        inside = {n: shape for n, shape in named.items() if n is not None}
        as_in_checkpoint(model, tower.kind, tower.moved, tower.placed, inside)
    model.eval()
    return model
