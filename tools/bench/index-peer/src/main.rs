//! Times our index and NVIDIA Dynamo's (`dynamo-kv-router`) under one load, in turn in one process, and
//! prints a JSON line for each figure: ours as the value, the peer's as the limit. `tools/bench/index` runs it.
//!
//! The peer is given what suits it: events are made before the clock starts, handed over without a copy, and
//! applied by as many threads of its own as of ours apply them. Stores and removals are counted in the time
//! that the applying threads had a core, so neither the hand-over nor other work on the machine is in it.
//! A look-up is a plain call on both sides, of a prompt whose hashes are in the cache, as they have just been
//! made; ours takes chained keys, the peer's the hashes of single blocks.

#[path = "../../../src/bench/index/load.rs"]
mod load;
mod peer;
mod replay;
mod report;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use dynamo_kv_router::protocols::LocalBlockHash;
use terrace_index::{Found, Index, Key, Limits};

use load::{Shape, mix, permille};
use peer::Peer;
use report::Pairs;

/// More than a load and both indexes take.
const TOUCHED_BYTES: usize = 3 << 30;
const PAGE_BYTES: usize = 4 << 10;
/// Look-ups of each length in a round.
const FINDS: usize = 4_000;
/// Look-ups of one side before it is the other's turn.
const TURN: usize = 500;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut pairs = Pairs::default();
    match arguments[..] {
        ["time", name, rounds] => {
            let shape = shape(name)?;
            touch_memory();
            for round in 0..rounds.parse::<usize>()? {
                measure(&shape, round, &mut pairs)?;
            }
        }
        ["replay", trace, rounds] => {
            for round in 0..rounds.parse::<usize>()? {
                replay::run(trace, round, &mut pairs)?;
            }
        }
        _ => bail!(
            "usage: index-peer time reference|decode|wide|cold ROUNDS, or index-peer replay TRACE ROUNDS"
        ),
    }
    pairs.print();
    Ok(())
}

/// A machine that is a guest pays several times as much for a page that its host has not given it yet, and who comes
/// first would pay for both. Pages that were touched and freed go to both sides alike.
fn touch_memory() {
    let mut touched = vec![0u8; TOUCHED_BYTES];
    touched.chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 1);
    black_box(touched);
}

pub(crate) fn shape(name: &str) -> anyhow::Result<Shape> {
    match name {
        "reference" => Ok(load::REFERENCE),
        "decode" => Ok(load::DECODE),
        "wide" => Ok(load::WIDE),
        "cold" => Ok(load::COLD),
        other => bail!("unknown load {other}; there are reference, decode, wide and cold"),
    }
}

/// Both indexes with the load in them, and the prompts for each.
struct Both {
    ours: Index,
    theirs: Peer,
    keys: Vec<Vec<Key>>,
    hashes: Vec<Vec<LocalBlockHash>>,
}

fn index(shape: &Shape) -> Index {
    Index::new(Limits { holders: shape.workers, bytes: 2 << 30 })
}

/// One round: stores and removals by one thread and by two, and look-ups alone and beside a writer.
fn measure(shape: &Shape, round: usize, pairs: &mut Pairs) -> anyhow::Result<()> {
    let keys: Vec<_> = (0..shape.documents).map(|document| shape.keys(document)).collect();
    let reversed: Vec<Vec<Key>> = keys.iter().map(|keys| keys.iter().rev().copied().collect()).collect();
    let name = shape.name;
    let mut filled = None;
    for threads in [2, 1] {
        let (ours, theirs) = (index(shape), Peer::new(threads));
        let rate = |took: Duration| shape.told() as f64 / 1e6 / took.as_secs_f64();
        let both =
            both_ways(round, || fill_ours(&ours, shape, &keys, threads), || fill_theirs(&theirs, shape));
        pairs.higher(
            &format!("{name}_store_{threads}_threads"),
            rate(both.0),
            rate(both.1),
            Some(1.2),
            "Mblocks/core s",
        );
        if threads == 2 {
            let both = both_ways(
                round,
                || empty_ours(&ours, shape, &reversed, threads),
                || empty_theirs(&theirs, shape),
            );
            pairs.higher(
                &format!("{name}_remove_2_threads"),
                rate(both.0),
                rate(both.1),
                Some(1.2),
                "Mblocks/core s",
            );
            ensure!(ours.counts().blocks == 0, "the load is not gone");
        } else {
            filled = Some((ours, theirs));
        }
    }
    let Some((ours, theirs)) = filled else { bail!("no round filled the indexes") };
    let hashes = (0..shape.documents).map(|document| peer::prompt(shape, document)).collect();
    let both = Both { ours, theirs, keys, hashes };
    for blocks in [64, 256, 512, 1_000, 2_000].into_iter().filter(|blocks| *blocks <= shape.blocks) {
        find(&both, shape, blocks, pairs)?;
    }
    if shape.per_event > 1 {
        find_beside_writer(&both, shape, &reversed, pairs);
    }
    let rate = |took: Duration| shape.told() as f64 / 1e6 / took.as_secs_f64();
    let took = both_ways(
        round,
        || empty_ours(&both.ours, shape, &reversed, 1),
        || empty_theirs(&both.theirs, shape),
    );
    pairs.higher(
        &format!("{name}_remove_1_threads"),
        rate(took.0),
        rate(took.1),
        Some(1.2),
        "Mblocks/core s",
    );
    Ok(())
}

/// Each side first in every other round.
fn both_ways<T>(round: usize, ours: impl FnOnce() -> T, theirs: impl FnOnce() -> T) -> (T, T) {
    if round % 2 == 0 {
        let first = ours();
        (first, theirs())
    } else {
        let first = theirs();
        (ours(), first)
    }
}

fn fill_ours(index: &Index, shape: &Shape, keys: &[Vec<Key>], threads: usize) -> Duration {
    timed(threads, |thread| {
        for (document, keys) in (0..).zip(keys) {
            load::store(index, shape, (document, 0), keys, |worker| worker as usize % threads == thread);
        }
    })
}

fn empty_ours(index: &Index, shape: &Shape, reversed: &[Vec<Key>], threads: usize) -> Duration {
    timed(threads, |thread| {
        for (document, keys) in (0..).zip(reversed) {
            load::remove(index, shape, (document, 0), keys, |worker| worker as usize % threads == thread);
        }
    })
}

/// Time on cores, of so many threads together.
fn timed(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let timed_one = |thread| {
        let before = on_core("/proc/thread-self");
        work(thread);
        on_core("/proc/thread-self") - before
    };
    if threads == 1 {
        return timed_one(0);
    }
    let timed_one = &timed_one;
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|thread| scope.spawn(move || timed_one(thread))).collect();
        all.into_iter().map(|one| one.join().expect("a thread of the bench ends")).sum()
    })
}

/// How long a thread has had a core, ever.
fn on_core(thread: &str) -> Duration {
    let text = std::fs::read_to_string(format!("{thread}/schedstat")).unwrap_or_default();
    let nanos = text.split_ascii_whitespace().next().and_then(|field| field.parse().ok());
    Duration::from_nanos(nanos.expect("the kernel counts the time of threads on cores"))
}

/// The time on cores of all threads but this one, which are the peer's.
fn of_others() -> Duration {
    let own = std::fs::read_link("/proc/thread-self").expect("threads have numbers");
    let own = own.file_name().map(std::ffi::OsStr::to_owned);
    let threads = std::fs::read_dir("/proc/self/task").expect("threads are listed");
    let others = threads.filter_map(Result::ok).filter(|thread| Some(thread.file_name()) != own);
    others.map(|thread| on_core(&thread.path().to_string_lossy())).sum()
}

/// Batches of documents, so that events do not fill the memory: made before, timed with the drain.
fn feed(
    theirs: &Peer,
    shape: &Shape,
    make: impl Fn(&Shape, (u64, usize), &mut Vec<peer::Event>),
) -> Duration {
    let (mut took, mut document) = (Duration::ZERO, 0);
    while document < shape.documents {
        let end = (document + 500).min(shape.documents);
        let mut events = Vec::new();
        (document..end).for_each(|number| make(shape, (number, 0), &mut events));
        let before = of_others();
        theirs.send(events);
        theirs.drain();
        took += of_others() - before;
        document = end;
    }
    took
}

fn fill_theirs(theirs: &Peer, shape: &Shape) -> Duration {
    feed(theirs, shape, peer::stored)
}

fn empty_theirs(theirs: &Peer, shape: &Shape) -> Duration {
    feed(theirs, shape, peer::removed)
}

#[expect(clippy::cast_possible_truncation, reason = "a look-up takes less than four seconds")]
fn nanos(began: Instant) -> u32 {
    began.elapsed().as_nanos() as u32
}

/// Look-ups of the beginnings of documents drawn at random, in turn; the same of both.
fn find(both: &Both, shape: &Shape, blocks: usize, pairs: &mut Pairs) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut found = Found::new();
    for turn in 0..FINDS / TURN {
        let drawn: Vec<usize> =
            (0..TURN).map(|at| (mix((turn * TURN + at) as u64) % shape.documents) as usize).collect();
        for document in &drawn {
            let prompt = &both.keys[*document][..blocks];
            black_box(prompt.iter().fold(Key::from_alias(0), |last, key| last.max(*key)));
            let began = Instant::now();
            both.ours.find(prompt, &mut found);
            ours.push(nanos(began));
            ensure!(found.blocks() as usize == blocks, "a document is not whole in our index");
        }
        for document in &drawn {
            let prompt = &both.hashes[*document][..blocks];
            black_box(prompt.iter().fold(0, |sum, hash| sum ^ hash.0));
            let began = Instant::now();
            let (workers, longest) = both.theirs.find(prompt);
            theirs.push(nanos(began));
            ensure!(workers > 0 && longest as usize == blocks, "a document is not whole in the peer's index");
        }
    }
    report_finds(&format!("{}_find_{blocks}", shape.name), &mut ours, &mut theirs, pairs);
    Ok(())
}

fn report_finds(name: &str, ours: &mut [u32], theirs: &mut [u32], pairs: &mut Pairs) {
    for (part, permilles) in [("p50", 500), ("p99", 990)] {
        let (mine, other) = (permille(ours, permilles), permille(theirs, permilles));
        pairs.lower(&format!("{name}_{part}"), mine / 1e3, other / 1e3, Some(1.0), "us");
    }
}

/// Look-ups of 512 blocks of the first half of the documents while the second half goes and comes again.
fn find_beside_writer(both: &Both, shape: &Shape, reversed: &[Vec<Key>], pairs: &mut Pairs) {
    let half = shape.documents / 2;
    let blocks = 512.min(shape.blocks);
    let done = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let (mut ours, mut found) = (Vec::new(), Found::new());
    let began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut document = half;
            while !done.load(Ordering::Relaxed) {
                load::remove(
                    &both.ours,
                    shape,
                    (document, shape.shared),
                    &reversed[document as usize],
                    |_| true,
                );
                load::store(
                    &both.ours,
                    shape,
                    (document, shape.shared),
                    &both.keys[document as usize],
                    |_| true,
                );
                written.fetch_add(2 * shape.told() / shape.documents, Ordering::Relaxed);
                document = if document + 1 < shape.documents { document + 1 } else { half };
            }
        });
        for at in 0..5 * FINDS as u64 {
            let prompt = &both.keys[(mix(at) % half) as usize][..blocks];
            let began = Instant::now();
            both.ours.find(prompt, &mut found);
            ours.push(nanos(began));
        }
        done.store(true, Ordering::Relaxed);
    });
    let our_rate = written.load(Ordering::Relaxed) as f64 / 1e6 / began.elapsed().as_secs_f64();

    let mut events = Vec::new();
    (half..shape.documents).for_each(|document| peer::removed(shape, (document, shape.shared), &mut events));
    (half..shape.documents).for_each(|document| peer::stored(shape, (document, shape.shared), &mut events));
    let told = shape.told();
    let backlog: Vec<_> = (0..4).map(|_| events.clone()).collect();
    drop(events);
    let mut theirs = Vec::new();
    let began = Instant::now();
    backlog.into_iter().for_each(|events| both.theirs.send(events));
    let drained = AtomicBool::new(false);
    let their_rate = thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            both.theirs.drain();
            drained.store(true, Ordering::Relaxed);
            4.0 * told as f64 / 1e6 / began.elapsed().as_secs_f64()
        });
        let mut at = 0;
        while !drained.load(Ordering::Relaxed) {
            let prompt = &both.hashes[(mix(at) % half) as usize][..blocks];
            let began = Instant::now();
            black_box(both.theirs.find(prompt));
            theirs.push(nanos(began));
            at += 1;
        }
        waiter.join().expect("the waiter ends")
    });
    report_finds(&format!("{}_find_{blocks}_beside_writer", shape.name), &mut ours, &mut theirs, pairs);
    pairs.higher(&format!("{}_writer_beside_reader", shape.name), our_rate, their_rate, None, "Mblocks/s");
}
