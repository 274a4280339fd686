//! One daemon's blocks in the index: a snapshot, and the events after it.
//!
//! Promises: each event is applied once and in order; after a gap, a new life of
//! the daemon or a cleared space it asks for a snapshot, and what was known stays
//! in use until that is complete; a snapshot that ends in the middle leaves no
//! trace. Leaves to others: the streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use terrace_client::wire::{BlockEvent, BlockEventKind, SnapshotResponse, Tier, WatchResponse};
use terrace_index::{HolderId, Index, Key, SizeClass, Stream, TierSet, Verdict};

/// Holders that one daemon takes: what is in use, and what is being loaded.
pub(super) const HOLDERS: u32 = 2;
const NONE: u32 = u32::MAX;
/// Blocks that are changed before others have a turn.
const BLOCKS_A_TURN: usize = 2_048;

/// What others see of a mirror.
#[derive(Debug)]
pub(super) struct Shown {
    holder: AtomicU32,
    /// Events that the daemon had told of and that were not applied yet.
    pub(super) behind: AtomicU64,
    /// Events applied.
    pub(super) applied: AtomicU64,
    /// Snapshots that were taken, the first included.
    pub(super) snapshots: AtomicU64,
}

impl Default for Shown {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self { holder: AtomicU32::new(NONE), behind: zero(), applied: zero(), snapshots: zero() }
    }
}

impl Shown {
    /// Under which number the index has the daemon's blocks; none before the first snapshot.
    pub(super) fn holder(&self) -> Option<HolderId> {
        let holder = self.holder.load(Ordering::Acquire);
        (holder != NONE).then_some(HolderId(holder))
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Mirror {
    index: Arc<Index>,
    holders: [HolderId; HOLDERS as usize],
    stream: Stream,
    loading: Option<Loading>,
    shown: Arc<Shown>,
}

#[derive(Debug)]
struct Loading {
    holder: HolderId,
    incarnation: u64,
    sequence: u64,
}

/// What to do after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read on.
    More,
    /// The snapshot is complete: watch from `sequence` on.
    Loaded {
        /// The number that is wanted next.
        sequence: u64,
    },
    /// Take a snapshot.
    Resync,
}

/// A message that no daemon of ours sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the daemon sent {what}")]
pub(super) struct BadMessage {
    what: &'static str,
}

impl Mirror {
    /// Of the daemon with this number.
    pub(super) fn new(index: Arc<Index>, daemon: u32, shown: Arc<Shown>) -> Self {
        let first = daemon * HOLDERS;
        let holders = [HolderId(first), HolderId(first + 1)];
        Self { index, holders, stream: Stream::new(), loading: None, shown }
    }

    /// A snapshot begins; an earlier one that did not end is forgotten.
    pub(super) fn begin(&mut self) {
        self.abandon();
        self.shown.snapshots.fetch_add(1, Ordering::Relaxed);
    }

    /// One piece of it.
    pub(super) fn load(&mut self, piece: &SnapshotResponse) -> Result<Step, BadMessage> {
        let spare = self.spare();
        let loading = self.loading.get_or_insert(Loading {
            holder: spare,
            incarnation: piece.incarnation,
            sequence: piece.sequence,
        });
        if (loading.incarnation, loading.sequence) != (piece.incarnation, piece.sequence) {
            return Err(BadMessage { what: "pieces of two snapshots in one" });
        }
        let mut changes = Changes::new(&self.index, loading.holder);
        for block in &piece.blocks {
            if block.kind() != BlockEventKind::Sealed {
                return Err(BadMessage { what: "a snapshot of something that is no block" });
            }
            changes.apply(block)?;
        }
        changes.flush();
        // Before the turn of what follows.
        drop(changes);
        if !piece.last {
            return Ok(Step::More);
        }
        Ok(self.complete())
    }

    fn complete(&mut self) -> Step {
        let Some(loaded) = self.loading.take() else { return Step::Resync };
        if !self.stream.snapshot(loaded.incarnation, loaded.sequence) {
            self.clear(loaded.holder);
            return Step::Resync;
        }
        let before = self.shown.holder.swap(loaded.holder.0, Ordering::AcqRel);
        if before != NONE {
            self.clear(HolderId(before));
        }
        Step::Loaded { sequence: loaded.sequence }
    }

    /// One message of the event stream.
    pub(super) fn apply(&mut self, message: &WatchResponse) -> Result<Step, BadMessage> {
        let Some(holder) = self.shown.holder() else { return Ok(Step::Resync) };
        if message.resync {
            return Ok(Step::Resync);
        }
        let mut changes = Changes::new(&self.index, holder);
        let (mut applied, mut step) = (0, Step::More);
        for (number, event) in (message.sequence..).zip(&message.events) {
            match self.stream.event(message.incarnation, number) {
                Verdict::Drop => continue,
                Verdict::Resync { .. } => step = Step::Resync,
                // The index knows blocks, not spaces: what is left is learned anew.
                Verdict::Apply if event.kind() == BlockEventKind::Cleared => step = Step::Resync,
                Verdict::Apply => {
                    changes.apply(event)?;
                    applied += 1;
                    continue;
                }
            }
            break;
        }
        changes.flush();
        drop(changes);
        let end = message.sequence + message.events.len() as u64;
        self.shown.applied.fetch_add(applied, Ordering::Relaxed);
        self.shown.behind.store(message.next_sequence.saturating_sub(end), Ordering::Relaxed);
        Ok(step)
    }

    /// The daemon is gone for good, as far as anybody can tell: it holds nothing.
    pub(super) fn lost(&mut self) {
        self.abandon();
        self.stream.lost();
        let before = self.shown.holder.swap(NONE, Ordering::AcqRel);
        if before != NONE {
            self.clear(HolderId(before));
        }
        self.shown.behind.store(0, Ordering::Relaxed);
    }

    /// The holder that is not in use.
    fn spare(&self) -> HolderId {
        let used = self.shown.holder();
        if used == Some(self.holders[0]) { self.holders[1] } else { self.holders[0] }
    }

    fn abandon(&mut self) {
        if let Some(loading) = self.loading.take() {
            self.clear(loading.holder);
        }
    }

    fn clear(&self, holder: HolderId) {
        self.index.clear(holder).expect("the index was made for all daemons' holders");
    }
}

/// Changes to the index in one turn, or in several where there are many, with blocks that follow each other stored together.
struct Changes<'a> {
    index: &'a Index,
    /// None before the first change.
    turn: Option<terrace_index::Changes<'a>>,
    /// Blocks that this turn may still change.
    left: usize,
    holder: HolderId,
    parent: Option<Key>,
    kind: (TierSet, SizeClass),
    run: Vec<Key>,
}

impl<'a> Changes<'a> {
    fn new(index: &'a Index, holder: HolderId) -> Self {
        let kind = (TierSet::NONE, SizeClass::UNKNOWN);
        Self { index, turn: None, left: 0, holder, parent: None, kind, run: Vec::new() }
    }

    /// The turn, for so many blocks more.
    fn turn(&mut self, blocks: usize) -> &mut terrace_index::Changes<'a> {
        if self.left < blocks {
            self.turn = None;
            self.left = BLOCKS_A_TURN;
        }
        self.left = self.left.saturating_sub(blocks);
        self.turn.get_or_insert_with(|| self.index.changes())
    }

    fn apply(&mut self, event: &BlockEvent) -> Result<(), BadMessage> {
        let block = key(&event.block_id)?.ok_or(BadMessage { what: "an event of no block" })?;
        match event.kind() {
            BlockEventKind::Sealed => {
                let parent = key(&event.parent_id)?;
                self.store(parent, block, (tiers(event), SizeClass::of_bytes(event.length)));
            }
            BlockEventKind::Moved => {
                self.flush();
                let now = tiers(event);
                let gone = TierSet::from_bits(TierSet::ALL.bits() & !now.bits());
                let (holder, size) = (self.holder, SizeClass::UNKNOWN);
                let stored = self.turn(1).store_sized(holder, now, size, None, &[block]);
                stored.expect("the index was made for all daemons' holders");
                self.remove(gone.unwrap_or(TierSet::NONE), block);
            }
            BlockEventKind::Evicted => {
                self.flush();
                self.remove(TierSet::ALL, block);
            }
            BlockEventKind::Cleared | BlockEventKind::Unspecified => {
                return Err(BadMessage { what: "an event of an unknown kind" });
            }
        }
        Ok(())
    }

    fn store(&mut self, parent: Option<Key>, block: Key, kind: (TierSet, SizeClass)) {
        let follows = self.run.last().is_some_and(|last| Some(*last) == parent) && self.kind == kind;
        if !follows {
            self.flush();
            (self.parent, self.kind) = (parent, kind);
        }
        self.run.push(block);
    }

    fn remove(&mut self, tiers: TierSet, block: Key) {
        let holder = self.holder;
        let removed = self.turn(1).remove(holder, tiers, &[block]);
        removed.expect("the index was made for all daemons' holders");
    }

    fn flush(&mut self) {
        let (tiers, size) = self.kind;
        let mut run = std::mem::take(&mut self.run);
        if run.is_empty() {
            return;
        }
        let (holder, parent) = (self.holder, self.parent);
        let stored = self.turn(run.len()).store_sized(holder, tiers, size, parent, &run);
        stored.expect("the index was made for all daemons' holders");
        run.clear();
        self.run = run;
    }
}

/// An id of 16 bytes, or none if it is empty.
fn key(bytes: &[u8]) -> Result<Option<Key>, BadMessage> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bytes = bytes.try_into().map_err(|_| BadMessage { what: "an id that is not 16 bytes long" })?;
    Ok(Some(Key::from_bytes(bytes)))
}

/// The daemon's own tiers; a copy elsewhere is another holder's.
fn tiers(event: &BlockEvent) -> TierSet {
    event.tiers().fold(TierSet::NONE, |set, tier| {
        set.with(match tier {
            Tier::Hbm => TierSet::HBM,
            Tier::Pinned => TierSet::PINNED,
            Tier::Nvme => TierSet::NVME,
            Tier::Remote | Tier::Unspecified => TierSet::NONE,
        })
    })
}

#[cfg(test)]
mod tests;
