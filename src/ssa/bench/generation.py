"""The whole model: tokens per second of decoding and time of a prefill, sparse against full mode. On a CPU also the
attention of one layer, since there a small model's weights take the most of a step.

Random weights, and for decoding a cache filled with random keys: neither changes what is computed. Before anything is
timed, cached logits of a short prompt are compared with uncached ones, and captured steps with eager ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa.bench.runner import Options, Record, kernels, milliseconds, one_line
from ssa.bench.timing import Timing, measure
from ssa.errors import InputError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.cache import BlockCache
from ssa.model.graph import graph_of
from ssa.ops import SparseSpec
from ssa.ops.decode import decode_attention, full_decode_attention, update_pooled
from ssa.train.build import compile_layers

MODES = ("full", "sparse")
STEPS = 256  # rows beyond the context: what warming up and timing may add
Errors = dict[str, tuple[float, float]]  # of logits by name, with their limits
# relative error of logits: float32 sums in another order; bf16 rounds 16 layers' residuals to 3 digits each
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Model:
    """A shape of the shipped recipes, by its name there."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def config(self, context: int) -> SSAConfig:
        """Its configuration for a context, blocks 16 x 16."""
        return SSAConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=context,
        )


@dataclass(frozen=True)
class Case:
    """What is timed: ``kind`` "decode" (one token for each of ``batch`` sequences), "prefill" of ``context`` tokens, or
    "attention" (of one layer, decoding)."""

    model: Model
    kind: str
    context: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.kind} {self.context // 1024}K b{self.batch}"

    def describe(self) -> dict[str, object]:
        """The workload of a record."""
        model = self.model
        return {
            "name": self.name, "inputs": "random", "batch": self.batch, "documents": self.batch, "tokens": self.context,
            "heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim, "layers": model.layers,
            "block_size": 16, "num_blocks": 16,
        }  # fmt: skip


ONE_B = Model("1B", 2048, 8192, 16, 32, 2, 64, 128256)
SIXTY_FOUR_M = Model("64M", 768, 2048, 8, 16, 1, 64, 16384)
GPU_CASES = (Case(ONE_B, "decode", 65536, 16), Case(ONE_B, "decode", 131072), Case(ONE_B, "prefill", 131072))
CPU_CASES = (Case(SIXTY_FOUR_M, "attention", 32768), Case(SIXTY_FOUR_M, "decode", 32768))


def run(options: Options, cases: tuple[Case, ...] | None = None) -> list[Record]:
    """Records of every case and mode; those of a GPU or those of a CPU, unless ``cases`` are given."""
    cuda = options.device.type == "cuda"
    cases = cases or (GPU_CASES if cuda else CPU_CASES)
    records: list[Record] = []
    models: dict[Model, SSAForCausalLM] = {}
    errors: Errors | Exception = {}
    for case in cases:
        if case.kind == "attention":
            records += attention(case, options)
            continue
        if case.model not in models:
            models.clear()
            longest = max(c.context for c in cases if c.model == case.model)
            models[case.model] = build(case.model, longest + STEPS, options.device)
            errors = _checked(models[case.model])
        found = [_record(case, record) for record in _run(models[case.model], errors, case, options)]
        records += _reported(found, options)
        if cuda:
            torch.cuda.empty_cache()
    return records


def build(model: Model, context: int, device: torch.device) -> SSAForCausalLM:
    """Random weights: bf16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        built: torch.nn.Module = SSAForCausalLM(model.config(context))
    return cast("SSAForCausalLM", built.to(dtype).eval())


def _checked(model: SSAForCausalLM) -> Errors | Exception:
    """Once per model, before its layers are compiled."""
    try:
        return check(model)
    except Exception as error:
        return error


def _run(model: SSAForCausalLM, errors: Errors | Exception, case: Case, options: Options) -> Iterator[Record]:
    if isinstance(errors, Exception):
        yield from ({"mode": mode, **_failure(errors)} for mode in MODES)
        return
    if wrong := [f"{name}: {error:.1e} > {limit:.1e}" for name, (error, limit) in errors.items() if error > limit]:
        yield from ({"mode": mode, "status": "wrong", "reason": "; ".join(wrong)} for mode in MODES)
        return
    try:
        timed = (decoding if case.kind == "decode" else prefilling)(model, case)
    except Exception as error:  # the other cases still count
        yield from ({"mode": mode, **_failure(error)} for mode in MODES)
        return
    for mode in MODES:
        try:
            with torch.no_grad(), model.attention_mode(mode):
                timing, stages = timed(options)
            yield {
                "mode": mode, "status": "ok", "check": {"errors": {n: list(e) for n, e in errors.items()}},
                "timing": asdict(timing), "kernels": stages,
            }  # fmt: skip
        except Exception as error:
            yield {"mode": mode, **_failure(error)}


def _failure(error: Exception) -> Record:
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}


def _record(case: Case, record: Record) -> Record:
    mode = record.pop("mode")
    return {
        "id": f"{case.name}: {mode}", "workload": case.describe(), "family": "model", "direction": case.kind,
        "backend": mode, **record,
    }  # fmt: skip


def _reported(records: list[Record], options: Options) -> list[Record]:
    """The records, printed, each sparse one with the fastest full one's time over its own."""
    full = [(time, r["id"]) for r in records if r["backend"] != "sparse" and (time := milliseconds(r, wall=True))]
    for record in records:
        mine = milliseconds(record, wall=True)
        if record["backend"] == "sparse" and mine and full:
            record["ratio"] = {"value": min(full)[0] / mine, "baseline": min(full)[1]}
        options.say(one_line(record) + _per_second(record))
        for row in record.get("kernels", [])[:12]:
            options.say(f"    {row['ms']:.3f} ms in {row['calls']} x {row['name'][:90]}")
    return records


def _per_second(record: Record) -> str:
    time, work = milliseconds(record, wall=True), record["workload"]
    if time is None or record["direction"] == "attention":
        return ""
    tokens = work["batch"] * (1 if record["direction"] == "decode" else work["tokens"])
    return f", {1e3 * tokens / time:.0f} tokens/s"


# ---------------------------------------------------------------------- correctness
@torch.no_grad()
def check(model: SSAForCausalLM, prompt: int = 600, steps: int = 10) -> Errors:
    """Errors and limits in both modes: a cached step against the uncached pass, captured against eager steps.

    In float32, and judged by the row at three quarters of the errors: two ways to compute the same query may choose
    other ones among nearly equal blocks, which random weights have many of, in bfloat16 all the time and in float32 now
    and then. Full mode, which chooses nothing, is checked in bfloat16 too.
    """
    ids = torch.randint(model.config.vocab_size, (2, prompt + steps), device=model.device)
    dtype = model.dtype
    errors: Errors = {}
    if dtype != torch.float32:
        errors = {f"full {name}, {dtype}": x for name, x in _compared(model, ids, steps, "full").items()}
    model.float()
    try:
        for mode in MODES:
            errors |= {f"{mode} {name}": x for name, x in _compared(model, ids, steps, mode).items()}
    finally:
        torch.nn.Module.to(model, dtype)  # exact: every weight came from there
    return errors


def _compared(model: SSAForCausalLM, ids: Tensor, steps: int, mode: str) -> Errors:
    limit, prompt, rows = LIMITS[model.dtype], ids.shape[1] - steps, []
    with model.attention_mode(mode):
        for end in range(prompt + 1, ids.shape[1] + 1):  # each step after the same history, whose rows the pass wrote
            cache = BlockCache.from_config(model.config, ids.shape[1])
            expected = _logits(model(ids[:, :end], past_key_values=cache, logits_to_keep=1)).float()
            cache.crop(-1)
            got = _step(model, cache, ids[:, end - 1 : end]).float()
            rows.append((got - expected).norm(dim=-1) / expected.norm(dim=-1))
        errors = {"cached": (float(torch.cat(rows).flatten().quantile(0.75)), limit)}
        if model.device.type == "cuda":
            cache.crop(-steps)
            eager = _walk(ids[:, prompt:], partial(_step, model, cache))
            cache.crop(-steps)
            graph = graph_of(model, cache)
            errors["captured"] = (_error(_walk(ids[:, prompt:], graph.step), eager), limit)
    return errors


def _step(model: SSAForCausalLM, cache: BlockCache, ids: Tensor) -> Tensor:
    return _logits(model(ids, past_key_values=cache))


def _walk(ids: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([step(ids[:, i : i + 1]).clone() for i in range(ids.shape[1])], 1)


def _logits(out: object) -> Tensor:
    logits = getattr(out, "logits", None)
    assert isinstance(logits, Tensor)
    return logits


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# ---------------------------------------------------------------------- what is timed
def compile_around_attention(model: SSAForCausalLM, step: Callable[[], Tensor]) -> None:
    """On a GPU: compile the layers; their kernels between attention are many and small.

    Raises:
        InputError: ``step``'s logits change by more than rounding. Asked in full mode, where rounding flips no choice
            of blocks, which would hide an error.
    """
    if model.device.type != "cuda":
        return
    with model.attention_mode("full"):
        for layer in model.model.layers:  # another case may have compiled them
            layer.compiled = False
        plain = step()
        compile_layers(model)
        error, limit = _error(step(), plain), LIMITS[model.dtype]
    if error > limit:
        raise InputError("compiled layers", f"an error of {error:.1e}", f"at most {limit:.1e}")


Timed = Callable[[Options], tuple[Timing, list[Record]]]  # with the kernels of a step


def decoding(model: SSAForCausalLM, case: Case) -> Timed:
    """One greedy step of every sequence over one cache of random keys; on a GPU compiled and captured."""
    cache = random_cache(model, case)
    ids = torch.ones(case.batch, 1, dtype=torch.int64, device=model.device)

    def step() -> Tensor:
        logits = _step(model, cache, ids)
        cache.crop(case.context)
        return logits

    def timed(options: Options) -> tuple[Timing, list[Record]]:
        compile_around_attention(model, step)
        greedy = _greedy(model, cache, ids)
        timing = measure(greedy, options.device, 4 * options.budget_ms)
        stages = kernels(greedy, options.device)
        cache.crop(case.context)
        return timing, stages

    return timed


def _greedy(model: SSAForCausalLM, cache: BlockCache, ids: Tensor) -> Callable[[], object]:
    if model.device.type != "cuda":
        return lambda: _step(model, cache, ids).argmax(-1)
    graph = graph_of(model, cache)
    return lambda: graph.step(graph.greedy)


def random_cache(model: SSAForCausalLM, case: Case) -> BlockCache:
    """A static cache of ``context`` random tokens for every sequence, block means included."""
    cache = BlockCache.from_config(model.config, case.context + STEPS)
    cache.positions.advance(case.batch, case.context, model.device)
    shape = (case.batch, case.context, case.model.kv_heads, case.model.head_dim)
    for layer in cache.held:
        layer.append(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv"))
        layer.pooled()
    return cache


def prefilling(model: SSAForCausalLM, case: Case) -> Timed:
    """A prompt into an empty cache, logits of its last token. On a GPU the layers are compiled around attention."""
    ids = torch.randint(model.config.vocab_size, (case.batch, case.context), device=model.device)

    def timed(options: Options) -> tuple[Timing, list[Record]]:
        cache = BlockCache.from_config(model.config, case.context)

        def step() -> Tensor:
            cache.reset()
            return _logits(model(ids, past_key_values=cache, logits_to_keep=1))

        compile_around_attention(model, step)
        return measure(step, options.device, options.budget_ms), []

    return timed


@torch.no_grad()
def attention(case: Case, options: Options) -> list[Record]:
    """One layer's attention of a new token: ours in both modes, and PyTorch's with the heads of a group as queries."""
    model, dtype = case.model, torch.bfloat16 if options.device.type == "cuda" else torch.float32
    q = torch.randn(case.batch, 1, model.heads, model.head_dim, dtype=dtype, device=options.device)
    k, v = (
        torch.randn(case.batch, case.context, model.kv_heads, model.head_dim, dtype=dtype, device=options.device)
        for _ in "kv"
    )
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=options.device)
    spec, every = SparseSpec(), SparseSpec(16, -(-case.context // 16))
    pooled = k.new_empty(case.batch, every.num_blocks, *k.shape[2:])
    update_pooled(pooled, k, lengths, case.context, None, 16)

    def sdpa() -> Tensor:
        grouped = q.view(case.batch, model.kv_heads, -1, model.head_dim)
        out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2))
        return out.view_as(q)

    calls: dict[str, Callable[[], Tensor]] = {
        "full": lambda: full_decode_attention(q, k, v, lengths),
        "sdpa": sdpa,
        "sparse": lambda: decode_attention(q, k, v, pooled, lengths, spec),
    }
    expected, records = sdpa(), []
    for mode, call in calls.items():
        got = decode_attention(q, k, v, pooled, lengths, every) if mode == "sparse" else call()  # all blocks: full
        error, limit = _error(got, expected), LIMITS[dtype]
        record: Record = {"mode": mode, "status": "wrong", "reason": f"error {error:.1e} > {limit:.1e}"}
        if error <= limit:
            timing = asdict(measure(call, options.device, 4 * options.budget_ms))
            record = {"mode": mode, "status": "ok", "check": {"errors": {"out": [error, limit]}}, "timing": timing}
        records.append(_record(case, record))
    return _reported(records, options)
