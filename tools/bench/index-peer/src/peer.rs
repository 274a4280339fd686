//! The peer's index, fed with the events of a load. Its events are made before the clock starts.

use dynamo_kv_router::ConcurrentRadixTreeCompressed;
use dynamo_kv_router::indexer::{SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};
use futures_executor::block_on;

use crate::load::{Part, Shape, mix};

pub(crate) type Event = RouterEvent;

pub(crate) struct Peer(ThreadPoolIndexer<ConcurrentRadixTreeCompressed>);

impl Peer {
    pub(crate) fn new(threads: usize) -> Self {
        Self(ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), threads, 16))
    }

    /// Hands events to its queues.
    pub(crate) fn send(&self, events: Vec<Event>) {
        for event in events {
            self.0.enqueue_event(event).expect("the peer takes events");
        }
    }

    /// Waits until its queues are empty.
    pub(crate) fn drain(&self) {
        block_on(self.0.flush_and_wait()).expect("the peer drains its queues");
    }

    /// Workers found, and the longest prefix.
    pub(crate) fn find(&self, prompt: &[LocalBlockHash]) -> (usize, u32) {
        let found = self.0.backend().find_matches(prompt, false);
        (found.scores.len(), found.scores.values().copied().max().unwrap_or(0))
    }
}

pub(crate) fn prompt(shape: &Shape, document: u64) -> Vec<LocalBlockHash> {
    (0..shape.blocks).map(|block| LocalBlockHash(local(shape, document, block))).collect()
}

/// The hash of a block's own tokens, and of it with all before it: any numbers that are as unique.
fn local(shape: &Shape, document: u64, block: usize) -> u64 {
    mix(shape.number(document, block))
}

fn chained(shape: &Shape, document: u64, block: usize) -> ExternalSequenceBlockHash {
    ExternalSequenceBlockHash(mix(local(shape, document, block) ^ 1337))
}

/// The events that tell of a document from block `from` on.
pub(crate) fn stored(shape: &Shape, (document, from): (u64, usize), events: &mut Vec<Event>) {
    for Part { worker, blocks } in shape.parts(document) {
        let mut start = from;
        while start < blocks {
            let end = (start + shape.per_event).min(blocks);
            let those = (start..end).map(|block| KvCacheStoredBlockData {
                block_hash: chained(shape, document, block),
                tokens_hash: LocalBlockHash(local(shape, document, block)),
                mm_extra_info: None,
            });
            let data = KvCacheEventData::Stored(KvCacheStoreData {
                parent_hash: start.checked_sub(1).map(|last| chained(shape, document, last)),
                start_position: None,
                blocks: those.collect(),
            });
            events.push(event(worker, data));
            start = end;
        }
    }
}

/// The events that take a document away, from its tail to block `from`.
pub(crate) fn removed(shape: &Shape, (document, from): (u64, usize), events: &mut Vec<Event>) {
    for Part { worker, blocks } in shape.parts(document) {
        let mut end = blocks;
        while end > from {
            let start = end.saturating_sub(shape.per_event).max(from);
            let block_hashes = (start..end).rev().map(|block| chained(shape, document, block)).collect();
            events.push(event(worker, KvCacheEventData::Removed(KvCacheRemoveData { block_hashes })));
            end = start;
        }
    }
}

/// An event of one worker.
pub(crate) fn event(worker: u32, data: KvCacheEventData) -> Event {
    RouterEvent::new(u64::from(worker), KvCacheEvent { event_id: 0, data, dp_rank: 0 })
}
