//! Readers beside a writer: they finish whatever it does, and are told of nobody who never had a block.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use terrace_index::{Found, HolderId, Index, Key, Limits, TierSet};

const CHAINS: u64 = 64;
const BLOCKS: u64 = 300;
const ROUNDS: u64 = 150;

fn chain(number: u64) -> Vec<Key> {
    let shared = (0..20).map(Key::from_alias);
    shared.chain((0..BLOCKS).map(move |at| Key::from_alias((number + 1) << 20 | at))).collect()
}

fn holder_of(chain: u64) -> HolderId {
    HolderId(u32::try_from(chain).expect("there are few chains") + 1)
}

/// Holder 0 keeps every chain; holder `number + 1` comes and goes on its own chain only. The memory is so
/// small that runs, records and extents are reused all the time.
fn write(index: &Index, done: &AtomicBool) {
    for round in 0..ROUNDS {
        for number in 0..CHAINS {
            let holder = holder_of(number);
            let blocks = chain(number);
            let tiers = if round % 2 == 0 { TierSet::HBM } else { TierSet::PINNED };
            index.store(holder, tiers, None, &blocks).expect("the holder is in range");
            if (round + number) % 3 == 0 {
                index.relocate(holder, TierSet::ALL, TierSet::NVME, &blocks).expect("the holder is in range");
            }
            let other = chain((number * 7 + round) % CHAINS);
            let holder = holder_of((number * 7 + round) % CHAINS);
            let reversed: Vec<Key> = other.iter().rev().copied().collect();
            index.remove(holder, TierSet::ALL, &reversed).expect("the holder is in range");
        }
    }
    done.store(true, Ordering::Release);
}

/// Reads every chain. On the chain of one holder nobody else may appear beyond the shared blocks but the
/// holder that keeps all; and that one, which never goes, must always have all of its own chain.
fn read(index: &Index, done: &AtomicBool, finds: &AtomicU64) {
    let mut found = Found::new();
    let kept = chain(CHAINS);
    while !done.load(Ordering::Acquire) {
        for number in 0..CHAINS {
            index.find(&chain(number), &mut found);
            for span in found.spans() {
                let holder = found.holders()[span.held as usize].holder.0;
                let own = u64::from(holder) == number + 1;
                assert!(own || span.end <= 20, "chain {number}: holder {holder} has {span:?}");
            }
        }
        index.find(&kept, &mut found);
        let held = found.held(HolderId(0)).map(|held| held.prefix);
        assert_eq!(held, Some([0, 320, 320]), "the chain that never changes");
        finds.fetch_add(CHAINS + 1, Ordering::Relaxed);
    }
}

/// A reader could wait, read a run that was freed and used again, or lose what did not change while the
/// writer moves, removes, reuses and splits.
#[test]
fn readers_see_only_what_is_true() {
    let index = Index::new(Limits { holders: 100, bytes: 16 << 20 });
    index.store(HolderId(0), TierSet::PINNED, None, &chain(CHAINS)).unwrap();
    let (done, finds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| write(&index, &done));
        scope.spawn(|| read(&index, &done, &finds));
        scope.spawn(|| read(&index, &done, &finds));
    });
    assert!(finds.load(Ordering::Relaxed) > CHAINS);
}

/// While the directory grows, tags change and entries move: a reader could miss a block that was there all
/// the time.
#[test]
fn what_is_there_is_found_while_the_directory_grows() {
    const CHAINS: u64 = 5_500;
    const BLOCKS: u64 = 500;
    let chain =
        |number: u64| -> Vec<Key> { (0..BLOCKS).map(|at| Key::from_alias(number << 20 | at)).collect() };
    let index = Index::new(Limits { holders: 2, bytes: 256 << 20 });
    let stored = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..CHAINS {
                index.store(HolderId(1), TierSet::HBM, None, &chain(number)).expect("the holder is in range");
                // What is looked for and not known makes the directory whole.
                let other = [Key::from_alias(u64::MAX)];
                index.remove(HolderId(1), TierSet::HBM, &other).expect("the holder is in range");
                stored.store(number + 1, Ordering::Release);
            }
        });
        let (mut step, mut found) = (0u64, Found::new());
        loop {
            let known = stored.load(Ordering::Acquire);
            if known > 0 {
                step += 1;
                let (number, from) = (step * 7_919 % known, step * 613 % BLOCKS);
                index.find(&chain(number)[usize::try_from(from).expect("it is small")..], &mut found);
                assert_eq!(
                    u64::from(found.blocks()),
                    BLOCKS - from,
                    "chain {number} of {known}, from {from}"
                );
            }
            if known == CHAINS {
                break;
            }
        }
    });
}
