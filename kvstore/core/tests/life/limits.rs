//! Limits of sessions and tenants, each by its own name.

use terrace_core::*;

use super::{Node, config, leased, space};

/// Sessions and tenants that hold more than their share: each limit must refuse by its own name, and let others go on.
#[test]
fn limits_of_sessions_and_tenants_are_told_apart() {
    let small = Limits {
        leases_per_session: 2,
        leases_per_tenant: 3,
        requests_waiting_per_session: 1,
        requests_waiting_per_tenant: 2,
        ..config().limits
    };
    let mut node = Node::with(small);
    node.open(3, 1, Locality::Local);
    node.write(1, &[1]);
    let lease = |node: &mut Node, session| {
        let op = node.lease_read(&[1]);
        node.serve(session, op)
    };
    for (session, expected) in
        [(1, None), (1, None), (1, Some(Limit::Leases)), (2, None), (2, Some(Limit::LeasesOfTenant))]
    {
        match (lease(&mut node, session), expected) {
            (Reply::Leased { lease: Some(_), .. }, None) => {}
            (Reply::Throttled(limit), Some(expected)) => assert_eq!(limit, expected),
            (other, expected) => panic!("{other:?} where {expected:?} was expected"),
        }
    }
    // A clear waits for the catalog.
    let clear = |node: &mut Node, session, repeat| {
        let request = node.ask(session, Request::Clear { repeat: Some(repeat), space: space(1) });
        node.reply(request)
    };
    assert_eq!(clear(&mut node, 1, 901), None);
    assert_eq!(clear(&mut node, 1, 902), Some(Reply::Throttled(Limit::RequestsWaitingOfSession)));
    assert_eq!(clear(&mut node, 2, 903), None);
    assert_eq!(clear(&mut node, 3, 904), Some(Reply::Throttled(Limit::RequestsWaitingOfTenant)));
    node.run();
    assert_eq!(clear(&mut node, 3, 905), None);
}

/// A session pins all that its tenant may: it must be stopped at its own share, and another of the tenant go on.
#[test]
fn one_session_cannot_pin_its_tenants_share() {
    let chunk = config().chunk_bytes.get();
    let small = Limits { leased_bytes_per_session: ByteCount::new(chunk + chunk / 4), ..config().limits };
    let mut node = Node::with(small);
    let mut first = Vec::new();
    let refused = loop {
        let from = u8::try_from(first.len()).expect("it ends before");
        let op = node.lease_write(&[from + 1]);
        match node.serve(1, op) {
            Reply::Leased { lease: Some(lease), .. } => first.push(lease),
            other => break other,
        }
    };
    assert_eq!(refused, Reply::Throttled(Limit::LeasedBytesOfSession));
    assert!(!first.is_empty());
    let op = node.lease_write(&[200]);
    leased(node.serve(2, op));
    assert_eq!(node.call(1, Request::Release { leases: vec![first[0]] }), Reply::Released { count: 1 });
    let op = node.lease_write(&[201]);
    leased(node.serve(1, op));
}

/// A pool whose chunks cannot be made (no descriptors, no memory), and one whose chunks are all in use: both refuse a
/// write, and neither may be blamed on what the session holds, because to release leases would not help.
#[test]
fn a_pool_without_room_is_no_limit_of_the_session() {
    let mut node = Node::with(config().limits);
    let refused = |node: &mut Node, session, number, outcome: fn(&Effect) -> Result<Done, Fault>| {
        let op = node.lease_write(&[number]);
        let request = node.ask(session, op);
        for _ in 0..600 {
            node.run_with(outcome);
            if let Some(reply) = node.reply(request) {
                return reply;
            }
            node.after(100);
        }
        panic!("not answered within a minute")
    };
    let fails = |effect: &Effect| match effect {
        Effect::CreateChunk { .. } => Err(Fault::NoMemory),
        _ => Ok(Done::Plain),
    };
    assert_eq!(refused(&mut node, 1, 1, fails), Reply::Throttled(Limit::Memory));
    node.after(10_000);
    for session in [3, 4, 5] {
        node.open(session, 1, Locality::Local);
    }
    // Each fills a window, and there are four chunks.
    for (number, session) in (10..).zip([1, 2, 3, 4]) {
        leased(refused(&mut node, session, number, |_| Ok(Done::Plain)));
    }
    assert_eq!(refused(&mut node, 5, 20, |_| Ok(Done::Plain)), Reply::Throttled(Limit::Pool));
}

/// A client renews for ever: its lease must end at the longest hold all the same, and it must be told why.
#[test]
fn a_hoarder_is_revoked() {
    let small = Limits { lease_hold_max: Micros::from_millis(30_000), ..config().limits };
    let mut node = Node::with(small);
    node.write(1, &[1]);
    let op = node.lease_read(&[1]);
    let (lease, _) = leased(node.serve(1, op));
    for _ in 0..29 {
        node.after(1000);
        let Reply::Renewed { ttl } = node.call(1, Request::Renew { lease, ttl: None }) else {
            panic!("renewed")
        };
        assert!(ttl <= Micros::from_millis(10_000));
    }
    assert_eq!(
        node.call(1, Request::Renew { lease, ttl: None }),
        Reply::Renewed { ttl: Micros::from_millis(1000) }
    );
    node.after(1001);
    let told = |effect: &Effect| {
        matches!(effect, Effect::Notify { notice: Notice::LeaseRevoked { lease: of, reason }, .. }
            if *of == lease && reason.contains("limits.lease_hold_max_ms"))
    };
    assert!(node.effects.iter().any(told));
    assert_eq!(node.core.counters().leases_revoked, 1);
    assert_eq!(node.core.tier_views().pinned.frames.pinned, 0);
    let op = node.lease_read(&[1]);
    leased(node.serve(1, op));
}
