//! Attention of a few tokens of one sequence over its blocks, for one KV head.
//!
//! K and V are read from the f16 blocks where they lie, those of the tokens
//! being computed included. Scores of a block are sixteen lanes, one per slot,
//! each summed over the head's dimensions in ascending order; outputs are summed
//! over positions from 0 upwards. A token therefore gets the same bits whether
//! it is computed alone or in a chunk, and wherever a block's memory came from.

use super::lanes::{LANES, Lanes, prefetch};
use super::memory::BlockBases;
use super::{Isa, elementwise, multiversion};
use crate::kv::BLOCK_TOKENS;

// A block's slots are the lanes of its scores.
const _: () = assert!(BLOCK_TOKENS == LANES);
const TILE_QUERIES: usize = 8;
// Values in a cache line of 64 bytes.
const LINE_HALVES: usize = 32;

/// Where one layer's K and V of one head lie in each block, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct HeadPlace {
    /// First key of the head, from the start of the block.
    pub(crate) keys: usize,
    /// First value of the head, from the start of the block.
    pub(crate) values: usize,
    /// From one slot to the next.
    pub(crate) slot_stride: usize,
    pub(crate) head_dim: usize,
}

/// Tokens of one sequence that attend together.
#[derive(Clone, Copy)]
pub(crate) struct QueryGroup {
    /// Position of the first token.
    pub(crate) position: usize,
    pub(crate) tokens: usize,
    /// Query heads that share the KV head.
    pub(crate) heads: usize,
}

/// Memory that one thread reuses.
#[derive(Default)]
pub(crate) struct AttentionScratch {
    queries: Vec<f32>,
    keys: Vec<f32>,
    scores: Vec<f32>,
}

/// Computes `output[token][head][dim]` of a group from `queries[token][head][dim]`.
///
/// The keys and values of every position up to the group's last are in the blocks.
pub(crate) fn attend(
    isa: Isa,
    blocks: &BlockBases<'_>,
    place: HeadPlace,
    group: QueryGroup,
    queries: Queries<'_>,
    scratch: &mut AttentionScratch,
    output: &mut [f32],
) {
    let count = group.tokens * group.heads;
    let used = (group.position + group.tokens).div_ceil(BLOCK_TOKENS);
    let stride = used * BLOCK_TOKENS;
    let tiles = count.div_ceil(TILE_QUERIES);
    assert!(used <= blocks.count(), "every position lies in a block");
    assert!(place.head_dim.is_multiple_of(LANES), "heads are whole registers");
    assert!(
        place.values.max(place.keys) + (BLOCK_TOKENS - 1) * place.slot_stride + place.head_dim * 2
            <= blocks.bytes()
    );
    assert_eq!(output.len(), count * place.head_dim, "one output per query");

    pack_queries(&mut scratch.queries, queries, group, place.head_dim, tiles);
    scratch.keys.resize(place.head_dim * LANES, 0.0);
    scratch.scores.resize(tiles * TILE_QUERIES * stride, 0.0);
    for block in 0..used {
        let score = Score {
            keys: blocks.at(block).wrapping_add(place.keys).cast(),
            next: blocks.at((block + 1).min(used - 1)).wrapping_add(place.keys).cast(),
            slot_stride: place.slot_stride / 2,
            head_dim: place.head_dim,
            queries: scratch.queries.as_ptr(),
            count,
            tiles,
            transposed: scratch.keys.as_mut_ptr(),
            scores: scratch.scores[block * LANES..].as_mut_ptr(),
            stride,
        };
        // SAFETY: the keys of 16 slots lie inside the block (asserted); the
        // scratch vectors have just been given the sizes that the kernel walks.
        unsafe { score_block(isa, score) };
    }
    for (query, row) in scratch.scores.chunks_exact_mut(stride).take(count).enumerate() {
        elementwise::softmax(isa, row, group.position + query / group.heads + 1);
    }
    for token in 0..group.tokens {
        let gather = Gather {
            blocks: blocks.as_ptr(),
            values: place.values,
            slot_stride: place.slot_stride,
            head_dim: place.head_dim,
            positions: group.position + token + 1,
            heads: group.heads,
            weights: scratch.scores[token * group.heads * stride..].as_ptr(),
            stride,
            output: output[token * group.heads * place.head_dim..].as_mut_ptr(),
        };
        // SAFETY: every position below `positions` lies in one of the `used`
        // blocks, its values inside the block (asserted); this token's rows of
        // scores and outputs are inside their slices.
        unsafe { gather_values(isa, gather) };
    }
}

/// Rotated queries of a batch: `[token][..stride]`, of which a KV head's query
/// heads are `heads * head_dim` values from `first` on.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// From the group's first token on.
    pub(crate) rows: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) first: usize,
}

/// Packs `[tile][dim][8]`, scaled by the root of the head's size.
fn pack_queries(
    packed: &mut Vec<f32>,
    queries: Queries<'_>,
    group: QueryGroup,
    head_dim: usize,
    tiles: usize,
) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    packed.clear();
    packed.resize(tiles * TILE_QUERIES * head_dim, 0.0);
    for token in 0..group.tokens {
        for head in 0..group.heads {
            let query = token * group.heads + head;
            let start = token * queries.stride + queries.first + head * head_dim;
            let tile = &mut packed[query / TILE_QUERIES * TILE_QUERIES * head_dim..];
            let column = tile.iter_mut().skip(query % TILE_QUERIES).step_by(TILE_QUERIES);
            for (target, value) in column.zip(&queries.rows[start..start + head_dim]) {
                *target = value * scale;
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Score {
    keys: *const u16,
    /// Keys of the block that follows, to be fetched meanwhile.
    next: *const u16,
    /// In f16 values.
    slot_stride: usize,
    head_dim: usize,
    queries: *const f32,
    count: usize,
    tiles: usize,
    transposed: *mut f32,
    scores: *mut f32,
    stride: usize,
}

multiversion! {
    /// Scores of all queries against the 16 slots of one block.
    ///
    /// # Safety
    /// `score` describes memory that may be read and written as far as it says.
    unsafe fn score_block = score_block_body(score: Score)
}

#[inline(always)]
unsafe fn score_block_body<V: Lanes>(score: Score) {
    // SAFETY: all offsets follow from the sizes in `score`, which the caller
    // vouches for.
    unsafe {
        for slot in 0..LANES {
            let row = score.next.wrapping_add(slot * score.slot_stride);
            for line in (0..score.head_dim).step_by(LINE_HALVES) {
                prefetch(row.wrapping_add(line).cast());
            }
        }
        for dim in (0..score.head_dim).step_by(LANES) {
            V::transpose_f16(score.keys.add(dim), score.slot_stride, score.transposed.add(dim * LANES));
        }
        for tile in 0..score.tiles {
            // The last tile is often no more than one token's heads.
            if score.count - tile * TILE_QUERIES <= TILE_QUERIES / 2 {
                score_tile::<V, { TILE_QUERIES / 2 }>(score, tile);
            } else {
                score_tile::<V, TILE_QUERIES>(score, tile);
            }
        }
    }
}

/// The first Q queries of a tile.
#[inline(always)]
unsafe fn score_tile<V: Lanes, const Q: usize>(score: Score, tile: usize) {
    // SAFETY: Q is at most the tile, whose queries and scores the caller vouches
    // for.
    unsafe {
        let mut query = score.queries.add(tile * TILE_QUERIES * score.head_dim);
        let mut keys = score.transposed.cast_const();
        let mut sums = [V::splat(0.0); Q];
        for _ in 0..score.head_dim {
            let key = V::load(keys);
            for (at, sum) in sums.iter_mut().enumerate() {
                *sum = key.fma(V::splat(*query.add(at)), *sum);
            }
            keys = keys.add(LANES);
            query = query.add(TILE_QUERIES);
        }
        for (at, sum) in sums.iter().enumerate() {
            sum.store(score.scores.add((tile * TILE_QUERIES + at) * score.stride));
        }
    }
}

#[derive(Clone, Copy)]
struct Gather {
    blocks: *const *const u8,
    values: usize,
    slot_stride: usize,
    head_dim: usize,
    positions: usize,
    heads: usize,
    weights: *const f32,
    stride: usize,
    output: *mut f32,
}

multiversion! {
    /// Sums the values of all positions that one token sees, for each of its heads.
    ///
    /// # Safety
    /// `gather` describes memory that may be read and written as far as it says.
    unsafe fn gather_values = gather_values_body(gather: Gather)
}

#[inline(always)]
unsafe fn gather_values_body<V: Lanes>(gather: Gather) {
    // SAFETY: the caller's promise; heads and dimensions are cut into pieces that
    // cover each exactly once.
    unsafe {
        let mut head = 0;
        while head < gather.heads {
            let heads = (gather.heads - head).min(4);
            let mut dim = 0;
            while dim < gather.head_dim {
                let wide = gather.head_dim - dim >= 4 * LANES;
                match (heads, wide) {
                    (4, true) => gather_piece::<V, 4, 4>(gather, head, dim),
                    (3, true) => gather_piece::<V, 3, 4>(gather, head, dim),
                    (2, true) => gather_piece::<V, 2, 4>(gather, head, dim),
                    (1, true) => gather_piece::<V, 1, 4>(gather, head, dim),
                    (4, false) => gather_piece::<V, 4, 1>(gather, head, dim),
                    (3, false) => gather_piece::<V, 3, 1>(gather, head, dim),
                    (2, false) => gather_piece::<V, 2, 1>(gather, head, dim),
                    (_, _) => gather_piece::<V, 1, 1>(gather, head, dim),
                }
                dim += if wide { 4 * LANES } else { LANES };
            }
            head += heads;
        }
    }
}

#[inline(always)]
unsafe fn gather_piece<V: Lanes, const H: usize, const D: usize>(gather: Gather, head: usize, dim: usize) {
    // SAFETY: reads `positions` weights of H heads and D registers of each
    // position's values; writes D registers of H outputs; the caller vouches.
    unsafe {
        let mut sums = [[V::splat(0.0); D]; H];
        let weights = gather.weights.add(head * gather.stride);
        let mut position = 0;
        while position < gather.positions {
            let block = *gather.blocks.add(position / LANES);
            let mut row: *const u16 = block.add(gather.values).cast::<u16>().add(dim);
            let end = gather.positions.min(position + LANES);
            let next = *gather.blocks.add((position / LANES + 1).min((gather.positions - 1) / LANES));
            let mut next = next.wrapping_add(gather.values).cast::<u16>().wrapping_add(dim);
            while position < end {
                let mut values = [V::splat(0.0); D];
                for (at, value) in values.iter_mut().enumerate() {
                    *value = V::load_f16(row.add(at * LANES));
                }
                for (at, sums) in sums.iter_mut().enumerate() {
                    let weight = V::splat(*weights.add(at * gather.stride + position));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = value.fma(weight, *sum);
                    }
                }
                for line in (0..D * LANES).step_by(LINE_HALVES) {
                    prefetch(next.wrapping_add(line).cast());
                }
                next = next.wrapping_add(gather.slot_stride / 2);
                row = row.add(gather.slot_stride / 2);
                position += 1;
            }
        }
        for (at, sums) in sums.iter().enumerate() {
            for (piece, sum) in sums.iter().enumerate() {
                sum.store(gather.output.add((head + at) * gather.head_dim + dim + piece * LANES));
            }
        }
    }
}
