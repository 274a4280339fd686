//! Bytes that our index and NVIDIA Dynamo's hold for each pair of block and worker, as the allocator counts
//! them. Counting takes time, so this is a program of its own.

#[path = "../../../src/bench/index/load.rs"]
#[expect(dead_code, reason = "other programs use other parts")]
mod load;
#[expect(dead_code, reason = "the other program uses other parts")]
mod peer;
#[expect(dead_code, reason = "the other program uses other parts")]
mod report;

use anyhow::{Context, ensure};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use terrace_index::{Index, Limits};

use load::Shape;
use peer::Peer;
use report::Pairs;

#[global_allocator]
static ALLOCATED: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// Bytes allocated and not yet freed. Growth in place is counted apart.
fn allocated() -> isize {
    let stats = ALLOCATED.stats();
    stats.bytes_allocated as isize - stats.bytes_deallocated as isize
}

fn main() -> anyhow::Result<()> {
    let mut pairs = Pairs::default();
    // By load: ours must take at most this part of the peer's.
    let loads = [(load::REFERENCE, 1.0), (load::DECODE, 2.0), (load::WIDE, 1.0), (load::COLD, 1.0)];
    let names: Vec<String> = std::env::args().skip(1).collect();
    for (shape, bar) in loads {
        if names.is_empty() || names.iter().any(|name| name == shape.name) {
            measure(&shape, bar, &mut pairs)?;
        }
    }
    pairs.print();
    Ok(())
}

fn measure(shape: &Shape, bar: f64, pairs: &mut Pairs) -> anyhow::Result<()> {
    let before = allocated();
    let ours = Index::new(Limits { holders: shape.workers, bytes: 2 << 30 });
    for document in 0..shape.documents {
        load::store(&ours, shape, (document, 0), &shape.keys(document), |_| true);
    }
    let our_bytes = allocated() - before;
    let counts = ours.counts();
    ensure!(counts.evicted == 0, "the limit is too small for the load");
    ensure!(
        counts.bytes.abs_diff(our_bytes as u64) < counts.bytes / 20,
        "{counts:?}, but {our_bytes} allocated"
    );
    drop(ours);

    let before = allocated();
    let theirs = Peer::new(1);
    for document in 0..shape.documents {
        let mut events = Vec::new();
        peer::stored(shape, (document, 0), &mut events);
        theirs.send(events);
        theirs.drain();
    }
    let their_bytes = allocated() - before;
    let entries = i64::try_from(counts.entries)? as f64;
    let each = |bytes: isize| -> anyhow::Result<f64> {
        Ok(u64::try_from(bytes).context("memory shrank")? as f64 / entries)
    };
    let name = format!("{}_bytes_per_entry", shape.name);
    pairs.lower(&name, each(our_bytes)?, each(their_bytes)?, Some(bar), "B");
    Ok(())
}
