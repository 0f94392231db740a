"""The documentation's commands and links: what a reader copies from a page works.

Every line of a ``sh`` block is taken apart like a shell would. ``llmquant`` lines go through the
real parser of the command line, so a renamed option or a misspelt choice fails here. Values that
the parser takes as plain text are checked as well: recipes, methods, dtypes, formats, kernels,
protocols and text sources. ``make`` targets must exist, and so must the scripts and options of
``python`` lines. Any other command must be on a short list. Commands and options that pages name
inside a sentence are held to the same parser.

The commands in ``EXECUTED`` need no network and a minute together. They are really run, word for
word as a page has them, in a folder that has nothing but links to ``examples`` and
``eval/results``.
"""

from __future__ import annotations

import contextlib
import io
import os
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import typer
import typer.main

import llmquant
from llmquant.cli import app, main
from llmquant.cli.method import parse_method
from llmquant.errors import LlmquantError
from llmquant.formats import FORMATS
from llmquant.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "decisions.md"),
    ROOT / "recipes" / "README.md",
    ROOT / "serve" / "README.md",
]
# Commands that are not ours: their arguments are not checked.
OTHERS = {
    ".", "aarch64-linux-gnu-g++", "apt-get", "cd", "curl", "docker", "export", "git", "hf",
    "pytest", "qemu-aarch64-static", "source", "systemctl",
}  # fmt: skip
PYTHON_MODULES = {"pip", "pytest", "venv"}
# Options in sentences that belong to other programs.
OTHER_OPTIONS = {
    "--index-url",
    "--extra-index-url",
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
}
SOURCE = re.compile(r"file:.+|jsonl:[^#]+#.+|hf:[^:]+(:[^:]+){1,3}")
PROTOCOL = re.compile(r"ppl/(gptq|word|word-wikitext)(-\d+)?|ppl/strided(-\d+){0,2}")
IN_THE_REPOSITORY = re.compile(r"(?:\w+:)?((?:bench|csrc|eval|examples|recipes|tests)/[\w./-]+)")
PYTHON_NAME = re.compile(r"llmquant(?:_eval|_serve)?(?:\.\w+)+")
USAGE_ERROR: Any = typer.BadParameter.__bases__[
    0
]  # of the click that typer uses, its own or the package

EXECUTED = [
    "llmquant doctor",
    "llmquant recipes",
    "llmquant recipes gptq-w4g128",
    "llmquant leaderboard eval/results",
    "llmquant plan examples/tiny-llama --recipe gptq-w4g128",
    "llmquant plan examples/tiny-llama --recipe rtn-w4g128",
    "llmquant quantize examples/tiny-llama -o out/tiny-rtn --recipe rtn-w4g128",
    "llmquant inspect out/tiny-rtn",
    "llmquant inspect out/tiny-rtn --verify",
    "llmquant verify out/tiny-rtn",
    "llmquant eval out/tiny-rtn --reference examples/tiny-llama "
    "--text file:examples/tiny-llama/heldout.txt --window 512 --max-windows 2 --no-cost",
    "llmquant validate examples/tiny-llama --data examples/prompts.jsonl -o out/original.json "
    "--max-tokens 16",
    "llmquant validate out/tiny-rtn --data examples/prompts.jsonl -o out/rtn.json --max-tokens 16 "
    "--reference out/original.json",
    "llmquant generate out/tiny-rtn Hello --max-new-tokens 10",
    "llmquant convert out/tiny-rtn --to gptq -o out/tiny-rtn-gptq",
]


# --- reading pages ------------------------------------------------------------------------------


class Command(NamedTuple):
    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)}"


def without_comment(line: str) -> str:
    """The line without ``# …`` at its end; a # inside quotes or a word stays."""
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line.rstrip()


def words_of(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of one line, each as its words; variables set before a command are left out."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    reader.whitespace_split, reader.commenters = True, ""
    command: list[str] = []
    for word in [*reader, ";"]:
        if not set(word) <= set("&|;"):
            if command or not re.match(r"[A-Z_]+=", word):
                command.append(word)
        elif command:
            yield tuple(command)
            command = []


def blocks_of(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Fenced blocks: language, number of the first line, lines."""
    language: str | None = None
    first = 0
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```(\S*)", line)
        if fence and language is None:
            language, first, lines = fence[1], number + 1, []
        elif fence and language is not None:
            yield language, first, lines
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"the block that starts before line {first} has no end"


def commands_of(page: Path) -> Iterator[Command]:
    """Commands of all ``sh`` blocks; a line that ends with a backslash goes on in the next."""
    for language, first, lines in blocks_of(page.read_text(encoding="utf-8")):
        if language != "sh":
            continue
        joined, start = "", first
        for number, line in enumerate(lines, first):
            start = start if joined else number
            joined += without_comment(line)
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            for words in words_of(joined):
                yield Command(page, start, words)
            joined = ""
        assert not joined, f"{page}:{start}: a backslash at the end of a block"


def spans_of(page: Path) -> list[str]:
    """``code`` inside sentences, each on one line."""
    text = re.sub(
        r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


# --- what is wrong with a command ---------------------------------------------------------------


@cache
def cli() -> Any:
    """The command line, complete, as ``llmquant`` builds it."""
    for entry in entry_points(group="llmquant.commands"):
        entry.load()(app)
    return typer.main.get_command(app)


@cache
def options_of(name: str) -> frozenset[str]:
    return frozenset(
        option for p in cli().commands[name].params for option in (*p.opts, *p.secondary_opts)
    )


@cache
def options_of_all() -> frozenset[str]:
    """Options of every command and of the scripts in ``bench``."""
    scripts = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "bench").rglob("*.py"))
    in_scripts = re.findall(r"add_argument\(\s*\"(--[\w-]+)", scripts)
    known = frozenset({"--help", "--version", *OTHER_OPTIONS, *in_scripts})
    return known.union(*map(options_of, cli().commands))


@cache
def targets() -> frozenset[str]:
    return frozenset(
        re.findall(
            r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    )


@cache
def extras() -> frozenset[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return frozenset(tomllib.loads(text)["project"]["optional-dependencies"])


@cache
def help_of(*command: str) -> str:
    """``--help`` of a script, or of one of its commands; empty where it has no such command."""
    script, *arguments = command
    shown, path, argv = io.StringIO(), list(sys.path), sys.argv
    sys.path.insert(0, str((ROOT / script).parent))
    sys.argv = [script, *arguments, "--help"]
    try:
        with (
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return shown.getvalue() if end.code in (0, None) else ""
    finally:
        sys.path[:], sys.argv = path, argv
    raise AssertionError(f"{script} --help does not end")


def known_recipe(name: str) -> bool:
    return name in llmquant.shipped_recipes() or name.endswith((".yaml", ".yml")) or name.isupper()


def parses(function: Callable[[str], object]) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            function(text)
        except LlmquantError:
            return False
        return True

    return check


# Parameters that the parser takes as any text: what their values must be.
VALUES: dict[str, Callable[[str], object]] = {
    "recipe": known_recipe,
    "method": parses(parse_method),
    "dtype": parses(llmquant.parse_dtype),
    "device": re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch,
    "kernel": lambda name: name == "auto" or name in KERNELS,
    "--format": lambda name: name in FORMATS,
    "--to": lambda name: name in {*FORMATS, "gguf", "dense", "onnx"},
    "text": SOURCE.fullmatch,
    "calibration": SOURCE.fullmatch,
    "eval_text": SOURCE.fullmatch,
    "protocol": lambda text: all(PROTOCOL.fullmatch(p) for p in text.split(",")),
    "suite": lambda name: name in {"quick", "standard"} or name.endswith((".yaml", ".yml")),
}  # fmt: skip


def problem_of_llmquant(words: tuple[str, ...]) -> str | None:
    """Of the words after ``llmquant``; a … among them means that more options may follow."""
    name, *arguments = words or ("",)
    if name.startswith("-"):
        return (
            None
            if any(name in p.opts for p in cli().params) or name in {"-h", "--help"}
            else f"no option {name}"
        )
    if name not in cli().commands:
        return f"no command {name!r}"
    if {"-h", "--help"} & set(arguments):
        return None
    command = cli().commands[name]
    try:
        given = command.make_context(name, [a for a in arguments if a != "…"]).params
    except USAGE_ERROR as e:
        return str(e.format_message())
    for parameter in command.params:
        value = given.get(parameter.name)
        keys = {parameter.name, *parameter.opts} | (
            {"recipe"} if (name, parameter.name) == ("recipes", "name") else set()
        )
        for key in keys & VALUES.keys():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, str) and not VALUES[key](item):
                    return f"{key} {item!r} does not exist"
    return None


def problem_of_python(words: tuple[str, ...]) -> str | None:
    if words[:2] == ("-m", "llmquant"):
        return problem_of_llmquant(words[2:])
    if words[:1] == ("-m",):
        return None if words[1] in PYTHON_MODULES else f"module {words[1]} is not on the list"
    script, *arguments = words or ("",)
    if not (ROOT / script).is_file():
        return f"no script {script!r}"
    first = next((word for word in arguments if re.fullmatch(r"[a-z_]+", word)), None)
    described = help_of(script) + (help_of(script, first) if first else "")
    known = set(re.findall(r"(?<![\w-])--?\w[\w-]*", described))
    unknown = [w for w in arguments if w.startswith("-") and w.partition("=")[0] not in known]
    return f"{script} has no {', '.join(unknown)}" if unknown else None


def problem(words: tuple[str, ...]) -> str | None:
    """What is wrong with a command, in words."""
    first, *rest = words
    for word in words:
        named = IN_THE_REPOSITORY.fullmatch(word)
        if named and not (ROOT / named[1]).exists():
            return f"{named[1]} is not in the repository"
    if first == "llmquant":
        return problem_of_llmquant(tuple(rest))
    if first in ("python", "python3"):
        return problem_of_python(tuple(rest))
    if first == "torchrun":
        if "-m" not in rest:
            return "torchrun without -m llmquant"
        return problem_of_python(tuple(rest[rest.index("-m") :]))
    if first == "pip":
        asked = {e for word in rest for e in re.findall(r"[\w-]+", word.partition("[")[2])}
        return f"no extra {', '.join(asked - extras())}" if asked - extras() else None
    if first == "make":
        unknown = [w for w in rest if "=" not in w and w not in targets()]
        return f"no make target {', '.join(unknown)}" if unknown else None
    return None if first in OTHERS else f"{first} is not on the list of other programs"


def problem_of_name(name: str) -> str | None:
    """``llmquant.load`` and the like."""
    if name == "llmquant.commands":  # a group of entry points
        return None
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return f"{name} is not there"
    return None


def problem_of_span(span: str) -> str | None:
    """The same for code inside a sentence: a part of a command, a file, a name in Python."""
    words = span.split()
    if (file := IN_THE_REPOSITORY.fullmatch(span)) and "NAME" not in span:
        return None if (ROOT / file[1]).exists() else f"{file[1]} is not in the repository"
    if name := PYTHON_NAME.match(span):
        return problem_of_name(name[0])
    if words[0] in ("make", "pip", "python") and len(words) > 1:
        return problem(tuple(shlex.split(span)))
    if words[0] == "llmquant" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
        if words[1] not in cli().commands:
            return f"no command {words[1]!r}"
        known = options_of(words[1]) | {"--help"}
    elif words[0].startswith("--"):
        known = options_of_all()
    else:
        return None
    unknown = [w for w in words if w.startswith("--") and re.split("[=,]", w)[0] not in known]
    return f"no option {', '.join(unknown)}" if unknown else None


# --- tests --------------------------------------------------------------------------------------


def on_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=on_page)
def test_every_command_of_a_page_can_be_given(page: Path) -> None:
    wrong = [
        f"{command}\n    {found}"
        for command in commands_of(page)
        if (found := problem(command.words))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=on_page)
def test_what_sentences_name_exists(page: Path) -> None:
    wrong = [
        f"`{span}`: {found}"
        for span in spans_of(page)
        if span.strip() and (found := problem_of_span(span))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=on_page)
def test_shell_commands_are_marked_as_such(page: Path) -> None:
    """So that they are checked."""
    languages = {language for language, _, _ in blocks_of(page.read_text(encoding="utf-8"))}
    assert not languages & {"bash", "shell", "console", "zsh"}


@pytest.mark.parametrize("page", PAGES, ids=on_page)
def test_python_on_a_page_is_python_and_names_what_exists(page: Path) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    for first, code in ((n, "\n".join(lines)) for lang, n, lines in blocks if lang == "python"):
        compile(code, f"{page}:{first}", "exec")
        names = sorted(set(PYTHON_NAME.findall(code)))
        assert [found for name in names if (found := problem_of_name(name))] == []


def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, made as GitHub makes them."""
    text = re.sub(
        r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    text = re.sub(
        r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            yield f"{target}: no such file"
        elif anchor and path.suffix == ".md" and anchor not in anchors_of(path):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=on_page)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


WRONG = [
    pytest.param("llmquant quantise M -o OUT", "no command 'quantise'", id="command"),
    pytest.param("llmquant quantize M", "Missing option", id="missing option"),
    pytest.param("llmquant quantize M -o OUT --bogus", "No such option: --bogus", id="option"),
    pytest.param(
        "llmquant quantize M -o OUT --bits four", "Invalid value for '--bits'", id="number"
    ),
    pytest.param(
        "llmquant allocate M --target-bpw 4 -o r.yaml --engine trt",
        "'trt' is not one of",
        id="choice",
    ),
    pytest.param("llmquant inspect M N", "unexpected extra argument", id="argument"),
    pytest.param(
        "llmquant plan M --recipe gptq-w5", "recipe 'gptq-w5' does not exist", id="recipe"
    ),
    pytest.param("llmquant recipes gptq-w5", "recipe 'gptq-w5' does not exist", id="recipe shown"),
    pytest.param("llmquant plan M --method gtpq", "method 'gtpq' does not exist", id="method"),
    pytest.param("llmquant eval M --text mine.txt", "text 'mine.txt' does not exist", id="text"),
    pytest.param(
        "llmquant eval M --text file:t --protocol ppl/gtpq",
        "protocol 'ppl/gtpq' does not exist",
        id="protocol",
    ),
    pytest.param(
        "llmquant convert M --to gptq3 -o OUT", "--to 'gptq3' does not exist", id="layout"
    ),
    pytest.param(
        "llmquant generate M hi --kernel warp", "kernel 'warp' does not exist", id="kernel"
    ),
    pytest.param("llmquant generate M hi --dtype int4", "dtype 'int4' does not exist", id="dtype"),
    pytest.param(
        "llmquant plan examples/big-llama",
        "examples/big-llama is not in the repository",
        id="example",
    ),
    pytest.param(
        "llmquant eval M --text file:examples/no.txt",
        "examples/no.txt is not in the",
        id="example text",
    ),
    pytest.param("A=1 torchrun -n 2 -m llmquant quantize M", "Missing option", id="torchrun"),
    pytest.param("make demo dmeo", "no make target dmeo", id="make"),
    pytest.param("pip install '.[evil]'", "no extra evil", id="extra"),
    pytest.param("python bench/no.py", "bench/no.py is not in the repository", id="script"),
    pytest.param(
        "python bench/quality.py table --bogus",
        "bench/quality.py has no --bogus",
        id="option of a script",
    ),
    pytest.param("make demo && rm -rf /", "rm is not on the list", id="another program"),
    pytest.param("echo 'a # b' # c", "echo is not on the list", id="comment"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_command_is_found(line: str, words: str) -> None:
    found = [problem(command) for command in words_of(without_comment(line))]
    assert words in str(found[-1])


@pytest.mark.parametrize(
    ("span", "words"),
    [
        pytest.param("llmquant serve --bogus", "no option --bogus", id="option of a command"),
        pytest.param("--bogus 3", "no option --bogus", id="option"),
        pytest.param("llmquant srve", "no command 'srve'", id="command"),
        pytest.param("make dmeo", "no make target dmeo", id="make"),
        pytest.param("bench/no.py", "bench/no.py is not in the repository", id="file"),
        pytest.param("llmquant.laod(path)", "llmquant.laod is not there", id="name in Python"),
    ],
)
def test_a_wrong_name_in_a_sentence_is_found(span: str, words: str) -> None:
    assert words in str(problem_of_span(span))


def test_links_to_nothing_are_found() -> None:
    page = ROOT / "docs" / "quickstart.md"
    assert anchors_of(page) >= {"long-runs", "what-you-can-rely-on"}
    assert "nowhere" not in anchors_of(page)


def test_the_short_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the list, since later ones read what earlier ones wrote."""
    shown = {shlex.join(command.words) for page in PAGES for command in commands_of(page)}
    assert [line for line in EXECUTED if line not in shown] == [], "commands that no page has"
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    Path("eval").mkdir()
    Path("eval/results").symlink_to(ROOT / "eval" / "results")
    for line in EXECUTED:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            main()
            code: object = 0
        except SystemExit as e:
            code = e.code
        told = capsys.readouterr()
        assert code in (0, None), f"{line}\n{told.err}"
        assert told.out.strip(), line
    assert {p.name for p in Path("out").iterdir()} >= {"tiny-rtn", "tiny-rtn-gptq"}
