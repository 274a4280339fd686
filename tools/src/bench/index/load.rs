//! The loads of the index, the same for `terrace bench index` and for the peer beside it: documents that
//! some workers hold to different depths, with a beginning that all of them share.

use terrace_index::{HolderId, Index, Key, SizeClass, TierSet};

/// Blocks that are told of in one turn of the writer, by as many events as come out of a queue for them.
const BLOCKS_A_TURN: usize = 2_048;

/// A load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) workers: u32,
    pub(crate) documents: u64,
    pub(crate) blocks: usize,
    /// How deep each holder of a document has it, in quarters.
    pub(crate) depths: &'static [usize],
    /// First blocks, the same in every document.
    pub(crate) shared: usize,
    /// Blocks that one event tells of.
    pub(crate) per_event: usize,
}

/// 100 workers x 10,000 blocks: documents of 2,000 blocks, held at depths 1, 3/4, 1/2 and 1/4.
pub(crate) const REFERENCE: Shape = Shape {
    name: "reference",
    workers: 100,
    documents: 200,
    blocks: 2_000,
    depths: &[4, 3, 2, 1],
    shared: 32,
    per_event: 64,
};
/// As decoding fills blocks: one block an event, nobody else has it.
pub(crate) const DECODE: Shape = Shape {
    name: "decode",
    workers: 100,
    documents: 2_000,
    blocks: 500,
    depths: &[4],
    shared: 0,
    per_event: 1,
};
/// 1,000 workers x 2,000 blocks.
pub(crate) const WIDE: Shape = Shape {
    name: "wide",
    workers: 1_000,
    documents: 1_600,
    blocks: 500,
    depths: &[4, 3, 2, 1],
    shared: 32,
    per_event: 64,
};
/// 10 M different blocks, far more than caches hold.
pub(crate) const COLD: Shape = Shape {
    name: "cold",
    workers: 100,
    documents: 5_000,
    blocks: 2_000,
    depths: &[4],
    shared: 32,
    per_event: 64,
};

/// A document's part that one worker has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) worker: u32,
    pub(crate) blocks: usize,
}

impl Shape {
    /// A number for a block of a document; the same for the blocks that all share.
    pub(crate) fn number(&self, document: u64, block: usize) -> u64 {
        let document = if block < self.shared { 0 } else { document + 1 };
        document << 24 | block as u64
    }

    pub(crate) fn keys(&self, document: u64) -> Vec<Key> {
        (0..self.blocks).map(|block| Key::from_alias(self.number(document, block))).collect()
    }

    /// Who has how much of a document.
    pub(crate) fn parts(&self, document: u64) -> impl Iterator<Item = Part> + use<> {
        let (workers, blocks, holders) = (u64::from(self.workers), self.blocks, self.depths.len() as u64);
        let parts = self.depths.iter().enumerate();
        parts.map(move |(number, quarters)| Part {
            worker: u32::try_from((document * holders + number as u64) % workers).unwrap_or(0),
            blocks: blocks * quarters / 4,
        })
    }

    /// Blocks that the events of all documents tell of.
    pub(crate) fn told(&self) -> u64 {
        self.documents * self.depths.iter().map(|quarters| self.blocks * quarters / 4).sum::<usize>() as u64
    }
}

/// Tells the index of a document from block `from` on, by the workers that `take` says.
pub(crate) fn store(
    index: &Index,
    shape: &Shape,
    (document, from): (u64, usize),
    keys: &[Key],
    take: impl Fn(u32) -> bool,
) {
    for Part { worker, blocks } in shape.parts(document).filter(|part| take(part.worker)) {
        let mut parent = from.checked_sub(1).map(|last| keys[last]);
        for events in keys[from..blocks].chunks(BLOCKS_A_TURN / shape.per_event * shape.per_event) {
            let mut turn = index.changes();
            for event in events.chunks(shape.per_event) {
                let size = SizeClass::UNKNOWN;
                let stored = match parent {
                    Some(_) => turn.store_sized(HolderId(worker), TierSet::HBM, size, parent, event),
                    None => turn.store_start(HolderId(worker), TierSet::HBM, size, event),
                };
                stored.expect("the load has fewer workers than the index may have");
                parent = event.last().copied();
            }
        }
    }
}

/// Takes a document away again, from its tail to block `from`. `reversed` are its keys in that order.
pub(crate) fn remove(
    index: &Index,
    shape: &Shape,
    (document, from): (u64, usize),
    reversed: &[Key],
    take: impl Fn(u32) -> bool,
) {
    for Part { worker, blocks } in shape.parts(document).filter(|part| take(part.worker)) {
        let part = &reversed[reversed.len() - blocks..reversed.len() - from];
        for events in part.chunks(BLOCKS_A_TURN / shape.per_event * shape.per_event) {
            let mut turn = index.changes();
            for event in events.chunks(shape.per_event) {
                let removed = turn.remove(HolderId(worker), TierSet::HBM, event);
                removed.expect("the load has fewer workers than the index may have");
            }
        }
    }
}

/// The value that so many of a thousand are at most, in nanoseconds.
pub(crate) fn permille(nanos: &mut [u32], permille: usize) -> f64 {
    nanos.sort_unstable();
    nanos
        .get((nanos.len() * permille / 1000).min(nanos.len().saturating_sub(1)))
        .map_or(0.0, |nanos| f64::from(*nanos))
}

/// SplitMix64.
pub(crate) fn mix(number: u64) -> u64 {
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}
