//! The shadows against a plain leaf-only LRU, and the bounds.

use super::*;
use crate::policy::hazards::bucket;

fn bits(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A prefix of a tree: chains that share their first blocks with ninety-nine and nine others.
fn request(n: u64, chains: u64) -> Vec<u64> {
    let random = bits(n ^ 0x5555) % 1_000_000;
    let chain = chains * random / 1_000_000 * random / 1_000_000;
    (0..2 + bits(n) % 12)
        .map(|at| match at {
            0..2 => bits(chain / 100 * 1000 + at),
            2..5 => bits(1 << 40 | (chain / 10 * 1000 + at)),
            at => bits(1 << 41 | (chain * 1000 + at)),
        })
        .collect()
}

fn steps(keys: &[u64]) -> impl Iterator<Item = Step> + '_ {
    keys.iter().map(|&key| Step { key, seconds: 1.0, worth: 1.0 })
}

/// Leaf-only LRU by definition: the leaf that was not used for longest leaves.
#[derive(Default)]
struct Naive {
    /// Key, parent's key, last use.
    held: Vec<(u64, Option<u64>, u64)>,
    clock: u64,
}

impl Naive {
    fn request(&mut self, keys: &[u64], capacity: usize) -> usize {
        self.clock += 1;
        let mut hits = 0;
        for (at, &key) in keys.iter().enumerate() {
            match self.held.iter_mut().find(|held| held.0 == key) {
                Some(held) => {
                    hits += usize::from(hits == at);
                    held.2 = self.clock;
                }
                None => self.held.push((key, at.checked_sub(1).map(|before| keys[before]), self.clock)),
            }
        }
        while self.held.len() > capacity {
            let leaf = |key: u64| !self.held.iter().any(|held| held.1 == Some(key));
            let oldest = self.held.iter().filter(|held| leaf(held.0)).min_by_key(|held| held.2);
            let gone = oldest.expect("a forest has leaves").0;
            self.held.retain(|held| held.0 != gone);
        }
        hits
    }
}

/// The edge could slip, or a new block count before its place: hit by hit the shadow is leaf-only LRU.
#[test]
fn the_lru_shadow_is_leaf_only_lru() {
    for capacity in [1, 7, 40, 200] {
        let mut ghost = Ghost::new(BlockCount::new(capacity));
        let mut hazards = Hazards::new();
        let mut naive = Naive::default();
        for n in 0..1500 {
            let keys = request(n, 300);
            let saved = ghost.request(keys.len() as u64, steps(&keys), &mut hazards);
            let wanted = naive.request(&keys, capacity as usize);
            assert_eq!(saved.lru, wanted as f64, "request {n} with {capacity} blocks");
            check(&ghost);
        }
    }
}

/// What is asked for again at once is not moved: all must be as if it had been taken out and put in.
#[test]
fn what_was_used_last_stays_where_it_would_go() {
    let mut stayed = 0;
    for capacity in [1, 7, 40, 200] {
        let mut ghost = Ghost::new(BlockCount::new(capacity));
        let mut hazards = Hazards::new();
        for n in 0..300 {
            let keys = request(n, 300);
            // Once more after none, one, or several others.
            for keys in [&keys, &keys, &request(n / 2, 300)] {
                let count = keys.len() as u64;
                let (mut moving, mut counts) = (ghost.clone(), hazards.clone());
                ghost.request(count, steps(keys), &mut hazards);
                moving.tick = moving.tick.next();
                moving.grow_older(&mut counts);
                moving.take_path(steps(keys), &mut counts);
                moving.count_new(count, &mut counts);
                stayed += u32::from(moving.is_hottest());
                for at in (0..moving.path.len()).rev() {
                    moving.make_hottest(moving.path[at], &mut counts);
                }
                moving.keep_path(&counts);
                while moving.length > moving.limit {
                    moving.forget_coldest(&mut counts);
                }
                assert_eq!(format!("{ghost:?} {hazards:?}"), format!("{moving:?} {counts:?}"), "request {n}");
            }
        }
    }
    assert!(stayed > 300, "only {stayed} requests named what was used last");
}

/// Structures that must agree: list, index, flags, counts and bounds.
fn check(ghost: &Ghost) {
    let (mut index, mut listed, mut lru, mut learned, mut hotter_age) = (ghost.hottest, 0, 0, 0, 0);
    let mut edge_passed = false;
    while index != NONE {
        let entry = ghost.entries.at(index);
        let age = ghost.tick.since(entry.used);
        assert!(age >= hotter_age, "in order of last use");
        hotter_age = age;
        assert!(usize::from(entry.bucket) == bucket(age), "its age's bucket");
        assert!(entry.flags & IN_LRU == 0 || !edge_passed, "the LRU shadow is the hottest blocks");
        lru += u32::from(entry.flags & IN_LRU != 0);
        learned += u32::from(entry.flags & IN_LEARNED != 0);
        let leaf = entry.flags & IN_LEARNED != 0 && entry.children == 0;
        assert!(entry.links.is_listed() == leaf, "the leaves of the learned shadow are listed");
        edge_passed |= index == ghost.lru_edge;
        assert!(ghost.find(entry.key) == Some(index), "it is found");
        listed += 1;
        index = entry.colder;
    }
    assert_eq!((listed, lru, learned), (ghost.length, ghost.lru_length, ghost.learned_length));
    assert!(lru <= ghost.capacity && learned <= ghost.capacity && listed <= ghost.limit, "within bounds");
}

/// Blocks that never come back beside blocks that do: the learned shadow must save more than LRU.
#[test]
fn the_learned_shadow_keeps_what_comes_back() {
    let mut ghost = Ghost::new(BlockCount::new(100));
    let mut hazards = Hazards::new();
    let mut sum = Saved::default();
    for n in 0..6000u64 {
        let hot = n % 200;
        let scan: Vec<u64> = (0..5).map(|at| bits(1 << 50 | (n * 10 + at))).collect();
        ghost.request(scan.len() as u64, steps(&scan), &mut hazards);
        if n % 4 == 0 {
            // 50 chains in turn: LRU would need 50 * 2 + 50 * 4 * 5 blocks.
            let chain: Vec<u64> = (0..2).map(|at| bits(1 << 51 | (hot / 4 * 10 + at))).collect();
            let saved = ghost.request(chain.len() as u64, steps(&chain), &mut hazards);
            sum.lru += saved.lru;
            sum.learned += saved.learned;
        }
        if n % 100 == 0 {
            check(&ghost);
        }
    }
    assert!(sum.learned > 1000.0 && sum.lru < 100.0, "{sum:?}");
}

/// A large tier is sampled: memory stays bounded, and the saved share stays near the full one.
#[test]
fn a_sampled_ghost_is_bounded_and_near() {
    let (mut full, mut sampled) = (Ghost::new(BlockCount::new(1500)), Ghost::new(BlockCount::new(1500)));
    (sampled.shift, sampled.capacity, sampled.limit) = (2, 375, 3000);
    let (mut h1, mut h2) = (Hazards::new(), Hazards::new());
    let (mut s1, mut s2, mut asked) = (Saved::default(), Saved::default(), 0.0);
    for n in 0..30_000 {
        let keys = request(n, 3000);
        asked += keys.len() as f64;
        let (a, b) = (
            full.request(keys.len() as u64, steps(&keys), &mut h1),
            sampled.request(keys.len() as u64, steps(&keys), &mut h2),
        );
        (s1.lru, s1.learned) = (s1.lru + a.lru, s1.learned + a.learned);
        (s2.lru, s2.learned) = (s2.lru + 4.0 * b.lru, s2.learned + 4.0 * b.learned);
    }
    check(&sampled);
    for (full, sampled) in [(s1.lru, s2.lru), (s1.learned, s2.learned)] {
        assert!((full - sampled).abs() / asked < 0.04, "{} for {}", sampled / asked, full / asked);
    }
    let large = Ghost::new(BlockCount::new(1 << 24));
    assert!(large.limit <= ENTRIES_MAX && large.capacity >> 8 > 0, "{} blocks stand for all", large.capacity);
}

/// The same requests must give the same shadow, whatever else the process did.
#[test]
fn the_ghost_is_deterministic() {
    let run = || {
        let (mut ghost, mut hazards) = (Ghost::new(BlockCount::new(64)), Hazards::new());
        (0..3000)
            .map(|n| {
                let keys = request(n, 400);
                ghost.request(keys.len() as u64, steps(&keys), &mut hazards)
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

/// A request may start amid a known prefix, or contradict one: ancestors must not be outlived.
#[test]
fn a_part_of_a_prefix_uses_all_before_it() {
    let (mut ghost, mut hazards) = (Ghost::new(BlockCount::new(50)), Hazards::new());
    let chain: Vec<u64> = (0..6).map(bits).collect();
    ghost.request(chain.len() as u64, steps(&chain), &mut hazards);
    for n in 0..20_000u64 {
        ghost.request(chain.len() as u64 - 3, steps(&chain[3..]), &mut hazards);
        ghost.request(2, steps(&[bits(1 << 40 | n), bits(1 << 42 | n)]), &mut hazards);
        if n % 1000 == 0 {
            check(&ghost);
            // Another predecessor than before: it ends the prefix.
            ghost.request(3, steps(&[chain[0], chain[4], chain[2]]), &mut hazards);
        }
    }
    assert!(ghost.find(chain[0]).is_some(), "used with every part");
}
