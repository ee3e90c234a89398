"""Look at an architecture without its weights, and plan a delta in the explorer's page."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltahub
from deltahub.explorer import page
from deltahub.inspecting import to_svg

with torch.device("meta"):  # seven billion parameters, and not one of them in memory
    model = LlamaForCausalLM(LlamaConfig())

structure = deltahub.inspect(model)
print(structure)
assert structure.parameters > 6_000_000_000

folder = Path(tempfile.mkdtemp())
(folder / "llama.html").write_text(page(structure), encoding="utf-8")  # open it in any browser
(folder / "llama.svg").write_text(to_svg(structure), encoding="utf-8")
print(*folder.iterdir(), sep="\n")
