//! Prompts for benchmarks: plain English of an exact number of tokens, unlike
//! every other prompt from its first words on.

use std::path::Path;

use anyhow::{Context, bail};
use terrace_worker::tokenizer::Tokenizer;

const WHO: [&str; 8] = [
    "The harbour master",
    "An old surveyor",
    "My neighbour",
    "The night librarian",
    "A young glassblower",
    "The ferry pilot",
    "Our schoolteacher",
    "The clockmaker",
];
const DID: [&str; 8] = [
    "wrote down",
    "carefully measured",
    "forgot about",
    "described to the council",
    "painted from memory",
    "argued over",
    "quietly repaired",
    "counted twice",
];
const WHAT: [&str; 8] = [
    "the height of the spring tide",
    "a row of copper kettles",
    "the shortest road across the marsh",
    "seven letters from the mountain station",
    "the sound of the northern bell",
    "an inventory of apple trees",
    "the tower's uneven shadow",
    "a map that nobody had asked for",
];
const WHEN: [&str; 8] = [
    "before the first frost.",
    "while the kettle boiled.",
    "on a Tuesday in late March.",
    "without telling anyone.",
    "because the bridge was closed.",
    "as the fog came in.",
    "for the third year in a row.",
    "and then went home.",
];

/// A prompt of exactly `tokens` tokens. Another `seed` gives another prompt.
///
/// # Errors
/// When the model's tokenizer cannot be used.
pub(super) fn tokens(model: &Path, seed: u64, tokens: usize) -> anyhow::Result<Vec<u32>> {
    let tokenizer = Tokenizer::open(model).with_context(|| format!("cannot use {}", model.display()))?;
    let mut text = format!("Chronicle number {seed}. ");
    let mut state = seed;
    // A sentence is more than eight tokens.
    for _ in 0..=tokens / 8 {
        for words in [WHO, DID, WHAT, WHEN] {
            text.push_str(words[draw(&mut state)]);
            text.push(' ');
        }
    }
    let mut found = tokenizer.encode(&text)?;
    if found.len() < tokens {
        bail!("a text of {} words has only {} tokens", text.split(' ').count(), found.len());
    }
    found.truncate(tokens);
    Ok(found)
}

/// A number below eight (SplitMix64's top bits).
fn draw(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    usize::try_from((mixed ^ (mixed >> 31)) >> 61).unwrap_or(0)
}

/// A seed that no earlier run used, so that nothing is cached by accident.
pub(super) fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.as_secs().wrapping_mul(1000)
}
