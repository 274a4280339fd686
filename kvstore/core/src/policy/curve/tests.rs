//! The sampled curve against exact LRU.

use super::*;

/// Uniform bits from a number.
fn bits(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn asked(blocks: usize) -> Asked {
    let blocks = f64::from(u32::try_from(blocks).unwrap());
    Asked { tokens: 10.0 * blocks, seconds: 0.5 * blocks }
}

fn lookup(number: u64) -> Lookup {
    Lookup { key: bits(number), size: 1, tokens: 10, seconds: 0.5 }
}

/// Requests of a few blocks from a skewed choice of chains: each chain shares its first two blocks with nine others.
fn requests(count: u64, chains: u64) -> Vec<Vec<u64>> {
    let skewed = |n: u64| {
        let random = bits(n ^ 0xabcd) % 1_000_000;
        chains * random / 1_000_000 * random / 1_000_000
    };
    (0..count)
        .map(|n| {
            let chain = skewed(n);
            let length = 3 + bits(n) % 10;
            (0..length)
                .map(|at| if at < 2 { (chain / 10) << 32 | at } else { chain << 32 | 1 << 31 | at })
                .collect()
        })
        .collect()
}

/// Hits of an exact tail-to-head LRU of one size.
fn exact(requests: &[Vec<u64>], size: usize) -> (u64, u64) {
    let mut order: Vec<u64> = Vec::new();
    let (mut hits, mut asked) = (0, 0);
    for request in requests {
        asked += request.len() as u64;
        let found = |block: &&u64| order.iter().rev().take(size).any(|other| other == *block);
        hits += request.iter().take_while(found).count() as u64;
        for block in request.iter().rev() {
            order.retain(|other| other != block);
            order.push(*block);
        }
        let surplus = order.len().saturating_sub(size);
        order.drain(..surplus);
    }
    (hits, asked)
}

/// The distance could be off by one or count a block twice: unsampled, the curve is exact.
#[test]
fn unsampled_the_curve_is_exact_at_every_size() {
    let requests = requests(1500, 120);
    let mut curve = Curve::new(400, 1 << 14);
    for request in &requests {
        curve.request(asked(request.len()), request.iter().map(|&number| lookup(number)));
    }
    assert_eq!(curve.sampled_one_of(), 1);
    let mut before = 0.0;
    for point in curve.points() {
        let (hits, asked) = exact(&requests, usize::try_from(point.size).expect("a small size"));
        let wanted = real(hits) / real(asked);
        assert!((point.token_hits - wanted).abs() < 1e-9, "{} {} {wanted}", point.size, point.token_hits);
        assert!((point.second_hits - wanted).abs() < 1e-6, "all blocks save the same here");
        assert!(point.token_hits >= before, "a larger tier never hits less");
        before = point.token_hits;
    }
    assert!(before > 0.5, "the requests do repeat: {before}");
}

/// A full sample must be thinned, its counts scaled, and memory stay as it is.
#[test]
fn a_sample_of_a_sixteenth_is_near() {
    let requests = requests(20_000, 4000);
    let mut curve = Curve::new(8000, 1500);
    let mut full = Curve::new(8000, 1 << 17);
    for request in &requests {
        curve.request(asked(request.len()), request.iter().map(|&number| lookup(number)));
        full.request(asked(request.len()), request.iter().map(|&number| lookup(number)));
        assert!(curve.entries.len() <= 2 * 1500 && curve.places.len() <= curve.by_place.places());
    }
    assert!(curve.sampled_one_of() >= 8, "sampled one of {}", curve.sampled_one_of());
    for (point, wanted) in curve.points().iter().zip(full.points()) {
        let off = (point.token_hits - wanted.token_hits).abs();
        assert!(off < 0.045, "size {}: {} for {}", point.size, point.token_hits, wanted.token_hits);
    }
}

/// Blocks that are never asked for again could push the rate to nothing in the long run.
#[test]
fn what_no_size_would_hold_is_forgotten() {
    let mut curve = Curve::new(100, 1024);
    for number in 0..50_000 {
        curve.request(asked(1), [lookup(number)].into_iter());
    }
    assert_eq!(curve.sampled_one_of(), 1, "400 blocks matter, 1,024 can be kept");
}

/// A client may name a block twice in one request: that is neither a hit nor a reason to fall over.
#[test]
fn a_block_named_twice_is_new_once() {
    // As many entries as the largest size has blocks, so that every block is sampled.
    let mut curve = Curve::new(1000, 4000);
    curve.request(asked(3), [lookup(7), lookup(8), lookup(7)].into_iter());
    assert!(curve.points().iter().all(|point| point.token_hits == 0.0), "{:?}", curve.points());
    curve.request(asked(2), [lookup(7), lookup(7)].into_iter());
    let last = curve.points()[CURVE_POINTS - 1];
    assert!(last.token_hits > 0.0, "the second request finds it: {last:?}");
}

/// A change that stays outside the tree, or a look from a neighbour, could count a place twice or not: compared with
/// sums by hand, through changes near and far, looks up and down, and a fresh start.
#[test]
fn sums_up_to_a_place_are_those_by_hand() {
    let mut sums = PlaceSums::new(1000);
    let mut by_hand = vec![0u64; 1000];
    for round in 0..4000u64 {
        if round == 2000 {
            sums.clear();
            by_hand.fill(0);
        }
        let first = usize::try_from(bits(round) % 990).unwrap();
        for (place, by_hand) in by_hand.iter_mut().enumerate().skip(first).take(10) {
            let size = bits(round * 10 + place as u64) % 3 * 1000;
            sums.set(place, size);
            *by_hand = size;
        }
        let mut near = Near::default();
        for look in 0..8 {
            let far = usize::try_from(bits(round ^ look << 40) % 1000).unwrap();
            for place in [far, far.saturating_sub(3), (far + 60).min(999)] {
                assert_eq!(sums.up_to(place, &mut near), by_hand[..=place].iter().sum::<u64>(), "{place}");
            }
        }
    }
}
