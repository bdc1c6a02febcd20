"""Optimise a Mixtral, see what was found, train a step, take the original back: python examples/quickstart.py."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moefx

config = MixtralConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
model = MixtralForCausalLM(config)  # any PyTorch model; moefx knows no model by name
batch = {"input_ids": torch.randint(256, (4, 32))}

moefx.optimize(model, batch)  # the same object, with the same parameters, state_dict and hooks
print(moefx.explain(model))  # what was found and how it was verified, and what was declined and why

loss = model(**batch, labels=batch["input_ids"]).loss
loss.backward()
print(f"loss {loss.item():.4f}")

moefx.restore(model)
