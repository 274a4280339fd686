//! `bench index`: the router's index under the loads of `load`, on this machine alone; `tools/bench/index`
//! puts NVIDIA Dynamo's index beside it.
//!
//! Limits are what that index took on a quiet machine (docs/benchmarks/index.md), times the 1.2 that ours
//! must be better by where it changes. Time in which the thread waited for a core is left out.

mod day;
pub(crate) mod load;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::ensure;
use terrace_index::{Found, HolderId, Index, Key, Limits, TierSet};

use super::table::clock::Stretch;
use super::{Line, median};
use load::{Shape, mix, permille};

const ROUNDS: usize = 5;
const FINDS: u64 = 4_000;
/// Look-ups by blocks, with the most microseconds at the median and at the 99th percentile.
const FIND_MAX: [(usize, f64, f64); 5] =
    [(64, 1.4, 1.9), (256, 1.8, 2.6), (512, 2.4, 3.7), (1_000, 3.1, 4.6), (2_000, 3.9, 7.4)];
/// Million blocks a second of one thread.
const STORE_MIN: f64 = 1.2 * 9.0;
const REMOVE_MIN: f64 = 1.2 * 10.9;
const BYTES_MAX: f64 = 59.0;
const DECODE_BYTES_MAX: f64 = 149.0;
/// Memory of the index that forgets.
const SMALL: u64 = 16 << 20;

pub(super) fn run(traces: &Path) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (shape, bytes_max, rounds) in [
        (load::REFERENCE, BYTES_MAX, ROUNDS),
        (load::WIDE, BYTES_MAX, ROUNDS),
        (load::DECODE, DECODE_BYTES_MAX, ROUNDS),
        (load::COLD, BYTES_MAX, 1),
    ] {
        measure(&shape, bytes_max, rounds, &mut lines)?;
    }
    lines.push(forgetting()?);
    lines.extend(day::run(traces)?);
    Ok(lines)
}

fn measure(shape: &Shape, bytes_max: f64, rounds: usize, lines: &mut Vec<Line>) -> anyhow::Result<()> {
    let keys: Vec<Vec<Key>> = (0..shape.documents).map(|document| shape.keys(document)).collect();
    let reversed: Vec<Vec<Key>> = keys.iter().map(|keys| keys.iter().rev().copied().collect()).collect();
    let (mut stores, mut removes) = (Vec::new(), Vec::new());
    let name = |figure: &str| format!("index_{}_{figure}", shape.name);
    #[expect(clippy::cast_precision_loss, reason = "a few million blocks")]
    let told = shape.told() as f64 / 1e6;
    for round in 0..rounds {
        let index = Index::new(Limits { holders: shape.workers, bytes: 1 << 30 });
        let stretch = Stretch::begin();
        for (document, keys) in (0..).zip(&keys) {
            load::store(&index, shape, (document, 0), keys, |_| true);
        }
        stores.push(told / (stretch.elapsed().as_secs_f64() * stretch.share()));
        if round == 0 {
            let counts = index.counts();
            ensure!(counts.evicted == 0, "the limit is too small for the load");
            #[expect(clippy::cast_precision_loss, reason = "a ratio to three digits")]
            let each = counts.bytes as f64 / counts.entries as f64;
            lines.push(Line::at_most(&name("bytes"), each, bytes_max, "B/entry"));
            if shape.per_event > 1 {
                finds(&index, shape, &keys, lines)?;
                beside_writer(&index, shape, &keys, &reversed, lines)?;
            }
        }
        let stretch = Stretch::begin();
        for (document, keys) in (0..).zip(&reversed) {
            load::remove(&index, shape, (document, 0), keys, |_| true);
        }
        removes.push(told / (stretch.elapsed().as_secs_f64() * stretch.share()));
        ensure!(index.counts().blocks == 0, "the load is not gone");
    }
    let is_reference = shape.name == load::REFERENCE.name;
    let rate = |figure: &str, rates: &[f64], limit: f64| match is_reference {
        true => Line::at_least(&name(figure), median(rates), limit, "Mblocks/s"),
        false => Line::plain(&name(figure), median(rates), "Mblocks/s"),
    };
    lines.push(rate("store", &stores, STORE_MIN));
    lines.push(rate("remove", &removes, REMOVE_MIN));
    Ok(())
}

/// Look-ups of the beginnings of documents drawn at random.
fn finds(index: &Index, shape: &Shape, keys: &[Vec<Key>], lines: &mut Vec<Line>) -> anyhow::Result<()> {
    for (blocks, p50_max, p99_max) in FIND_MAX.into_iter().filter(|(blocks, ..)| *blocks <= shape.blocks) {
        let (p50, p99) = timed_finds(index, (shape.documents, blocks), keys)?;
        let name = |part: &str| format!("index_{}_find_{blocks}_{part}", shape.name);
        if shape.name == load::REFERENCE.name {
            lines.push(Line::at_most(&name("p50"), p50, p50_max, "us"));
            lines.push(Line::at_most(&name("p99"), p99, p99_max, "us"));
        } else {
            lines.push(Line::plain(&name("p50"), p50, "us"));
            lines.push(Line::plain(&name("p99"), p99, "us"));
        }
    }
    Ok(())
}

/// Microseconds at the median and at the 99th percentile.
fn timed_finds(
    index: &Index,
    (documents, blocks): (u64, usize),
    keys: &[Vec<Key>],
) -> anyhow::Result<(f64, f64)> {
    let (mut nanos, mut found) = (Vec::new(), Found::new());
    for draw in 0..FINDS {
        let prompt = &keys[usize::try_from(mix(draw) % documents)?][..blocks];
        // The keys have just been made when a router looks them up.
        std::hint::black_box(prompt.iter().max());
        let began = Instant::now();
        index.find(prompt, &mut found);
        nanos.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
        ensure!(found.blocks() as usize == blocks, "a document is not whole");
    }
    Ok((permille(&mut nanos, 500) / 1e3, permille(&mut nanos, 990) / 1e3))
}

/// Look-ups of the first half of the documents while the other half goes and comes again.
fn beside_writer(
    index: &Index,
    shape: &Shape,
    keys: &[Vec<Key>],
    reversed: &[Vec<Key>],
    lines: &mut Vec<Line>,
) -> anyhow::Result<()> {
    let half = shape.documents / 2;
    let done = AtomicBool::new(false);
    let blocks = shape.blocks.min(512);
    let (p50, p99) = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (document, (keys, reversed)) in (0..).zip(keys.iter().zip(reversed)).skip(keys.len() / 2)
                {
                    load::remove(index, shape, (document, shape.shared), reversed, |_| true);
                    load::store(index, shape, (document, shape.shared), keys, |_| true);
                }
            }
        });
        let timed = timed_finds(index, (half, blocks), keys);
        done.store(true, Ordering::Relaxed);
        timed
    })?;
    lines.push(Line::plain(&format!("index_{}_find_{blocks}_beside_writer_p50", shape.name), p50, "us"));
    lines.push(Line::plain(&format!("index_{}_find_{blocks}_beside_writer_p99", shape.name), p99, "us"));
    Ok(())
}

/// New documents without end in an index of 16 MiB: what it takes must stay there.
fn forgetting() -> anyhow::Result<Line> {
    let index = Index::new(Limits { holders: 100, bytes: SMALL });
    let mut most = 0;
    for document in 0..10_000u32 {
        let keys: Vec<Key> =
            (0..500).map(|block| Key::from_alias(u64::from(document) << 24 | block)).collect();
        index.store(HolderId(document % 100), TierSet::PINNED, None, &keys)?;
        most = most.max(index.counts().bytes);
    }
    ensure!(index.counts().evicted > 0, "nothing was forgotten");
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    Ok(Line::at_most("index_forgetting_bytes", most as f64, SMALL as f64, "B"))
}
