//! Matrix products: packed f16 weights times f32 activations.
//!
//! Weights are packed once into panels of 32 rows, `[panel][column][32]`, so
//! that one cache line holds the weights that one activation meets.
//! Activations are packed into tiles of up to 12 tokens, `[tile][column][tokens]`,
//! and outputs come panel-major, `[panel][token][32]`, so that every task owns
//! one contiguous piece. **Every output is one chain of fused multiply-adds over
//! the columns in ascending order**, whatever the tile: that is the promise on
//! which bit-identical prefixes rest.

use half::f16;
use rayon::prelude::*;

use super::lanes::{LANES, Lanes};
use super::{Isa, multiversion};

/// Rows in a panel.
pub(crate) const PANEL_ROWS: usize = 32;
/// Most tokens in a tile: 12 tokens by two registers of rows leave room for the
/// inputs among 32 registers.
pub(crate) const TILE_TOKENS: usize = 12;
// 4 panels: enough independent chains to hide the latency of a multiply-add
// when a tile has one token.
const TASK_PANELS: usize = 4;

/// One cache line of weights: the same column of 32 rows.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u16; PANEL_ROWS]);

/// A weight matrix, `rows` by `columns`, in f16.
pub(crate) struct PackedMatrix {
    rows: usize,
    columns: usize,
    lines: Vec<Line>,
}

impl PackedMatrix {
    /// Packs a matrix whose rows `row(index, buffer)` writes as f32. Values are
    /// rounded to the nearest f16. Missing rows of the last panel are zero.
    pub(crate) fn pack<E: Send>(
        rows: usize,
        columns: usize,
        row: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(columns > 0, "a matrix has columns");
        let panels = rows.div_ceil(PANEL_ROWS);
        let mut lines = vec![Line([0; PANEL_ROWS]); panels * columns];
        lines.par_chunks_mut(columns).enumerate().try_for_each_init(
            || vec![0.0f32; columns],
            |buffer, (panel, lines)| {
                for lane in 0..PANEL_ROWS.min(rows - panel * PANEL_ROWS) {
                    row(panel * PANEL_ROWS + lane, buffer)?;
                    for (line, value) in lines.iter_mut().zip(buffer.iter()) {
                        line.0[lane] = f16::from_f32(*value).to_bits();
                    }
                }
                Ok(())
            },
        )?;
        Ok(Self { rows, columns, lines })
    }

    /// Bytes of the packed weights.
    pub(crate) fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// The packed weights, `[panel][column][32]`, as little-endian f16.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        // SAFETY: a line is 32 u16 and nothing else (its size is its alignment), so all bytes are set, and
        // bytes have no alignment.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), size_of_val(&*self.lines)) }
    }

    /// Floats that the output of `tokens` tokens takes.
    pub(crate) fn output_len(&self, tokens: usize) -> usize {
        self.rows.div_ceil(PANEL_ROWS) * PANEL_ROWS * tokens
    }

    /// Writes row `index` as f32 to `target`.
    pub(crate) fn row(&self, index: usize, target: &mut [f32]) {
        assert!(index < self.rows, "row inside the matrix");
        assert_eq!(target.len(), self.columns, "one value per column");
        let panel = &self.lines[index / PANEL_ROWS * self.columns..][..self.columns];
        for (value, line) in target.iter_mut().zip(panel) {
            *value = f16::from_bits(line.0[index % PANEL_ROWS]).to_f32();
        }
    }

    /// Computes `output[panel][token][32]` for all rows, in parallel on the
    /// current pool.
    pub(crate) fn multiply(&self, isa: Isa, input: &PackedTokens, output: &mut [f32]) {
        assert_eq!(input.columns, self.columns, "inputs match the matrix");
        assert_eq!(output.len(), self.output_len(input.tokens), "outputs match the matrix");
        output
            .par_chunks_mut(TASK_PANELS * PANEL_ROWS * input.tokens)
            .zip(self.lines.par_chunks(TASK_PANELS * self.columns))
            .for_each(|(output, lines)| multiply_panels(isa, lines, input, output));
    }
}

/// Activations of some tokens, packed into tiles.
pub(crate) struct PackedTokens {
    tokens: usize,
    columns: usize,
    data: Vec<f32>,
}

impl PackedTokens {
    pub(crate) fn new() -> Self {
        Self { tokens: 0, columns: 0, data: Vec::new() }
    }

    /// Takes the shape for `tokens` by `columns`; the contents are to be written.
    pub(crate) fn shape(&mut self, tokens: usize, columns: usize) {
        self.tokens = tokens;
        self.columns = columns;
        let mut len = tokens / TILE_TOKENS * TILE_TOKENS * columns;
        len += tile_width(tokens % TILE_TOKENS) * columns;
        self.data.resize(len, 0.0);
    }

    /// The tiles in order, each as (its data, its width); a tile's token `t` has
    /// column `c` at `c * width + t`.
    pub(crate) fn tiles(&mut self) -> impl IndexedParallelIterator<Item = TileMut<'_>> {
        let (tokens, columns) = (self.tokens, self.columns);
        self.data.par_chunks_mut((TILE_TOKENS * columns).max(1)).enumerate().map(move |(index, data)| {
            TileMut {
                first: index * TILE_TOKENS,
                tokens: TILE_TOKENS.min(tokens - index * TILE_TOKENS),
                width: data.len() / columns,
                data,
            }
        })
    }
}

/// One tile being packed.
pub(crate) struct TileMut<'a> {
    /// First token of the tile.
    pub(crate) first: usize,
    /// Tokens in it.
    pub(crate) tokens: usize,
    width: usize,
    data: &'a mut [f32],
}

impl TileMut<'_> {
    /// Writes columns `column..` of token `token` (counted in the tile).
    pub(crate) fn write(&mut self, token: usize, column: usize, values: &[f32]) {
        assert!(token < self.tokens, "token inside the tile");
        let columns = self.data[column * self.width..].chunks_exact_mut(self.width);
        for (target, value) in columns.zip(values) {
            target[token] = *value;
        }
    }
}

/// The kernel's width for the last tile of `tokens` tokens.
fn tile_width(tokens: usize) -> usize {
    match tokens {
        0..=2 => tokens,
        3..=4 => 4,
        5..=8 => 8,
        _ => TILE_TOKENS,
    }
}

fn multiply_panels(isa: Isa, lines: &[Line], input: &PackedTokens, output: &mut [f32]) {
    let panels = lines.len() / input.columns;
    assert_eq!(lines.len(), panels * input.columns, "whole panels");
    assert_eq!(output.len(), panels * PANEL_ROWS * input.tokens, "whole outputs");
    let mut first = 0;
    for data in input.data.chunks(TILE_TOKENS * input.columns) {
        let width = data.len() / input.columns;
        let tokens = width.min(input.tokens - first);
        let mut panel = 0;
        while panel < panels {
            let together = panels_together(width).min(panels - panel);
            // One panel at a time where fewer are left than the kernel takes.
            let together = if together == panels_together(width) { together } else { 1 };
            let tile = Tile {
                weights: lines[panel * input.columns..].as_ptr().cast(),
                panel_stride: input.columns * PANEL_ROWS,
                columns: input.columns,
                input: data.as_ptr(),
                output: output[(panel * input.tokens + first) * PANEL_ROWS..].as_mut_ptr(),
                output_panel_stride: input.tokens * PANEL_ROWS,
                tokens,
                width,
                panels: together,
            };
            // SAFETY: `lines` holds `panels` whole panels and `data` one whole
            // tile (asserted above, and by `shape`); the output of panel p and
            // token t lies at (p * tokens + t) * 32 with p < panels and
            // t < tokens, inside `output`, which this task owns.
            unsafe { multiply_tile(isa, tile) };
            panel += together;
        }
        first += tokens;
    }
}

/// Panels that one call takes at a given width.
fn panels_together(width: usize) -> usize {
    match width {
        1 => 4,
        2..=4 => 2,
        _ => 1,
    }
}

#[derive(Clone, Copy)]
struct Tile {
    weights: *const u16,
    panel_stride: usize,
    columns: usize,
    input: *const f32,
    output: *mut f32,
    output_panel_stride: usize,
    tokens: usize,
    width: usize,
    panels: usize,
}

multiversion! {
    /// # Safety
    /// `tile` describes memory that may be read and written as far as it says.
    unsafe fn multiply_tile = multiply_tile_body(tile: Tile)
}

#[inline(always)]
unsafe fn multiply_tile_body<V: Lanes>(tile: Tile) {
    // SAFETY: the caller's promise, passed through; R registers are R / 2 panels.
    unsafe {
        match (tile.width, tile.panels) {
            (1, 4) => chains::<V, 8, 1>(tile),
            (1, _) => chains::<V, 2, 1>(tile),
            (2, 2) => chains::<V, 4, 2>(tile),
            (2, _) => chains::<V, 2, 2>(tile),
            (4, 2) => chains::<V, 4, 4>(tile),
            (4, _) => chains::<V, 2, 4>(tile),
            (8, _) => chains::<V, 2, 8>(tile),
            (12, _) => chains::<V, 2, 12>(tile),
            (width, panels) => unreachable!("no kernel for {width} tokens by {panels} panels"),
        }
    }
}

/// R registers of rows times T tokens, all columns.
#[inline(always)]
unsafe fn chains<V: Lanes, const R: usize, const T: usize>(tile: Tile) {
    // SAFETY: reads `columns` lines of each of R / 2 panels and `columns` times T
    // inputs, writes 16 outputs per register and token; the caller vouches for
    // all of them and for the instructions.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; T];
        let mut weights = tile.weights;
        let mut input = tile.input;
        for _ in 0..tile.columns {
            let mut rows = [V::splat(0.0); R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = V::load_f16(weights.add((r / 2) * tile.panel_stride + (r % 2) * LANES));
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let value = V::splat(*input.add(t));
                for (sum, row) in sums.iter_mut().zip(rows) {
                    *sum = row.fma(value, *sum);
                }
            }
            weights = weights.add(PANEL_ROWS);
            input = input.add(T);
        }
        for (t, sums) in sums.iter().enumerate().take(tile.tokens) {
            for (r, sum) in sums.iter().enumerate() {
                let panel = (r / 2) * tile.output_panel_stride;
                sum.store(tile.output.add(panel + t * PANEL_ROWS + (r % 2) * LANES));
            }
        }
    }
}

/// Copies rows `first..first + target.len()` of one token out of a panel-major
/// output of `tokens` tokens.
pub(crate) fn copy_rows(output: &[f32], tokens: usize, token: usize, first: usize, target: &mut [f32]) {
    let mut row = first;
    let mut rest = target;
    while !rest.is_empty() {
        let lane = row % PANEL_ROWS;
        let (piece, after) = rest.split_at_mut(rest.len().min(PANEL_ROWS - lane));
        let start = (row / PANEL_ROWS * tokens + token) * PANEL_ROWS + lane;
        piece.copy_from_slice(&output[start..start + piece.len()]);
        row += piece.len();
        rest = after;
    }
}
