//! Clears that cannot be made durable at once.

use terrace_core::*;

use super::{Node, block, leased, space};

fn clear(repeat: u64) -> Request {
    Request::Clear { repeat: Some(repeat), space: space(1) }
}

/// Ends every clear that is in flight with a failure of the device, and all else well. Says how many there were.
fn fail_clears(node: &mut Node) -> usize {
    let is_clear = |effect: &Effect| matches!(effect, Effect::ClearSpace { .. });
    let count = node.effects.iter().filter(|effect| is_clear(effect)).count();
    node.run_with(|effect| if is_clear(effect) { Err(Fault::Device) } else { Ok(Done::Plain) });
    count
}

fn seal_durable(node: &mut Node, n: u8) -> RequestId {
    let op = node.lease_write(&[n]);
    let request = node.ask(1, op);
    fail_clears(node);
    let (lease, _) = leased(node.reply(request).expect("it is granted"));
    let op = node.seal(lease, &[(0, u64::from(n))], Durability::Durable);
    node.ask(1, op)
}

fn not_durable() -> Option<Reply> {
    Some(Reply::Sealed { outcomes: vec![SealOutcome::NotDurable] })
}

/// A device that is out takes no record of a clear. Who seals durably or flushes could wait until it is back, while
/// the daemon asks it once a second for every clear that there was: they must be told at once, one try must stand for
/// all clears of the space, and come more and more rarely. When it succeeds, everything goes on.
#[test]
fn nobody_waits_for_a_clear_that_cannot_be_recorded() {
    let mut node = Node::new();
    node.write(1, &[1]);
    let waiting = seal_durable(&mut node, 2);
    let cleared = node.ask(2, clear(901));
    // Sealed after the clear, and before it is known that it fails.
    let behind = seal_durable_later(&mut node, 3);
    assert!(fail_clears(&mut node) > 0);
    assert_eq!(node.reply(cleared), Some(Reply::Refused(Refusal::NotRecorded)));
    assert!(node.reply(waiting).is_some(), "a block that was cleared is not waited for");
    assert_eq!(node.reply(behind), not_durable());
    for repeat in 902..905 {
        let cleared = node.ask(2, clear(repeat));
        fail_clears(&mut node);
        assert_eq!(node.reply(cleared), Some(Reply::Refused(Refusal::NotRecorded)));
    }
    let sealed = seal_durable(&mut node, 4);
    assert_eq!(node.reply(sealed), not_durable());
    let flushed = node.ask(1, Request::Flush);
    assert_eq!(node.reply(flushed), Some(Reply::Flushed { blocks: 0, failed: 1 }));
    let tries: usize = (0..60).map(|_| tries_in(&mut node, 1000)).sum();
    assert!((1..=6).contains(&tries), "{tries} tries in a minute");
    node.after(120_000);
    let again = node.effects.iter().filter(|effect| matches!(effect, Effect::ClearSpace { .. })).count();
    assert_eq!(again, 1, "one try for the space");
    node.run();
    assert_eq!(node.serve(1, Request::Flush), Reply::Flushed { blocks: 0, failed: 0 });
    assert!(node.core.stat(block(4)).is_some_and(|view| view.tiers.nvme), "it was written when it could be");
    assert_eq!(node.serve(2, clear(910)), Reply::Cleared { generation: 5, blocks: 1 });
}

fn tries_in(node: &mut Node, millis: u64) -> usize {
    node.after(millis);
    fail_clears(node)
}

/// Seals while the clear is in flight, without ending it.
fn seal_durable_later(node: &mut Node, n: u8) -> RequestId {
    let op = node.lease_write(&[n]);
    let request = node.ask(1, op);
    let place = node.effects.iter().position(|effect| matches!(effect, Effect::ClearSpace { .. }));
    let held = node.effects.remove(place.expect("it is in flight"));
    node.run();
    node.effects.push(held);
    let (lease, _) = leased(node.reply(request).expect("it is granted"));
    let op = node.seal(lease, &[(0, u64::from(n))], Durability::Durable);
    node.ask(1, op)
}

/// A device comes back: a clear that waits for it must not wait for the end of its pause.
#[test]
fn a_device_that_is_back_is_told_of_the_clear() {
    let mut node = Node::new();
    let cleared = node.ask(1, clear(901));
    fail_clears(&mut node);
    assert!(node.reply(cleared).is_some());
    for _ in 0..6 {
        node.after(60_000);
        fail_clears(&mut node);
    }
    node.tell(Input::DeviceState { device: DeviceId::new(0), usable: false });
    node.tell(Input::DeviceState { device: DeviceId::new(0), usable: true });
    assert!(node.effects.iter().any(|effect| matches!(effect, Effect::ClearSpace { generation: 1, .. })));
}
