"""``--threads``: set once, refused where it cannot be, allowed beyond the machine with a word about
it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmquant.errors import UsageError
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import ChosenDtype
from llmquant.runtime.processor import this_processor
from llmquant.runtime.threads import set_threads


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_none_leaves_what_torch_has():
    before = torch.get_num_threads()
    assert set_threads(None) == before == torch.get_num_threads()


def test_a_number_is_set(capsys):
    assert set_threads(1) == 1 == torch.get_num_threads()
    assert not capsys.readouterr().err


def test_more_than_the_machine_has_is_allowed_and_said(capsys):
    many = this_processor().threads + 1
    assert set_threads(many) == many == torch.get_num_threads()
    assert f"warning: --threads {many} is more than the {many - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [0, -1], ids=str)
def test_fewer_than_one_is_refused(threads):
    with pytest.raises(UsageError, match=f"--threads {threads}: give 1 or more"):
        set_threads(threads)


def test_the_record_says_how_it_is_computed():
    set_threads(1)
    chosen = Computing.of("cpu", ChosenDtype(torch.float32, "it is faster"))
    assert (
        chosen.as_text({"cpu": 14})
        == "float32 on cpu, 1 thread, kernel cpu for 14 linears; float32 because it is faster"
    )
    asked = Computing.of("cuda:0", ChosenDtype(torch.float16))
    assert asked.as_text() == "float16 on cuda:0, 1 thread"
    assert asked.as_dict() == {
        "device": "cuda:0",
        "dtype": "float16",
        "dtype_reason": None,
        "threads": 1,
        "processor": this_processor().name,
        "instruction_sets": list(this_processor().instruction_sets),
    }
