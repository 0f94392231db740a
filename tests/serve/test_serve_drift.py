"""A server that watches drift: what it writes, what it tells, what survives a restart."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from serving import NAME, TINY, Server, running, with_engine
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmquant
from llmquant import DriftObservation, DriftProfile
from llmquant.errors import UsageError
from llmquant_serve.drift import hooks as hooking
from llmquant_serve.drift.hooks import Hooks
from llmquant_serve.drift.log import DriftLog, Entry, read_log
from llmquant_serve.drift.original import Original
from llmquant_serve.drift.recorder import Recorder, observed
from llmquant_serve.engines.base import Sampling
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.pieces import Piece
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Service

REQUESTS, TOKENS = 120, 8
ALPHA = 0.01


def request(**more: Any) -> DriftObservation:
    return DriftObservation(
        prompt_length=3, prompt_words={1: 3}, answer_length=2, answer_words={2: 2}, ended=True
    ).model_copy(update=more)


def made(tokenizer: PreTrainedTokenizerBase) -> DriftProfile:
    fingerprint = llmquant.tokenizer_fingerprint(tokenizer)
    return llmquant.make_drift_profile([request()] * 40, NAME, fingerprint)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Twice as many as a stream has; in no order, since the text has several parts."""
    held = (TINY / "heldout.txt").read_text(encoding="utf-8")
    step = len(held) // REQUESTS // 2
    pieces = [held[i * step :][: 40 + i % 7 * 12] for i in range(2 * REQUESTS)]
    return random.Random(0).sample(pieces, len(pieces))


@pytest.fixture(scope="module")
def texts(prompts: list[str]) -> list[str]:
    """Those that the profile has not seen."""
    return prompts[REQUESTS:]


@contextmanager
def watching(
    model: PreTrainedModel,
    log: Path,
    profile: DriftProfile,
    hooks: Hooks | None = None,
    original: LocalEngine | None = None,
) -> Iterator[Server]:
    engine = LocalEngine(model, 8)
    service = Service(engine, TextModel(TINY, engine.info.vocab), NAME)
    scorer = None if original is None else Original(original, 1.0)
    service.drift = Recorder(DriftLog(log, profile, ALPHA), hooks or Hooks(), scorer)
    with running(service) as server:
        yield server


def ask(server: Server, texts: list[str], at_once: int = 1) -> None:
    """One after the other: what is told of a stream depends on its order."""

    def one(place: int) -> None:
        body = {"prompt": texts[place], "max_tokens": TOKENS, "temperature": 1, "seed": place}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(len(texts))))
    server.until_idle()


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=60)


@pytest.fixture(scope="module")
def served_log(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """The log of a server that had any profile; read-only. A profile depends on its order."""
    log = tmp_path_factory.mktemp("drift") / "first.jsonl"
    with watching(model, log, made(tokenizer)) as server:
        ask(server, prompts[:REQUESTS])
    return log


@pytest.fixture
def profile(run: Run, served_log: Path) -> DriftProfile:
    """Of what the server really answered."""
    done = run("monitor", served_log, "--profile", "profile.json")
    assert done.code in (0, 3), done.err
    return llmquant.load_drift_profile(Path("profile.json"))


@pytest.fixture(scope="module")
def broken(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The packed model after something wrote other scales into one block's linears."""
    folder = Path(shutil.copytree(packed, tmp_path_factory.mktemp("broken") / NAME))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(0)
    names = [n for n in tensors if n.endswith("scale") and ".layers.1." in n]
    assert names
    for name in names:
        scale = tensors[name]
        tensors[name] = (scale * torch.exp(torch.randn(scale.shape))).to(scale.dtype)
    save_file(tensors, path, {"format": "pt"})
    return llmquant.load(folder, dtype="float32")


class Listener(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_request_is_a_line_without_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    with watching(model, log, made(tokenizer)) as server:
        ask(server, prompts[:REQUESTS], at_once=8)
    _, entries = read_log(log)
    seen = list(entries)
    assert len(seen) == REQUESTS
    assert all(e.logprob is not None and e.entropy is not None and e.entropy > 0 for e in seen)
    assert {e.answer_length for e in seen} <= set(range(1, TOKENS + 1))
    words = set(" ".join(prompts).split()) - {"model", "tiny"}
    assert not [w for w in words if len(w) > 5 and f'"{w}"' in log.read_text()]


def test_a_profile_does_not_take_the_place_of_the_log(run: Run, served_log: Path) -> None:
    before = served_log.read_bytes()
    done = run("monitor", served_log, "--profile", served_log, "--overwrite")
    assert (done.code, "is the log itself" in done.said) == (2, True)
    assert served_log.read_bytes() == before


def test_a_stream_like_the_profile_raises_no_alarm(
    run: Run, model: PreTrainedModel, profile: DriftProfile, texts: list[str], tmp_path: Path
) -> None:
    with watching(model, tmp_path / "log.jsonl", profile) as server:
        ask(server, texts)
        report = get(server, "/drift").json()
        assert (report["requests"], report["cause"], report["alarms"]) == (REQUESTS, "nothing", [])
        assert run("monitor", f"{server.url}/v1").code == 0
    assert run("monitor", tmp_path / "log.jsonl").code == 0


def test_damaged_scales_are_found_and_told_once(
    run: Run, broken: PreTrainedModel, profile: DriftProfile, texts: list[str], tmp_path: Path,
    listener: Listener,
) -> None:  # fmt: skip
    code = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"
    command = (sys.executable, "-c", code, str(tmp_path / "told; touch no-shell"))
    hooks = Hooks(command, f"http://127.0.0.1:{listener.server_port}/drift")
    log = tmp_path / "log.jsonl"
    with watching(broken, log, profile, hooks) as server:
        ask(server, texts)
        report = get(server, "/drift").json()
        metrics = get(server, "/metrics").text
        shown = run("monitor", server.url, "--plot", "drift.html")
    assert (shown.code, report["cause"]) == (3, "model")
    assert "look at the model" in shown.out
    assert "<svg" in Path("drift.html").read_text(encoding="utf-8")
    alarms = {a["statistic"]: a["request"] for a in report["alarms"]}
    assert min(alarms.values()) <= 40
    assert 'llmquant_drift_cause{cause="model"} 1.0' in metrics
    assert f"llmquant_drift_requests {float(REQUESTS)}" in metrics
    lines = (tmp_path / "told; touch no-shell").read_text().splitlines()
    told = [json.loads(line)["alarm"]["statistic"] for line in lines]
    assert told == [message["alarm"]["statistic"] for message in listener.got] == list(alarms)
    with watching(broken, log, profile, hooks) as server:
        again = get(server, "/drift").json()
    assert [a["request"] for a in again["alarms"]] == list(alarms.values())
    assert len(listener.got) == len(alarms)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_clients_see_what_they_saw_before(
    model: PreTrainedModel, server: Server, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    stream: bool,
) -> None:  # fmt: skip
    text = {"prompt": "The river", "max_tokens": 5, "temperature": 1, "seed": 3, "stream": stream}
    chat = {"messages": [{"role": "user", "content": "The river"}], **text}
    del chat["prompt"]
    bodies = [
        *(text | more for more in ({}, {"logprobs": 2}, {"n": 3}, {"stop": ["e"]})),
        *(chat | more for more in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2})),
    ]
    with watching(model, tmp_path / "log.jsonl", made(tokenizer)) as watched:
        for body in bodies:
            path = "chat/completions" if "messages" in body else "completions"
            here, there = (
                httpx.post(f"{s.url}/v1/{path}", json=body, timeout=60) for s in (watched, server)
            )
            assert sorted(choices(here)) == sorted(choices(there))
        assert get(watched, "/drift").json()["requests"] == len(bodies)
        assert get(server, "/drift").status_code == 404


def choices(answer: httpx.Response) -> list[str]:
    """Those of an answer or of the parts of a stream, as JSON."""
    lines = answer.raise_for_status().text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line not in ("", "data: [DONE]")]
    return [json.dumps(json.loads(line)["choices"]) for line in data]


def test_an_answer_that_nobody_waits_for_is_counted_and_not_compared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with watching(model, tmp_path / "log.jsonl", made(tokenizer)) as server:
        body = {"prompt": "A", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        server.until_idle()
        report = get(server, "/drift").json()
    assert (report["requests"], report["unfinished"]) == (0, 1)


def test_the_original_scores_answers_in_the_background(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path
) -> None:
    async def main(original: LocalEngine) -> None:
        log = DriftLog(tmp_path / "log.jsonl", made(tokenizer), ALPHA)
        recorder = Recorder(log, Hooks(), Original(original, 1.0))
        with recorder.watch(tokenizer.encode("The river")) as watch:
            sampling = observed(Sampling(max_tokens=4, temperature=0.0))
            async for step in original.generate(tokenizer.encode("The river"), sampling):
                watch.update(Piece(tokens=step.tokens, finish=step.finish))
        for task in list(recorder.scorer._tasks):
            await task
        await recorder.close()

    with_engine(model, main)
    _, entries = read_log(tmp_path / "log.jsonl")
    first, second = entries
    assert first.answer_length == 4
    assert second.gap == pytest.approx(0, abs=1e-3)  # the original is this model


def entry(**more: Any) -> Entry:
    return Entry(**dict(request(**more)), time=0)


@pytest.fixture
def written(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> tuple[Path, DriftProfile]:
    """A log of 70 entries whose state was written at the 50th."""
    profile, path = made(tokenizer), tmp_path / "log.jsonl"
    log = DriftLog(path, profile, ALPHA)
    for i in range(70):
        log.append(entry(ended=i % 3 == 0))
        log.monitor.add(entry(ended=i % 3 == 0))
        if i == 49:
            log.save()
    log.close()
    return path, profile


@pytest.mark.parametrize("damage", ["none", "no state", "old state", "half a line"])
def test_a_restart_knows_every_line(written: tuple[Path, DriftProfile], damage: str) -> None:
    path, profile = written
    state = path.with_name(f"{path.name}.state")
    whole = path.read_bytes()
    if damage == "no state":
        state.unlink()
    elif damage == "old state":
        state.write_text("{", encoding="utf-8")
    elif damage == "half a line":
        path.write_bytes(whole + b'{"prompt_le')
    twin = llmquant.DriftMonitor(profile, ALPHA)
    for i in range(70):
        twin.add(entry(ended=i % 3 == 0))
    log = DriftLog(path, profile, ALPHA)
    assert log.monitor.report() == twin.report()
    assert path.read_bytes() == whole
    log.close()


@pytest.mark.parametrize("left", ["nothing", "half the header"])
def test_a_log_that_is_begun_again_knows_nothing_of_the_one_before(
    written: tuple[Path, DriftProfile], left: str
) -> None:
    path, profile = written
    header = path.read_bytes().partition(b"\n")[0]
    path.unlink()
    if left != "nothing":
        path.write_bytes(header[:100])
    log = DriftLog(path, profile, ALPHA)
    for _ in range(60):  # more bytes than the state of the old log has read, and killed then
        log.append(entry(refused=True, json_valid=True))
    log.close()
    log = DriftLog(path, profile, ALPHA)
    assert (log.monitor.entries, path.read_bytes().partition(b"\n")[0]) == (60, header)
    log.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param("alpha", "another profile or another --drift-alpha", id="another alpha"),
        pytest.param("profile", "another profile or another --drift-alpha", id="another profile"),
        pytest.param("second", "is another server's", id="a second server"),
        pytest.param("middle", "line 3 is not a line of a drift log", id="a damaged line"),
        pytest.param("other", "is not a drift log", id="another file"),
        pytest.param("line", "is not a drift log", id="another file without a line end"),
        pytest.param("bytes", "is not a drift log", id="bytes that are no UTF-8"),
    ],
)
def test_a_log_that_cannot_be_continued_is_refused(
    written: tuple[Path, DriftProfile], change: str, why: str
) -> None:
    path, profile = written
    alpha, held = ALPHA, None
    if change == "alpha":
        alpha = 0.05
    elif change == "profile":
        profile = profile.model_copy(update={"model": "other"})
    elif change == "second":
        held = DriftLog(path, profile, alpha)
    elif change == "middle":
        path.with_name(f"{path.name}.state").unlink()
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:2], "{}\n", *lines[3:]]))
    else:
        found = {"other": b"something\nelse", "line": b'{"mine": 1}', "bytes": b"\xff\n\xfe"}
        path.write_bytes(found[change])
    before = path.read_bytes()
    with pytest.raises(UsageError, match=why):
        DriftLog(path, profile, alpha)
    assert path.read_bytes() == before
    if held is not None:
        held.close()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        pytest.param("serve {tiny} --drift none.json", "cannot be read", id="no profile"),
        pytest.param("serve {tiny} --on-drift true", "add --drift PROFILE", id="a hook alone"),
        pytest.param("serve {tiny} --drift-alpha 0.1", "add --drift PROFILE", id="alpha alone"),
        pytest.param("serve {tiny} --drift {p} --drift-sample 1", "--reference", id="no original"),
        pytest.param("serve {tiny} --drift {p} --drift-alpha 2", "between 0 and 1", id="alpha"),
        pytest.param("serve {tiny} --drift {p} --on-drift a'", "be split", id="a quotation mark"),
        pytest.param("serve {tiny} --drift {p} --on-drift no-such", "no program", id="no program"),
        pytest.param("serve {tiny} --drift {p} --drift-webhook a", "http://", id="no address"),
        pytest.param("serve {tiny} --drift {q}", "tokenizer is another", id="another tokenizer"),
        pytest.param("serve {tiny} --drift {p} --drift-log no/log", "cannot be written", id="log"),
        pytest.param("monitor none.jsonl", "cannot be read", id="no log"),
        pytest.param("monitor {p}", "is not a drift log", id="a profile for a log"),
        pytest.param("monitor {p} --plot a.doc", "must end in", id="no picture"),
        pytest.param("monitor {p} --plot mine.html", "is no page", id="a page of the user's"),
        pytest.param("monitor {p} --plot mine.png", "is no plot", id="a picture of the user's"),
        pytest.param("monitor {p} --profile {m} --overwrite", "is no drift", id="another file"),
        pytest.param("monitor http://127.0.0.1:9 --profile a", "does not answer", id="no server"),
    ],
)
def test_misuse_is_told(
    run: Run, tokenizer: PreTrainedTokenizerBase, command: str, why: str
) -> None:
    profile = made(tokenizer)
    Path("p.json").write_text(profile.to_json())
    other = profile.model_copy(update={"tokenizer_sha256": "0" * 64})
    Path("q.json").write_text(other.to_json())
    for mine in ("mine.html", "mine.png"):
        Path(mine).write_text("mine")
    words = [w.format(tiny=TINY, p="p.json", q="q.json", m="mine.png") for w in command.split()]
    ported = [*words, "--port", "0"] if words[0] == "serve" else words
    done = run(*ported)
    assert (done.code, why in done.said) == (1 if "http" in words[1] else 2, True), done.err
    assert "Traceback" not in done.err


def test_a_key_that_no_header_takes_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQUANT_API_KEY", "schlüssel")
    done = run("monitor", "http://127.0.0.1:9")
    assert (done.code, "LLMQUANT_API_KEY is not ASCII" in done.said) == (2, True), done.err


def test_a_full_disk_costs_the_log_and_no_answer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = DriftLog(tmp_path / "log.jsonl", made(tokenizer), ALPHA)
    recorder, write = Recorder(log, Hooks()), os.write
    recorder.record(request())
    whole = log.path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:9]))
        for _ in range(2):
            recorder.record(request())
    assert recorder.report().requests == 3
    assert log.path.read_bytes() == whole
    assert capsys.readouterr().err.count("cannot be written") == 1
    log.close()


@dataclass(frozen=True)
class Stuck(Hooks):
    """Tells of one alarm, and hangs at the next until it is set free."""

    told: list[str] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)

    def tell(self, alarm: Any) -> None:
        self.told.append(alarm["alarm"]["statistic"])
        if len(self.told) == 2:
            assert self.free.wait(60)


def test_a_hook_that_hangs_holds_up_no_shutdown_and_is_run_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(hooking, "_CLOSE_SECONDS", 0.5)
    path, profile = tmp_path / "log.jsonl", made(tokenizer)
    stuck, again = Stuck(), Stuck()
    recorder = Recorder(DriftLog(path, profile, ALPHA), stuck)
    for _ in range(40):  # other words in prompts and answers
        recorder.record(request(prompt_words={7: 30}, answer_words={7: 70}))
    alarms = [alarm.statistic for alarm in recorder.report().alarms]
    assert len(alarms) > 2
    asyncio.run(recorder.close())
    assert "are told at the next start" in capsys.readouterr().err
    assert alarms[:2] == stuck.told
    log = DriftLog(path, profile, ALPHA)
    assert [alarm.told for alarm in log.monitor.alarms] == [True] + [False] * (len(alarms) - 1)
    again.free.set()
    asyncio.run(Recorder(log, again).close())
    assert alarms[1:] == again.told
    stuck.free.set()  # its thread is the process's


@pytest.mark.parametrize(
    ("command", "webhook", "why"),
    [
        pytest.param("false", None, "--on-drift false ended with 1", id="exit code"),
        pytest.param("printf '\\377' ; exit 3", None, "ended with 3: \ufffd", id="no UTF-8"),
        pytest.param("sleep 60", None, "timed out", id="too long"),
        pytest.param(None, "http://127.0.0.1:9/secret", "127.0.0.1 was not told", id="no listener"),
        pytest.param(None, "http://127.0.0.1:99999/", "127.0.0.1 was not told", id="no port"),
    ],
)
def test_a_hook_that_fails_is_said(
    command: str | None, webhook: str | None, why: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(hooking, "_COMMAND_SECONDS", 0.5)
    monkeypatch.setattr(hooking, "_PAUSE_SECONDS", 0.0)
    words = shlex.join(["sh", "-c", f"({command}) >&2"]) if command else None
    Hooks.of(command if command == "false" else words, webhook).tell({"kind": "drift-alarm"})
    said = capsys.readouterr().err
    assert why in said
    assert "secret" not in said
