"""A Llama checkpoint becomes an SSA model that computes the same: ``python examples/conversion.py FOLDER``."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ssa.model import load_model
from ssa.model.convert import convert_checkpoint

folder = Path(sys.argv[1])
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llama")  # stands for a checkpoint that you have

done = convert_checkpoint(folder / "llama", folder / "ssa", block_size=16, num_blocks=4)
print(f"{done.parameters:,} parameters; logits in full mode differ by at most {done.difference:.1e}")

model, ids = load_model(folder / "ssa"), torch.randint(256, (1, 200))
with torch.no_grad(), model.attention_mode("sparse"):
    print(f"sparse logits of the last token: {model(ids).logits[0, -1, :4].tolist()}")
# Now `ssa train RECIPE --from` continues with SSA, so that the sparse mode loses nothing.

convert_checkpoint(folder / "ssa", folder / "plain", to="plain")  # for software that does not know this package
