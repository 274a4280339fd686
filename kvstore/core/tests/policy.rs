//! The eviction policies over whole traces, through the crate's surface: LRU against
//! its definition, the duel against LRU on loads that are hard for the one or the
//! other, and admission in front of a second tier.

use std::collections::BTreeMap;

use terrace_core::policy::{Admit, Costs, Devices, Duel, Replay, Step, WriteBudget};
use terrace_core::{BlockCount, BlockId, ByteCount, Now, Policy, TokenCount, UseStats};

const COSTS: Costs = Costs { block_tokens: TokenCount::new(512), linear: 141.2e9, quadratic: 1.31e6 };

/// Uniform bits from a number.
fn bits(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn id(number: u64) -> BlockId {
    let (high, low) = (bits(number), bits(!number));
    BlockId::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}

/// A chain of blocks of its own.
fn chain(number: u64, length: u64) -> Vec<BlockId> {
    (0..length).map(|at| id(number << 12 | at)).collect()
}

type Trace = Vec<Vec<BlockId>>;

/// Popularity falls with rank.
fn zipf(requests: u64) -> Trace {
    // As many draws from 1..2 as from 2..4, 4..8 and so on: popularity falls as one over the rank.
    let rank = |n: u64| {
        let octave = 1 << (bits(n ^ 0x77) % 11);
        octave + bits(n ^ 0x99) % octave
    };
    (0..requests).map(rank).map(|rank| chain(rank, 3 + bits(rank) % 8)).collect()
}

/// Every chain in turn, more than fit: LRU hits nothing.
fn wheel(requests: u64) -> Trace {
    (0..requests).map(|n| chain(n % 300, 5)).collect()
}

/// A hot set, and long prompts that never come back.
fn scan_and_hot(requests: u64) -> Trace {
    let one =
        |n: u64| if bits(n).is_multiple_of(3) { chain(1 << 30 | n, 30) } else { chain(bits(n ^ 9) % 60, 6) };
    (0..requests).map(one).collect()
}

/// The hot set moves, and what was once used often never comes back.
fn phases(requests: u64) -> Trace {
    let one = |n: u64| chain(((n / 3000) << 20) | (bits(n ^ 5) % 120), 6);
    (0..requests).map(one).collect()
}

/// Conversations grow turn by turn; some are left after the first.
fn conversations(requests: u64) -> Trace {
    let one = |n: u64| {
        let talk = n / 40 * 40 + bits(n) % 40;
        let turns = 1 + n % 40 / 10;
        chain(1 << 28 | talk, 4 * turns)
    };
    (0..requests).map(one).collect()
}

/// Share of blocks hit, and of cost saved.
fn replay(policy: Policy, capacity: u32, trace: &Trace) -> (f64, f64) {
    let mut tier = Replay::new(policy, BlockCount::new(capacity), COSTS);
    let (mut hits, mut asked, mut saved, mut cost) = (0, 0, 0.0, 0.0);
    for request in trace {
        let served = tier.request(request);
        hits += u64::from(served.hits);
        asked += request.len() as u64;
        saved += COSTS.of(u64::from(served.hits) * 512);
        cost += COSTS.of(request.len() as u64 * 512);
        assert!(tier.resident().get() <= capacity, "a tier stays within its size");
    }
    (100.0 * hits as f64 / asked as f64, 100.0 * saved / cost)
}

/// Leaf-only LRU by definition, on small tiers: the leaf that was not used for longest leaves.
fn leaf_only_lru(capacity: usize, trace: &Trace) -> u64 {
    let mut held: Vec<(BlockId, Option<BlockId>, u64)> = Vec::new();
    let mut hits = 0;
    for (clock, request) in (0..).zip(trace) {
        let mut prefix = true;
        for (at, &block) in request.iter().enumerate() {
            let found = held.iter_mut().find(|held| held.0 == block);
            prefix &= found.is_some();
            hits += u64::from(prefix);
            match found {
                Some(held) => held.2 = clock,
                None => held.push((block, at.checked_sub(1).map(|before| request[before]), clock)),
            }
        }
        while held.len() > capacity {
            let leaf = |block: BlockId| !held.iter().any(|held| held.1 == Some(block));
            let oldest = held.iter().filter(|held| leaf(held.0)).min_by_key(|held| held.2);
            let gone = oldest.expect("a forest has leaves").0;
            held.retain(|held| held.0 != gone);
        }
    }
    hits
}

/// The lists could differ from the definition where chains branch or a tier is smaller than a prompt.
#[test]
fn lru_is_leaf_only_lru() {
    let mut trace = zipf(600);
    // Prompts that end within others, and branch off them.
    for n in 0..600u64 {
        let (talk, cut) = (bits(n) % 40, 4 + bits(n ^ 3) % 8);
        let mut part = chain(talk, cut);
        if n % 3 == 0 {
            part.push(id((1 << 50) | (talk << 12) | (cut << 4) | (bits(n ^ 7) % 4)));
        }
        trace.push(part);
    }
    for capacity in [1u32, 5, 13, 60, 150] {
        let mut tier = Replay::new(Policy::Lru, BlockCount::new(capacity), COSTS);
        let hits: u64 = trace.iter().map(|request| u64::from(tier.request(request).hits)).sum();
        assert_eq!(hits, leaf_only_lru(capacity as usize, &trace), "{capacity} blocks");
    }
}

/// A learned policy can lose where the past misleads: on no load may the duel fall more than 0.3
/// points below LRU, in blocks or in saved cost, and where LRU fails it must win.
#[test]
fn the_duel_is_never_below_lru() {
    let loads: [(&str, Trace); 5] = [
        ("zipf", zipf(15_000)),
        ("wheel", wheel(15_000)),
        ("scan and hot set", scan_and_hot(15_000)),
        ("phases", phases(15_000)),
        ("conversations", conversations(15_000)),
    ];
    for (name, trace) in &loads {
        for capacity in [50, 200, 800, 3000] {
            let lru = replay(Policy::Lru, capacity, trace);
            let duel = replay(Policy::Duel, capacity, trace);
            println!("{name} {capacity}: lru {:.2} {:.2} duel {:.2} {:.2}", lru.0, lru.1, duel.0, duel.1);
            assert!(duel.0 >= lru.0 - 0.3, "{name} with {capacity}: {duel:?}, LRU {lru:?}");
            assert!(duel.1 >= lru.1 - 0.3, "{name} with {capacity}: {duel:?}, LRU {lru:?}");
        }
    }
    let gain = |trace: &Trace, capacity| {
        replay(Policy::Duel, capacity, trace).0 - replay(Policy::Lru, capacity, trace).0
    };
    assert!(gain(&loads[1].1, 800) > 30.0, "on a wheel that does not fit");
    assert!(gain(&loads[2].1, 200) > 5.0, "with scans through a hot set");
}

/// Two runs of one trace must agree to the block.
#[test]
fn replays_are_deterministic() {
    let trace = scan_and_hot(3000);
    for policy in [Policy::Duel, Policy::Learned, Policy::Lru, Policy::S3Fifo, Policy::Fifo] {
        let run = || {
            let mut tier = Replay::new(policy, BlockCount::new(100), COSTS);
            trace.iter().map(|request| tier.request(request)).collect::<Vec<_>>()
        };
        assert_eq!(run(), run(), "{policy:?}");
    }
}

/// FIFO forgets by age alone; S3-FIFO must shield its main queue from blocks that come once.
#[test]
fn s3_fifo_withstands_a_scan_that_fifo_does_not() {
    let trace = scan_and_hot(20_000);
    let (fifo, s3) = (replay(Policy::Fifo, 380, &trace).0, replay(Policy::S3Fifo, 380, &trace).0);
    assert!(s3 > fifo + 3.0, "fifo {fifo}, s3fifo {s3}");
}

/// LRU over ids, a prompt's tail before its head.
#[derive(Default)]
struct Lru {
    by_use: BTreeMap<u64, BlockId>,
    used: BTreeMap<BlockId, u64>,
    clock: u64,
}

impl Lru {
    fn holds(&self, block: BlockId) -> bool {
        self.used.contains_key(&block)
    }

    fn touch(&mut self, block: BlockId) {
        self.clock += 1;
        if let Some(before) = self.used.insert(block, self.clock) {
            self.by_use.remove(&before);
        }
        self.by_use.insert(self.clock, block);
    }

    fn shrink(&mut self, capacity: usize) {
        while self.used.len() > capacity {
            let (_, gone) = self.by_use.pop_first().expect("it is not empty");
            self.used.remove(&gone);
        }
    }
}

/// Hits in percent and blocks written with a small fast tier in front of a large one.
fn two_tiers(trace: &Trace, fast: usize, slow: usize, mut admit: Option<Admit>) -> (f64, u64) {
    let (mut pinned, mut nvme) = (Lru::default(), Lru::default());
    let mut duel = Duel::new(BlockCount::new(u32::try_from(slow).expect("a small tier")));
    let mut stats: BTreeMap<BlockId, UseStats> = BTreeMap::new();
    let (mut hits, mut asked, mut written) = (0, 0, 0);
    for (n, request) in (0..).zip(trace) {
        let held = |block: &&BlockId| pinned.holds(**block) || nvme.holds(**block);
        let found = request.iter().take_while(held).count();
        let known = request.iter().take_while(|block| stats.contains_key(block)).count();
        let turn = if known == 0 { 0 } else { stats[&request[known - 1]].turn.saturating_add(1) };
        hits += found;
        asked += request.len();
        let key = Step::key_of;
        let steps = request.iter().map(|&block| Step { key: key(block), seconds: 1.0, worth: 1.0 });
        duel.request(request.len() as u64, steps);
        let prompt = u32::try_from(request.len()).expect("a short prompt");
        for &block in request.iter().rev() {
            let uses = stats.get(&block).map_or(0, |stats| stats.uses.saturating_add(1));
            let turn = stats.get(&block).map_or(turn, |stats| stats.turn);
            let past = UseStats { depth: 0, turn, uses };
            stats.insert(block, past);
            pinned.touch(block);
            let now = Now::from_micros(n * 100_000);
            let write = match &mut admit {
                Some(admit) => {
                    !nvme.holds(block)
                        && admit.decide(now, &duel, past, prompt, ByteCount::new(1), Devices::Busy)
                }
                None => !nvme.holds(block),
            };
            written += u64::from(write);
            if write || nvme.holds(block) {
                nvme.touch(block);
            }
        }
        pinned.shrink(fast);
        nvme.shrink(slow);
    }
    (100.0 * hits as f64 / asked as f64, written)
}

/// Most blocks never come back: writing them wears the drive for nothing, refusing those that do loses hits.
#[test]
fn admission_halves_the_writes_for_few_hits() {
    let trace = scan_and_hot(20_000);
    let (all, writes) = two_tiers(&trace, 100, 1000, None);
    let admit = Admit::new(WriteBudget::new(None, Now::default()));
    let (hits, fewer) = two_tiers(&trace, 100, 1000, Some(admit));
    assert!(fewer * 2 < writes, "{fewer} of {writes} written");
    assert!(hits > all - 1.0, "{hits} % hits, {all} when all is written");
}

/// A budget must hold over a day, whatever is asked, and be spent when devices idle.
#[test]
fn a_budget_bounds_what_is_written() {
    let duel = Duel::new(BlockCount::new(1000));
    let budget = WriteBudget::new(Some(ByteCount::new(24_000)), Now::default());
    let mut admit = Admit::new(budget);
    let used = UseStats { depth: 0, turn: 0, uses: 3 };
    let hour = 3_600_000_000u64;
    for n in 0..100_000u64 {
        let now = Now::from_micros(n * hour * 24 / 100_000);
        admit.decide(now, &duel, used, 1, ByteCount::new(10), Devices::Busy);
    }
    let written = admit.written().get();
    assert!((20_000..=25_100).contains(&written), "24,000 a day and an hour's savings: {written}");
    assert_eq!(admit.refused().get() + written, 1_000_000);
}
