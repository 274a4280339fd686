//! Moves blocks between an engine's pages and our layout.

use std::ops::Range;
use std::sync::Arc;

use super::pages::{BlockShape, EnginePages};
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
/// Layers of one launch: two halves each.
const LAYERS_MAX: u32 = 32_767;

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

    /// [`Mover::prepare`] and [`Prepared::gather`] at once.
    ///
    /// # Safety
    /// As [`Prepared::gather`].
    ///
    /// # Errors
    /// As those two.
    pub unsafe fn gather(&self, blocks: &[BlockTokens], layers: Range<u32>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.prepare(blocks)?.gather(layers) }
    }

    /// [`Mover::prepare`] and [`Prepared::scatter`] at once.
    ///
    /// # Safety
    /// As [`Prepared::gather`].
    ///
    /// # Errors
    /// As those two.
    pub unsafe fn scatter(&self, blocks: &[BlockTokens], layers: Range<u32>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.prepare(blocks)?.scatter(layers) }
    }

    /// Checks blocks and puts what the kernels must know of them onto the device, once for all layers.
    ///
    /// # Errors
    /// [`KernelError::BadJob`], else what the queue says.
    pub fn prepare(&self, blocks: &[BlockTokens]) -> Result<Prepared<'_>, KernelError> {
        let parts = blocks.chunks(GRID_MAX).map(|blocks| self.part(blocks)).collect::<Result<_, _>>()?;
        Ok(Prepared { mover: self, parts })
    }

    fn part(&self, blocks: &[BlockTokens]) -> Result<Part, KernelError> {
        let addresses = || blocks.iter().map(|block| block.block.address());
        let alignment = addresses().fold(self.alignment, gcd);
        let mut table: Vec<u64> = addresses().collect();
        for block in blocks {
            table.extend(self.starts(block)?);
        }
        let tables = self.queue.allocate(table.len() * 8)?;
        self.queue.write(&tables, &bytes_of(&table))?;
        let count = u32::try_from(blocks.len()).map_err(|_| KernelError::bad("too many blocks"))?;
        Ok(Part {
            tables,
            count,
            alignment,
            _blocks: blocks.iter().map(|block| block.block.clone()).collect(),
        })
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

    unsafe fn start(&self, way: Way, part: &Part, layers: Range<u32>) -> Result<(), KernelError> {
        let vector = match part.alignment {
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
        let parameters = Move {
            blocks: part.tables.address(),
            starts: part.tables.address() + 8 * u64::from(part.count),
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
        let grid = [vectors.div_ceil(threads * UNROLL), 2 * (layers.end - layers.start), part.count];
        // SAFETY: every block has the shape's length and every run lies in a page (checked in `starts`), every
        // page in its layer's memory (checked in `new`), and all stay by the caller's promise. The vector's
        // length divides every address and stride.
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

/// Blocks that are ready to be moved, any layers of them, any number of times.
#[derive(Debug)]
pub struct Prepared<'a> {
    mover: &'a Mover,
    parts: Vec<Part>,
}

/// As many blocks as one launch takes.
#[derive(Debug)]
struct Part {
    /// Addresses of the blocks, then the starts of their runs.
    tables: KernelBytes,
    count: u32,
    alignment: u64,
    _blocks: Vec<KernelBytes>,
}

impl Prepared<'_> {
    /// Starts copying tokens from the engine's pages into the blocks, for some layers.
    ///
    /// # Safety
    /// Blocks and pages stay, and nobody else uses those layers of them, until the queue has come to an end.
    ///
    /// # Errors
    /// [`KernelError::BadJob`], before anything is started; else what the queue says.
    pub unsafe fn gather(&self, layers: Range<u32>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.run(Way::ToBlocks, layers) }
    }

    /// Starts copying the blocks into the engine's pages, for some layers.
    ///
    /// # Safety
    /// As [`Prepared::gather`].
    ///
    /// # Errors
    /// As [`Prepared::gather`].
    pub unsafe fn scatter(&self, layers: Range<u32>) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.run(Way::ToPages, layers) }
    }

    unsafe fn run(&self, way: Way, layers: Range<u32>) -> Result<(), KernelError> {
        let all = self.mover.shape.layers;
        if layers.end > all || layers.start >= layers.end {
            return Err(KernelError::bad(format!("layers {layers:?} of {all}")));
        }
        for part in &self.parts {
            let mut first = layers.start;
            while first < layers.end {
                let end = layers.end.min(first + LAYERS_MAX);
                // SAFETY: the caller's promise; sizes were checked when the blocks were prepared.
                unsafe { self.mover.start(way, part, first..end) }?;
                first = end;
            }
        }
        Ok(())
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
