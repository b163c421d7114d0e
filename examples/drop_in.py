"""Our attention in a stock transformers model: inference in either mode, one training step with both streams."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ssa
from ssa.train.streams import draw_stream

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
config.num_key_value_heads = 2
model = AutoModelForCausalLM.from_config(config)  # or from_pretrained("a folder", attn_implementation="ssa")
ssa.configure(model, mode="sparse", block_size=16, num_blocks=4)
ids = torch.randint(256, (2, 256))

# Inference: mode and budget change between two calls.
model.eval()
with torch.no_grad():
    sparse = model(ids).logits
    with ssa.attention_mode(model, "full"):
        full = model(ids).logits
print(f"logits of the two modes differ by at most {(full - sparse).abs().max():.3f}")

# Training: the stream of a step is drawn from seed and step; the alignment reaches the weights by itself.
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(1, 4):
    stream = draw_stream(seed=0, step=step, full_probability=0.5)
    loss = model(ids, labels=ids, stream=stream).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}, {stream}: loss {loss:.3f}, alignment {ssa.last_alignment(model)['alignment']:.4f}")
