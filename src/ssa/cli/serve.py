"""``ssa serve``: a model over HTTP with OpenAI's interface, in one mode at one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg


def run(argv: list[str]) -> int:
    """Parse flags, load, serve until interrupted; exit code 0."""
    return tyro.cli(serve, args=argv, prog="ssa serve")


def serve(
    model: Annotated[Path, tyro.conf.Positional],
    mode: Annotated[Literal["full", "sparse"] | None, arg(help="attention; default the model's inference mode")] = None,
    num_blocks: Annotated[int | None, arg(help="blocks per query of the sparse mode; default the model's")] = None,
    block_size: Annotated[int | None, arg(help="tokens per block; default the model's")] = None,
    name: Annotated[str | None, arg(help="how requests call the model; default the folder's name")] = None,
    host: Annotated[
        str, arg(help="address to listen on; anything but 127.0.0.1 is open to others, unguarded")
    ] = "127.0.0.1",
    port: Annotated[int, arg(help="port to listen on; 0 takes a free one")] = 8000,
    device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], arg(help="of the weights; auto: as stored")] = "auto",
) -> int:
    """Serve the model of a run folder or model folder: /v1/completions, /v1/chat/completions, /v1/models, /health,
    as OpenAI clients expect them, streaming included. Mode and budget are the server's, for all requests."""
    import torch

    from ssa.environment import default_device
    from ssa.errors import MissingDependencyError

    try:
        from ssa.serve import build_app, check_address, load
        from ssa.serve import run as run_server
    except ImportError as error:
        if isinstance(error, MissingDependencyError):
            raise
        hint = "pip install 'sparse-sparse-attention[serve]'"
        raise MissingDependencyError("ssa serve", str(error), "fastapi, uvicorn and openai", hint) from None
    from ssa.model.opening import attention_in_words

    check_address(host, port)
    one = load(
        model,
        name=name,
        mode=mode,
        num_blocks=num_blocks,
        block_size=block_size,
        device=default_device(device),
        dtype=None if dtype == "auto" else getattr(torch, dtype),
    )
    words = attention_in_words(one.model)
    run_server(build_app(one), host, port, lambda url: print(f"{one.force_model}, {words}: {url}", flush=True))
    return 0
