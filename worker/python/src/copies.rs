//! Many blocks copied in one call, with the interpreter released once, by more than one thread if there is much.
//!
//! Promises: every copy was compared with its block's checksum; nobody writes where two targets overlap at once.

use pyo3::prelude::*;

use crate::block::{Block, Copy, Span, copy_all};
use crate::errors::invalid;

/// Below this a second thread costs more than it saves.
const PARALLEL_BYTES_MIN: usize = 4 << 20;
const THREADS_MAX: usize = 8;

/// Copies each block into its target; answers which copies are the block. See the package's stubs.
#[pyfunction]
#[pyo3(signature = (blocks, targets, *, threads=1))]
pub(crate) fn copy_blocks(
    py: Python<'_>,
    blocks: Vec<Bound<'_, Block>>,
    targets: Vec<Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<Vec<bool>> {
    if blocks.len() != targets.len() {
        return Err(invalid(format!("{} blocks and {} targets", blocks.len(), targets.len())));
    }
    let spans = targets.iter().map(Span::of_pieces).collect::<PyResult<Vec<_>>>()?;
    let pairs = blocks.iter().zip(&spans);
    let copies = pairs.map(|(block, span)| Copy::new(block.get(), span)).collect::<PyResult<Vec<_>>>()?;
    Ok(py.detach(|| run(copies, threads)))
}

fn run(copies: Vec<Copy<'_>>, threads: usize) -> Vec<bool> {
    let bytes: usize = copies.iter().map(Copy::bytes).sum();
    let threads = threads.clamp(1, THREADS_MAX).min(copies.len());
    if threads < 2 || bytes < PARALLEL_BYTES_MIN || overlap(&copies) {
        return copies.iter().map(Copy::run).collect();
    }
    copy_all(copies, threads)
}

fn overlap(copies: &[Copy<'_>]) -> bool {
    let mut places: Vec<_> = copies.iter().map(Copy::place).collect();
    places.sort_unstable_by_key(|place| place.start);
    places.windows(2).any(|two| two[0].end > two[1].start)
}
