"""``ssa doctor``: what this machine has, and which backend serves which operation."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from tyro.conf import arg


def run(argv: list[str]) -> int:
    """Print the environment, optional packages and the backend choice with reasons; exit code 0."""
    return tyro.cli(doctor, args=argv, prog="ssa doctor")


def doctor(
    recipe: Annotated[
        str,
        tyro.conf.Positional,
        arg(metavar="[RECIPE]", help="YAML file or shipped name: tell its size, and explain its layers"),
    ] = "",
    /,
    heads: Annotated[int, arg(help="query heads of the layer to explain")] = 32,
    kv_heads: Annotated[int, arg(help="KV heads")] = 2,
    head_dim: Annotated[int, arg(help="head dimension")] = 64,
    block_size: Annotated[int, arg(help="tokens per block")] = 16,
    num_blocks: Annotated[int, arg(help="blocks per query")] = 16,
) -> int:
    """What this machine has, which backend serves which operation on it and why, and what a recipe needs."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from ssa._version import __version__
    from ssa.environment import commit, machine, package_version
    from ssa.ops import explain
    from ssa.ops.dispatch import OPERATIONS

    size = None
    if recipe:
        from ssa.train.recipe_file import load_recipe
        from ssa.train.summary import describe_size

        settings = load_recipe(recipe)
        size, model = describe_size(settings), settings.model
        heads, kv_heads, head_dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
        block_size, num_blocks = model.block_size, model.num_blocks
    console = Console()
    facts = machine()
    console.print(f"[bold]ssa {__version__}[/bold]  commit {commit() or 'unknown'}  {sys.executable}")
    table = Table(show_header=False, box=None)
    for key in ("platform", "python", "processor", "cores", "memory_gib", "gpu", "gpu_count", "gpu_memory_gib", "cuda"):
        table.add_row(key.replace("_", " "), str(facts[key]))
    console.print(table)
    packages = [*facts["packages"], "matplotlib", "jinja2", "zstandard", "lm-eval", "fastapi", "tensorboard"]
    missing = [name for name in packages if package_version(name) is None]
    console.print("packages  " + ", ".join(f"{n} {package_version(n)}" for n in packages if n not in missing))
    if missing:
        console.print(
            f"missing   {', '.join(missing)}   (pip install 'sparse-sparse-attention\\[eval,harness,serve,track]')"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = f"{heads}/{kv_heads} heads, D {head_dim}, blocks {num_blocks} x {block_size}, {str(dtype)[6:]} on {device}"
    console.print(f"\n[bold]backends[/bold] for {shape}")
    for operation in OPERATIONS:
        found = explain(
            operation,
            device=device,
            dtype=dtype,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            num_blocks=num_blocks,
        )
        console.print(str(found), highlight=False)
    if size is not None:
        console.print(f"\n[bold]recipe[/bold] {recipe}\n{size}", highlight=False, soft_wrap=True)
    return 0
