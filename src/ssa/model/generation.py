"""How transformers' ``generate`` drives our model: which cache it gets, what a step is given, captured steps.

Works with transformers that call the cache ``past_key_values`` (up to 5.23) and ``cache`` (from 5.24 on).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import GenerationMixin

from ssa.errors import InputError
from ssa.model.cache import BlockCache
from ssa.model.graph import graph_of

if TYPE_CHECKING:
    from ssa.model.modeling import SSAForCausalLM

CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
STATIC, DYNAMIC = ("static",), (None, "dynamic", "dynamic_full")


class SSAGenerationMixin(GenerationMixin):
    """``generate`` with a :class:`BlockCache`: dynamic, or static with ``cache_implementation="static"``."""

    def _prepare_cache_for_generation(  # type: ignore[override]  # its annotation says bool; it returns nothing
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> None:
        """Put a cache into ``model_kwargs`` unless the caller gave one or wants none."""
        kind = generation_config.cache_implementation
        given = next(
            (model_kwargs[n] for n in (CACHE_NAME, "past_key_values") if model_kwargs.get(n) is not None), None
        )
        if given is not None:
            if kind is not None:
                raise InputError("generate", f"a cache and cache_implementation={kind!r}", "one of them")
            return
        if generation_config.use_cache is False:
            return
        if kind not in STATIC + DYNAMIC:
            raise InputError("generate.cache_implementation", repr(kind), f"one of {STATIC + DYNAMIC}")
        if kind in STATIC:
            max_cache_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        config = cast("SSAForCausalLM", self).config
        model_kwargs[CACHE_NAME] = BlockCache.from_config(config, max_cache_length if kind in STATIC else None)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: BlockCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: BlockCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step: the newest ids (or the embeddings of the first step), the padding, the cache.

        Positions follow from the padding and the cache, so they are not handed on.
        """
        held = cache if past_key_values is None else past_key_values
        x = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        if next_sequence_length is not None:
            x = x[:, -next_sequence_length:]
        name = "inputs_embeds" if x is inputs_embeds or x.is_floating_point() else "input_ids"
        drop = ("position_ids", "cache_position", "labels", "next_sequence_length")
        given = {key: value for key, value in kwargs.items() if key not in drop}
        return {name: x.contiguous(), "past_key_values": held, "attention_mask": attention_mask, **given}

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Whether steps are replayed as CUDA graphs: a static cache on a GPU, unless ``disable_compile``."""
        held = model_kwargs.get(CACHE_NAME)
        on_gpu = cast("SSAForCausalLM", self).device.type == "cuda"
        return (
            on_gpu
            and isinstance(held, BlockCache)
            and bool(held.positions.capacity)
            and not generation_config.disable_compile
        )

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """The forward pass with captured steps; transformers asks for it after the criteria above."""
        return self._captured_call

    def _captured_call(self, **inputs: Any) -> Any:
        from ssa.model.modeling import SSAOutput

        model, held, ids = cast("SSAForCausalLM", self), inputs["past_key_values"], inputs.get("input_ids")
        place = held.positions
        eager = held.mass is not None or model.config.max_dropped_mass is not None  # adaptive budgets are not captured
        if ids is None or ids.shape[1] != 1 or not place.length or not place.begun or eager:
            return model(**inputs)
        return SSAOutput(logits=graph_of(model, held).step(ids), cache=held)
