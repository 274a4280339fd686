//! The engine gives the same bits however the work is cut.

use std::path::PathBuf;

use super::*;
use crate::chat::Message;
use crate::kernels::memory::WriteBytes;
use crate::kv::BLOCK_TOKENS;
use crate::sampler::{Sampler, Sampling};
use crate::tiny::TinyModel;
use crate::tokenizer::Tokenizer;

fn tiny(threads: usize, isa: Isa) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    TinyModel::default().write(&path).unwrap();
    Model::open_with(&path, ModelOptions { threads, isa }).unwrap()
}

fn prompt(len: usize) -> Vec<u32> {
    (0..).map(|at: u32| at * 37 % 250).take(len).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|value| value.to_bits()).collect()
}

/// Computes the tokens in pieces of the given lengths, the last one repeated,
/// behind what the sequence holds; returns the last scores' bits.
fn compute(model: &Model, kv: &mut KvSequence, tokens: &[u32], pieces: &[usize]) -> Vec<u32> {
    let mut scratch = Scratch::new();
    let mut rest = &tokens[kv.len()..];
    let mut pieces = pieces.iter().copied();
    let mut piece = 1;
    kv.reserve_private(tokens.len());
    while !rest.is_empty() {
        piece = pieces.next().unwrap_or(piece);
        let (now, after) = rest.split_at(piece.min(rest.len()));
        let outcome = model.forward(&mut scratch, now, kv, WantLogits::Last, &AtomicBool::new(false));
        assert_eq!(outcome.unwrap(), Outcome::Done);
        rest = after;
    }
    bits(scratch.logits(0).unwrap())
}

fn blocks(kv: &KvSequence) -> Vec<Vec<u8>> {
    (0..kv.blocks()).map(|index| kv.block_to_vec(index).unwrap()).collect()
}

// The promise of the engine: however a prompt is cut, the scores and the blocks
// are the same bits. A sum whose order depends on the batch breaks it.
#[test]
fn every_cut_gives_the_same_bits() {
    let model = tiny(2, Isa::detect());
    let tokens = prompt(75);
    let mut whole = KvSequence::new(model.geometry());
    let expected = compute(&model, &mut whole, &tokens, &[75]);
    assert!(expected.iter().any(|value| f32::from_bits(*value).abs() > 1e-3), "scores say something");
    for pieces in [&[1][..], &[16], &[7, 3, 13], &[2, 24, 5, 12, 1], &[64, 11]] {
        let mut kv = KvSequence::new(model.geometry());
        assert_eq!(compute(&model, &mut kv, &tokens, pieces), expected, "pieces {pieces:?}");
        assert_eq!(blocks(&kv), blocks(&whole), "blocks of pieces {pieces:?}");
    }
}

// Equal bits prove nothing if all of them are wrong: compare the scores with
// the same model in f64, written without any of our kernels. What is left is the
// rounding of K and V to f16.
#[test]
fn scores_match_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    for (heads, kv_heads) in [(6, 2), (4, 4), (10, 2)] {
        TinyModel { heads, kv_heads, ..TinyModel::default() }.write(&path).unwrap();
        let model = Model::open(&path).unwrap();
        let tokens = prompt(37);
        let expected = reference::scores(&path, &tokens);
        let found = compute(&model, &mut KvSequence::new(model.geometry()), &tokens, &[37]);
        let scale = expected.iter().map(|score| score.abs()).fold(0.0, f64::max);
        for (found, expected) in found.iter().zip(&expected) {
            let error = (f64::from(f32::from_bits(*found)) - expected).abs() / scale;
            assert!(
                error < 2e-3,
                "{heads} over {kv_heads} heads: {expected} became {}",
                f32::from_bits(*found)
            );
        }
    }
}

// A prefix from the store must be as good as a computed one: copy the first
// blocks into fresh memory, sealed, and compute the rest behind them.
#[test]
fn prefix_from_blocks_gives_the_same_bits() {
    let model = tiny(2, Isa::detect());
    let tokens = prompt(70);
    let mut whole = KvSequence::new(model.geometry());
    let expected = compute(&model, &mut whole, &tokens, &[70]);
    for count in 1..=4 {
        let mut kv = KvSequence::new(model.geometry());
        for index in 0..count {
            let mut copy = WriteBytes::private(model.geometry().block_bytes());
            copy.copy_from(&whole.block_to_vec(index).unwrap());
            kv.push_read(copy.freeze()).unwrap();
        }
        assert_eq!(compute(&model, &mut kv, &tokens, &[70]), expected, "{count} blocks from the store");
        assert_eq!(blocks(&kv), blocks(&whole));
    }
}

// A prompt that is known whole has no scores: its last token is computed again
// over sealed blocks, must give the same scores, and must not touch them.
#[test]
fn full_hit_computes_one_token_again() {
    let model = tiny(1, Isa::detect());
    let tokens = prompt(3 * BLOCK_TOKENS);
    let mut kv = KvSequence::new(model.geometry());
    let expected = compute(&model, &mut kv, &tokens, &[48]);
    let before = blocks(&kv);
    for index in 0..3 {
        assert!(kv.is_sealable(index));
        assert!(kv.freeze(index).is_some());
        assert!(!kv.is_sealable(index));
    }
    kv.rewind(47);
    assert_eq!(compute(&model, &mut kv, &tokens, &[1]), expected);
    assert_eq!(blocks(&kv), before);
}

// Sequences in one pass must not see each other: run a chunk, two decodes and a
// prefix together and compare each with itself alone.
#[test]
fn batch_gives_the_same_bits() {
    let model = tiny(2, Isa::detect());
    let lengths = [40usize, 1, 17, 1];
    let known = [0usize, 20, 16, 63];
    let prompts: Vec<Vec<u32>> = (0u32..4)
        .zip(known.iter().zip(lengths))
        .map(|(at, (known, length))| prompt(known + length).iter().map(|token| token + at).collect())
        .collect();
    let mut alone = Vec::new();
    let mut sequences = Vec::new();
    for (tokens, known) in prompts.iter().zip(known) {
        let mut kv = KvSequence::new(model.geometry());
        alone.push(compute(&model, &mut kv, tokens, &[64]));
        kv.rewind(known);
        sequences.push(kv);
    }
    let mut scratch = Scratch::new();
    let mut steps: Vec<Step<'_>> = sequences
        .iter_mut()
        .zip(&prompts)
        .map(|(kv, tokens)| Step { tokens: &tokens[kv.len()..], kv, logits: WantLogits::Last })
        .collect();
    steps[2].logits = WantLogits::No;
    let outcome = model.forward_batch(&mut scratch, &mut steps, &AtomicBool::new(false)).unwrap();
    assert_eq!(outcome, Outcome::Done);
    for (step, expected) in alone.iter().enumerate() {
        match scratch.logits(step) {
            Some(logits) => assert_eq!(bits(logits), *expected, "sequence {step}"),
            None => assert_eq!(step, 2, "only one step wanted no scores"),
        }
    }
}

// Blocks of one machine continue on another with other instructions or another
// number of threads: run each and compare bits with the portable one.
#[test]
fn threads_and_instructions_give_the_same_bits() {
    let tokens = prompt(50);
    let run = |threads, isa| {
        let model = tiny(threads, isa);
        let mut kv = KvSequence::new(model.geometry());
        let logits = compute(&model, &mut kv, &tokens, &[24, 9, 2, 12, 3]);
        (logits, blocks(&kv))
    };
    let expected = run(1, *Isa::available().last().unwrap());
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            assert!(run(threads, isa) == expected, "{isa:?} with {threads} threads differs");
        }
    }
}

// A cancelled pass must leave the sequence as long as it was, and the tokens
// must come out right when they are computed afterwards.
#[test]
fn cancelled_pass_leaves_the_sequence() {
    let model = tiny(1, Isa::detect());
    let tokens = prompt(20);
    let mut kv = KvSequence::new(model.geometry());
    kv.reserve_private(32);
    let mut scratch = Scratch::new();
    let outcome = model.forward(&mut scratch, &tokens, &mut kv, WantLogits::Last, &AtomicBool::new(true));
    assert_eq!(outcome.unwrap(), Outcome::Cancelled);
    assert_eq!(kv.len(), 0);
    assert!(scratch.logits(0).is_none());
    let after = compute(&model, &mut kv, &tokens, &[20]);
    assert_eq!(after, compute(&model, &mut KvSequence::new(model.geometry()), &tokens, &[20]));
}

// Each thing that does not fit must be refused before anything is written.
#[test]
fn misfits_are_refused() {
    let model = tiny(1, Isa::detect());
    let mut scratch = Scratch::new();
    let never = AtomicBool::new(false);
    let mut kv = KvSequence::new(model.geometry());
    kv.reserve_private(16);
    let mut run = |kv: &mut KvSequence, tokens: &[u32]| {
        model.forward(&mut scratch, tokens, kv, WantLogits::No, &never).unwrap_err()
    };
    assert_eq!(run(&mut kv, &[]), ForwardError::BatchSize { tokens: 0 });
    assert_eq!(run(&mut kv, &[0; 513]), ForwardError::BatchSize { tokens: 513 });
    assert_eq!(run(&mut kv, &[9999]), ForwardError::UnknownToken { token: 9999, vocabulary: 263 });
    assert_eq!(run(&mut kv, &[1; 17]), ForwardError::NoRoom { tokens: 17, capacity: 16 });
    let geometry = Geometry { layers: 1, ..model.geometry() };
    assert_eq!(run(&mut KvSequence::new(geometry), &[1]), ForwardError::WrongGeometry);
    assert!(kv.push_write(WriteBytes::private(8)).is_err());
    let sealed = WriteBytes::private(model.geometry().block_bytes()).freeze();
    assert_eq!(kv.push_read(sealed), Err(crate::kv::KvError::Gap { start: 16, len: 0 }));
}

// The speed itself is printed, not judged: other tests run beside this one.
#[test]
fn real_model_is_measured() {
    let Some(path) = real() else { return };
    let model = Model::open(&path).unwrap();
    let measured = measure(&model, 256, 16).unwrap();
    assert_eq!((measured.prefill_tokens, measured.decode_tokens), (256, 16));
    println!(
        "{} with {} threads: prefill {:.0} tokens/s, decode {:.1} tokens/s of {} weight bytes",
        model.isa().name(),
        model.threads(),
        measured.prefill_rate(),
        measured.decode_rate(),
        model.weight_bytes(),
    );
}

/// The real model, if it has been fetched.
fn real() -> Option<PathBuf> {
    let cache = std::env::var_os("TERRACE_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/terrace")))?;
    let path = cache.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.is_file() {
        return Some(path);
    }
    println!("SKIPPED: {} is absent; `make model` fetches it", path.display());
    None
}

// The whole chain on real weights: a wrong rotation, a wrong scale or a wrong
// template would still run, but not know the answer. A prefix from blocks must
// give the same bits here too.
#[test]
fn real_model_answers() {
    let Some(path) = real() else { return };
    let tokenizer = Tokenizer::open(&path).unwrap();
    let messages =
        [Message { role: "user".to_owned(), content: "What is the capital of France?".to_owned() }];
    let rendered = tokenizer.chat().unwrap().render(&messages).unwrap();
    let tokens = tokenizer.encode_chat(&rendered).unwrap();
    assert_eq!(tokens, GOLDEN);

    let model = Model::open(&path).unwrap();
    let mut kv = KvSequence::new(model.geometry());
    let expected = compute(&model, &mut kv, &tokens, &[64]);
    let mut again = KvSequence::new(model.geometry());
    again.push_read(kv.freeze(0).unwrap()).unwrap();
    assert_eq!(compute(&model, &mut again, &tokens, &[20, 5, 1]), expected);

    let mut scratch = Scratch::new();
    let mut sampler = Sampler::new(Sampling { temperature: 0.0, top_p: 1.0, seed: 0 });
    let logits: Vec<f32> = expected.iter().map(|value| f32::from_bits(*value)).collect();
    let mut next = sampler.next(&logits);
    let mut answer = Vec::new();
    while answer.len() < 24 && !tokenizer.ends().contains(&next) {
        answer.push(next);
        kv.reserve_private(kv.len() + 1);
        let outcome =
            model.forward(&mut scratch, &[next], &mut kv, WantLogits::Last, &AtomicBool::new(false));
        assert_eq!(outcome.unwrap(), Outcome::Done);
        next = sampler.next(scratch.logits(0).unwrap());
    }
    let text = tokenizer.decode(&answer);
    assert!(text.contains("Paris"), "the answer was {text:?}");
}

// The file's own template with its default system prompt, around the question.
const GOLDEN: [u32; 37] = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
    2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
];
