//! Blocks that are to be kept, in a pool whose chunks are emptied whole.

use terrace_core::*;

use super::kept::{CHUNKS, fill, full_node};
use super::{Node, block};

fn retain(node: &mut Node, n: u8) {
    let retain = Request::Retain { blocks: vec![block(n)], ttl: Micros::from_millis(60_000), priority: 1 };
    assert_eq!(node.call(1, retain), Reply::Retained { count: 1 });
}

/// In memory, by number.
fn there(node: &Node, blocks: std::ops::Range<u8>) -> Vec<u8> {
    let in_memory = |n: &u8| node.core.stat(block(*n)).is_some_and(|view| view.frame.is_some());
    blocks.filter(in_memory).collect()
}

/// New windows take the chunk that was not used for longest, with all that is in it. A block that was to be kept would
/// go with its neighbours while blocks that nobody wants stay: it moves to a frame of one of those.
#[test]
fn a_retained_block_outlives_its_chunk() {
    let (mut node, _) = full_node();
    retain(&mut node, 0);
    let all = 2 * CHUNKS;
    for n in 0..3 * CHUNKS {
        fill(&mut node, CHUNKS + n);
        assert_eq!(there(&node, 0..1), [0], "after {n} new windows");
    }
    assert!(there(&node, 1..all).is_empty(), "everything else was replaced");
    // It ends, and the block goes as any other.
    node.after(60_001);
    for n in 4 * CHUNKS..6 * CHUNKS {
        fill(&mut node, n);
    }
    assert!(there(&node, 0..1).is_empty());
}

/// One such block in each chunk: whichever chunk is emptied has one to be moved, and none may be lost.
#[test]
fn retained_blocks_are_brought_together() {
    let (mut node, _) = full_node();
    for n in 0..CHUNKS {
        retain(&mut node, 2 * n);
    }
    for n in 0..2 * CHUNKS {
        fill(&mut node, CHUNKS + n);
        let kept = there(&node, 0..2 * CHUNKS).into_iter().filter(|n| n % 2 == 0).count();
        assert_eq!(kept, usize::from(CHUNKS), "after {n} new windows");
    }
}

/// Memory that is full of blocks which are to be kept would never be had again: they leave where there are no others.
#[test]
fn retained_blocks_make_room_where_there_are_no_others() {
    let (mut node, _) = full_node();
    for n in 0..2 * CHUNKS {
        retain(&mut node, n);
    }
    fill(&mut node, CHUNKS);
    assert_eq!(there(&node, 2 * CHUNKS..2 * CHUNKS + 2).len(), 2);
    assert_eq!(there(&node, 0..2 * CHUNKS).len(), usize::from(2 * CHUNKS - 2));
}
