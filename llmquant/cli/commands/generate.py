"""``llmquant generate``: a short reply from a model folder, packed or not, streamed as it is made.

Penalties, filters and other settings of the folder's ``generation_config.json`` are left out, its
end tokens are not, as in ``validate`` and ``serve``: what the options say is all that there is.
"""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.options import DeviceOption, DtypeOption, JsonOption, KernelOption, ThreadsOption
from llmquant.errors import QuantizationError, UnfitModelError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name, packed or dense.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling threshold.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Sampling seed.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; do not use the chat template.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate from PROMPT with MODEL.

    Uses the model's chat template if it has one.
    """
    prompt = _prompt(prompt)
    import torch
    from transformers import TextStreamer
    from transformers.utils import logging as transformers_logging

    from llmquant.kernels.packed_linear import describe
    from llmquant.models.decoding.generation import end_tokens, plain_generation
    from llmquant.models.load import compute_dtype, load
    from llmquant.runtime.computing import Computing
    from llmquant.runtime.devices import parse_device
    from llmquant.runtime.threads import set_threads

    set_threads(threads)
    transformers_logging.disable_progress_bar()
    path, tokenizer, ids = _read(model, prompt, raw)
    on = parse_device(device)
    chosen = compute_dtype(path, dtype, on)
    loaded: Any = load(path, dtype=chosen.dtype, device=on, kernel=kernel)
    _refuse_strange(ids, loaded.get_input_embeddings().num_embeddings, path)
    _refuse_too_long(ids.shape[1], max_new_tokens, loaded.config)
    torch.manual_seed(seed)
    shown = {"skip_prompt": not raw, "skip_special_tokens": True}
    streamer = None if as_json else TextStreamer(tokenizer, **shown)
    ends = end_tokens(loaded.config, loaded.generation_config, tokenizer)
    settings = plain_generation(max_new_tokens, temperature, ends, tokenizer, top_p)
    started = time.perf_counter()
    new = _generated(loaded, ids.to(loaded.device), settings, streamer)
    seconds = time.perf_counter() - started
    computing, kernels = Computing.of(on, chosen), describe(loaded).kernels
    if not as_json:
        sys.stderr.write(
            f"{new.numel()} token{'' if new.numel() == 1 else 's'} in {seconds:.1f} s; {computing.as_text(kernels)}\n"
        )
        return
    text = tokenizer.decode(new, skip_special_tokens=True)
    counts = {"prompt_tokens": ids.shape[1], "new_tokens": new.numel(), "seconds": seconds}
    record = {"text": text, **counts, "kernels": kernels, "computing": computing.as_dict()}
    sys.stdout.write(json.dumps(record) + "\n")


def _read(model: str, prompt: str, raw: bool) -> tuple[Path, PreTrainedTokenizerBase, Tensor]:
    """The model's folder, its tokenizer, and the prompt's token ids."""
    from llmquant.checkpoint.hub import resolve
    from llmquant.models.from_folder import load_tokenizer, read_config

    path = resolve(model)
    read_config(path)  # before the tokenizer, which reads it too and would take the blame
    tokenizer = load_tokenizer(path)
    return path, tokenizer, _encode(tokenizer, prompt, raw)


def _generated(model: Any, ids: Tensor, settings: GenerationConfig, streamer: Any) -> Tensor:
    """The new token ids ``[n]`` of one sequence."""
    import torch

    from llmquant.models.decoding.generation import generate_tokens

    model.generation_config = settings
    out = generate_tokens(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        logits_processor=[partial(_refuse_no_numbers, ids.shape[1])],
    )
    new: Tensor = out[0, ids.shape[1] :]
    return new


def _refuse_no_numbers(prompt: int, ids: Tensor, logits: Tensor) -> Tensor:
    """Logits as they are. Those after the prompt, where damaged weights show, are looked at: the
    likeliest token of NaN is a token too."""
    if ids.shape[1] == prompt and not math.isfinite(largest := float(logits.max())):
        raise QuantizationError(
            f"the model computed the logit {largest} after {prompt} tokens; another --dtype may avoid that, "
            "and if none does, its weights are damaged: fetch or make them again"
        )
    return logits


def _prompt(given: str) -> str:
    try:
        prompt = sys.stdin.read() if given == "-" else given
        # bytes of another encoding come through the command line as lone surrogates
        prompt.encode()
    except UnicodeError as e:
        raise UsageError(f"the prompt is not UTF-8 text: {e}") from e
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> Tensor:
    """Token ids ``[1, n]``: of the text itself, or of one user turn in the model's chat
    template."""
    from llmquant.data.template import template_faults

    if raw or tokenizer.chat_template is None:
        plain: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
        return plain
    turns = [{"role": "user", "content": prompt}]
    try:
        encoded: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except template_faults() as e:
        raise UnfitModelError(
            f"the model's chat template cannot be used: {e}; use --raw to skip the template"
        ) from e
    ids: Tensor = encoded["input_ids"]
    return ids


def _refuse_strange(ids: Tensor, rows: int, path: Path) -> None:
    """Token ids that the embedding has no row for, as where tokens were added to the tokenizer
    alone."""
    if not ids.shape[1]:
        raise UnfitModelError(f"{path}: the tokenizer makes no token of the prompt")
    if int(ids.max()) >= rows:
        raise UnfitModelError(
            f"{path}: the tokenizer gives token id {int(ids.max())}, but the model's embedding has {rows} rows; "
            "the tokenizer belongs to another model"
        )


def _refuse_too_long(prompt_tokens: int, new_tokens: int, config: Any) -> None:
    """A model's positions end where its training did; behind them it babbles."""
    from llmquant.models.from_folder import context_length

    positions = context_length(config)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise UsageError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are more than the model's {positions} positions; "
            "shorten the prompt or lower --max-new-tokens"
        )
