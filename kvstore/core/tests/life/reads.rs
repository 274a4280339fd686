//! Device reads and those who wait for them.

use terrace_core::*;

use super::*;

/// Completes everything but reads; the read that is left, and its class.
fn the_read(node: &mut Node) -> (OpId, IoClass) {
    let other = |effect: &Effect| Node::op_of(effect).filter(|_| !matches!(effect, Effect::Read { .. }));
    while let Some(op) = node.effects.iter().find_map(other) {
        node.effects.retain(|effect| Node::op_of(effect) != Some(op));
        node.tell(Input::OpDone { op, outcome: Ok(Done::Plain) });
    }
    let read = node.effects.iter().find_map(|effect| match effect {
        Effect::Read { op, class, .. } => Some((*op, *class)),
        _ => None,
    });
    read.expect("a read is in flight")
}

/// A device is given up while it has a read. Whoever waits must be told at once
/// that it is a miss, and nobody else be promised the block; but the frame is
/// the device's until it answers, and then it is free and the block there again.
#[test]
fn a_lost_device_ends_waits_and_not_operations() {
    let mut node = Node::new();
    node.tell(Input::BlocksFound { blocks: vec![found(1)] });
    let op = node.lease_read(&[1]);
    let request = node.ask(1, op);
    let (read, _) = the_read(&mut node);
    assert!(node.reply(request).is_none());
    let device = DeviceId::new(0);
    node.tell(Input::DeviceState { device, usable: false });
    let reply = node.reply(request).expect("the wait ends with the device");
    assert!(
        matches!(reply, Reply::Leased { lease: None, blocks, .. } if blocks == [Grant::Missing(MissReason::Device)])
    );
    assert_eq!(node.core.tier_views().pinned.frames.filling, 1, "the device may still write into it");
    let matched = node.call(1, Request::Match { blocks: vec![block(1)], mode: MatchMode::Set });
    assert_eq!(matched, Reply::Matched { blocks: vec![None] });
    node.core.check();
    node.tell(Input::OpDone { op: read, outcome: Ok(Done::Plain) });
    assert_eq!(node.core.tier_views().pinned.frames.filling, 0);
    node.core.check();
    node.effects.clear();
    node.tell(Input::DeviceState { device, usable: true });
    let op = node.lease_read(&[1]);
    let (_, grants) = leased(node.serve(1, op));
    assert!(matches!(grants[..], [Grant::Granted { .. }]), "{grants:?}");
}

/// A decode asks for a block that a prefetch is bringing in: the read must be
/// made more urgent. Then the decode is gone, and with it the reason to read.
#[test]
fn reads_follow_those_who_wait_for_them() {
    let mut node = Node::new();
    node.tell(Input::BlocksFound { blocks: vec![found(1), found(2)] });
    // A hint alone gets no memory made: this does.
    let op = node.lease_read(&[2]);
    leased(node.serve(1, op));
    node.effects.clear();
    node.call(1, Request::Prefetch { blocks: vec![block(1)], want: Memory::Pinned });
    let (read, class) = the_read(&mut node);
    assert_eq!(class, IoClass::Prefetch);
    let Request::LeaseRead { repeat, blocks, ttl, answer_by, .. } = node.lease_read(&[1]) else { panic!() };
    let purpose = Purpose::Decode;
    node.ask(2, Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, want: Memory::Pinned });
    let promoted = |effect: &Effect| matches!(effect, Effect::Promote { op, class: IoClass::DecodeFetch, .. } if *op == read);
    assert!(node.effects.iter().any(promoted), "{:?}", node.effects);
    node.tell(Input::SessionClosed { session: SessionId::new(2) });
    let cancelled = |effect: &Effect| matches!(effect, Effect::Cancel { op, .. } if *op == read);
    assert!(node.effects.iter().any(cancelled), "{:?}", node.effects);
    node.tell(Input::OpDone { op: read, outcome: Err(Fault::NotStarted) });
    assert_eq!(node.core.tier_views().pinned.frames.filling, 0);
    assert_eq!(node.core.counters().device_faults, 0, "the device did nothing wrong");
    node.core.check();
    node.effects.clear();
    let op = node.lease_read(&[1]);
    let (_, grants) = leased(node.serve(1, op));
    assert!(matches!(grants[..], [Grant::Granted { .. }]), "{grants:?}");
}

/// Completes what is in flight, but no drop of a chunk.
fn run_but_drops(node: &mut Node) {
    let other = |effect: &Effect| Node::op_of(effect).filter(|_| !matches!(effect, Effect::DropChunk { .. }));
    while let Some(op) = node.effects.iter().find_map(other) {
        node.effects.retain(|effect| Node::op_of(effect) != Some(op));
        node.tell(Input::OpDone { op, outcome: Ok(Done::Plain) });
    }
}

/// A writer goes, and its window with it, before a reader has mapped what it was granted there. The reader must learn that
/// the chunk is gone, which is a miss, and not that it may not map it; nobody else may learn that there was one.
#[test]
fn a_chunk_that_is_gone_is_told_from_a_foreign_one() {
    let mut node = Node::new();
    node.open(3, 2, Locality::Local);
    node.open(4, 1, Locality::Isolated);
    node.write(1, &[1]);
    let op = node.lease_read(&[1]);
    let (lease, grants) = leased(node.serve(2, op));
    let Grant::Granted { frame, .. } = grants[0] else { panic!("granted") };
    node.tell(Input::SessionClosed { session: SessionId::new(1) });
    node.after(config().window_recall_max.get() / 1000 + 1);
    run_but_drops(&mut node);
    let map = |chunk| Request::MapChunk { chunk };
    let gone = |chunk| Reply::Refused(Refusal::ChunkGone { chunk });
    let foreign = |chunk| Reply::Refused(Refusal::NotYourChunk { chunk });
    let chunk = frame.chunk;
    assert_eq!(node.call(2, map(chunk)), gone(chunk), "it is being dropped");
    assert_eq!(node.call(3, map(chunk)), foreign(chunk));
    node.run();
    assert_eq!(node.call(2, map(chunk)), gone(chunk), "it was dropped");
    assert_eq!(node.call(3, map(chunk)), foreign(chunk));
    assert_eq!(node.call(2, Request::Release { leases: vec![lease] }), Reply::Released { count: 1 });
    let op = node.lease_write(&[2]);
    let (lease, grants) = leased(node.serve(4, op));
    let Grant::Granted { frame, .. } = grants[0] else { panic!("granted") };
    let private = frame.chunk;
    node.call(4, Request::Release { leases: vec![lease] });
    node.call(4, Request::ReturnWindow { chunk: private });
    node.run();
    assert_eq!(node.call(4, map(private)), gone(private));
    assert_eq!(node.call(2, map(private)), foreign(private), "nobody else could map it");
    let never = ChunkId::new(1000);
    assert_eq!(node.call(2, map(never)), foreign(never));
}

/// Whoever asks again for what he has given back must not believe that he has it: its frames may be others' by now. While he
/// has it he is told so.
#[test]
fn a_repeat_after_its_lease_has_nothing() {
    let mut node = Node::new();
    node.write(1, &[1, 2]);
    let read = node.lease_read(&[1, 2]);
    let first = node.call(1, read.clone());
    let (lease, grants) = leased(first.clone());
    assert!(grants.iter().all(|grant| matches!(grant, Grant::Granted { .. })), "{grants:?}");
    assert_eq!(node.call(1, read.clone()), first);
    node.call(1, Request::Release { leases: vec![lease] });
    let nothing = vec![Grant::Missing(MissReason::Unknown); 2];
    let ended = Reply::Leased { lease: None, ttl: Micros::from_millis(10_000), blocks: nothing };
    assert_eq!(node.call(1, read.clone()), ended);
    let Request::LeaseRead { repeat, .. } = read else { unreachable!("it reads") };
    let Request::LeaseRead { blocks, ttl, answer_by, purpose, want, .. } = node.lease_read(&[2, 1]) else {
        unreachable!("it reads")
    };
    let other = Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, want };
    let repeat = repeat.expect("it has an id");
    assert_eq!(node.call(1, other), Reply::Refused(Refusal::RepeatDiffers { repeat }));
}
