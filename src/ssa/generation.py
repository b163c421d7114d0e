"""``ssa.generate``: continue a text with a model, in either mode and at any budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from ssa.data.tokenizer import begin_with_bos, load_tokenizer
from ssa.environment import default_device
from ssa.errors import ConfigError
from ssa.model import SSAForCausalLM
from ssa.model.cache import BlockCache
from ssa.model.generation import CACHE_NAME
from ssa.model.opening import attention_in_words, model_folder, open_model


@dataclass(frozen=True)
class Generated:
    """A continuation and what it took.

    Attributes:
        text: what was added; ``str()`` of this object.
        prompt_tokens, new_tokens: counted with special tokens.
        prefill_seconds: until the first new token; decode_seconds: from there to the last one.
        attention: mode and budget in words.
        dropped_mass: mean over layers, heads and decoded tokens, if asked for: the share of full attention's mass that
            the chosen blocks leave out; blocks_taken: mean number of blocks that a query read.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    attention: str
    dropped_mass: float | None = None
    blocks_taken: float | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float | None:
        """New tokens per second after the first, None if there is one only."""
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9) if self.new_tokens > 1 else None


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: Any = None,
    mode: str | None = None,
    num_blocks: int | None = None,
    max_dropped_mass: float | None = None,
    flavour: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    prefill_chunk_size: int | None = None,
    report_mass: bool = False,
    device: str = "auto",
    on_text: Callable[[str], object] | None = None,
) -> Generated:
    """Continue ``prompt``: ``print(ssa.generate("runs/mine", "Once", mode="sparse", num_blocks=8))``.

    Args:
        model: a run folder, a model folder or an opened model (which keeps the mode and budget given here).
        tokenizer: of an opened model; that of the folder otherwise.
        mode: ``"full"`` or ``"sparse"``; num_blocks: blocks per query; None: the model's.
        max_dropped_mass: an adaptive budget: as many blocks as it takes, up to ``num_blocks`` if that is given;
            flavour: ``"estimated"``, ``"certified"``, ``"per_block"``. See :class:`ssa.ops.SparseSpec`.
        max_new_tokens: at most so many.
        temperature: 0 takes the most probable token each time; top_p: nucleus of the sampling; seed: of the sampling.
        stop: end after this text, or one of several.
        prefill_chunk_size: read the prompt in chunks of so many tokens: less memory, the same result.
        report_mass: measure the dropped attention mass: full attention runs beside sparse decoding.
        device: auto, cpu, cuda; for folders.
        on_text: called with each piece of text as it is made.

    Raises:
        ConfigError: values that cannot be, a prompt that leaves no room, a model that cannot measure.
    """
    _check(max_new_tokens, temperature, top_p, prefill_chunk_size)
    network, tokenizer = _opened(model, tokenizer, mode, num_blocks, device)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"].to(network.device)
    if not ids.shape[1]:
        raise ConfigError("prompt", "empty text", "at least one token")
    _check_room(network, ids.shape[1], max_new_tokens)
    cache = _cache(network, ids.shape[1] + max_new_tokens, report_mass)
    streamer = _Streamer(tokenizer, on_text)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    given: dict[str, Any] = {CACHE_NAME: cache}
    if stop:
        given |= {"stop_strings": stop, "tokenizer": tokenizer}
    with torch.no_grad(), _adaptive(network, num_blocks, max_dropped_mass, flavour):
        attention = attention_in_words(network)
        out: Tensor = network.generate(  # type: ignore[operator]  # mypy takes it for a submodule or tensor
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            prefill_chunk_size=prefill_chunk_size,
            streamer=streamer,
            **sampling,
            **given,
        )
    new = out.shape[1] - ids.shape[1]
    return Generated(
        text=tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=new,
        prefill_seconds=streamer.first - streamer.started,
        decode_seconds=streamer.last - streamer.first,
        attention=attention,
        dropped_mass=cache.dropped_mass(),
        blocks_taken=cache.blocks_taken(),
    )


class _Streamer(TextStreamer):
    """Hands on whole words as they are made, and notes the time of the first and the last token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.puts = on_text, 0
        self.started = self.first = self.last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """transformers puts the prompt first, then each token; it has waited for the device by then."""
        self.last = time.perf_counter()
        self.started = self.last if self.puts == 0 else self.started
        self.first = self.last if self.puts <= 1 else self.first
        self.puts += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text that no later token changes."""
        if self.on_text is not None and text:
            self.on_text(text)


def _check(max_new_tokens: int, temperature: float, top_p: float, chunk: int | None) -> None:
    if max_new_tokens < 1:
        raise ConfigError("--max-new-tokens", max_new_tokens, "at least 1")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ConfigError("--temperature, --top-p", f"{temperature}, {top_p}", "temperature >= 0 and 0 < top_p <= 1")
    if chunk is not None and chunk < 1:
        raise ConfigError("--prefill-chunk-size", chunk, "at least 1")


def _opened(
    model: str | Path | PreTrainedModel, tokenizer: Any, mode: str | None, num_blocks: int | None, device: str
) -> tuple[PreTrainedModel, Any]:
    from ssa.model.opening import set_attention

    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError("tokenizer", "None beside an opened model", "the model's tokenizer")
        return set_attention(model, mode=mode, num_blocks=num_blocks), tokenizer
    network = open_model(model, mode=mode, num_blocks=num_blocks, device=default_device(device))
    return network, tokenizer or begin_with_bos(load_tokenizer(str(model_folder(model))))


def _adaptive(
    network: PreTrainedModel, num_blocks: int | None, limit: float | None, flavour: str | None
) -> AbstractContextManager[object]:
    if limit is None:
        if flavour is not None:
            raise ConfigError("--flavour", repr(flavour), "--max-dropped-mass beside it")
        return nullcontext()
    if not isinstance(network, SSAForCausalLM):
        raise ConfigError("--max-dropped-mass", f"a model of type {network.config.model_type}", "a model of ours")
    return network.attention_mode(num_blocks=num_blocks, max_dropped_mass=limit, flavour=flavour)


def _check_room(network: PreTrainedModel, prompt: int, new: int) -> None:
    limit = int(network.config.get_text_config().max_position_embeddings)
    if prompt + new > limit:
        raise ConfigError("--max-new-tokens", f"{prompt} prompt + {new} new tokens", f"at most {limit} in all", "fewer")


def _cache(network: PreTrainedModel, rows: int, report_mass: bool) -> BlockCache:
    """For our models on a GPU a static one, whose steps are captured."""
    config: Any = network.config
    if not isinstance(network, SSAForCausalLM):
        if report_mass:
            raise ConfigError("--report-mass", f"a model of type {config.model_type}", "a model of ours")
        text = config.get_text_config()
        return BlockCache(text.num_hidden_layers, text.ssa_block_size)
    on_gpu = network.device.type == "cuda"
    cache = BlockCache.from_config(config, rows if on_gpu and not report_mass else None)
    cache.report_mass(report_mass)
    return cache
