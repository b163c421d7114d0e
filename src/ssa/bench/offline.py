"""What a call would launch on an NVIDIA GPU, compiled here without one: registers, memory, instructions of each loop.

    python -m ssa.bench.offline [selection selection-long sparse decode ...]

A scheduler issues one instruction per clock, and an exponential of a warp takes the exponential unit 8 clocks: where
one of these bounds a kernel, the counts predict its time. And a kernel that does not compile, or spills registers in
its loop, is found on any machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


class Loop(NamedTuple):
    """Instructions of a warp in one turn; ``spills``: reads and writes of registers that were put into memory."""

    instructions: int
    exponentials: int
    shuffles: int
    matrix: int
    spills: int


class Compiled(NamedTuple):
    """A kernel as it would be launched.

    Attributes:
        name: of the kernel.
        warps: of a program.
        registers: of a thread.
        stack: bytes of a thread's memory for spilled registers.
        shared: bytes of a program's shared memory.
        instructions: of the whole code.
        loops: innermost and outer, in the order of the code.
    """

    name: str
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: int
    loops: tuple[Loop, ...]


def compiled(call: Callable[[], Any], capability: int = 90) -> list[Compiled]:
    """The kernels that ``call`` launches, in order, each once; the call runs on CPU tensors and computes nothing.

    Args:
        call: runs operations of a Triton backend, which must be called directly: the public ones refuse CPU tensors.
        capability: compute capability times 10 of the GPU that is compiled for.

    Raises:
        Exception: what the compiler says of a kernel that does not compile.
    """
    from triton.runtime.jit import JITFunction

    found: dict[Any, Compiled] = {}

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {key: value for key, value in named.items() if key not in kernel.arg_names and value is not None}
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values |= {key: value for key, value in named.items() if key in kernel.arg_names}
        source, key = _source(kernel, values)
        key = (kernel.fn.__module__, kernel.fn.__name__, key, tuple(sorted(options.items())))
        if key not in found:
            found[key] = _compile(source, kernel.fn.__name__, options, capability)

    with patch.object(JITFunction, "run", run):
        call()
    return list(found.values())


def _source(kernel: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """The kernel's source for arguments like ``values``, specialized as at a launch, and what it is specialized on."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value, special = values[parameter.name], not parameter.do_not_specialize
        if isinstance(value, Tensor):
            kind, aligned = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            kind, aligned = "i1", False
        elif isinstance(value, int):
            kind, aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        else:
            kind, aligned = "fp32", False
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            kind, constants[place,] = "constexpr", value
        elif special and aligned:
            attributes[place,] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    key = (*signature.values(), *((k, str(v)) for k, v in constants.items()), *attributes)
    return ASTSource(kernel, signature, constants, attributes), key


def _compile(source: Any, name: str, options: dict[str, Any], capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(built.asm["cubin"])
        usage = _said(tools / "cuobjdump", "-res-usage", file)
        loops, count = _loops(_said(tools / "nvdisasm", "-c", file))
    registers, stack = (int(x) for x in re.findall(r"REG:(\d+).*?STACK:(\d+)", usage)[-1])
    return Compiled(name, options.get("num_warps", 4), registers, stack, built.metadata.shared, count, loops)


def _said(*command: Any) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def _loops(code: str) -> tuple[tuple[Loop, ...], int]:
    """Stretches of code between a label and a jump back to it, and the number of all instructions."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops = []
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*);", line):
            names.append(instruction[1])
            target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if instruction[1] == "BRA" and target and (first := labels.get(target[1])) is not None:
                inside = Counter(names[first:])
                kinds = ("MUFU",), ("SHFL",), ("HGMMA", "HMMA", "QGMMA"), ("LDL", "STL")
                loops.append(Loop(len(names) - first, *(sum(inside[name] for name in kind) for kind in kinds)))
    return tuple(loop for loop in loops if loop.instructions > 2), len(names)  # code ends with a jump to itself


# ---------------------------------------------------------------------- cases
ONE, EIGHT = (32, 2, 64), (32, 8, 128)  # heads, KV heads, head dim of the 1B and the 8B shape
SPEC = SparseSpec(16, 16)


def inputs(shape: tuple[int, int, int], tokens: int, rows: int = 1) -> tuple[Tensor, Tensor, DocumentLayout]:
    """Queries and keys of which only shapes and addresses count."""
    H, K, D = shape
    q, k = (torch.empty(rows, tokens, heads, D, dtype=torch.bfloat16) for heads in (H, K))
    return q, k, DocumentLayout.single(rows, tokens)


def select(shape: tuple[int, int, int], tokens: int, **options: Any) -> Callable[[], Any]:
    from ssa.ops.selection import triton as triton_selection

    q, k, layout = inputs(shape, tokens)
    return lambda: triton_selection.select_blocks(q, k, SparseSpec(16, 16, **options), layout, 0.125)


def attend(shape: tuple[int, int, int], tokens: int) -> Callable[[], Any]:
    """Forward and backward."""
    from ssa.ops.sparse import triton  # noqa: F401 - declares the operations

    q, k, layout = inputs(shape, tokens)
    blocks = torch.zeros(1, tokens, k.shape[2], SPEC.num_blocks, dtype=torch.int32)

    def call() -> None:
        results = torch.ops.ssa.sparse_forward(q, k, k, blocks, layout.lengths, 16, 0.125)
        torch.ops.ssa.sparse_backward(q, q, k, k, blocks, *results, layout.lengths, 16, 0.125)

    return call


def step(shape: tuple[int, int, int], batch: int, capacity: int) -> Callable[[], Any]:
    """One token of every sequence against its cache, as on a GPU of 132 processors with dependent launches."""
    from ssa.ops.decode import triton as triton_decode

    H, K, D = shape
    q = torch.empty(batch, 1, H, D, dtype=torch.bfloat16)
    k = torch.empty(batch, capacity, K, D, dtype=torch.bfloat16)
    pooled, lengths = k[:, ::16].contiguous(), torch.zeros(batch, dtype=torch.int32)
    as_on_gpu: dict[str, Any] = {
        "_processors": lambda index: 132,
        "_dependent": lambda index, when=2: (when, {"launch_pdl": True}),
    }

    def call() -> None:
        triton_decode.forget_launches()
        with patch.multiple(triton_decode, **as_on_gpu):
            triton_decode.decode_attention(q, k, k, pooled, lengths, None, SPEC, 0.125, False)
        triton_decode.forget_launches()

    return call


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "selection": lambda: select(ONE, 8192),
    "selection-long": lambda: select(ONE, 32768),
    "selection-8b": lambda: select(EIGHT, 8192),
    "selection-official": lambda: select(ONE, 8192, rule="official"),
    "sparse": lambda: attend(ONE, 8192),
    "sparse-8b": lambda: attend(EIGHT, 8192),
    "decode": lambda: step(ONE, 1, 131072),
    "decode-batch": lambda: step(ONE, 32, 131072),
    "decode-8b": lambda: step(EIGHT, 16, 131072),
}


def main() -> None:
    """Print all cases, or those named."""
    parser = argparse.ArgumentParser(prog="python -m ssa.bench.offline", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; default all")
    for name in parser.parse_args().cases or CASES:
        if name not in CASES:
            parser.error(f"case: got {name!r}; expected one of {', '.join(CASES)}")
        print(name)
        for x in compiled(CASES[name]()):
            print(
                f"  {x.name}: {x.warps} warps, {x.registers} registers, {x.stack} B spilled, "
                f"{x.shared / 1024:.0f} KiB shared, {x.instructions} instructions"
            )
            for loop in x.loops:
                told = ", ".join(f"{value} {key}" for key, value in loop._asdict().items() if value)
                print(f"    loop: {told}")


if __name__ == "__main__":
    main()
