"""One local model over HTTP with OpenAI's interface: the request handlers of ``transformers serve``, our attention.

Only what a model server needs: no other model can be loaded, nothing is fetched, no code of a checkpoint runs. The
handlers know one model, in one mode at one budget, and one request at a time reaches it (no continuous batching: its
paged cache belongs to other attentions).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from ssa.data.tokenizer import begin_with_bos, load_tokenizer
from ssa.errors import ConfigError, MissingDependencyError
from ssa.model.opening import attention_in_words, model_folder, open_model

try:
    from transformers.cli.serving.completion import CompletionHandler
except ImportError as error:  # transformers 5.5 had chat only
    hint = "pip install -U 'transformers[serving]'"
    raise MissingDependencyError("ssa serve", "a transformers without /v1/completions", "a newer one", hint) from error

DEFAULT_NEW_TOKENS = 256
LENGTH_KEYS = ("max_completion_tokens", "max_tokens")


@dataclass
class OneModel:
    """What the handlers ask for a model; they always get this one.

    Attributes:
        force_model: the only name that requests may give.
        model, processor: what answers them.
    """

    force_model: str
    model: PreTrainedModel
    processor: PreTrainedTokenizerFast

    get_model_modality = staticmethod(ModelManager.get_model_modality)

    @staticmethod
    def process_model_name(name: str) -> str:
        """Names have no revisions here."""
        return name

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model and its tokenizer, loaded long ago."""
        return self.model, self.processor


def load(path: Path, *, name: str | None = None, **attention: Any) -> OneModel:
    """Open a model folder or run folder for serving.

    Args:
        path: the folder; no hub name.
        name: how requests call the model; None: the folder's name.
        attention: ``mode``, ``num_blocks``, ``block_size``, ``device``, ``dtype``; see
            :func:`ssa.model.opening.open_model`.

    Raises:
        ConfigError: not a folder with a model and a tokenizer, an unknown mode, an impossible budget.
        CheckpointError: weights that cannot be read.
    """
    folder = model_folder(path)
    tokenizer = begin_with_bos(load_tokenizer(str(folder)))
    return OneModel(name or path.resolve().name, open_model(folder, **attention), tokenizer)


def build_app(one: OneModel) -> FastAPI:
    """The HTTP application: ``/v1/completions``, ``/v1/chat/completions`` (both may stream), ``/v1/models``,
    ``/health``."""
    shared: dict[str, Any] = {"model_manager": one, "generation_state": GenerationState()}
    text, chat = CompletionHandler(**shared), ChatCompletionHandler(**shared)
    app = FastAPI(title="ssa serve", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Any:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise HTTPException(400, "prompt: expected a text that is not empty")
        return await text.handle_request(fit(body, one, one.processor(prompt)), _identity(request))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Any:
        if not one.processor.chat_template:
            raise HTTPException(400, f"{one.force_model} has no chat template; expected one; try /v1/completions")
        try:
            prompt = one.processor.apply_chat_template(body["messages"], return_dict=True, add_generation_prompt=True)
        except Exception as error:  # whatever a template makes of other people's messages
            raise HTTPException(400, f"messages: {error}; expected a list of {{role, content}}") from error
        return await chat.handle_request(fit(body, one, prompt), _identity(request))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": one.force_model, "object": "model", "created": 0, "owned_by": "ssa"}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "attention": attention_in_words(one.model)}

    return app


def fit(body: dict[str, Any], one: OneModel, prompt: Any) -> dict[str, Any]:
    """The request with a number of new tokens that fits the model's context beside ``prompt["input_ids"]``.

    Raises:
        HTTPException: 404 for another model, 400 for a number or a prompt that does not fit.
    """
    if body.get("model", one.force_model) != one.force_model:
        raise HTTPException(404, f"model: got {body['model']!r}; expected {one.force_model!r}")
    limit = int(one.model.config.get_text_config().max_position_embeddings)
    used = len(prompt["input_ids"])
    key = next((key for key in LENGTH_KEYS if body.get(key) is not None), "max_tokens")
    new = body.get(key)
    new = max(min(DEFAULT_NEW_TOKENS, limit - used), 1) if new is None else new
    if not isinstance(new, int) or isinstance(new, bool) or new < 1:
        raise HTTPException(400, f"{key}: got {new!r}; expected an integer of at least 1")
    if used + new > limit:
        raise HTTPException(400, f"{key}: got {used} prompt + {new} new tokens; expected at most {limit} in all")
    return {**body, "model": one.force_model, key: new}


def check_address(host: str, port: int) -> None:
    """Raise :class:`ConfigError` unless host and port can be those of a server."""
    if not 0 <= port < 65536:
        raise ConfigError("--port", port, "0 (any free one) to 65535")
    if not host:
        raise ConfigError("--host", "nothing", "an address, such as 127.0.0.1")


def run(app: FastAPI, host: str, port: int, on_ready: Any = lambda url: None) -> None:
    """Serve until interrupted. ``on_ready(url)`` is called when connections are accepted.

    Raises:
        ConfigError: an address that cannot be bound.
    """
    import socket

    import uvicorn

    check_address(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            "--host, --port", f"{host}:{port} ({error.strerror})", "a free address of this machine"
        ) from error
    on_ready(f"http://{host}:{bound.getsockname()[1]}")  # the socket queues what comes before the loop runs
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


def _identity(request: Request) -> str:
    return request.headers.get("x-request-id") or str(uuid.uuid4())
