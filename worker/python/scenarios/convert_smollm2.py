"""SmolLM2 from its GGUF file into the folder that vLLM reads: ``convert_smollm2.py model.gguf folder``."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

source, target = Path(sys.argv[1]), Path(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(
    source.parent,
    gguf_file=source.name,
    dtype=torch.float32,
    quantization_config=GgufConfig(dequantize=True),
)
model.to(torch.bfloat16).save_pretrained(target)
AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
