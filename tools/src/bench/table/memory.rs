//! Bytes of memory for each resident block: growth of this process's resident
//! set, as the kernel counts it.

use std::fs;

use anyhow::{Context, ensure};
use terrace_core::{Locality, Policy};

use super::shard::{CHAIN_BLOCKS, Shape, Shard};
use super::{BLOCK_BYTES, BLOCKS};
use crate::bench::Line;

const BYTES_MAX: f64 = 200.0;

/// Memory of a table that grows to one million blocks, then to two, and then
/// replaces half of them.
pub(super) fn run() -> anyhow::Result<Vec<Line>> {
    let before = resident_bytes()?;
    let shape = Shape {
        blocks: 2 * BLOCKS,
        block_bytes: BLOCK_BYTES,
        locality: Locality::Streamed,
        policy: Policy::Duel,
    };
    let mut shard = Shard::new(shape)?;
    let mut chains = 0..;
    let mut write = |shard: &mut Shard, count: u64| {
        chains.by_ref().take(usize::try_from(count)?).try_for_each(|number| shard.write(number).map(|_| ()))
    };
    write(&mut shard, BLOCKS / CHAIN_BLOCKS as u64)?;
    let (one, one_blocks) = (resident_bytes()?, shard.resident());
    write(&mut shard, BLOCKS / CHAIN_BLOCKS as u64)?;
    let (two, two_blocks) = (resident_bytes()?, shard.resident());
    write(&mut shard, BLOCKS / CHAIN_BLOCKS as u64)?;
    let (replaced, replaced_blocks) = (resident_bytes()?, shard.resident());
    ensure!(shard.evicted() > BLOCKS * 9 / 10, "only {} blocks were replaced", shard.evicted());
    let figure = |name: &str, bytes: u64, blocks: u64| {
        #[expect(clippy::cast_precision_loss, reason = "a ratio to three digits")]
        let each = bytes as f64 / blocks as f64;
        Line::at_most(name, each, BYTES_MAX, "B/block")
    };
    Ok(vec![
        figure("table_bytes_1m", one.saturating_sub(before), one_blocks),
        figure("table_bytes_1m_to_2m", two.saturating_sub(one), two_blocks - one_blocks),
        figure("table_bytes_after_replacing", replaced.saturating_sub(before), replaced_blocks),
    ])
}

/// The resident set, summed up exactly over all mappings.
fn resident_bytes() -> anyhow::Result<u64> {
    let path = "/proc/self/smaps_rollup";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib =
        line.and_then(|rest| rest.trim().strip_suffix(" kB")).with_context(|| format!("no Rss in {path}"))?;
    Ok(kib.parse::<u64>().with_context(|| format!("{path}: Rss is {kib}"))? * 1024)
}
