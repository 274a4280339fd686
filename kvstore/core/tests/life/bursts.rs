//! Somebody writes much at once.

use terrace_core::*;

use super::{Node, leased};

/// Whether a copy to a device was begun, or the place for it.
fn is_written(node: &Node) -> bool {
    node.effects.iter().any(|effect| matches!(effect, Effect::CarveSlot { .. } | Effect::Write { .. }))
}

/// A copy beside whoever fills a window takes half of what memory moves from him. What is merely due waits until he
/// pauses, and the core says when that is.
#[test]
fn what_is_due_waits_for_a_pause() {
    let mut node = Node::new();
    node.write(1, &[1]);
    node.after(898);
    node.write(1, &[2]);
    node.after(4);
    assert!(!is_written(&node), "the first is due, and somebody wrote 4 ms ago");
    assert_eq!(node.core.next_deadline(), Some(Now::from_micros(903_001)), "when the burst is over");
    node.after(2);
    assert!(is_written(&node));
}

/// Somebody who never pauses must not keep blocks from their device for ever: they would be lost in a crash long after
/// `persist_delay`.
#[test]
fn what_is_due_does_not_wait_for_ever() {
    let mut node = Node::new();
    node.write(1, &[1]);
    node.after(898);
    let held = (2..).step_by(1).take_while(|&n| {
        node.write(1, &[n]);
        node.after(2);
        !is_written(&node)
    });
    assert_eq!(held.count(), 49, "100 ms of a write each 2 ms");
    assert!(node.now <= 1_000_001, "within the delay");
}

/// What somebody waits for is written at once, whoever else writes.
#[test]
fn durable_blocks_do_not_wait() {
    let mut node = Node::new();
    let op = node.lease_write(&[1]);
    let (lease, _) = leased(node.serve(1, op));
    let op = node.seal(lease, &[(0, 1)], Durability::Durable);
    let request = node.ask(1, op);
    assert!(is_written(&node), "the seal waits for it");
    node.run();
    assert_eq!(node.reply(request), Some(Reply::Sealed { outcomes: vec![SealOutcome::Sealed] }));
}
