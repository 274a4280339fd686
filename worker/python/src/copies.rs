//! Many blocks copied in one call, with the interpreter released once, by more than one thread if there is much.
//!
//! Promises: every copy was compared with its block's checksum; nobody writes where two targets overlap at once.

use pyo3::prelude::*;

use terrace_lane::{Called, share};

use crate::block::{Block, Copy, Way};
use crate::errors::invalid;
use crate::span::{Pieces, Span, overlap};

/// Up to here the targets of one call are still in the last cache when somebody looks at them, and often before: 29 GiB/s
/// into what is there, by two threads 36, on Zen 5, where past the cache both have 25 to 27.
const CACHED_BYTES_MAX: usize = 8 << 20;

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
    let bytes: usize = copies.iter().map(Copy::bytes).sum();
    let way = if bytes <= CACHED_BYTES_MAX { Way::ThroughTheCache } else { Way::ByLength };
    let copies: Vec<_> = copies.into_iter().map(|copy| copy.by(way)).collect();
    let targets = || copies.iter().map(Copy::target);
    // Rows of several layers lie between each other, and share nothing.
    let is_shared = || overlap(targets().map(Pieces::place)) && overlap(targets().flat_map(Pieces::places));
    let threads = if threads > 1 && is_shared() { 1 } else { threads.min(copies.len()) };
    let mut copies: Vec<_> = copies.into_iter().map(|copy| (copy, false)).collect();
    Ok(py.detach(|| {
        share(&mut copies, bytes, Called::of(threads, bytes), |(copy, good)| *good = copy.run());
        copies.iter().map(|(_, good)| *good).collect()
    }))
}

/// Maps the pages of blocks, so that whoever reads them soon need not wait for it. See the package's stubs.
#[pyfunction]
pub(crate) fn map_blocks(py: Python<'_>, blocks: Vec<Bound<'_, Block>>) -> PyResult<()> {
    let held = blocks.iter().map(|block| block.get().held()).collect::<PyResult<Vec<_>>>()?;
    py.detach(|| held.iter().for_each(|held| Block::map_ahead(held)));
    Ok(())
}
