//! A day of recorded agents' traffic through an index that may keep a part of it: it must be as large at the end as it
//! was after an hour.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use terrace_index::{Found, HolderId, Index, Key, Limits, SizeClass, TierSet};

use crate::bench::Line;
use crate::sim::trace::{Ask, Trace};

const FILE: &str = "weka_agentic_64.jsonl.zst";
const WORKERS: u32 = 16;
const HOUR: u64 = 3_600_000_000;
const HOURS: u64 = 24;
/// Memory of the index; what an hour brings needs more.
const BYTES: u64 = 3 << 19;
/// Blocks that one event tells of.
const PER_EVENT: usize = 64;
/// How much larger the last hour may be than the first: one segment of anything.
const GROWTH_MAX: f64 = 1.1;

/// Each session stays on its worker, which tells of the blocks that the index does not have of it, and never that any
/// are gone. What the trace is too short for comes from the beginning again, as other sessions of other blocks.
pub(super) fn run(traces: &Path) -> anyhow::Result<Vec<Line>> {
    let path = traces.join(FILE);
    if !path.is_file() {
        eprintln!("{} is missing: no day of it is replayed", path.display());
        return Ok(Vec::new());
    }
    let trace = Trace::read(&path, None, Some(64))?;
    let index = Index::new(Limits { holders: WORKERS, bytes: BYTES });
    let (workers, length) = (workers(&trace), trace.asks.last().map_or(0, |ask| ask.at) + 1);
    let (mut hourly, mut found, began, mut told) = (Vec::new(), Found::new(), Instant::now(), 0);
    let passes = (0u64..).flat_map(|pass| trace.asks.iter().zip(&workers).map(move |both| (pass, both)));
    for (pass, (ask, worker)) in passes {
        let hour = (pass * length + ask.at) / HOUR;
        while (hourly.len() as u64) < hour {
            hourly.push(index.counts());
        }
        if hour >= HOURS {
            break;
        }
        told += serve(&index, &keys(&trace, ask, pass), *worker, &mut found)?;
        let counts = index.counts();
        ensure!(counts.bytes <= BYTES, "{} bytes in hour {}", counts.bytes, hour + 1);
    }
    let (first, last) = hourly.first().zip(hourly.last()).context("the trace is empty")?;
    ensure!(last.evicted > last.entries, "the day did not bring more than the index keeps");
    println!("a day of {FILE}: {told} blocks told of in {:.1} s of ours", began.elapsed().as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    let [first, last] = [first, last].map(|counts| counts.bytes as f64);
    Ok(vec![
        Line::plain("index_day_bytes_hour_1", first, "B"),
        Line::at_most("index_day_bytes_hour_24", last, first * GROWTH_MAX, "B"),
    ])
}

/// Finds a prompt, stores what its worker lacks of it, and keeps the rest warm. Blocks stored.
fn serve(index: &Index, keys: &[Key], worker: HolderId, found: &mut Found) -> anyhow::Result<u64> {
    index.find(keys, found);
    let known = found.held(worker).map_or(0, |held| held.prefix[2] as usize);
    index.touch(worker, &keys[..known])?;
    let mut turn = index.changes();
    let mut parent = known.checked_sub(1).map(|last| keys[last]);
    for event in keys[known..].chunks(PER_EVENT) {
        match parent {
            Some(_) => turn.store_sized(worker, TierSet::PINNED, SizeClass::UNKNOWN, parent, event)?,
            None => turn.store_start(worker, TierSet::PINNED, SizeClass::UNKNOWN, event)?,
        };
        parent = event.last().copied();
    }
    Ok((keys.len() - known) as u64)
}

fn keys(trace: &Trace, ask: &Ask, pass: u64) -> Vec<Key> {
    trace.numbers(ask).iter().map(|number| Key::from_alias(pass << 32 | u64::from(*number))).collect()
}

/// The worker of each request: that of its session.
fn workers(trace: &Trace) -> Vec<HolderId> {
    let (mut sessions, mut workers) = (0, vec![HolderId(0); trace.asks.len()]);
    for (place, ask) in trace.asks.iter().enumerate() {
        if !ask.follows {
            workers[place] = HolderId(sessions % WORKERS);
            sessions += 1;
        }
        if let Some(next) = ask.next {
            workers[next as usize] = workers[place];
        }
    }
    workers
}
