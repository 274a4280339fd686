//! Blocks between an engine's pages and our layout.
//!
//! An engine keeps, for each layer, keys and values in pages of some slots. Where
//! an element lies is said by three strides and two addresses a layer, which covers
//! what vLLM and SGLang do: K and V in one tensor or two, a page's slots before its
//! heads (NHD) or behind (HND), or K and V next to each other in every row.

use std::ops::Range;
use std::sync::Arc;

use super::queue::{KernelBytes, KernelQueue, Launch, Parameters, bytes_of};
use super::{Kernel, KernelError};

/// `n * magic >> MAGIC_BITS` is `n / d` while `n * d` is below this power.
const MAGIC_BITS: u32 = 40;
const VECTORS_MAX: u64 = 1 << 20;
/// Vectors that a thread moves; the kernel's own constant.
const UNROLL: u32 = 4;
const THREADS_MAX: u32 = 256;
/// Groups in the second and third direction of a grid.
const GRID_MAX: usize = 65_535;

/// Shape of a block, `[layer][k or v][slot][kv head][dimension]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Layers.
    pub layers: u32,
    /// Tokens of a block.
    pub slots: u32,
    /// Heads that have keys and values of their own, on this device.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// 2 for f16 and bf16, 1 for fp8.
    pub element_bytes: u32,
}

impl BlockShape {
    /// Bytes of a head of a slot.
    pub fn row_bytes(self) -> u64 {
        u64::from(self.head_dim) * u64::from(self.element_bytes)
    }

    /// Bytes of the keys, or the values, of one layer.
    pub fn half_bytes(self) -> u64 {
        u64::from(self.slots) * u64::from(self.kv_heads) * self.row_bytes()
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        2 * u64::from(self.layers) * self.half_bytes()
    }
}

/// Where an element lies in the pages of one layer, in bytes. Elements of a row follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Pages of a layer.
    pub pages: u32,
    /// Slots of a page.
    pub page_slots: u32,
    /// From one page to the next.
    pub page_stride: u64,
    /// From one slot of a page to the next.
    pub slot_stride: u64,
    /// From one head of a slot to the next.
    pub head_stride: u64,
    /// From the first key to the first value of a layer in one tensor.
    pub value_offset: u64,
}

impl PageLayout {
    /// `[page][slot][head][dim]`, K and V in two tensors (SGLang), or one behind the other in a tensor
    /// `[2][page][slot][head][dim]` (vLLM's FlashAttention of old).
    pub fn nhd_apart(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let slot_stride = u64::from(shape.kv_heads) * shape.row_bytes();
        let page_stride = u64::from(page_slots) * slot_stride;
        let value_offset = u64::from(pages) * page_stride;
        Self { pages, page_slots, page_stride, slot_stride, head_stride: shape.row_bytes(), value_offset }
    }

    /// `[page][2][slot][head][dim]` (vLLM, NHD).
    pub fn nhd_together(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::nhd_apart(shape, pages, page_slots);
        Self { page_stride: 2 * apart.page_stride, value_offset: apart.page_stride, ..apart }
    }

    /// `[page][head][slot][dim]`, K and V in two tensors or one behind the other.
    pub fn hnd_apart(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::nhd_apart(shape, pages, page_slots);
        let slot_stride = shape.row_bytes();
        Self { slot_stride, head_stride: u64::from(page_slots) * slot_stride, ..apart }
    }

    /// `[page][2][head][slot][dim]` (vLLM, HND).
    pub fn hnd_together(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::hnd_apart(shape, pages, page_slots);
        Self { page_stride: 2 * apart.page_stride, value_offset: apart.page_stride, ..apart }
    }

    /// `[page][head][slot][2][dim]`: the view of every layer that vLLM has had since 0.32.
    pub fn hnd_rows_together(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::hnd_apart(shape, pages, page_slots);
        Self {
            page_stride: 2 * apart.page_stride,
            slot_stride: 2 * apart.slot_stride,
            head_stride: 2 * apart.head_stride,
            value_offset: shape.row_bytes(),
            ..apart
        }
    }

    /// Bytes from the first of its keys, or values, to behind the last.
    fn extent(self, shape: BlockShape) -> Option<u64> {
        let last = |count: u32, stride: u64| u64::from(count.checked_sub(1)?).checked_mul(stride);
        last(self.pages, self.page_stride)?
            .checked_add(last(self.page_slots, self.slot_stride)?)?
            .checked_add(last(shape.kv_heads, self.head_stride)?)?
            .checked_add(shape.row_bytes())
    }
}

/// The pages of an engine.
#[derive(Clone, Debug)]
pub struct EnginePages {
    /// Where elements lie.
    pub layout: PageLayout,
    /// Keys and values of every layer; the memory is at least as long as the layout says.
    pub layers: Vec<[KernelBytes; 2]>,
}

impl EnginePages {
    /// Pages where K and V of a layer lie in one tensor.
    ///
    /// # Errors
    /// If a tensor is too short for the layout's [`PageLayout::value_offset`].
    pub fn in_one_tensor(layout: PageLayout, layers: &[KernelBytes]) -> Result<Self, KernelError> {
        let offset = usize::try_from(layout.value_offset).map_err(|_| KernelError::bad("value offset"))?;
        let halves = |bytes: &KernelBytes| {
            let length = bytes.len().checked_sub(offset);
            let length = length.ok_or_else(|| KernelError::bad("values begin behind the tensor"))?;
            Ok([bytes.clone(), bytes.part(offset, length)?])
        };
        Ok(Self { layout, layers: layers.iter().map(halves).collect::<Result<_, _>>()? })
    }
}

/// A block and the slots of the engine that hold its tokens.
#[derive(Clone, Debug)]
pub struct BlockTokens {
    /// The payload, in our layout.
    pub block: KernelBytes,
    /// Slots of the engine, counted over its pages, where runs begin: one entry for every
    /// [`Mover::run_slots`] tokens.
    pub runs: Vec<u32>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Move {
    blocks: u64,
    starts: u64,
    bases: u64,
    slot_stride: u64,
    head_stride: u64,
    half_bytes: u64,
    inner_magic: u64,
    heads_magic: u64,
    run_magic: u64,
    vectors: u32,
    inner: u32,
    heads: u32,
    step_slots: u32,
    run_slots: u32,
    runs: u32,
    first_half: u32,
}

// SAFETY: the fields of `Move` in move.cu.
unsafe impl Parameters for Move {}

/// Moves blocks between one engine's pages and our layout.
#[derive(Debug)]
pub struct Mover {
    queue: Arc<dyn KernelQueue>,
    shape: BlockShape,
    pages: EnginePages,
    bases: KernelBytes,
    run_slots: u32,
    /// Bytes that every address and stride is a multiple of, up to 16.
    alignment: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ToBlocks,
    ToPages,
}

impl Mover {
    /// Checks the pages against the shape once, and puts their addresses onto the device.
    ///
    /// # Errors
    /// [`KernelError::BadJob`] if the two do not fit, else what the queue says.
    pub fn new(
        queue: Arc<dyn KernelQueue>,
        shape: BlockShape,
        pages: EnginePages,
    ) -> Result<Self, KernelError> {
        let layout = pages.layout;
        if pages.layers.len() != usize::try_from(shape.layers).unwrap_or(0) || shape.layers == 0 {
            return Err(KernelError::bad(format!(
                "{} layers of pages for {}",
                pages.layers.len(),
                shape.layers
            )));
        }
        if shape.slots == 0 || shape.half_bytes() == 0 || layout.page_slots == 0 {
            return Err(KernelError::bad("blocks or pages of nothing"));
        }
        if shape.half_bytes() > VECTORS_MAX * 16
            || u64::from(layout.pages) * u64::from(layout.page_slots) > u64::from(u32::MAX)
        {
            return Err(KernelError::bad("blocks or pages that are too large"));
        }
        let extent = layout.extent(shape).ok_or_else(|| KernelError::bad("pages leave the address space"))?;
        let halves = || pages.layers.iter().flatten();
        if let Some(short) = halves().find(|half| (half.len() as u64) < extent) {
            return Err(KernelError::bad(format!("{} bytes of pages, and {extent} are needed", short.len())));
        }
        let addresses: Vec<u64> = halves().map(KernelBytes::address).collect();
        let strides =
            [shape.row_bytes(), layout.page_stride, layout.slot_stride, layout.head_stride].into_iter();
        let alignment = strides.chain(addresses.iter().copied()).fold(16, gcd);
        let bases = queue.allocate(addresses.len() * 8)?;
        queue.write(&bases, &bytes_of(&addresses))?;
        let run_slots = u32::try_from(gcd(u64::from(shape.slots), u64::from(layout.page_slots)))
            .map_err(|_| KernelError::bad("pages of too many slots"))?;
        Ok(Self { queue, shape, pages, bases, run_slots, alignment })
    }

    /// Tokens that lie in one page together, whatever the block: a block has `slots / run_slots` runs.
    pub fn run_slots(&self) -> u32 {
        self.run_slots
    }

    /// Starts copying tokens from the engine's pages into blocks, for some layers.
    ///
    /// # Safety
    /// The blocks and pages stay, and nobody else uses them, until the queue has come to an end.
    ///
    /// # Errors
    /// [`KernelError::BadJob`], before anything is started; else what the queue says.
    pub unsafe fn gather(&self, blocks: &[BlockTokens], layers: Range<u32>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.run(Way::ToBlocks, blocks, layers) }
    }

    /// Starts copying blocks into the engine's pages, for some layers.
    ///
    /// # Safety
    /// As [`Mover::gather`].
    ///
    /// # Errors
    /// As [`Mover::gather`].
    pub unsafe fn scatter(&self, blocks: &[BlockTokens], layers: Range<u32>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.run(Way::ToPages, blocks, layers) }
    }

    unsafe fn run(&self, way: Way, blocks: &[BlockTokens], layers: Range<u32>) -> Result<(), KernelError> {
        if layers.end > self.shape.layers || layers.start >= layers.end {
            return Err(KernelError::bad(format!("layers {layers:?} of {}", self.shape.layers)));
        }
        let starts = blocks.iter().map(|block| self.starts(block)).collect::<Result<Vec<_>, _>>()?;
        let halves_max = u32::try_from(GRID_MAX / 2).expect("a small number");
        for (blocks, starts) in blocks.chunks(GRID_MAX).zip(starts.chunks(GRID_MAX)) {
            let mut first = layers.start;
            while first < layers.end {
                let end = layers.end.min(first + halves_max);
                // SAFETY: the caller's promise; sizes were checked here and in `starts`.
                unsafe { self.start(way, blocks, starts, first..end) }?;
                first = end;
            }
        }
        Ok(())
    }

    /// Bytes from the base of a layer to every run of a block.
    fn starts(&self, block: &BlockTokens) -> Result<Vec<u64>, KernelError> {
        if block.block.len() as u64 != self.shape.block_bytes() {
            let bytes = self.shape.block_bytes();
            return Err(KernelError::bad(format!("{} bytes for a block of {bytes}", block.block.len())));
        }
        let runs = usize::try_from(self.shape.slots / self.run_slots).unwrap_or(0);
        if block.runs.len() != runs {
            return Err(KernelError::bad(format!("{} runs for a block of {runs}", block.runs.len())));
        }
        let layout = self.pages.layout;
        let start = |first: &u32| {
            let (page, slot) = (first / layout.page_slots, first % layout.page_slots);
            if page >= layout.pages || !first.is_multiple_of(self.run_slots) {
                return Err(KernelError::bad(format!("a run of tokens at slot {first} of the engine")));
            }
            Ok(u64::from(page) * layout.page_stride + u64::from(slot) * layout.slot_stride)
        };
        block.runs.iter().map(start).collect()
    }

    unsafe fn start(
        &self,
        way: Way,
        blocks: &[BlockTokens],
        starts: &[Vec<u64>],
        layers: Range<u32>,
    ) -> Result<(), KernelError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let addresses: Vec<u64> = blocks.iter().map(|block| block.block.address()).collect();
        let vector = match addresses.iter().copied().fold(self.alignment, gcd) {
            16 => 16,
            4 | 8 => 4,
            _ => 1,
        };
        let kernel = match (way, vector) {
            (Way::ToBlocks, 16) => Kernel::Gather16,
            (Way::ToBlocks, 4) => Kernel::Gather4,
            (Way::ToBlocks, _) => Kernel::Gather1,
            (Way::ToPages, 16) => Kernel::Scatter16,
            (Way::ToPages, 4) => Kernel::Scatter4,
            (Way::ToPages, _) => Kernel::Scatter1,
        };
        let pieces = self.pieces();
        let vectors = self.vectors(self.shape.half_bytes(), vector)?;
        let inner = self.vectors(pieces.bytes, vector)?;
        let table: Vec<u64> = addresses.iter().copied().chain(starts.iter().flatten().copied()).collect();
        let memory = self.queue.allocate(table.len() * 8)?;
        self.queue.write(&memory, &bytes_of(&table))?;
        let parameters = Move {
            blocks: memory.address(),
            starts: memory.address() + 8 * addresses.len() as u64,
            bases: self.bases.address(),
            slot_stride: self.pages.layout.slot_stride,
            head_stride: self.pages.layout.head_stride,
            half_bytes: self.shape.half_bytes(),
            inner_magic: magic(inner),
            heads_magic: magic(pieces.heads),
            run_magic: magic(self.run_slots),
            vectors,
            inner,
            heads: pieces.heads,
            step_slots: pieces.step_slots,
            run_slots: self.run_slots,
            runs: self.shape.slots / self.run_slots,
            first_half: 2 * layers.start,
        };
        let threads = vectors.div_ceil(UNROLL).next_multiple_of(32).min(THREADS_MAX);
        let count = u32::try_from(blocks.len()).expect("at most a grid");
        let grid = [vectors.div_ceil(threads * UNROLL), 2 * (layers.end - layers.start), count];
        // SAFETY: every block has the shape's length and every run lies in a page (checked in `starts`), every
        // page in its layer's memory (checked in `new`), and all stay by the caller's promise. The vector's
        // length divides every address and stride. The table is freed only behind the kernel.
        unsafe { self.queue.launch(Launch::new(kernel, grid, threads, &parameters)) }
    }

    fn vectors(&self, bytes: u64, vector: u64) -> Result<u32, KernelError> {
        let count = bytes / vector;
        if count >= VECTORS_MAX {
            let shape = self.shape;
            return Err(KernelError::bad(format!("{count} vectors of {vector} bytes a half: {shape:?}")));
        }
        Ok(u32::try_from(count).expect("below a million"))
    }

    /// What is contiguous on both sides: rows, or slots where heads follow each other, or runs.
    fn pieces(&self) -> Pieces {
        let (row, heads) = (self.shape.row_bytes(), self.shape.kv_heads);
        let layout = self.pages.layout;
        if heads > 1 && layout.head_stride != row {
            return Pieces { bytes: row, heads, step_slots: 1 };
        }
        let slot = row * u64::from(heads);
        if self.run_slots > 1 && layout.slot_stride != slot {
            return Pieces { bytes: slot, heads: 1, step_slots: 1 };
        }
        Pieces { bytes: slot * u64::from(self.run_slots), heads: 1, step_slots: self.run_slots }
    }
}

struct Pieces {
    bytes: u64,
    heads: u32,
    step_slots: u32,
}

/// Exact for what is divided by it here: both are below 2^20.
fn magic(divisor: u32) -> u64 {
    (1u64 << MAGIC_BITS).div_ceil(u64::from(divisor))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
