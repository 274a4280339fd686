//! One forward pass.
//!
//! Work between two matrix products is cut by tiles of tokens, a matrix product
//! by panels of rows, attention by groups of tokens and heads. Each task owns
//! its output, so the cut never changes the bits.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;
use rayon::prelude::*;

use super::{Layer, Model, Outcome, Step, WantLogits};
use crate::kernels::attention::{AttentionScratch, HeadPlace, Queries, QueryGroup, attend};
use crate::kernels::elementwise::{rms_norm, silu_product};
use crate::kernels::gemm::{PackedTokens, TILE_TOKENS, copy_rows};
use crate::kernels::memory::BlockBases;

// 16 tokens attend together: a block's keys are converted once for 16 tokens and
// all heads that share them, and the scores of a group stay in the cache.
const GROUP_TOKENS: usize = 16;

thread_local! {
    // Scores over a long context are large enough for the allocator to map and
    // unmap them at every layer, so each thread of the pool keeps its own.
    static MEMORY: RefCell<AttentionScratch> = RefCell::default();
}

/// Memory of one pass at a time, kept between passes. It grows to what the
/// largest pass needed.
pub struct Scratch {
    residual: Vec<f32>,
    packed: PackedTokens,
    product: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<u16>,
    values: Vec<u16>,
    attended: Vec<f32>,
    /// Cosine and sine of every pair, `[token][pair]`.
    pub(super) turns: Vec<(f32, f32)>,
    pub(super) logits: Vec<f32>,
    /// Row in `logits`, by step.
    pub(super) rows: Vec<Option<usize>>,
    vocabulary: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// Empty.
    pub fn new() -> Self {
        Self {
            residual: Vec::new(),
            packed: PackedTokens::new(),
            product: Vec::new(),
            queries: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            attended: Vec::new(),
            turns: Vec::new(),
            logits: Vec::new(),
            rows: Vec::new(),
            vocabulary: 0,
        }
    }

    /// Scores of the next token after step `step` of the last pass, one per
    /// token id; nothing if it did not ask for them.
    pub fn logits(&self, step: usize) -> Option<&[f32]> {
        let row = (*self.rows.get(step)?)?;
        Some(&self.logits[row * self.vocabulary..][..self.vocabulary])
    }

    /// Gives rows of the scores to the steps that want some, and returns the tokens (counted over the pass)
    /// that the rows are for.
    pub(super) fn take_rows(&mut self, vocabulary: usize, steps: &[Step<'_>]) -> Vec<usize> {
        let mut last = Vec::new();
        let mut end = 0;
        for step in steps {
            end += step.tokens.len();
            match step.logits {
                WantLogits::No => self.rows.push(None),
                WantLogits::Last => {
                    self.rows.push(Some(last.len()));
                    last.push(end - 1);
                }
            }
        }
        self.vocabulary = vocabulary;
        last
    }
}

/// Some neighbouring tokens of one step.
struct Group {
    step: usize,
    /// First token, counted over the pass.
    first: usize,
    span: QueryGroup,
}

pub(super) fn forward(
    model: &Model,
    scratch: &mut Scratch,
    steps: &mut [Step<'_>],
    cancel: &AtomicBool,
) -> Outcome {
    scratch.rows.clear();
    let groups = groups(model, steps);
    embed(model, scratch, steps);
    turn_angles(model, scratch, steps);
    for (index, layer) in model.layers.iter().enumerate() {
        if cancel.load(Ordering::Relaxed) {
            return Outcome::Cancelled;
        }
        attention(model, index, layer, scratch, steps, &groups);
        feed_forward(model, layer, scratch);
    }
    logits(model, scratch, steps);
    for step in steps {
        step.kv.advance(step.tokens.len());
    }
    Outcome::Done
}

fn groups(model: &Model, steps: &[Step<'_>]) -> Vec<Group> {
    let heads = model.shape.heads / model.shape.kv.kv_heads;
    let mut groups = Vec::new();
    let mut first = 0;
    for (index, step) in steps.iter().enumerate() {
        for start in (0..step.tokens.len()).step_by(GROUP_TOKENS) {
            let tokens = GROUP_TOKENS.min(step.tokens.len() - start);
            let span = QueryGroup { position: step.kv.len() + start, tokens, heads };
            groups.push(Group { step: index, first: first + start, span });
        }
        first += step.tokens.len();
    }
    groups
}

fn embed(model: &Model, scratch: &mut Scratch, steps: &[Step<'_>]) {
    let tokens: Vec<u32> = steps.iter().flat_map(|step| step.tokens.iter().copied()).collect();
    scratch.residual.resize(tokens.len() * model.shape.hidden, 0.0);
    scratch.residual.par_chunks_mut(model.shape.hidden).zip(tokens.par_iter()).for_each(|(row, token)| {
        let token = usize::try_from(*token).expect("the pass was checked against the vocabulary");
        model.embedding.row(token, row);
    });
}

pub(super) fn turn_angles(model: &Model, scratch: &mut Scratch, steps: &[Step<'_>]) {
    scratch.turns.clear();
    for step in steps {
        for position in step.kv.len()..step.kv.len() + step.tokens.len() {
            scratch.turns.extend(model.frequencies.iter().map(|frequency| {
                let angle = position as f64 * frequency;
                (narrow(angle.cos()), narrow(angle.sin()))
            }));
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "rounding a cosine or sine to f32 is what is meant")]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Normalises the residual into the input of the next product.
fn normalise(model: &Model, scratch: &mut Scratch, weight: &[f32]) {
    let hidden = model.shape.hidden;
    let tokens = scratch.residual.len() / hidden;
    scratch.packed.shape(tokens, hidden);
    let residual = scratch.residual.par_chunks(TILE_TOKENS * hidden);
    scratch.packed.tiles().zip(residual).for_each_init(
        || vec![0.0; hidden],
        |row, (mut tile, residual)| {
            for (token, source) in residual.chunks_exact(hidden).enumerate() {
                rms_norm(model.isa, source, weight, model.shape.epsilon, row);
                tile.write(token, 0, row);
            }
        },
    );
}

/// Adds the last product to the residual.
fn add_product(model: &Model, scratch: &mut Scratch) {
    let hidden = model.shape.hidden;
    let tokens = scratch.residual.len() / hidden;
    let product = &scratch.product;
    scratch.residual.par_chunks_mut(TILE_TOKENS * hidden).enumerate().for_each_init(
        || vec![0.0; hidden],
        |row, (tile, residual)| {
            for (at, target) in residual.chunks_exact_mut(hidden).enumerate() {
                copy_rows(product, tokens, tile * TILE_TOKENS + at, 0, row);
                for (value, addend) in target.iter_mut().zip(row.iter()) {
                    *value += addend;
                }
            }
        },
    );
}

fn attention(
    model: &Model,
    index: usize,
    layer: &Layer,
    scratch: &mut Scratch,
    steps: &mut [Step<'_>],
    groups: &[Group],
) {
    let geometry = model.shape.kv;
    let query_columns = model.shape.heads * geometry.head_dim;
    let tokens = scratch.residual.len() / model.shape.hidden;

    normalise(model, scratch, &layer.attention_norm);
    scratch.product.resize(layer.attention_input.output_len(tokens), 0.0);
    layer.attention_input.multiply(model.isa, &scratch.packed, &mut scratch.product);
    rotate(model, scratch, tokens);
    store(model, index, scratch, steps);

    // One piece of the output per group and KV head, each with room for a whole
    // group.
    let shared = query_columns / geometry.kv_heads;
    let piece = GROUP_TOKENS * shared;
    scratch.attended.resize(groups.len() * geometry.kv_heads * piece, 0.0);
    let bases: Vec<BlockBases<'_>> = steps.iter().map(|step| step.kv.bases()).collect();
    let queries = &scratch.queries;
    scratch.attended.par_chunks_mut(piece).enumerate().for_each(|(task, output)| {
        let group = &groups[task / geometry.kv_heads];
        let head = task % geometry.kv_heads;
        let place = HeadPlace {
            keys: geometry.keys_at(index) + head * geometry.head_dim * 2,
            values: geometry.values_at(index) + head * geometry.head_dim * 2,
            slot_stride: geometry.slot_bytes(),
            head_dim: geometry.head_dim,
        };
        let rows = &queries[group.first * query_columns..][..group.span.tokens * query_columns];
        let queries = Queries { rows, stride: query_columns, first: head * shared };
        let output = &mut output[..group.span.tokens * shared];
        MEMORY.with_borrow_mut(|memory| {
            attend(model.isa, &bases[group.step], place, group.span, queries, memory, output);
        });
    });
    drop(bases);

    pack_attended(scratch, groups, tokens, geometry.kv_heads, shared);
    scratch.product.resize(layer.attention_output.output_len(tokens), 0.0);
    layer.attention_output.multiply(model.isa, &scratch.packed, &mut scratch.product);
    add_product(model, scratch);
}

/// Splits the product into rotated queries, rotated f16 keys and f16 values.
fn rotate(model: &Model, scratch: &mut Scratch, tokens: usize) {
    let geometry = model.shape.kv;
    let query_columns = model.shape.heads * geometry.head_dim;
    let kv_columns = geometry.kv_heads * geometry.head_dim;
    scratch.queries.resize(tokens * query_columns, 0.0);
    scratch.keys.resize(tokens * kv_columns, 0);
    scratch.values.resize(tokens * kv_columns, 0);
    let product = &scratch.product;
    let queries = scratch.queries.par_chunks_mut(query_columns);
    let keys = scratch.keys.par_chunks_mut(kv_columns);
    let values = scratch.values.par_chunks_mut(kv_columns);
    let turns = scratch.turns.par_chunks(geometry.head_dim / 2);
    queries.zip(keys).zip(values).zip(turns).enumerate().with_min_len(TILE_TOKENS).for_each_init(
        || vec![0.0; kv_columns],
        |row, (token, (((queries, keys), values), turns))| {
            copy_rows(product, tokens, token, 0, queries);
            turn(queries, turns);
            copy_rows(product, tokens, token, query_columns, row);
            turn(row, turns);
            round(row, keys);
            copy_rows(product, tokens, token, query_columns + kv_columns, row);
            round(row, values);
        },
    );
}

/// Turns neighbouring pairs of every head by the token's angles.
fn turn(heads: &mut [f32], turns: &[(f32, f32)]) {
    for head in heads.chunks_exact_mut(turns.len() * 2) {
        for (pair, (cosine, sine)) in head.chunks_exact_mut(2).zip(turns) {
            let (x, y) = (pair[0], pair[1]);
            pair[0] = x * cosine - y * sine;
            pair[1] = x * sine + y * cosine;
        }
    }
}

fn round(source: &[f32], target: &mut [u16]) {
    for (bits, value) in target.iter_mut().zip(source) {
        *bits = f16::from_f32(*value).to_bits();
    }
}

fn store(model: &Model, layer: usize, scratch: &Scratch, steps: &mut [Step<'_>]) {
    let columns = model.shape.kv.kv_heads * model.shape.kv.head_dim;
    let mut rows = scratch.keys.chunks_exact(columns).zip(scratch.values.chunks_exact(columns));
    for step in steps {
        let start = step.kv.len();
        for (position, (keys, values)) in (start..start + step.tokens.len()).zip(&mut rows) {
            step.kv.store(layer, position, keys, values);
        }
    }
}

/// Packs the heads' outputs as the input of the next product.
fn pack_attended(scratch: &mut Scratch, groups: &[Group], tokens: usize, kv_heads: usize, shared: usize) {
    scratch.packed.shape(tokens, kv_heads * shared);
    // Which group a token is in, and where there.
    let mut places = Vec::with_capacity(tokens);
    for (index, group) in groups.iter().enumerate() {
        assert_eq!(group.first, places.len(), "groups follow each other");
        places.extend((0..group.span.tokens).map(|at| (index, at)));
    }
    let attended = &scratch.attended;
    scratch.packed.tiles().for_each(|mut tile| {
        for token in 0..tile.tokens {
            let (group, at) = places[tile.first + token];
            for head in 0..kv_heads {
                let start = ((group * kv_heads + head) * GROUP_TOKENS + at) * shared;
                tile.write(token, head * shared, &attended[start..start + shared]);
            }
        }
    });
}

fn feed_forward(model: &Model, layer: &Layer, scratch: &mut Scratch) {
    let columns = model.shape.feed_forward;
    let tokens = scratch.residual.len() / model.shape.hidden;
    normalise(model, scratch, &layer.forward_norm);
    scratch.product.resize(layer.forward_input.output_len(tokens), 0.0);
    layer.forward_input.multiply(model.isa, &scratch.packed, &mut scratch.product);

    scratch.packed.shape(tokens, columns);
    let product = &scratch.product;
    scratch.packed.tiles().for_each_init(
        || (vec![0.0; columns], vec![0.0; columns], vec![0.0; columns]),
        |(gate, up, row), mut tile| {
            for at in 0..tile.tokens {
                copy_rows(product, tokens, tile.first + at, 0, gate);
                copy_rows(product, tokens, tile.first + at, columns, up);
                silu_product(model.isa, gate, up, row);
                tile.write(at, 0, row);
            }
        },
    );
    scratch.product.resize(layer.forward_output.output_len(tokens), 0.0);
    layer.forward_output.multiply(model.isa, &scratch.packed, &mut scratch.product);
    add_product(model, scratch);
}

/// Scores after the last token of every step that wants them.
fn logits(model: &Model, scratch: &mut Scratch, steps: &[Step<'_>]) {
    let (hidden, vocabulary) = (model.shape.hidden, model.shape.vocabulary);
    let last = scratch.take_rows(vocabulary, steps);
    if last.is_empty() {
        return;
    }
    let rows: Vec<f32> =
        last.iter().flat_map(|at| scratch.residual[at * hidden..][..hidden].to_vec()).collect();
    scratch.residual.clear();
    scratch.residual.extend_from_slice(&rows);
    normalise(model, scratch, &model.output_norm);
    let output = model.output_matrix();
    scratch.product.resize(output.output_len(last.len()), 0.0);
    output.multiply(model.isa, &scratch.packed, &mut scratch.product);
    scratch.logits.resize(last.len() * vocabulary, 0.0);
    for (row, target) in scratch.logits.chunks_exact_mut(vocabulary).enumerate() {
        copy_rows(&scratch.product, last.len(), row, 0, target);
    }
}
