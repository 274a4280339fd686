//! The reference replay, with the live core, against a model that shares no code with it.

use indicatif::ProgressBar;
use terrace_core::Policy;

use super::*;

/// Tokens of a block in these traces.
const TOKENS: u64 = 16;

/// A trace of conversations that grow and come back, by a fixed sequence of numbers.
pub(crate) fn conversations(seed: u64, requests: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut known: Vec<Vec<u64>> = vec![vec![1, 2]];
    let mut last = 2;
    let mut text = String::new();
    for request in 0..requests {
        let place = usize::try_from(random(known.len() as u64)).unwrap();
        let mut blocks = if random(4) == 0 { vec![1, 2] } else { known[place].clone() };
        for _ in 0..random(6) {
            last += 1;
            blocks.push(last);
        }
        let input = blocks.len() as u64 * TOKENS - random(2) * 3;
        let session = random(12);
        text += &format!(
            "{{\"timestamp\": {}, \"input_length\": {input}, \"output_length\": 20, \"hash_ids\": {blocks:?}, \"session_id\": {session}}}\n",
            request * 700
        );
        known.push(blocks);
        if known.len() > 30 {
            known.remove(0);
        }
    }
    text
}

pub(crate) fn trace_of(text: &str) -> Trace {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Trace::read(file.path(), None, Some(16)).unwrap()
}

/// Least recently used, by a list that is searched: hit blocks and hit tokens.
fn naive_lru(trace: &Trace, capacity: usize) -> (u64, u64) {
    let mut coldest_first: Vec<u32> = Vec::new();
    let (mut blocks, mut tokens) = (0, 0);
    for ask in &trace.asks {
        let prompt = trace.numbers(ask);
        let hits = prompt.iter().take_while(|block| coldest_first.contains(block)).count() as u64;
        blocks += hits;
        tokens += (hits * TOKENS).min(ask.input);
        for block in prompt.iter().rev() {
            coldest_first.retain(|other| other != block);
            coldest_first.push(*block);
        }
        let surplus = coldest_first.len().saturating_sub(capacity);
        coldest_first.drain(..surplus);
    }
    (blocks, tokens)
}

/// The live core could evict something else than the least recently used leaf,
/// and every figure of the simulator would be of another policy.
#[test]
fn the_live_core_hits_what_lru_hits() {
    for seed in 0..6 {
        let trace = trace_of(&conversations(seed, 400));
        for capacity in [0, 1, 3, 10, 40, 100, 100_000] {
            let outcome = replay(&trace, capacity, Policy::Lru, &Profile::REFERENCE, &ProgressBar::hidden());
            let expected = naive_lru(&trace, usize::try_from(capacity).unwrap());
            assert_eq!(
                (outcome.block_hits.sum(), outcome.token_hits.sum()),
                expected,
                "seed {seed}, {capacity} blocks"
            );
            assert_eq!(outcome.requests, 400);
            assert!(outcome.saved_seconds <= outcome.seconds);
        }
    }
}

/// A cache that holds everything hits every block but the first of its kind.
#[test]
fn without_evictions_only_first_uses_miss() {
    let trace = trace_of(&conversations(9, 300));
    let outcome = replay(&trace, trace.distinct(), Policy::Lru, &Profile::REFERENCE, &ProgressBar::hidden());
    assert_eq!(outcome.block_hits.sum(), trace.references() - trace.distinct());
    assert_eq!((outcome.evictions_pinned, outcome.throttled), (0, 0));
}
