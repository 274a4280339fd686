"""A small model with random weights whose layers see all tokens or a window of them, in turns:
``hybrid_model.py TOKENIZER_FOLDER FOLDER``. It says nothing of sense; what matters is that it always says the same."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

LAYERS, WINDOW = 6, 128

source, target = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(source)
torch.manual_seed(1)
config = Gemma3TextConfig(
    vocab_size=len(tokenizer),
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    query_pre_attn_scalar=64,
    sliding_window=WINDOW,
    layer_types=["full_attention" if layer % 2 else "sliding_attention" for layer in range(LAYERS)],
    max_position_embeddings=2048,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
tokenizer.save_pretrained(target)
