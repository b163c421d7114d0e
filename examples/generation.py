"""Continue a prompt in both modes: ``python examples/generation.py RUN``, a run folder or model folder."""

import sys

import ssa

for mode in ("full", "sparse"):
    done = ssa.generate(sys.argv[1], "def parse(", mode=mode, max_new_tokens=20, device="cpu")
    print(f"[{done.attention}, {done.new_tokens} tokens] {done.text!r}")
