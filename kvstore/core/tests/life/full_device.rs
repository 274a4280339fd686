//! A device is full, and more comes.

use std::cell::RefCell;

use terrace_core::*;

use super::{BLOCK_BYTES, Node, leased, space};

const REQUEST: u32 = 64;

/// A commit takes as long for one block as for hundreds, and what waits for the room waits for it: small blocks that made
/// room one by one would hold a device to a small part of its rate. Three times what the device holds is written.
#[test]
fn room_for_small_blocks_is_made_by_the_many() {
    let mut node = Node::new();
    node.open(3, 1, Locality::Streamed);
    let found = RefCell::new(Vec::new());
    for round in 0..32 {
        write_many(&mut node, round, &found);
        node.after(1001);
        node.run_with(|effect| seen(effect, &found));
    }
    let found = found.into_inner();
    let (commits, deletes, most) =
        (found.len(), found.iter().sum::<usize>(), found.iter().max().copied().unwrap_or(0));
    assert!(deletes > 1000, "the device was not full: {deletes} blocks were deleted");
    assert!(deletes / commits > 24, "{deletes} blocks were deleted by {commits} commits");
    // And not so many that what is held becomes little: the device holds some 680.
    assert!(most <= 64, "{most} blocks were evicted at once");
}

/// Notes how many blocks a commit deletes, and completes everything well.
fn seen(effect: &Effect, found: &RefCell<Vec<usize>>) -> Result<Done, Fault> {
    if let Effect::Commit { delete, .. } = effect
        && !delete.is_empty()
    {
        found.borrow_mut().push(delete.len());
    }
    Ok(Done::Plain)
}

/// Writes and seals blocks of this round.
fn write_many(node: &mut Node, round: u32, found: &RefCell<Vec<usize>>) {
    let blocks = (0..REQUEST).map(|n| {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&(round * REQUEST + n).wrapping_mul(0x9e37_79b1).to_le_bytes());
        BlockId::from_bytes(id)
    });
    let repeat = u64::from(round) * 2 + 1;
    let op = Request::LeaseWrite {
        repeat: Some(repeat),
        space: space(1),
        blocks: blocks.collect(),
        parent: None,
        ttl: None,
        want: Memory::Pinned,
    };
    let request = node.ask(3, op);
    node.run_with(|effect| seen(effect, found));
    let (lease, grants) = leased(node.reply(request).expect("nothing is in flight"));
    assert!(grants.iter().all(|grant| matches!(grant, Grant::Granted { .. })), "{grants:?}");
    let parts = (0..REQUEST).map(|n| (n, ByteCount::new(BLOCK_BYTES), Checksum::new(1)));
    let op = Request::Seal {
        repeat: Some(repeat + 1),
        lease,
        blocks: parts.collect(),
        durability: Durability::Readable,
    };
    node.call(3, op);
    node.call(3, Request::Release { leases: vec![lease] });
}
