"""``ssa convert``: a checkpoint in another form, the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg


def run(argv: list[str]) -> int:
    """Parse flags, convert, say what was written; exit code 0."""

    def command(
        source: Annotated[str, tyro.conf.Positional],
        out: Annotated[Path, tyro.conf.Positional],
        to: Annotated[Literal["ssa", "stock", "plain", "official"], arg(help="form to write")] = "ssa",
        from_official: Annotated[bool, arg(help="insist that SOURCE is a published llama-nsa checkpoint")] = False,
        mode: Annotated[Literal["full", "sparse"] | None, arg(help="inference mode; default the source's")] = None,
        method: Annotated[Literal["full", "moba", "ssa"] | None, arg(help="how SOURCE was trained")] = None,
        block_size: Annotated[int | None, arg(help="tokens per block")] = None,
        num_blocks: Annotated[int | None, arg(help="blocks per query")] = None,
        selection_rule: Annotated[Literal["exact", "official"] | None, arg(help="how blocks are ranked")] = None,
        check: Annotated[bool, arg(help="compare the logits before and after")] = True,
        download: Annotated[bool, arg(help="allow fetching SOURCE from the hub")] = False,
    ) -> int:
        """Convert a checkpoint: a Llama, Mistral, Qwen2 or Qwen3 folder or cached hub name, a published SSA
        checkpoint (llama-nsa), or a model of ours. Forms: ssa (our model class, trained by `ssa train --from OUT`),
        stock (the same architecture with attn_implementation "ssa" in its configuration), plain (an ungated model of
        ours as Llama or Qwen), official (a gated model of ours in the published form)."""
        from ssa.model.convert import convert_checkpoint

        named: dict[str, Any] = {"block_size": block_size, "num_blocks": num_blocks, "selection_rule": selection_rule}
        named |= {"method": method, ("mode" if to == "stock" else "inference_mode"): mode}
        settings = {key: value for key, value in named.items() if value is not None}
        done = convert_checkpoint(
            source, out, to=to, official=from_official, check=check, download=download, **settings
        )
        print(f"{done.folder}: {done.tensors} tensors, {done.parameters:,} parameters")
        if done.difference is not None:
            print(f"logits in full mode differ by at most {done.difference:.1e} (largest logit {done.scale:.1f})")
        return 0

    return tyro.cli(command, args=argv, prog="ssa convert")
