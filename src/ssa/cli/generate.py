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
    max_dropped_mass: Annotated[
        float | None, arg(help="adaptive budget: the fewest blocks that drop at most this share of the attention")
    ] = None,
    flavour: Annotated[
        Literal["estimated", "certified", "per_block"] | None,
        arg(help="how the adaptive budget knows; default estimated"),
    ] = None,
    max_new_tokens: Annotated[int, arg(help="how many tokens to add at most")] = 100,
    temperature: Annotated[float, arg(help="0 takes the most probable token each time")] = 0.0,
    top_p: Annotated[float, arg(help="nucleus of the sampling")] = 0.95,
    seed: Annotated[int, arg(help="seed of the sampling")] = 0,
    stop: Annotated[tuple[str, ...], arg(help="end after one of these texts")] = (),
    prefill_chunk_size: Annotated[int | None, arg(help="read the prompt in chunks of so many tokens")] = None,
    report_mass: Annotated[bool, arg(help="measure the attention mass that sparse decoding drops (slower)")] = False,
    device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
) -> int:
    """Continue a prompt with the model of a run folder or model folder. Text streams to standard output.

    Tokens per second of prompt and continuation, mode and budget go to standard error at the end.
    """
    text = _read_prompt(prompt, prompt_file)

    from ssa.generation import generate as continue_text

    done = continue_text(
        model,
        text,
        mode=mode,
        num_blocks=num_blocks,
        max_dropped_mass=max_dropped_mass,
        flavour=flavour,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=list(stop) or None,
        prefill_chunk_size=prefill_chunk_size,
        report_mass=report_mass,
        device=device,
        on_text=lambda piece: print(piece, end="", flush=True),
    )
    print()
    speed = "" if done.decode_speed is None else f", {done.decode_speed:.1f} tokens/s"
    parts = [
        f"prompt {done.prompt_tokens} tokens, {done.prefill_speed:.0f} tokens/s",
        f"{done.new_tokens} new tokens{speed}",
        done.attention,
    ]
    if done.dropped_mass is not None:
        parts.append(f"mean dropped mass {done.dropped_mass:.3f} with {done.blocks_taken:.1f} blocks a query")
    elif report_mass:
        parts.append("no dropped mass: no sparse step was decoded")
    print(f"[{'; '.join(parts)}]", file=sys.stderr)
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
