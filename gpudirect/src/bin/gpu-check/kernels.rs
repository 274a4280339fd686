//! Gather and scatter between an engine's pages and blocks, against a plain copy
//! on the device: both read and write each byte once.

use std::sync::Arc;
use std::time::Instant;

use terrace_gpudirect::kernels::{
    BlockShape, BlockTokens, Cuda, EnginePages, KernelBytes, KernelError, KernelQueue, Mover, PageLayout,
};

use crate::Options;
use crate::rows::{Rows, median};

pub(crate) const NAMES: &[&str] =
    &["gather_llama_3_8b", "scatter_llama_3_8b", "gather_llama_3_70b_tp8", "scatter_llama_3_70b_tp8"];

/// 16 tokens a block, bf16.
const SHAPES: [(&str, BlockShape); 2] = [
    ("llama_3_8b", BlockShape { layers: 32, slots: 16, kv_heads: 8, head_dim: 128, element_bytes: 2 }),
    ("llama_3_70b_tp8", BlockShape { layers: 80, slots: 16, kv_heads: 1, head_dim: 128, element_bytes: 2 }),
];
const BLOCKS: u32 = 128;
const LAUNCHES: u32 = 10;
/// Odd, so that a median is a round.
const ROUNDS: usize = 5;

pub(crate) fn measure(options: &Options, rows: &mut Rows, until: Instant, copy_rate: Option<f64>) {
    if options.host_only {
        return NAMES.iter().for_each(|name| rows.skip(name, "kernels on the host say nothing about speed"));
    }
    let queue: Arc<dyn KernelQueue> = match Cuda::open(options.ordinal) {
        Ok(queue) => Arc::new(queue),
        Err(error) => return NAMES.iter().for_each(|name| rows.fail(name, &error.to_string())),
    };
    rows.note("kernels", &queue.describe());
    for (name, shape) in SHAPES {
        let names = [format!("gather_{name}"), format!("scatter_{name}")];
        match rates(&queue, shape, until) {
            Ok(rates) => {
                for (name, rate) in names.iter().zip(rates) {
                    match copy_rate {
                        Some(limit) => rows.part_of(name, rate, limit, Some(0.8), "GB/s"),
                        None => rows.plain(name, rate, "GB/s"),
                    }
                }
            }
            Err(error) => names.iter().for_each(|name| rows.fail(name, &error.to_string())),
        }
    }
}

/// Gather's and scatter's, in GB/s of block bytes.
fn rates(queue: &Arc<dyn KernelQueue>, shape: BlockShape, until: Instant) -> Result<[f64; 2], KernelError> {
    // Twice as many pages as blocks, and blocks all over them.
    let layout = PageLayout::nhd_apart(shape, BLOCKS * 2, shape.slots);
    let half = usize::try_from(u64::from(BLOCKS) * 2 * shape.half_bytes()).unwrap_or(usize::MAX);
    let halves = |_| Ok([queue.allocate(half)?, queue.allocate(half)?]);
    let layers: Vec<[KernelBytes; 2]> = (0..shape.layers).map(halves).collect::<Result<_, KernelError>>()?;
    let mover = Mover::new(Arc::clone(queue), shape, EnginePages { layout, layers })?;
    let block_bytes = usize::try_from(shape.block_bytes()).unwrap_or(usize::MAX);
    let block = |index: u32| {
        let runs = vec![index * 37 % (BLOCKS * 2) * shape.slots];
        Ok(BlockTokens { block: queue.allocate(block_bytes)?, runs })
    };
    let blocks: Vec<BlockTokens> = (0..BLOCKS).map(block).collect::<Result<_, KernelError>>()?;
    // Once for all launches, as for layers that are streamed.
    let ready = mover.prepare(&blocks)?;
    let mut rounds = [Vec::new(), Vec::new()];
    // One round more, which is not counted: the first launches load the kernels.
    for round in 0..=ROUNDS {
        if Instant::now() > until {
            break;
        }
        for (way, rates) in rounds.iter_mut().enumerate() {
            let began = Instant::now();
            for _ in 0..LAUNCHES {
                // SAFETY: blocks and pages live until the queue was waited for, and nobody else has them.
                unsafe {
                    if way == 0 {
                        ready.gather(0..shape.layers)?;
                    } else {
                        ready.scatter(0..shape.layers)?;
                    }
                }
            }
            queue.wait()?;
            if round > 0 {
                let kibibytes = u32::try_from(shape.block_bytes() >> 10).map_or(f64::MAX, f64::from);
                let bytes = kibibytes * 1024.0 * f64::from(BLOCKS) * f64::from(LAUNCHES);
                rates.push(bytes * 1e-9 / began.elapsed().as_secs_f64().max(1e-9));
            }
        }
    }
    Ok([median(&rounds[0]), median(&rounds[1])])
}
