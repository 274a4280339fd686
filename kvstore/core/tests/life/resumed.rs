//! A client that goes on by another session.

use terrace_core::*;

use super::{Node, space, tenant};

fn resume(node: &mut Node, session: u64, of: u8, client: u8) {
    node.open(session, of, Locality::Local);
    let client = ClientId::from_bytes([client; 16]);
    node.tell(Input::SessionResumed { session: SessionId::new(session), client });
}

fn clear() -> Request {
    Request::Clear { repeat: Some(901), space: space(1) }
}

/// A session ends while its space is being cleared. A repeat could clear a second time, or be answered before the clear
/// is durable: it must be told to come again until then, and get the first one's answer.
#[test]
fn a_clear_goes_on_without_its_session() {
    let mut node = Node::new();
    node.write(1, &[1, 2]);
    resume(&mut node, 10, 1, 7);
    let asked = node.ask(10, clear());
    assert_eq!(node.reply(asked), None);
    // The first is still open when the second comes: it ends.
    resume(&mut node, 11, 1, 7);
    let ended =
        |effect: &Effect| matches!(effect, Effect::EndSession { session } if *session == SessionId::new(10));
    assert!(node.effects.iter().any(ended));
    assert_eq!(node.call(10, clear()), Reply::Refused(Refusal::UnknownSession));
    assert_eq!(node.call(11, clear()), Reply::Throttled(Limit::RequestsWaiting));
    node.tell(Input::SessionClosed { session: SessionId::new(11) });
    node.run();
    resume(&mut node, 12, 1, 7);
    assert_eq!(node.call(12, clear()), Reply::Cleared { generation: 1, blocks: 2 });
    assert_eq!(
        node.call(12, Request::Clear { repeat: Some(901), space: space(2) }),
        Reply::Refused(Refusal::RepeatDiffers { repeat: 901 })
    );
    assert_eq!(node.core.counters().clears, 1);
}

/// Another tenant, or another client, names a session's client or request: it must end nothing and learn nothing.
#[test]
fn nobody_else_resumes() {
    let mut node = Node::new();
    resume(&mut node, 10, 1, 7);
    assert_eq!(node.serve(10, clear()), Reply::Cleared { generation: 1, blocks: 0 });
    resume(&mut node, 11, 2, 7);
    resume(&mut node, 12, 1, 8);
    assert!(!node.effects.iter().any(|effect| matches!(effect, Effect::EndSession { .. })));
    assert_eq!(node.call(11, clear()), Reply::Refused(Refusal::UnknownSpace));
    assert_eq!(node.serve(12, clear()), Reply::Cleared { generation: 2, blocks: 0 });
    assert_ne!(tenant(1), tenant(2));
}

/// Clients come and go by the thousand, each with an answer to remember: the first ones must be forgotten.
#[test]
fn clients_that_went_are_limited() {
    let mut node = Node::new();
    for number in 0..1000u64 {
        node.open(100 + number, 1, Locality::Local);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        let (session, client) = (SessionId::new(100 + number), ClientId::from_bytes(bytes));
        node.tell(Input::SessionResumed { session, client });
        node.serve(100 + number, clear());
        // Walks the limits.
        node.tell(Input::SessionClosed { session });
        node.effects.clear();
    }
    let clears = node.core.counters().clears;
    node.open(5000, 1, Locality::Local);
    node.tell(Input::SessionResumed { session: SessionId::new(5000), client: ClientId::from_bytes([0; 16]) });
    node.serve(5000, clear());
    assert_eq!(node.core.counters().clears, clears + 1, "the first one is still remembered");
}

/// A clear waits for the device while its client leases by the hundred, and then the connection breaks. Had the leases
/// pushed it out, the repeat would clear a second time, and drop what was written since.
#[test]
fn a_clear_that_waits_is_not_forgotten() {
    let mut node = Node::new();
    resume(&mut node, 10, 1, 7);
    let asked = node.ask(10, clear());
    for _ in 0..300 {
        let op = node.lease_read(&[1]);
        assert!(matches!(node.call(10, op), Reply::Leased { lease: None, .. }));
    }
    assert_eq!(node.reply(asked), None);
    resume(&mut node, 11, 1, 7);
    assert_eq!(node.call(11, clear()), Reply::Throttled(Limit::RequestsWaiting));
    node.run();
    assert_eq!(node.call(11, clear()), Reply::Cleared { generation: 1, blocks: 0 });
    assert_eq!(node.core.counters().clears, 1);
}

/// An answer was lost with its connection, after its client had leased by the hundred: leases end with their session, so
/// they must not push out what can be asked again.
#[test]
fn leases_push_out_no_other_answer() {
    let mut node = Node::new();
    resume(&mut node, 10, 1, 7);
    assert_eq!(node.serve(10, clear()), Reply::Cleared { generation: 1, blocks: 0 });
    for _ in 0..300 {
        let op = node.lease_read(&[1]);
        node.call(10, op);
    }
    resume(&mut node, 11, 1, 7);
    assert_eq!(node.call(11, clear()), Reply::Cleared { generation: 1, blocks: 0 });
    assert_eq!(node.core.counters().clears, 1);
}

/// Streams of the daemon make requests that nobody repeats: they must neither be taken for one another nor be remembered.
#[test]
fn requests_without_an_id_are_no_repeats() {
    let mut node = Node::new();
    let unnamed = || Request::Clear { repeat: None, space: space(1) };
    assert_eq!(node.serve(1, unnamed()), Reply::Cleared { generation: 1, blocks: 0 });
    assert_eq!(node.serve(1, unnamed()), Reply::Cleared { generation: 2, blocks: 0 });
}
