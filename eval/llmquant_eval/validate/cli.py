"""``llmquant validate``: a model on the user's own prompts, item by item, for ``llmquant compare``.
Importing this module loads typer and nothing heavier."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmquant.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    KernelOption,
    OverwriteOption,
    RestartOption,
    ThreadsOption,
)
from llmquant_eval.cli_options import QuietOption, RetryForOption
from llmquant_eval.cli_progress import stages
from llmquant_eval.validate import options


def validate_command(
    model: options.ModelArgument,
    data: options.DataOption,
    output: options.OutputOption,
    reference: options.ReferenceOption = None,
    profile: options.ProfileOption = None,
    metric: options.MetricOption = None,
    scorer: options.ScorerOption = None,
    lower_is_better: options.LowerOption = None,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = 256,
    temperature: options.TemperatureOption = 0.0,
    seed: options.SeedOption = 0,
    limit: options.LimitOption = None,
    raw: options.RawOption = False,
    no_text: options.NoTextOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    batch_size: options.BatchOption = None,
    tokenizer: options.TokenizerOption = None,
    retry_for: RetryForOption = None,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score MODEL on your own prompts, item by item.

    Right answers, patterns, JSON, tool calls, your own scorers; and behaviour that perplexity does
    not see: turns that do not end, loops, longer answers, other languages, refusals. Answers are
    kept as they are made: the same command resumes.
    """
    from llmquant_eval.validate import plan
    from llmquant_eval.validate.data import read_data
    from llmquant_eval.validate.engines.engine import Generation

    plan.check_output(output, data, reference, overwrite=overwrite)
    read = read_data(data, limit, system)
    plan.check_profile(profile, output, read, reference, overwrite=overwrite)
    how = (dtype, device, kernel, threads, batch_size, tokenizer, retry_for)
    execution = plan.Execution(*how, profile is not None)
    generation = Generation(max_tokens, temperature, seed, raw)
    baseline = None if reference is None else plan.read_reference(reference, read, generation)
    names = plan.Chosen(metric or (), scorer or (), lower_is_better or ())
    with _kept_when_interrupted(), stages(quiet or as_json) as (progress, tell):
        run = plan.plan_run(model, read, generation, execution, names, progress, tell)
        results = run.results(
            output, restart=restart, text=not no_text, reference=baseline, profile=profile
        )
    if as_json:
        sys.stdout.write(results.to_json())
    else:
        from llmquant_eval.validate.summary import show

        given = None if reference is None or baseline is None else (reference, baseline)
        show(results, output, given, original=run.engine.original)


@contextmanager
def _kept_when_interrupted() -> Iterator[None]:
    """Says at Ctrl-C what is left, and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; answers so far are kept, and the same command resumes\n")
        raise SystemExit(130) from None
