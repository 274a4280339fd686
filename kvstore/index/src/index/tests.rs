//! The index against a model of maps and sets, under seeded random histories.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use super::*;
use crate::crowd::CROWDED;
use crate::{Span, Tier};

const HOLDERS: u32 = 12;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

/// Tiers of each block and holder, and nothing else.
#[derive(Default)]
struct Model(BTreeMap<(Key, u32), u8>);

impl Model {
    fn store(&mut self, holder: u32, tiers: TierSet, blocks: &[Key]) {
        for key in blocks {
            *self.0.entry((*key, holder)).or_default() |= tiers.bits();
        }
    }

    fn remove(&mut self, holder: u32, tiers: TierSet, blocks: &[Key]) {
        for key in blocks {
            if let Some(bits) = self.0.get_mut(&(*key, holder)) {
                *bits &= !tiers.bits();
                if *bits == 0 {
                    self.0.remove(&(*key, holder));
                }
            }
        }
    }

    fn clear(&mut self, holder: u32) {
        self.0.retain(|(_, of), _| *of != holder);
    }

    /// For each block from the first, as long as somebody has it: tiers by holder.
    fn find(&self, prompt: &[Key]) -> Vec<BTreeMap<u32, u8>> {
        let of = |key: &Key| -> BTreeMap<u32, u8> {
            self.0.range((*key, 0)..=(*key, u32::MAX)).map(|((_, holder), bits)| (*holder, *bits)).collect()
        };
        prompt.iter().map(of).take_while(|held| !held.is_empty()).collect()
    }
}

fn fastest(bits: u8) -> Tier {
    Tier::ALL.into_iter().find(|tier| bits >> tier.index() & 1 == 1).unwrap()
}

/// Every part of the answer against the model.
fn compare(found: &Found, expected: &[BTreeMap<u32, u8>], story: &str) {
    assert_eq!(found.blocks() as usize, expected.len(), "{story}: blocks held by anybody");
    let holders: BTreeSet<u32> = expected.iter().flat_map(|held| held.keys().copied()).collect();
    let named: BTreeSet<u32> = found.holders().iter().map(|held| held.holder.0).collect();
    assert_eq!(named, holders, "{story}: holders");
    assert_eq!(found.holders().len(), holders.len(), "{story}: each holder once");
    for held in found.holders() {
        let bits_at = |at: usize| expected[at].get(&held.holder.0).copied().unwrap_or(0);
        let prefix = |tiers: u8| (0..expected.len()).take_while(|at| bits_at(*at) & tiers != 0).count();
        let expected_prefix = [prefix(1), prefix(3), prefix(7)];
        assert_eq!(held.prefix.map(|count| count as usize), expected_prefix, "{story}: prefix of {held:?}");
        let mut by_tier = [0; 3];
        (0..prefix(7)).for_each(|at| by_tier[fastest(bits_at(at)).index()] += 1);
        assert_eq!(held.fastest, by_tier, "{story}: fastest tiers of {held:?}");
        let blocks = (0..expected.len()).filter(|at| bits_at(*at) != 0).count();
        assert_eq!(held.blocks as usize, blocks, "{story}: blocks of {held:?}");
    }
    let mut spans: BTreeMap<(usize, u32), Tier> = BTreeMap::new();
    for Span { held, tier, start, end } in found.spans() {
        for at in *start..*end {
            let holder = found.holders()[*held as usize].holder.0;
            assert!(spans.insert((at as usize, holder), *tier).is_none(), "{story}: block {at} in two spans");
        }
    }
    let wanted: BTreeMap<(usize, u32), Tier> = expected
        .iter()
        .enumerate()
        .flat_map(|(at, held)| held.iter().map(move |(holder, bits)| ((at, *holder), fastest(*bits))))
        .collect();
    let wrong = wanted.iter().find(|(at, tier)| spans.get(at) != Some(tier));
    assert!(wrong.is_none(), "{story}: no span says ((block, holder), tier) {wrong:?}");
    assert_eq!(spans.len(), wanted.len(), "{story}: spans");
}

/// A forest of prompts: each is a prefix of an earlier one and then its own blocks.
fn forest(random: &mut Random, chains: usize, salt: u64) -> Vec<Vec<Key>> {
    let mut all: Vec<Vec<Key>> = Vec::new();
    for number in 0..chains {
        let mut chain: Vec<Key> = Vec::new();
        if number > 0 && random.below(4) > 0 {
            let old = &all[random.below(number)];
            chain.extend(&old[..random.below(old.len() + 1)]);
        }
        let own = 1 + random.below(150);
        chain.extend((0..own).map(|at| Key::from_alias(salt << 40 | (number as u64) << 20 | at as u64)));
        all.push(chain);
    }
    all
}

fn tiers(random: &mut Random) -> TierSet {
    TierSet::from_bits(u8::try_from(1 + random.below(7)).unwrap()).unwrap()
}

fn check_counts(index: &Index, model: &Model, story: &str) {
    let counts = index.counts();
    let blocks: BTreeSet<Key> = model.0.keys().map(|(key, _)| *key).collect();
    assert_eq!(counts.entries, model.0.len() as u64, "{story}: entries");
    assert_eq!(counts.blocks, blocks.len() as u64, "{story}: blocks");
    check_directory(index, story);
}

/// What the directory has: each block that was listed once, and every live block that follows none in its run.
fn check_directory(index: &Index, story: &str) {
    let (writer, tables) = (index.guard(), &index.tables);
    let mut listed = [0; 2];
    for number in 1..tables.runs.items() {
        let live = tables.runs.at(number).live.load(Ordering::Relaxed);
        let note = writer.notes[number as usize];
        assert_eq!(note.is_listed() & !live, 0, "{story}: run {number} lists what is gone");
        let lacking = live & !(live << 1) & !note.listed[0];
        assert_eq!(lacking, 0, "{story}: run {number} does not list what begins");
        assert!(live & !note.is_listed() == 0 || note.waits, "{story}: run {number} does not wait");
        for (sum, mask) in listed.iter_mut().zip(note.listed) {
            *sum += u64::from(mask.count_ones());
        }
    }
    let entries = [&tables.directory, &tables.inner].map(|directory| directory.entries(&tables.pool));
    listed[1] += writer.gone.len() as u64;
    assert_eq!(entries, listed, "{story}: entries of the directories");
}

fn history(seed: u64, steps: usize, holders: u32) {
    let mut random = Random(seed);
    let index = Index::new(Limits { holders, bytes: 64 << 20 });
    let (mut model, mut found) = (Model::default(), Found::new());
    let chains = forest(&mut random, 14, seed);
    for step in 0..steps {
        let story = format!("seed {seed}, step {step}");
        let chain = &chains[random.below(chains.len())];
        let start = random.below(chain.len());
        let end = start + 1 + random.below(chain.len() - start);
        let blocks = &chain[start..end];
        let holder = u32::try_from(random.below(holders as usize)).unwrap();
        let set = tiers(&mut random);
        match random.below(10) {
            // Out of order too: the parent may be unknown, or not be named.
            0..=3 => {
                let parent = start.checked_sub(1).map(|at| chain[at]).filter(|_| random.below(5) > 0);
                index.store(HolderId(holder), set, parent, blocks).unwrap();
                model.store(holder, set, blocks);
            }
            4..=5 => {
                index.remove(HolderId(holder), set, blocks).unwrap();
                model.remove(holder, set, blocks);
            }
            6 => {
                let reversed: Vec<Key> = blocks.iter().rev().copied().collect();
                index.remove(HolderId(holder), TierSet::ALL, &reversed).unwrap();
                model.remove(holder, TierSet::ALL, blocks);
            }
            7 => {
                let target = tiers(&mut random);
                index.relocate(HolderId(holder), set, target, blocks).unwrap();
                model.store(holder, target, blocks);
                let leaves = TierSet::from_bits(set.bits() & !target.bits()).unwrap();
                model.remove(holder, leaves, blocks);
            }
            8 if random.below(6) == 0 => {
                let gone = index.clear(HolderId(holder)).unwrap();
                let before = model.0.len();
                model.clear(holder);
                assert_eq!(usize::try_from(gone), Ok(before - model.0.len()), "{story}: cleared");
            }
            _ => {
                index.find(chain, &mut found);
                compare(&found, &model.find(chain), &story);
                index.touch(HolderId(holder), chain).unwrap();
            }
        }
        if step % 64 == 0 {
            check_counts(&index, &model, &story);
        }
    }
    for chain in &chains {
        index.find(chain, &mut found);
        compare(&found, &model.find(chain), &format!("seed {seed}, at the end"));
    }
    check_counts(&index, &model, &format!("seed {seed}, at the end"));
    for holder in 0..holders {
        index.clear(HolderId(holder)).unwrap();
    }
    let counts = index.counts();
    assert_eq!((counts.blocks, counts.entries, counts.records), (0, 0, 0), "seed {seed}: all cleared");
}

/// Anything could be wrong: partial removes in the middle, moves between tiers, clears, orphans whose
/// parents come later. Each answer is compared with the model's in every part.
#[test]
fn the_index_answers_as_a_map_would() {
    for seed in 0..200 {
        history(seed, 400, HOLDERS);
    }
}

/// While the directory grows, tags change and entries are copied: one could stay behind in its old place, or be lost.
#[test]
fn a_directory_that_has_grown_has_each_block_once() {
    let chain = |number: u64| -> Vec<Key> { (0..500).map(|at| Key::from_alias(number << 20 | at)).collect() };
    let index = Index::new(Limits { holders: HOLDERS, bytes: 256 << 20 });
    for number in 0..5_500 {
        index.store(HolderId(1), TierSet::HBM, None, &chain(number)).unwrap();
    }
    assert_eq!(index.counts().blocks, 2_750_000);
    index.guard().list_all(&index.tables);
    let tables = &index.tables;
    let entries = [&tables.directory, &tables.inner].map(|directory| directory.entries(&tables.pool));
    assert_eq!(entries[0] + entries[1], 2_750_000, "each block once");
    let mut found = Found::new();
    for number in 0..5_500 {
        index.find(&chain(number), &mut found);
        assert_eq!(found.blocks(), 500, "chain {number}");
    }
}

/// A block that the directory lacks could be taken for a new one by somebody who does not say what it goes on from, or
/// not be found where it is to be removed: each is found by its key alone, in any order.
#[test]
fn a_block_is_found_by_its_key_alone() {
    let chain: Vec<Key> = (0..1000).map(Key::from_alias).collect();
    let index = Index::new(Limits { holders: HOLDERS, bytes: 8 << 20 });
    index.changes().store_start(HolderId(1), TierSet::HBM, SizeClass::UNKNOWN, &chain).unwrap();
    index.store(HolderId(2), TierSet::HBM, None, &chain[500..600]).unwrap();
    index.store(HolderId(3), TierSet::HBM, Some(Key::from_alias(5_000)), &chain[7..9]).unwrap();
    let counts = index.counts();
    assert_eq!((counts.blocks, counts.entries), (1000, 1102), "nothing is there twice");
    let asked = [999, 3, 550, 8, 501].map(|at| chain[at]);
    let hbm = Some(Tier::Hbm);
    assert_eq!(index.fastest(HolderId(2), &asked), [None, None, hbm, None, hbm]);
    assert_eq!(index.fastest(HolderId(1), &[chain[4], Key::from_alias(5_001)]), [hbm, None]);
    check_directory(&index, "found by keys");
    let index = Index::new(Limits { holders: HOLDERS, bytes: 8 << 20 });
    index.changes().store_start(HolderId(1), TierSet::HBM, SizeClass::UNKNOWN, &chain).unwrap();
    for at in 0..1000 {
        let removed = index.remove(HolderId(1), TierSet::ALL, &chain[at * 617 % 1000..][..1]);
        assert_eq!(removed, Ok(1), "block {}", at * 617 % 1000);
        check_directory(&index, "removed in any order");
    }
    assert_eq!(index.counts().blocks, 0);
}

/// Runs that wait to be listed could pile up without end where blocks come and go behind one that stays.
#[test]
fn what_comes_and_goes_behind_a_block_leaves_nothing() {
    let chain: Vec<Key> = (0..2).map(Key::from_alias).collect();
    let index = Index::new(Limits { holders: HOLDERS, bytes: 1 << 20 });
    index.store(HolderId(1), TierSet::HBM, None, &chain[..1]).unwrap();
    let before = index.counts().bytes;
    for _ in 0..500_000 {
        index.store(HolderId(1), TierSet::HBM, Some(chain[0]), &chain[1..]).unwrap();
        index.remove(HolderId(1), TierSet::HBM, &chain[1..]).unwrap();
    }
    let grown = index.counts().bytes - before;
    assert!(grown < 64 << 10, "{grown} bytes");
}

/// Where a run has many holders, a list says where their records are: it could keep a record that is gone or
/// moved, or lose one.
#[test]
fn a_crowd_of_holders_is_answered_for_alike() {
    for seed in 0..8 {
        history(seed, 4_000, 6 * CROWDED);
    }
}

/// An index that forgets could forget too little, or answer with what it forgot or never had: under a
/// limit it stays within, and names only what the model has.
#[test]
fn a_full_index_stays_within_its_limit_and_never_invents() {
    let limit = 2 << 20;
    let index = Index::new(Limits { holders: HOLDERS, bytes: limit });
    let mut random = Random(7);
    let (mut model, mut found) = (Model::default(), Found::new());
    for round in 0..60 {
        for chain in forest(&mut random, 30, round) {
            let holder = u32::try_from(random.below(HOLDERS as usize)).unwrap();
            index.store(HolderId(holder), TierSet::PINNED, None, &chain).unwrap();
            model.store(holder, TierSet::PINNED, &chain);
            let counts = index.counts();
            assert!(counts.bytes <= limit, "{} bytes", counts.bytes);
            index.find(&chain, &mut found);
            assert!(found.blocks() as usize <= chain.len());
            let expected = model.find(&chain);
            for span in found.spans() {
                let holder = found.holders()[span.held as usize].holder.0;
                (span.start..span.end).for_each(|at| assert!(expected[at as usize].contains_key(&holder)));
            }
        }
    }
    let counts = index.counts();
    assert!(counts.evicted > 0);
    assert!(
        counts.entries + counts.evicted >= model.0.len() as u64,
        "what is gone was forgotten, and counted"
    );
    assert!(counts.blocks > 10_000, "only {} blocks fit in {limit} bytes", counts.blocks);
}

/// What is used could be forgotten before what is not: a chain that is touched all the time outlives
/// thousands that are stored once, and those lose their ends before their beginnings.
#[test]
fn what_is_warm_stays() {
    let index = Index::new(Limits { holders: 4, bytes: 2 << 20 });
    let chain = |number: u64| -> Vec<Key> { (0..200).map(|at| Key::from_alias(number << 20 | at)).collect() };
    let warm = chain(1);
    let mut found = Found::new();
    index.store(HolderId(1), TierSet::HBM, None, &warm).unwrap();
    for number in 2..3_000 {
        index.store(HolderId(2), TierSet::HBM, None, &chain(number)).unwrap();
        index.touch(HolderId(1), &warm).unwrap();
    }
    index.find(&warm, &mut found);
    assert_eq!(found.blocks(), 200, "the warm chain is whole");
    assert!(index.counts().evicted > 100_000);
    let kept = (2..3_000).filter(|number| {
        index.find(&chain(*number), &mut found);
        let begins = found.blocks() > 0;
        let ends = index.guard().seek(&index.tables, chain(*number)[199]).is_some();
        assert!(begins || !ends, "chain {number} lost its beginning before its end");
        begins
    });
    assert!(kept.count() > 20);
}

/// Two keys that agree in 64 bits, as two engines' short hashes may, could be taken for each other; and
/// many keys under one directory hash could get lost.
#[test]
fn keys_that_collide_are_kept_apart() {
    let index = Index::new(Limits { holders: 4, bytes: 4 << 20 });
    let key = |high: u64| Key { low: 0x1234_5678, high };
    index.store(HolderId(1), TierSet::HBM, None, &[key(1)]).unwrap();
    let mut found = Found::new();
    index.find(&[key(2)], &mut found);
    assert_eq!(found.blocks(), 0, "other tokens under the same 64 bits");
    // The hash folds both halves: these have one directory hash.
    let same = |number: u64| Key { low: number, high: (number ^ 5).rotate_right(29) };
    assert_eq!(same(1).hash(), same(2).hash());
    for number in 0..500 {
        index.store(HolderId(2), TierSet::HBM, None, &[same(number)]).unwrap();
    }
    for number in 0..500 {
        index.find(&[same(number)], &mut found);
        assert_eq!(found.blocks(), 1, "{number}");
    }
    index.clear(HolderId(2)).unwrap();
    assert_eq!(index.counts().blocks, 1);
}

/// A reader that was stopped in a chain of overflow reads what the writer has made of it since: any number for a place.
/// It must take it for another's entry, not for a run that was never made.
#[test]
fn a_place_that_never_was_is_nobodys() {
    let index = Index::new(Limits { holders: HOLDERS, bytes: 4 << 20 });
    let blocks: Vec<Key> = (0..3).map(Key::from_alias).collect();
    index.store(HolderId(1), TierSet::HBM, None, &blocks).unwrap();
    let (mut writer, tables) = (index.guard(), &index.tables);
    let absent = Key { low: blocks[0].low ^ 1, ..blocks[0] };
    for hash in [blocks[0].hash(), absent.hash()] {
        for bits in [u32::MAX, 1 << 31, 1 << 20] {
            tables.directory.insert(&tables.pool, &mut writer.extents, hash, bits);
        }
    }
    drop(writer);
    assert!(tables.locate(blocks[0]).is_some());
    assert_eq!(tables.locate(absent), None);
}

/// A number out of range could grow every reader's scratch: refused, with the limit in the answer.
#[test]
fn holders_out_of_range_are_refused() {
    let index = Index::new(Limits { holders: 4, bytes: 1 });
    let refused = Refused::Holder { holder: 4, limit: 4 };
    assert_eq!(index.store(HolderId(4), TierSet::HBM, None, &[Key::from_alias(1)]), Err(refused));
    assert_eq!(index.remove(HolderId(4), TierSet::HBM, &[]), Err(refused));
    assert_eq!(index.clear(HolderId(4)), Err(refused));
    assert_eq!(index.store(HolderId(3), TierSet::NONE, None, &[Key::from_alias(1)]), Ok(0));
    assert_eq!(index.counts().blocks, 0);
}

/// Size and heat could be lost with a move between tiers, or when a record is found again.
#[test]
fn size_and_heat_stay_with_the_holder() {
    let index = Index::new(Limits { holders: 4, bytes: 1 << 20 });
    let blocks: Vec<Key> = (0..10).map(Key::from_alias).collect();
    let size = SizeClass::of_bytes(3_000_000);
    index.store_sized(HolderId(1), TierSet::HBM, size, None, &blocks).unwrap();
    let mut found = Found::new();
    index.find(&blocks, &mut found);
    let first = found.holders()[0];
    index.relocate(HolderId(1), TierSet::HBM, TierSet::NVME, &blocks).unwrap();
    index.find(&blocks, &mut found);
    let second = found.holders()[0];
    assert_eq!((first.size, second.size), (size, size));
    assert!(second.heat > first.heat, "{} then {}", first.heat, second.heat);
    assert_eq!((first.prefix, second.prefix), ([10, 10, 10], [0, 0, 10]));
}
