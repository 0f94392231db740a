"""Log-probabilities are keyed by token, not by text: with a vocabulary like Llama 2's, where
different tokens have one text, no alternative is lost, bytes keep their spaces, and no client takes
a token for the most likely one that is not."""

from __future__ import annotations

import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI
from serving import served
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

from llmquant_eval.models.endpoint import Endpoint
from llmquant_serve.generation.text_model import TextModel

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
WORDS = ["▁", "▁the", "the", "▁a", "a", "A", "▁river", "river", "e", "h", "t", "th", "he", "▁t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A SentencePiece-like tokenizer: word pieces that begin with ▁, and a token for every byte, so
    that ``A`` and ``<0x41>`` have one text."""
    path = tmp_path_factory.mktemp("sentencepiece")
    vocab = {piece: i for i, piece in enumerate([*PIECES, *WORDS])}
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("▁", "t")]
    for left, right in (("▁", "the"), ("▁", "a"), ("▁", "river")):
        merges.append((left, right))
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.add_special_tokens([AddedToken(p, special=True) for p in PIECES[:3]])
    LlamaTokenizerFast(tokenizer_object=bpe).save_pretrained(path)
    bpe.save(str(path / "tokenizer.json"))
    return path


SIZE = len(PIECES) + len(WORDS) + 5  # a few rows that the tokenizer has no token for


@pytest.fixture(scope="module")
def server(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with served(model, TextModel(folder, SIZE)) as live:
        live.model = model
        yield live


def ask(server, path="/v1/completions", **body):
    with server.client as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


def test_every_token_has_a_name_of_its_own(server, folder):
    names = [server.service.text.names[i] for i in range(SIZE)]
    assert len(set(names)) == SIZE
    assert names[len(PIECES) + WORDS.index("▁the")] == " the"
    assert names[len(PIECES) + WORDS.index("the")] == "the"
    assert {names[PIECES.index("<0x41>")], names[len(PIECES) + WORDS.index("A")]} == {"A", "<0x41>"}
    assert names[SIZE - 1] == f"token_id:{SIZE - 1}"


IDS = [1, *(len(PIECES) + i for i in (1, 2, 5, 6, 2, 1))]


@pytest.mark.parametrize("count", [1, 5, 20])
def test_no_alternative_is_lost(server, count):
    whole = ask(server, prompt=IDS, max_tokens=8, temperature=0, logprobs=count, echo=True)
    logs = whole["choices"][0]["logprobs"]
    for token, own, top in list(
        zip(logs["tokens"], logs["token_logprobs"], logs["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == own
        assert len(top) == (count if own >= sorted(top.values())[-count] else count + 1)


def test_names_can_be_ids(server):
    logs = ask(
        server, prompt=IDS, max_tokens=1, logprobs=3, echo=True, return_tokens_as_token_ids=True
    )["choices"][0]["logprobs"]
    assert logs["tokens"][: len(IDS)] == [f"token_id:{i}" for i in IDS]
    assert all(name.startswith("token_id:") for top in logs["top_logprobs"][1:] for name in top)


def test_bytes_of_a_chat_keep_their_spaces(server):
    server.service.text.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    the = len(PIECES) + WORDS.index("▁the")
    choice = ask(
        server, "/v1/chat/completions", messages=[{"role": "user", "content": "the river"}],
        max_tokens=3, logprobs=True, top_logprobs=5, logit_bias={str(the): 100}, temperature=0,
    )["choices"][0]  # fmt: skip
    entries = choice["logprobs"]["content"]
    assert [e["token"] for e in entries] == [" the"] * 3
    assert bytes(b for e in entries for b in e["bytes"]) == b" the the the"
    assert choice["message"]["content"] == " the the the"
    for entry in entries:
        assert len({t["token"] for t in entry["top_logprobs"]}) == 5


def twins(model):
    """Sequences whose last token is less likely than another of the same text, by the model: such a
    token was taken for the most likely one."""
    pairs = [("A", "<0x41>"), ("<0x41>", "A"), ("<0x74>", "t"), ("t", "<0x74>"), ("h", "<0x68>")]
    everything = [*PIECES, *WORDS]
    for own, other in pairs:
        yield [1, everything.index("▁the"), everything.index(own)], everything.index(other)


def test_the_clients_agree_with_the_model_on_what_is_most_likely(server, folder):
    """lm-eval's client, and our own evaluation of a server."""
    lm_eval = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=str(folder),
        tokenizer_backend="huggingface", max_length=64, num_concurrent=1, batch_size=1,
    )  # fmt: skip
    head = server.model.lm_head.weight
    for ids, twin in twins(server.model):
        # The twin wins by a little, and everything else is far below.
        with torch.inference_mode():
            state = server.model.model(torch.tensor([ids[:2]])).last_hidden_state[0, -1]
            before = head[[ids[2], twin]].clone()
            head[ids[2]], head[twin] = state * 2, state * 2.2
        try:
            # A new one each time: it keeps what a model answered, and the model changes here.
            endpoint = Endpoint(f"{server.url}/v1")
            assert endpoint.score(ids).greedy[-1] is False
            assert endpoint.score([*ids[:2], twin]).greedy[-1] is True
            answers = lm_eval._loglikelihood_tokens(
                [(("", ""), ids[:2], [ids[2]]), (("", ""), ids[:2], [twin])], disable_tqdm=True
            )
            assert [greedy for _, greedy in answers] == [False, True]
        finally:
            with torch.inference_mode():
                head[[ids[2], twin]] = before
