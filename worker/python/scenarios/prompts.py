"""Prompts of plain text: the same for the same seed, and for no other."""

import random
from typing import Any

QUESTION = "Question: What is the capital of France? Answer: The capital of France is"
SENTENCES = [
    "The river rises in the hills and runs through three old towns before it reaches the sea.",
    "A baker who wants good bread must wait for the dough, and there is no way to hurry it.",
    "Most of the letters in the archive were written in winter, when the roads were closed.",
    "Sailors learned to read the colour of the water long before they had charts of the coast.",
    "The train to the capital leaves at seven in the morning and arrives a little after noon.",
    "Glass is made of sand, ash and lime, and it takes a great deal of heat to melt them.",
    "In the garden behind the school the children grow beans, onions and a few sunflowers.",
    "The clock in the market square has been ten minutes late for as long as anybody remembers.",
]
TOKENS_PER_LINE = 26


def prompt(seed: int, tokens: int, *, shared: int = 0, shared_seed: int = 0) -> str:
    """About so many tokens, with an end that any model can go on from. The first ``shared`` of them are those of
    ``shared_seed``."""
    lines = [*_lines(shared_seed, shared), *_lines(seed, tokens - shared)]
    return "\n".join([*lines, QUESTION])


def exact_prompt(tokenizer: Any, seed: int, tokens: int) -> list[int]:
    """The last tokens of such a text, so many."""
    text: list[int] = tokenizer.encode(prompt(seed, tokens))
    assert len(text) >= tokens
    return text[-tokens:]


def _lines(seed: int, tokens: int) -> list[str]:
    chosen = random.Random(seed)
    count = max(1, tokens // TOKENS_PER_LINE) if tokens > 0 else 0
    return [f"Note {chosen.randrange(10**6)}: {chosen.choice(SENTENCES)}" for _ in range(count)]
