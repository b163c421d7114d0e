"""``ssa generate``: continue a prompt with a checkpoint, in either mode and at any budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg


def run(argv: list[str]) -> int:
    """Parse flags, generate, print; exit code 0."""
    return tyro.cli(generate, args=argv, prog="ssa generate")


def generate(
    model: Annotated[Path, tyro.conf.Positional],
    prompt: Annotated[str | None, arg(help="text to continue; '-' reads standard input")] = None,
    prompt_file: Annotated[Path | None, arg(help="read the prompt from a file")] = None,
    mode: Annotated[Literal["full", "sparse"] | None, arg(help="attention; default the model's inference mode")] = None,
    num_blocks: Annotated[int | None, arg(help="blocks per query of the sparse mode; default the model's")] = None,
    max_new_tokens: Annotated[int, arg(help="how many tokens to add")] = 100,
    temperature: Annotated[float, arg(help="0 takes the most probable token each time")] = 0.0,
    top_p: Annotated[float, arg(help="nucleus of the sampling")] = 0.95,
    seed: Annotated[int, arg(help="seed of the sampling")] = 0,
    device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
) -> int:
    """Continue a prompt with the model of a run folder or model folder. Text streams to standard output.

    Every step reads the whole sequence again: there is no key-value cache yet.
    """
    import time

    import torch
    from transformers import TextStreamer

    from ssa.data.tokenizer import load_tokenizer
    from ssa.environment import default_device
    from ssa.errors import ConfigError
    from ssa.model import load_model

    if max_new_tokens < 1:
        raise ConfigError("--max-new-tokens", max_new_tokens, "at least 1")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ConfigError("--temperature, --top-p", f"{temperature}, {top_p}", "temperature >= 0 and 0 < top_p <= 1")
    text = _read_prompt(prompt, prompt_file)
    where = default_device(device)
    network = load_model(model, device=where)
    tokenizer = load_tokenizer(str(model / "model" if (model / "model").is_dir() else model))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([[*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]], device=where)
    limit = network.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise ConfigError(
            "--max-new-tokens",
            f"{ids.shape[1]} prompt + {max_new_tokens} new tokens",
            f"at most {limit} in all",
            "fewer",
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    print(text, end="", flush=True)
    started = time.perf_counter()
    with torch.no_grad(), network.attention_mode(mode, num_blocks=num_blocks):
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        config = network.config
        used = config.inference_mode if config.inference_mode == "full" else f"sparse, {config.num_blocks} blocks"
    seconds, new = time.perf_counter() - started, out.shape[1] - ids.shape[1]
    print(f"[{new} tokens, {new / seconds:.1f} tokens/s, {used}, {where}]", file=sys.stderr)
    return 0


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    from ssa.errors import ConfigError

    if (prompt is None) == (prompt_file is None):
        raise ConfigError("ssa generate", "both or neither of --prompt and --prompt-file", "one of them")
    try:
        text = (
            prompt_file.read_text() if prompt_file is not None else sys.stdin.read() if prompt == "-" else str(prompt)
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompt-file", str(error), "a readable UTF-8 text file") from error
    if not text:
        raise ConfigError("prompt", "empty text", "at least one character")
    return text
