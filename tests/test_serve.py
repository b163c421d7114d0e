"""``ssa serve`` over real HTTP on the loopback address, in a process of its own."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ssa import restore
from ssa.cli import main
from ssa.data.tokenizer import begin_with_bos, load_tokenizer, train_tokenizer
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.opening import open_model

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="needs the extra [serve]")
pytest.importorskip("transformers.cli.serving.completion", reason="needs a newer transformers")

PROMPT = "a tin can be opened with an opener or a knife but never with a spoon"
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SPARSE = {"mode": "sparse", "num_blocks": 1, "block_size": 4}


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our model and a Llama, both called tin; wide weights, so that the attention decides the text."""
    tokenizer = train_tokenizer([PROMPT], 300)
    tokenizer.chat_template = CHAT
    found = {}
    for kind, config in (("ours", SSAConfig(**SIZES, head_dim=8)), ("stock", LlamaConfig(**SIZES))):
        path = tmp_path_factory.mktemp(kind) / "tin"
        tokenizer.save_pretrained(path)
        torch.manual_seed(0)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, None, 2
        model = (SSAForCausalLM if kind == "ours" else LlamaForCausalLM)(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(path)
        found[kind] = path
    return found


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[str]:
    """Address of ``ssa serve`` in a process of its own, with our model in sparse mode."""
    argv = ["serve", str(folders["ours"]), "--port", "0", "--device", "cpu", "--mode", "sparse", "--num-blocks", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ssa", *argv, "--block-size", "4"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tin, sparse attention, 1 blocks of 4 tokens: http://127.0.0.1:"), line
    yield line.split()[-1]
    process.terminate()
    assert process.wait(20) in (0, -15)


@pytest.fixture(scope="module")
def in_thread(folders: dict[str, Path]) -> str:
    """Address of the same server in a thread of this process, with the Llama."""
    from ssa.serve import build_app, load, run

    addresses: queue.Queue[str] = queue.Queue()
    app = build_app(load(folders["stock"], **SPARSE))
    threading.Thread(target=run, args=(app, "127.0.0.1", 0, addresses.put), daemon=True).start()
    return addresses.get(timeout=30)


@pytest.fixture(params=["ours", "stock"])
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Path]:
    """A server and its folder."""
    server: str = request.getfixturevalue("served" if request.param == "ours" else "in_thread")
    return server, folders[request.param]


@pytest.fixture
def server(served: str) -> str:
    return served


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def greedy(folder: Path, prompt: str, new: int, **attention: Any) -> str:
    """Greedy text of the same model in this process, without a cache."""
    tokenizer = begin_with_bos(load_tokenizer(str(folder)))
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    model = open_model(folder, **attention)
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_completions_are_the_model_s_in_its_mode(case: tuple[str, Path]) -> None:
    server, folder = case
    body = {"model": "tin", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0}
    status, text = ask(f"{server}/v1/completions", body)
    assert status == 200, text
    answer = json.loads(text)
    assert answer["choices"][0]["text"] == greedy(folder, PROMPT, 12, **SPARSE)
    assert answer["choices"][0]["text"] != greedy(folder, PROMPT, 12, mode="full")
    assert answer["usage"]["completion_tokens"] == 12


def test_streamed_completions_are_the_same(case: tuple[str, Path]) -> None:
    server, _ = case
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.0}
    whole = json.loads(ask(f"{server}/v1/completions", body)[1])["choices"][0]["text"]
    status, stream = ask(f"{server}/v1/completions", {**body, "stream": True})
    assert status == 200
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert len(chunks) > 2
    text = "".join(chunk["choices"][0].get("text") or "" for chunk in chunks if chunk["choices"])
    assert text == whole.rstrip("\ufffd")  # a stream holds back bytes that are no character yet


def test_an_openai_client_can_chat(case: tuple[str, Path]) -> None:
    server, folder = case
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model="tin", messages=messages, max_tokens=8, temperature=0.0)
    assert answer.choices[0].message.content == greedy(folder, f"user: {PROMPT}\nassistant:", 8, **SPARSE)
    assert [model.id for model in client.models.list()] == ["tin"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"model": "other/model", "prompt": "x"}, 404, "expected 'tin'"),
        ("/v1/completions", {"prompt": ["x"]}, 400, "expected a text"),
        ("/v1/completions", {"prompt": ""}, 400, "expected a text"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1000}, 400, "at most 128 in all"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "at least 1"),
        ("/v1/chat/completions", {"messages": 3}, 400, "messages"),
        ("/load_model", {"model": "other/model"}, 404, "Not Found"),
        ("/reset", {}, 404, "Not Found"),
        ("/docs", None, 404, "Not Found"),
        ("/health", None, 200, "sparse attention, 1 blocks of 4 tokens"),
    ],
)
def test_what_is_refused_and_what_is_not_there(
    server: str, path: str, body: dict[str, Any] | None, status: int, message: str
) -> None:
    got, text = ask(server + path, body)
    assert (got, message in text) == (status, True), text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "--port: got 65536"),
        (["--host", ""], "--host: got nothing"),
        (["--num-blocks", "0"], "num_blocks"),
        (["--host", "192.0.2.1", "--port", "0"], "a free address of this machine"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--continuous-batching"], "--continuous-batching"),
        (["--trust-remote-code"], "--trust-remote-code"),
    ],
)
def test_impossible_flags_are_refused(
    folders: dict[str, Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folders["ours"]), "--device", "cpu", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_hub_name_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "owner/model"]) == 2
    assert "got no config.json" in capsys.readouterr().err


def test_full_mode_needs_nothing_of_ours(folders: dict[str, Path], tmp_path: Path) -> None:
    """What any other engine serves: the weights of a stock model with our attention, without our keys."""
    ids = torch.arange(1, 60).view(1, -1)
    model = open_model(folders["stock"], mode="full")
    with torch.no_grad():
        expected = model(ids).logits
        restore(model).save_pretrained(tmp_path)
        config = (tmp_path / "config.json").read_text()
        assert "ssa" not in config
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
        assert plain.config._attn_implementation == "sdpa"
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-3)
