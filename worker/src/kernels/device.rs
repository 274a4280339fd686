//! The engine's kernels on a device: each call checks its sizes and starts one.
//!
//! They compute what the kernels beside this module do, to the bit; the sources
//! (`gpudirect/kernels/engine.cu`) say in which order. Everything runs in the
//! order of one queue, so an output may be the next input at once.

use std::sync::Arc;

use terrace_gpudirect::kernels::{Kernel, KernelBytes, KernelError, KernelQueue, Launch, Parameters};

use super::gemm::PANEL_ROWS;
use super::lanes::LANES;
use crate::kv::{BLOCK_TOKENS, Geometry};

const ROW_THREADS: u32 = 128;
const PRODUCT_THREADS: u32 = 256;
/// Tokens and rows of a tile; the kernel's own constant.
const TILE: usize = 64;
/// The largest head that the attention kernel holds; its own constant.
pub(crate) const HEAD_DIM_MAX: usize = 256;
const F32_BYTES: usize = 4;
// Scores of one launch of the attention kernel: as many tokens together as fit.
const SCORES_BYTES_MAX: usize = 64 << 20;

/// Declares the parameters of a kernel.
macro_rules! parameters {
    ($name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        #[derive(Clone, Copy)]
        #[repr(C)]
        struct $name {
            $($field: $kind),*
        }
        // SAFETY: the fields of the structure of this name in engine.cu.
        unsafe impl Parameters for $name {}
    };
}

parameters!(Embed { weights: u64, tokens: u64, target: u64, columns: u32 });
parameters!(RmsNorm { source: u64, weight: u64, target: u64, columns: u32, epsilon: f32 });
parameters!(Product { weights: u64, input: u64, output: u64, columns: u32, rows: u32, tokens: u32 });
parameters!(Add { target: u64, addend: u64, count: u64 });
parameters!(Place {
    product: u64,
    turns: u64,
    queries: u64,
    slots: u64,
    keys_at: u64,
    values_at: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
});
parameters!(Attend {
    queries: u64,
    output: u64,
    blocks: u64,
    sequences: u64,
    positions: u64,
    scores: u64,
    keys_at: u64,
    values_at: u64,
    first: u32,
    heads: u32,
    heads_shared: u32,
    head_dim: u32,
    slot_bytes: u32,
    stride: u32,
    scale: f32,
});
parameters!(Silu { product: u64, target: u64, columns: u32 });
parameters!(Rows { source: u64, indexes: u64, target: u64, columns: u32 });

/// A matrix of f32, row after row.
#[derive(Clone)]
pub(crate) struct Floats {
    pub(crate) bytes: KernelBytes,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

/// Packed weights on the device.
pub(crate) struct Weights {
    bytes: KernelBytes,
    rows: usize,
    columns: usize,
}

/// Starts kernels on a queue.
#[derive(Clone)]
pub(crate) struct DeviceKernels {
    queue: Arc<dyn KernelQueue>,
}

/// What the tokens of a pass are, and where their K and V lie, on the device.
pub(crate) struct PassTables {
    tokens: KernelBytes,
    turns: KernelBytes,
    slots: KernelBytes,
    blocks: KernelBytes,
    sequences: KernelBytes,
    positions: KernelBytes,
    count: usize,
    geometry: Geometry,
    seen_max: usize,
    // Blocks stay while their addresses are in the tables.
    _kept: Vec<KernelBytes>,
}

/// One token of a pass.
pub(crate) struct PassToken {
    pub(crate) id: u32,
    /// Position in its sequence.
    pub(crate) position: usize,
    /// Which of the pass's sequences.
    pub(crate) sequence: usize,
    /// Whether its K and V are to be written, or lie there sealed.
    pub(crate) stores: bool,
}

fn number(value: usize) -> u32 {
    u32::try_from(value).expect("sizes of a model and of a pass are far below 2^32")
}

fn little(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_le_bytes).collect()
}

fn little32(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

impl PassTables {
    /// Puts the tables of a pass onto the device. `blocks[sequence]` are its blocks in order, `turns` cosine
    /// and sine of every pair of every token, `vocabulary` bounds the ids.
    pub(crate) fn new(
        kernels: &DeviceKernels,
        geometry: Geometry,
        vocabulary: usize,
        tokens: &[PassToken],
        blocks: &[Vec<KernelBytes>],
        turns: &[(f32, f32)],
    ) -> Result<Self, KernelError> {
        assert_eq!(turns.len(), tokens.len() * geometry.head_dim / 2, "one turn per pair");
        let flat = || blocks.iter().flatten();
        assert!(flat().all(|block| block.len() == geometry.block_bytes()), "blocks of this geometry");
        let mut starts = Vec::with_capacity(blocks.len());
        let mut start = 0;
        for sequence in blocks {
            starts.push(number(start));
            start += sequence.len();
        }
        for token in tokens {
            assert!(token.position / BLOCK_TOKENS < blocks[token.sequence].len(), "positions lie in blocks");
            assert!(usize::try_from(token.id).is_ok_and(|id| id < vocabulary), "ids are known");
        }
        let slot = |token: &PassToken| {
            let block = &blocks[token.sequence][token.position / BLOCK_TOKENS];
            let within = (token.position % BLOCK_TOKENS * geometry.slot_bytes()) as u64;
            if token.stores { block.address() + within } else { 0 }
        };
        let pairs = turns.iter().flat_map(|(cosine, sine)| [cosine.to_bits(), sine.to_bits()]);
        Ok(Self {
            tokens: kernels.put(&little32(tokens.iter().map(|token| token.id)))?,
            turns: kernels.put(&little32(pairs))?,
            slots: kernels.put(&little(tokens.iter().map(slot)))?,
            blocks: kernels.put(&little(flat().map(KernelBytes::address)))?,
            sequences: kernels.put(&little32(tokens.iter().map(|token| starts[token.sequence])))?,
            positions: kernels.put(&little32(tokens.iter().map(|token| number(token.position))))?,
            count: tokens.len(),
            geometry,
            seen_max: tokens.iter().map(|token| token.position + 1).max().unwrap_or(0),
            _kept: flat().cloned().collect(),
        })
    }
}

impl DeviceKernels {
    pub(crate) fn new(queue: Arc<dyn KernelQueue>) -> Self {
        Self { queue }
    }

    pub(crate) fn queue(&self) -> &Arc<dyn KernelQueue> {
        &self.queue
    }

    /// Memory with these bytes.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<KernelBytes, KernelError> {
        let memory = self.queue.allocate(bytes.len())?;
        self.queue.write(&memory, bytes)?;
        Ok(memory)
    }

    /// Room for a matrix.
    pub(crate) fn floats(&self, rows: usize, columns: usize) -> Result<Floats, KernelError> {
        Ok(Floats { bytes: self.queue.allocate(rows * columns * F32_BYTES)?, rows, columns })
    }

    /// A row of values that are known.
    pub(crate) fn vector(&self, values: &[f32]) -> Result<Floats, KernelError> {
        let bytes = self.put(&little32(values.iter().map(|value| value.to_bits())))?;
        Ok(Floats { bytes, rows: 1, columns: values.len() })
    }

    /// Packed weights, `[panel][column][32]`.
    pub(crate) fn weights(&self, lines: &[u8], rows: usize, columns: usize) -> Result<Weights, KernelError> {
        assert_eq!(lines.len(), rows.div_ceil(PANEL_ROWS) * PANEL_ROWS * columns * 2, "whole panels");
        assert!(columns.is_multiple_of(LANES), "columns are whole steps of the kernel");
        Ok(Weights { bytes: self.put(lines)?, rows, columns })
    }

    fn start<T: Parameters>(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        threads: u32,
        parameters: &T,
    ) -> Result<(), KernelError> {
        let launch = Launch::new(kernel, grid.map(number), threads, parameters);
        // SAFETY: only the methods of this module call it, each with the structure of its kernel, after it
        // has checked that every size in it lies inside the memory whose address stands beside. Memory of
        // the queue is freed behind what was launched before; whoever runs a pass keeps the blocks, and waits.
        unsafe { self.queue.launch(launch) }
    }

    pub(crate) fn embed(
        &self,
        weights: &Weights,
        tables: &PassTables,
        target: &Floats,
    ) -> Result<(), KernelError> {
        assert_eq!((target.rows, target.columns), (tables.count, weights.columns), "one row per token");
        let parameters = Embed {
            weights: weights.bytes.address(),
            tokens: tables.tokens.address(),
            target: target.bytes.address(),
            columns: number(weights.columns),
        };
        self.start(Kernel::Embed, [tables.count, 1, 1], ROW_THREADS, &parameters)
    }

    pub(crate) fn rms_norm(
        &self,
        source: &Floats,
        weight: &Floats,
        epsilon: f32,
        target: &Floats,
    ) -> Result<(), KernelError> {
        assert_eq!((source.rows, source.columns), (target.rows, target.columns), "one result per value");
        assert_eq!((weight.rows, weight.columns), (1, source.columns), "one weight per column");
        assert!(source.columns.is_multiple_of(LANES), "rows are whole registers");
        let parameters = RmsNorm {
            source: source.bytes.address(),
            weight: weight.bytes.address(),
            target: target.bytes.address(),
            columns: number(source.columns),
            epsilon,
        };
        self.start(Kernel::RmsNorm, [source.rows, 1, 1], ROW_THREADS, &parameters)
    }

    pub(crate) fn product(
        &self,
        weights: &Weights,
        input: &Floats,
        output: &Floats,
    ) -> Result<(), KernelError> {
        assert_eq!(input.columns, weights.columns, "inputs match the weights");
        assert_eq!((output.rows, output.columns), (input.rows, weights.rows), "outputs match the weights");
        let parameters = Product {
            weights: weights.bytes.address(),
            input: input.bytes.address(),
            output: output.bytes.address(),
            columns: number(weights.columns),
            rows: number(weights.rows),
            tokens: number(input.rows),
        };
        let grid = [weights.rows.div_ceil(TILE), input.rows.div_ceil(TILE), 1];
        self.start(Kernel::Product, grid, PRODUCT_THREADS, &parameters)
    }

    pub(crate) fn add(&self, target: &Floats, addend: &Floats) -> Result<(), KernelError> {
        assert_eq!((target.rows, target.columns), (addend.rows, addend.columns), "equal shapes");
        let count = target.rows * target.columns;
        let parameters =
            Add { target: target.bytes.address(), addend: addend.bytes.address(), count: count as u64 };
        self.start(Kernel::Add, [count.div_ceil(256), 1, 1], 256, &parameters)
    }

    /// Turns queries and keys, and writes keys and values of a layer to their blocks.
    pub(crate) fn place(
        &self,
        product: &Floats,
        tables: &PassTables,
        layer: usize,
        queries: &Floats,
    ) -> Result<(), KernelError> {
        let geometry = tables.geometry;
        let heads = queries.columns / geometry.head_dim;
        assert!(layer < geometry.layers, "a layer of the model");
        assert_eq!((queries.rows, product.rows), (tables.count, tables.count), "one row per token");
        assert_eq!(queries.columns, heads * geometry.head_dim, "whole heads");
        assert_eq!(product.columns, (heads + 2 * geometry.kv_heads) * geometry.head_dim, "q, k and v");
        let parameters = Place {
            product: product.bytes.address(),
            turns: tables.turns.address(),
            queries: queries.bytes.address(),
            slots: tables.slots.address(),
            keys_at: geometry.keys_at(layer) as u64,
            values_at: geometry.values_at(layer) as u64,
            heads: number(heads),
            kv_heads: number(geometry.kv_heads),
            head_dim: number(geometry.head_dim),
        };
        self.start(Kernel::Place, [tables.count, 1, 1], ROW_THREADS, &parameters)
    }

    /// Attention of all tokens of a pass over their blocks, in one layer.
    pub(crate) fn attend(
        &self,
        queries: &Floats,
        tables: &PassTables,
        layer: usize,
        output: &Floats,
    ) -> Result<(), KernelError> {
        let geometry = tables.geometry;
        let heads = queries.columns / geometry.head_dim;
        assert!(geometry.head_dim <= HEAD_DIM_MAX, "heads fit the kernel");
        assert!(layer < geometry.layers, "a layer of the model");
        assert_eq!(heads % geometry.kv_heads, 0, "heads share keys evenly");
        assert_eq!(queries.columns, heads * geometry.head_dim, "whole heads");
        assert_eq!((queries.rows, output.rows), (tables.count, tables.count), "one row per token");
        assert_eq!(queries.columns, output.columns, "one output per query");
        let stride = tables.seen_max.next_multiple_of(BLOCK_TOKENS);
        let together = (SCORES_BYTES_MAX / (heads * stride * F32_BYTES)).clamp(1, tables.count);
        let scores = self.queue.allocate(together * heads * stride * F32_BYTES)?;
        for first in (0..tables.count).step_by(together) {
            let parameters = Attend {
                queries: queries.bytes.address(),
                output: output.bytes.address(),
                blocks: tables.blocks.address(),
                sequences: tables.sequences.address(),
                positions: tables.positions.address(),
                scores: scores.address(),
                keys_at: geometry.keys_at(layer) as u64,
                values_at: geometry.values_at(layer) as u64,
                first: number(first),
                heads: number(heads),
                heads_shared: number(heads / geometry.kv_heads),
                head_dim: number(geometry.head_dim),
                slot_bytes: number(geometry.slot_bytes()),
                stride: number(stride),
                scale: 1.0 / (geometry.head_dim as f32).sqrt(),
            };
            let tokens = together.min(tables.count - first);
            self.start(Kernel::Attend, [tokens, heads, 1], ROW_THREADS, &parameters)?;
        }
        Ok(())
    }

    pub(crate) fn silu(&self, product: &Floats, target: &Floats) -> Result<(), KernelError> {
        assert_eq!((product.rows, product.columns), (target.rows, 2 * target.columns), "gates and ups");
        let parameters = Silu {
            product: product.bytes.address(),
            target: target.bytes.address(),
            columns: number(target.columns),
        };
        self.start(Kernel::Silu, [target.rows, 1, 1], ROW_THREADS, &parameters)
    }

    /// Copies some rows.
    pub(crate) fn rows(&self, source: &Floats, indexes: &[usize]) -> Result<Floats, KernelError> {
        assert!(indexes.iter().all(|index| *index < source.rows), "rows inside the matrix");
        let target = self.floats(indexes.len(), source.columns)?;
        let table = self.put(&little32(indexes.iter().map(|index| number(*index))))?;
        let parameters = Rows {
            source: source.bytes.address(),
            indexes: table.address(),
            target: target.bytes.address(),
            columns: number(source.columns),
        };
        self.start(Kernel::Rows, [indexes.len(), 1, 1], ROW_THREADS, &parameters)?;
        Ok(target)
    }

    /// Waits, and reads a matrix.
    pub(crate) fn read(&self, source: &Floats) -> Result<Vec<f32>, KernelError> {
        let mut bytes = vec![0; source.bytes.len()];
        self.queue.read(&source.bytes, &mut bytes)?;
        Ok(bytes.as_chunks::<F32_BYTES>().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }
}
