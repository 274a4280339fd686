//! Memory is needed, and what is coldest is not on a device yet.

use terrace_core::*;

use super::{BLOCK_BYTES, CHUNK_BYTES, Node, config, leased, space};

/// A block stays the coldest while its write is committed, and is looked at whenever memory is short: it could be
/// counted each time. Commits wait here for as long as anything else can happen.
#[test]
fn a_block_written_early_is_counted_once() {
    let mut node = Node::of(Config {
        pinned_bytes: ByteCount::new(2 * CHUNK_BYTES),
        chunks_ready_min: 0,
        frames_ready_min: 8,
        // What is sealed while there is memory is not due before the end.
        persist_delay: Micros::from_millis(3_600_000),
        ..config()
    });
    node.open(3, 1, Locality::Streamed);
    let mut written = 0;
    for n in 0..600u32 {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_le_bytes());
        let repeat = u64::from(n) + 1;
        let blocks = vec![BlockId::from_bytes(id)];
        let request = node.ask(
            3,
            Request::LeaseWrite {
                repeat,
                space: space(1),
                blocks,
                parent: None,
                ttl: None,
                want: Memory::Pinned,
            },
        );
        written += settle(&mut node, is_commit);
        written += if node.reply(request).is_none() { settle(&mut node, |_| false) } else { 0 };
        let (lease, _) = leased(node.reply(request).expect("nothing is in flight"));
        let blocks = vec![(0, ByteCount::new(BLOCK_BYTES), Checksum::new(1))];
        let repeat = repeat + 1000;
        node.call(3, Request::Seal { repeat, lease, blocks, durability: Durability::Readable });
        node.call(3, Request::Release { leases: vec![lease] });
    }
    written += settle(&mut node, |_| false);
    assert!(written > 50, "memory was not short: {written} blocks were written early");
    assert_eq!(node.core.counters().demotions, written);
}

fn is_commit(effect: &Effect) -> bool {
    matches!(effect, Effect::Commit { .. })
}

/// Completes what is in flight, oldest first, and what that starts. How many blocks were written early.
fn settle(node: &mut Node, held: impl Fn(&Effect) -> bool) -> u64 {
    let mut written = 0;
    let is_next = |effect: &Effect| Node::op_of(effect).is_some() && !held(effect);
    while let Some(place) = node.effects.iter().position(is_next) {
        let effect = node.effects.remove(place);
        written += u64::from(matches!(effect, Effect::Write { class: IoClass::Demotion, .. }));
        let op = Node::op_of(&effect).expect("it has one");
        node.tell(Input::OpDone { op, outcome: Ok(Done::Plain) });
    }
    written
}
