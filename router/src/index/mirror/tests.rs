//! Snapshots, tails, and all that can be wrong with them.

use terrace_index::{Found, Limits};

use super::*;

const PINNED: &[Tier] = &[Tier::Pinned];

fn id(number: u32) -> [u8; 16] {
    let mut id = [7; 16];
    id[..4].copy_from_slice(&number.to_le_bytes());
    id
}

fn sealed(number: u32, tiers: &[Tier]) -> BlockEvent {
    let parent = number.checked_sub(1).map(|before| id(before).to_vec().into()).unwrap_or_default();
    BlockEvent { parent_id: parent, length: 4096, ..event(BlockEventKind::Sealed, number, tiers) }
}

fn event(kind: BlockEventKind, number: u32, tiers: &[Tier]) -> BlockEvent {
    BlockEvent {
        kind: kind.into(),
        block_id: id(number).to_vec().into(),
        tiers: tiers.iter().map(|tier| (*tier).into()).collect(),
        ..BlockEvent::default()
    }
}

fn piece(life: u64, sequence: u64, blocks: Vec<BlockEvent>, last: bool) -> SnapshotResponse {
    SnapshotResponse { incarnation: life, sequence, blocks, last }
}

fn tail(life: u64, sequence: u64, events: Vec<BlockEvent>) -> WatchResponse {
    let next_sequence = sequence + events.len() as u64;
    WatchResponse { incarnation: life, sequence, events, resync: false, next_sequence }
}

struct Bench {
    index: Arc<Index>,
    shown: Arc<Shown>,
    mirror: Mirror,
}

impl Bench {
    fn new() -> Self {
        let index = Arc::new(Index::new(Limits { holders: 4, bytes: 8 << 20 }));
        let shown = Arc::new(Shown::default());
        let mirror = Mirror::new(Arc::clone(&index), 1, Arc::clone(&shown));
        Self { index, shown, mirror }
    }

    /// With blocks 0 to 9 in host memory, and the next event numbered 5 of life 1.
    fn loaded() -> Self {
        let mut bench = Self::new();
        bench.mirror.begin();
        let blocks = (0..10).map(|number| sealed(number, PINNED)).collect();
        assert_eq!(bench.mirror.load(&piece(1, 5, blocks, true)), Ok(Step::Loaded { sequence: 5 }));
        bench
    }

    /// Longest prefix by tier, of those that are in use.
    fn prefix(&self) -> [u32; 3] {
        let prompt: Vec<Key> = (0..100).map(|number| Key::from_bytes(id(number))).collect();
        let mut found = Found::new();
        self.index.find(&prompt, &mut found);
        self.shown.holder().and_then(|holder| found.held(holder)).map_or([0; 3], |held| held.prefix)
    }
}

/// What is told must be what is known: a block that is stored, moved or evicted, in the snapshot or later.
#[test]
fn events_become_what_is_known() {
    let mut bench = Bench::loaded();
    assert_eq!(bench.prefix(), [0, 10, 10]);
    let events = vec![
        sealed(10, PINNED),
        sealed(11, &[Tier::Pinned, Tier::Nvme]),
        event(BlockEventKind::Moved, 9, &[Tier::Nvme]),
    ];
    assert_eq!(bench.mirror.apply(&tail(1, 5, events)), Ok(Step::More));
    assert_eq!(bench.prefix(), [0, 9, 12]);
    let gone = vec![event(BlockEventKind::Evicted, 4, &[])];
    assert_eq!(bench.mirror.apply(&tail(1, 8, gone)), Ok(Step::More));
    assert_eq!(bench.prefix(), [0, 4, 4]);
    // A copy elsewhere is not this daemon's.
    let left = vec![event(BlockEventKind::Moved, 2, &[Tier::Remote])];
    assert_eq!(bench.mirror.apply(&tail(1, 9, left)), Ok(Step::More));
    assert_eq!((bench.prefix(), bench.shown.applied.load(Ordering::Relaxed)), ([0, 2, 2], 5));
}

/// Events could be applied twice, over a gap, or from a life that is over: a repeated message must change
/// nothing, and the others must ask for a snapshot and leave what is known as it was.
#[test]
fn repeats_gaps_and_other_lives_change_nothing() {
    let mut bench = Bench::loaded();
    let store = |sequence, number| tail(1, sequence, vec![sealed(number, PINNED)]);
    assert_eq!(bench.mirror.apply(&store(5, 10)), Ok(Step::More));
    let evict = |life, sequence| tail(life, sequence, vec![event(BlockEventKind::Evicted, 0, &[])]);
    assert_eq!(bench.mirror.apply(&evict(1, 5)), Ok(Step::More), "the number was used");
    assert_eq!(bench.mirror.apply(&evict(0, 6)), Ok(Step::More), "of an earlier life");
    assert_eq!(bench.mirror.apply(&evict(1, 8)), Ok(Step::Resync), "two are missing");
    assert_eq!(bench.mirror.apply(&evict(2, 6)), Ok(Step::Resync), "of a new life");
    let told = WatchResponse { resync: true, ..Default::default() };
    assert_eq!(bench.mirror.apply(&told), Ok(Step::Resync));
    assert_eq!(bench.prefix(), [0, 11, 11]);
}

/// An unknown parent must cost nothing: the block is found when what is before it arrives, in any order.
#[test]
fn children_may_come_before_their_parents() {
    let mut bench = Bench::new();
    bench.mirror.begin();
    let mut blocks: Vec<BlockEvent> = (0..20).map(|number| sealed(number, PINNED)).collect();
    blocks.reverse();
    let (first, second) = blocks.split_at(13);
    assert_eq!(bench.mirror.load(&piece(1, 9, first.to_vec(), false)), Ok(Step::More));
    assert_eq!(bench.prefix(), [0; 3], "not before it is whole");
    assert_eq!(bench.mirror.load(&piece(1, 9, second.to_vec(), true)), Ok(Step::Loaded { sequence: 9 }));
    assert_eq!(bench.prefix(), [0, 20, 20]);
}

/// A snapshot that is cut must leave what was known, and nothing of its own; the next whole one replaces all.
#[test]
fn a_cut_snapshot_leaves_no_trace() {
    let mut bench = Bench::loaded();
    let entries = bench.index.counts().entries;
    bench.mirror.begin();
    let half = (0..50).map(|number| sealed(number, PINNED)).collect();
    assert_eq!(bench.mirror.load(&piece(1, 7, half, false)), Ok(Step::More));
    assert_eq!(bench.prefix(), [0, 10, 10]);
    bench.mirror.begin();
    assert_eq!((bench.prefix(), bench.index.counts().entries), ([0, 10, 10], entries));
    let mixed = piece(1, 8, vec![sealed(0, PINNED)], false);
    assert_eq!(bench.mirror.load(&mixed), Ok(Step::More));
    assert!(bench.mirror.load(&piece(1, 9, vec![], true)).is_err(), "pieces of two");
    bench.mirror.begin();
    let whole = (0..3).map(|number| sealed(number, PINNED)).collect();
    assert_eq!(bench.mirror.load(&piece(1, 9, whole, true)), Ok(Step::Loaded { sequence: 9 }));
    assert_eq!((bench.prefix(), bench.index.counts().entries), ([0, 3, 3], 3));
    bench.mirror.begin();
    assert_eq!(bench.mirror.load(&piece(1, 8, vec![], true)), Ok(Step::Resync), "older than what is known");
    assert_eq!((bench.prefix(), bench.index.counts().entries), ([0, 3, 3], 3));
}

/// A cleared space asks for a snapshot; a daemon that is gone holds nothing, and must not come back by an event.
#[test]
fn what_is_cleared_or_lost_is_gone() {
    let mut bench = Bench::loaded();
    let cleared =
        BlockEvent { kind: BlockEventKind::Cleared.into(), block_id: Vec::new().into(), ..sealed(0, PINNED) };
    assert_eq!(bench.mirror.apply(&tail(1, 5, vec![cleared, sealed(10, PINNED)])), Ok(Step::Resync));
    bench.mirror.lost();
    assert_eq!((bench.prefix(), bench.index.counts().entries), ([0; 3], 0));
    assert_eq!(bench.mirror.apply(&tail(1, 6, vec![sealed(0, PINNED)])), Ok(Step::Resync));
    assert_eq!(bench.index.counts().entries, 0);
}

/// Ids and kinds that are none must be refused, without a panic.
#[test]
fn what_no_daemon_sends_is_refused() {
    for (kind, block) in [
        (BlockEventKind::Sealed, vec![1; 15]),
        (BlockEventKind::Unspecified, vec![1; 16]),
        (BlockEventKind::Evicted, vec![]),
    ] {
        let mut bench = Bench::loaded();
        let bad = BlockEvent { kind: kind.into(), block_id: block.into(), ..Default::default() };
        assert!(bench.mirror.apply(&tail(1, 5, vec![bad.clone()])).is_err());
        bench.mirror.begin();
        assert!(bench.mirror.load(&piece(1, 6, vec![bad], true)).is_err());
        assert_eq!(bench.prefix(), [0, 10, 10]);
    }
}

/// A million events of one block each must stay within the limit of memory and take seconds, not minutes.
#[test]
fn a_million_tiny_events_stay_bounded() {
    let mut bench = Bench::loaded();
    let began = std::time::Instant::now();
    for number in 0..1_000_000u64 {
        let chain = u32::try_from(number).unwrap() + 100;
        let message = tail(1, 5 + number, vec![sealed(chain, PINNED)]);
        assert_eq!(bench.mirror.apply(&message), Ok(Step::More));
    }
    let (took, counts) = (began.elapsed(), bench.index.counts());
    println!("a million events of one block: {took:?}, {counts:?}");
    assert!(counts.bytes <= 8 << 20, "{counts:?}");
    assert!(counts.evicted > 0 && counts.entries > 0, "{counts:?}");
    assert!(took.as_secs() < 60, "{took:?}");
}
