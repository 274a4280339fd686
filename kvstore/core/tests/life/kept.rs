//! Memory that a process keeps after its chunk is gone: it stands still, and has not heard of it.

use terrace_core::*;

use super::{Node, config, leased};

/// Two frames.
const CHUNK_BYTES: u64 = 7 * 4096;
pub(super) const CHUNKS: u8 = 8;

/// A full pool without a device, each chunk of which holds two blocks.
pub(super) fn full_node() -> (Node, Vec<ChunkId>) {
    let mut node = Node::of(Config {
        pinned_bytes: ByteCount::new(u64::from(CHUNKS) * CHUNK_BYTES),
        chunk_bytes: ByteCount::new(CHUNK_BYTES),
        device_slots: Vec::new(),
        chunks_ready_min: 0,
        limits: Limits { retained_percent: 100, ..config().limits },
        ..config()
    });
    let chunks = (0..CHUNKS).map(|n| fill(&mut node, n)).collect();
    node.after(2000);
    (node, chunks)
}

/// Writes two blocks into a new window, which becomes a chunk.
pub(super) fn fill(node: &mut Node, n: u8) -> ChunkId {
    let blocks = [2 * n, 2 * n + 1];
    let op = node.lease_write(&blocks);
    let (lease, grants) = leased(node.serve(1, op));
    let Grant::Granted { frame, .. } = grants[0] else { panic!("granted") };
    let op = node.seal(lease, &[(0, 1), (1, 2)], Durability::Readable);
    node.call(1, op);
    node.call(1, Request::Release { leases: vec![lease] });
    node.call(1, Request::ReturnWindow { chunk: frame.chunk });
    node.run();
    frame.chunk
}

fn dropped(node: &Node) -> Vec<(OpId, ChunkId)> {
    let drops = node.effects.iter().filter_map(|effect| match effect {
        Effect::DropChunk { op, chunk, .. } => Some((*op, *chunk)),
        _ => None,
    });
    drops.collect()
}

/// Who waits for memory waited two seconds for each chunk that a stopped process had mapped, one after the other. They are
/// waited for together, but not all of them: the pool must not be emptied for one process.
#[test]
fn chunks_that_are_kept_are_waited_for_together() {
    let (mut node, chunks) = full_node();
    let op = node.lease_write(&[100, 101]);
    let request = node.ask(1, op);
    assert_eq!(dropped(&node).len(), 1, "one is enough, as long as its memory comes back at once");
    let mut found = Vec::new();
    for _ in 0..10 {
        node.after(251);
        found.push(dropped(&node).len());
    }
    assert_eq!(found, [2, 3, 4, 4, 4, 4, 4, 4, 4, 4]);
    let kept: Vec<ChunkId> = dropped(&node).iter().map(|(_, chunk)| *chunk).collect();
    assert_eq!(kept, chunks[..4], "the coldest");
    assert!(node.reply(request).is_none());
    node.run();
    assert!(matches!(node.reply(request), Some(Reply::Leased { lease: Some(_), .. })));
}

/// A process that did not let go of one chunk will not let go of the next one. What it has not mapped goes first, although
/// it is warmer, until a chunk of its own comes back.
#[test]
fn what_is_kept_goes_last() {
    let (mut node, chunks) = full_node();
    for &chunk in &chunks[..2] {
        for session in [1, 2] {
            node.call(session, Request::MapChunk { chunk });
        }
    }
    node.call(1, Request::MapChunk { chunk: chunks[2] });
    let op = node.lease_write(&[100, 101]);
    node.ask(1, op);
    let &[(op, first)] = &dropped(&node)[..] else { panic!("one is dropped") };
    assert_eq!(first, chunks[0], "nobody is known to keep any");
    node.effects.retain(|effect| !matches!(effect, Effect::DropChunk { .. }));
    node.tell(Input::OpDone { op, outcome: Err(Fault::StillMapped) });
    node.run();
    // Which of the two keeps it is not known; the chunk of one of them alone goes before that of both, and one of neither
    // before them.
    let mut order = Vec::new();
    for n in 51..58 {
        let op = node.lease_write(&[2 * n, 2 * n + 1]);
        node.ask(1, op);
        order.extend(dropped(&node).iter().map(|(_, chunk)| *chunk));
        node.run();
    }
    let place = |chunk| order.iter().position(|found| *found == chunk).unwrap_or(usize::MAX);
    assert_eq!(order.first(), Some(&chunks[3]), "{order:?} of {chunks:?}");
    assert!(place(chunks[7]) < place(chunks[2]), "{order:?} of {chunks:?}");
    assert!(place(chunks[2]) < place(chunks[1]), "{order:?} of {chunks:?}");
}

/// Sessions come and go while a chunk stays: what a chunk knows of those that map it must not grow with them.
#[test]
fn sessions_that_are_over_are_forgotten() {
    let (mut node, chunks) = full_node();
    node.call(2, Request::MapChunk { chunk: chunks[0] });
    // Every step looks whether all that is known to map a chunk is open.
    node.tell(Input::SessionClosed { session: SessionId::new(2) });
    node.run();
}

/// A chunk is dropped that several sessions were told how to map: those that are open, and no others, must hear of it.
#[test]
fn whoever_maps_a_chunk_is_told_that_it_goes() {
    let (mut node, chunks) = full_node();
    for session in [3, 4] {
        node.open(session, 1, Locality::Local);
    }
    for session in [2, 3, 4] {
        node.call(session, Request::MapChunk { chunk: chunks[0] });
    }
    node.tell(Input::SessionClosed { session: SessionId::new(3) });
    for n in 50..58 {
        let op = node.lease_write(&[2 * n, 2 * n + 1]);
        node.ask(1, op);
        let told = node.effects.iter().find_map(|effect| match effect {
            Effect::DropChunk { chunk, mappers, .. } if *chunk == chunks[0] => Some(mappers.clone()),
            _ => None,
        });
        if let Some(mappers) = told {
            assert_eq!(mappers, [2, 4].map(SessionId::new));
            return;
        }
        node.run();
    }
    panic!("the chunk was not dropped");
}
