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
        let request = ask_to_write(&mut node, n);
        written += settle(&mut node, is_commit);
        written += if node.reply(request).is_none() { settle(&mut node, |_| false) } else { 0 };
        seal(&mut node, request, n);
    }
    written += settle(&mut node, |_| false);
    assert!(written > 50, "memory was not short: {written} blocks were written early");
    assert_eq!(node.core.counters().demotions, written);
}

/// What cannot be written yet, as its device has no frame, is wanted again whenever memory is short: it could be queued
/// each time, and all of it looked through whenever something ends. The core's check counts the queues.
#[test]
fn what_waits_for_a_device_is_queued_once() {
    let mut node = Node::of(Config {
        pinned_bytes: ByteCount::new(2 * CHUNK_BYTES),
        device_slots: vec![1],
        chunks_ready_min: 0,
        frames_ready_min: 8,
        persist_delay: Micros::from_millis(0),
        ..config()
    });
    node.open(3, 1, Locality::Streamed);
    let mut last = None;
    let mut count = 0;
    while last.is_none_or(|request| node.reply(request).is_some()) {
        let request = ask_to_write(&mut node, count);
        // When the device is full, nothing makes room on it.
        settle(&mut node, |effect| count > 200 && is_commit(effect));
        if node.reply(request).is_some() {
            seal(&mut node, request, count);
        }
        (last, count) = (Some(request), count + 1);
        assert!(count < 2_000, "memory and device have room for so many");
    }
    let waits = last.expect("the last one was asked for");
    for _ in 0..20_000 {
        node.now += 100;
        node.tell(Input::Tick);
        node.effects.retain(|effect| Node::op_of(effect).is_some() || matches!(effect, Effect::Reply { .. }));
    }
    assert!(node.reply(waits).is_none(), "it got memory that nothing had left");
    settle(&mut node, |_| false);
    seal(&mut node, waits, count - 1);
}

/// A lease of one block that differs with `n`.
fn ask_to_write(node: &mut Node, n: u32) -> RequestId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_le_bytes());
    let blocks = vec![BlockId::from_bytes(id)];
    let (repeat, space) = (Some(u64::from(n) + 1), space(1));
    node.ask(3, Request::LeaseWrite { repeat, space, blocks, parent: None, ttl: None, want: Memory::Pinned })
}

/// Seals the block of [`ask_to_write`] and gives its lease back.
fn seal(node: &mut Node, request: RequestId, n: u32) {
    let (lease, _) = leased(node.reply(request).expect("nothing is in flight"));
    let blocks = vec![(0, ByteCount::new(BLOCK_BYTES), Checksum::new(1))];
    let repeat = Some(u64::from(n) + 10_001);
    node.call(3, Request::Seal { repeat, lease, blocks, durability: Durability::Readable });
    node.call(3, Request::Release { leases: vec![lease] });
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
