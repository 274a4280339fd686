//! Windows that are open before anybody needs them.

use terrace_core::*;

use super::{CHUNK_BYTES, Node, config};

/// Blocks that a window holds.
const WINDOW: u64 = 170;

/// A node with memory for sixteen chunks: two of them may be ahead.
fn node(limits: Limits) -> Node {
    Node::of(Config { pinned_bytes: ByteCount::new(16 * CHUNK_BYTES), limits, ..config() })
}

fn numbers(from: u8, count: u8) -> Vec<u8> {
    (from..from + count).collect()
}

/// Windows that sessions were told of so far.
fn told(node: &Node) -> Vec<ChunkId> {
    let of = |effect: &Effect| match effect {
        Effect::Notify { notice: Notice::WindowOpened { chunk, .. }, .. } => Some(*chunk),
        _ => None,
    };
    node.effects.iter().filter_map(of).collect()
}

fn is_recalled(node: &Node, window: ChunkId) -> bool {
    let recalled = Notice::WindowRecalled { chunk: window };
    node.effects.iter().any(|effect| matches!(effect, Effect::Notify { notice, .. } if *notice == recalled))
}

/// Session 1 has written more than half a window, and pauses.
fn written(node: &mut Node) {
    node.write(1, &numbers(1, 50));
    node.write(1, &numbers(51, 50));
    assert!(told(node).is_empty(), "as many fit once more: whoever writes is not disturbed");
    node.after(6);
    node.run();
}

/// Somebody who writes a prefill after a pause must not wait until a window is made and mapped: it is there, and he was told.
#[test]
fn the_next_window_is_open_when_it_is_needed() {
    let mut node = node(config().limits);
    written(&mut node);
    let next = told(&node);
    assert_eq!(next.len(), 1);
    let map = Request::MapChunk { chunk: next[0] };
    assert_eq!(node.call(1, map), Reply::MayMap { chunk: next[0], access: MapAccess::Write });
    node.write(1, &numbers(101, 50));
    let op = node.lease_write(&numbers(151, 40));
    let Reply::Leased { blocks, .. } = node.call(1, op) else { panic!("it is answered at once") };
    let granted = blocks.iter().filter_map(|grant| match grant {
        Grant::Granted { frame, .. } => Some(frame.chunk),
        _ => None,
    });
    let granted: Vec<ChunkId> = granted.collect();
    assert_eq!(granted.len(), 40);
    assert_eq!(granted.iter().filter(|chunk| **chunk == next[0]).count() as u64, 150 + 40 - WINDOW);
}

/// Somebody who writes without a pause is given the next window while he fills the last of what he has, and one at a time.
#[test]
fn who_does_not_pause_is_given_the_next_window_in_time() {
    let mut node = node(config().limits);
    node.write(1, &numbers(1, 64));
    node.write(1, &numbers(65, 64));
    assert_eq!(told(&node).len(), 1, "as many do not fit once more");
    node.write(1, &numbers(129, 30));
    node.after(6);
    node.run();
    assert_eq!(told(&node).len(), 1);
}

/// A first write waits until its window is made, and may do so for longer than a pause: what it takes of that counts as well.
#[test]
fn who_waited_for_a_window_is_given_the_next() {
    let mut node = node(config().limits);
    let requests = [1, 51].map(|from| {
        let op = node.lease_write(&numbers(from, 50));
        node.ask(1, op)
    });
    node.after(6);
    assert!(requests.iter().all(|request| node.reply(*request).is_none()), "they wait");
    node.run();
    for request in requests {
        assert!(matches!(node.reply(request), Some(Reply::Leased { lease: Some(_), .. })));
    }
    node.after(6);
    node.run();
    assert_eq!(told(&node).len(), 1);
}

/// A window that nobody uses must not keep its tenant's other sessions from writing.
#[test]
fn a_window_ahead_goes_back_when_a_limit_is_in_the_way() {
    let limits = Limits { leased_bytes_per_tenant: ByteCount::new(4 * CHUNK_BYTES), ..config().limits };
    let mut node = node(limits);
    node.open(3, 1, Locality::Local);
    written(&mut node);
    let next = told(&node)[0];
    node.write(2, &[201]);
    let granted = |reply: Reply| match reply {
        Reply::Leased { blocks, .. } => blocks.iter().any(|grant| matches!(grant, Grant::Granted { .. })),
        _ => false,
    };
    let op = node.lease_write(&[202]);
    assert!(!granted(node.serve(3, op)), "three windows and one ahead are all that the tenant may pin");
    assert!(is_recalled(&node, next));
    assert_eq!(node.call(1, Request::ReturnWindow { chunk: next }), Reply::WindowReturned { blocks: 0 });
    node.run();
    let op = node.lease_write(&[203]);
    assert!(granted(node.serve(3, op)));
}

/// Nor may it be opened where half of a limit would not be left for leases.
#[test]
fn no_window_is_ahead_beyond_half_of_a_limit() {
    let limits = Limits { leased_bytes_per_session: ByteCount::new(3 * CHUNK_BYTES), ..config().limits };
    let mut node = node(limits);
    written(&mut node);
    assert!(told(&node).is_empty());
}

/// Memory that somebody needs, and a pool that has nothing to give: what is ahead goes back, before somebody waits in vain.
#[test]
fn a_window_ahead_goes_back_when_there_is_no_memory() {
    let mut node = node(config().limits);
    written(&mut node);
    let next = told(&node)[0];
    // The two windows are all the memory there is.
    node.tell(Input::MemoryLimit { bytes: ByteCount::new(2 * CHUNK_BYTES) });
    let op = node.lease_write(&[201]);
    let request = node.ask(2, op);
    assert_eq!(node.reply(request), None, "it waits");
    assert!(is_recalled(&node, next));
    node.call(1, Request::ReturnWindow { chunk: next });
    node.run();
    assert!(matches!(node.reply(request), Some(Reply::Leased { lease: Some(_), .. })));
}

/// It stays for a while longer than a window that was written into, not for ever; and it goes with its session.
#[test]
fn a_window_ahead_ends() {
    let mut node = node(config().limits);
    written(&mut node);
    let next = told(&node)[0];
    node.after(6_000);
    assert!(!is_recalled(&node, next), "its session writes now and then");
    node.after(31 * 5_000);
    assert!(is_recalled(&node, next));
    let mut node = super::ahead::node(config().limits);
    written(&mut node);
    let next = told(&node)[0];
    node.tell(Input::SessionClosed { session: SessionId::new(1) });
    node.run();
    assert_eq!(node.core.chunk_tenant(next), None);
}
