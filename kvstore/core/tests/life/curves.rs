//! What the curves are told.

use terrace_core::*;

use super::*;

/// The share of its tokens that a tier of today's size would serve, and how many blocks were asked for.
fn served(node: &Node) -> (f64, u64) {
    let curves = node.core.curves();
    let pinned = curves.iter().find(|curve| curve.tier == CurveTier::Pinned && curve.tenant.is_none());
    pinned.map_or((0.0, 0), |curve| {
        (curve.points.last().map_or(0.0, |point| point.token_ratio), curve.references)
    })
}

/// A client that knows where its blocks lie reads them without a lease. If it told only that they were used, hits would be
/// missing in the counters and in the curves, by which operators size the tier.
#[test]
fn reads_without_a_lease_count() {
    let mut node = Node::new();
    node.tell(Input::BlocksFound { blocks: vec![found(1), found(2)] });
    let op = node.lease_read(&[1, 2]);
    leased(node.serve(1, op));
    let (hits, (_, asked)) = (node.core.counters().hits, served(&node));
    let touch = |reads: Vec<u32>| Request::Touch { blocks: vec![block(1), block(2), block(9)], reads };
    assert_eq!(node.call(1, touch(Vec::new())), Reply::Touched { count: 2 });
    assert_eq!((node.core.counters().hits, served(&node).1), (hits, asked), "used, and not read");
    assert_eq!(node.call(1, touch(vec![9, 0, 5])), Reply::Touched { count: 2 });
    // What is not known here was no hit of anything that is.
    assert_eq!((node.core.counters().hits, served(&node).1), (hits + 9, asked + 9));
    let (ratio, _) = served(&node);
    assert!(ratio > 0.8, "9 of 11 were hits: {ratio}");
    node.core.check();
}
