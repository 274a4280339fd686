//! Chunks of Pinned and Hbm and the frames they are carved into.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{ChunkId, Fence, FrameRef, LeaseId, Memory, SessionId, TenantId};
use crate::state::block::{BlockIndex, ShortOp};
use crate::state::count;
use crate::state::gone::Gone;
use crate::state::index::Index;
use crate::state::space::SpaceIndex;
use crate::units::Now;

/// What a chunk is for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChunkKind {
    /// The shell is making it.
    Creating { owner: Option<SessionId> },
    /// The daemon fills it.
    Pool,
    /// One session fills it. After a recall nothing more is granted in it.
    Window { owner: SessionId, recalled: bool },
    /// A window that was handed back, until the shell knows whether anybody can still write into it.
    Closing { owner: SessionId },
    /// A window that was not handed back, or that can still be written: its blocks are being moved out, for somebody may still write into it.
    Replacing,
    /// A Pool chunk that is being emptied so that its memory can be used otherwise.
    Retiring,
    /// The shell is giving its memory back.
    Dropping,
}

/// Who may be storing bytes into a frame, by the low half of its number: no two
/// with the same half are ever alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filler {
    Lease(ShortLease),
    Op(ShortOp),
}

/// Low half of a lease's number: the upper half is the incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShortLease(u32);

impl From<LeaseId> for ShortLease {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is kept")]
    fn from(lease: LeaseId) -> Self {
        Self(lease.get() as u32)
    }
}

/// Lifecycle of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameState {
    Free,
    /// The filler may still be storing bytes, so it is neither readable nor evictable.
    Filling {
        block: BlockIndex,
        filler: Filler,
    },
    /// Evictable while `pins` is zero. `verified`: its bytes were compared with
    /// the checksum since they arrived. Bytes that were not are those of the
    /// chunk's sealer.
    Sealed {
        block: BlockIndex,
        pins: u32,
        verified: bool,
    },
    /// Holds nothing any more, but operations still read from it.
    Evicting,
    /// A client may still write into it: unusable until its window is handed back or replaced.
    Quarantined,
}

/// One frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) fence: Fence,
    pub(crate) state: FrameState,
    /// Operations that read from it.
    pub(crate) busy: u32,
}

/// Frames by state; they sum up to the chunk's frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    /// Hold nothing.
    pub free: u64,
    /// Being filled.
    pub filling: u64,
    /// Hold a block.
    pub sealed: u64,
    /// Hold nothing, but operations are not done with them.
    pub evicting: u64,
    /// May not be touched.
    pub quarantined: u64,
    /// Of the sealed ones: pinned by a lease.
    pub pinned: u64,
}

/// One chunk.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) kind: ChunkKind,
    pub(crate) tenant: TenantId,
    pub(crate) space: SpaceIndex,
    pub(crate) frames: Vec<Frame>,
    /// Free frames, next one last.
    pub(crate) free: Vec<u32>,
    pub(crate) counts: FrameCounts,
    /// Frames with operations that read from them.
    pub(crate) busy: u32,
    /// Last seal or lease in it.
    pub(crate) touched: Now,
    /// It was made for somebody who has not come for a frame yet: not emptied for another before then.
    pub(crate) reserved_until: Now,
    /// While it is replaced: leased blocks stay in place until then.
    pub(crate) leave_by: Now,
    /// Counted as a window of its tenant until its memory is back.
    pub(crate) charged: bool,
    /// The session that fills it, or filled it while it was a window: it may read
    /// back what it sealed before that is verified.
    pub(crate) sealer: Option<SessionId>,
    /// A window of an isolated session: nobody else maps it, and it is never adopted.
    pub(crate) private: bool,
    /// Where it is.
    pub(crate) memory: Memory,
    /// While it retires: leases do not keep it beyond `leave_by`.
    pub(crate) forced: bool,
    /// Sessions that were told how to map it.
    pub(crate) mappers: BTreeSet<SessionId>,
}

const _: () = assert!(size_of::<Frame>() == 32);

impl Chunk {
    pub(crate) fn new(kind: ChunkKind, tenant: TenantId, space: SpaceIndex, frames: u32, now: Now) -> Self {
        let frame = Frame { fence: Fence::new(1), state: FrameState::Free, busy: 0 };
        Self {
            kind,
            tenant,
            space,
            frames: vec![frame; frames as usize],
            free: (0..frames).rev().collect(),
            counts: FrameCounts { free: u64::from(frames), ..FrameCounts::default() },
            busy: 0,
            touched: now,
            reserved_until: now,
            leave_by: now,
            charged: false,
            sealer: None,
            private: false,
            memory: Memory::Pinned,
            forced: false,
            mappers: BTreeSet::new(),
        }
    }

    /// Changes a frame's state and the counts with it.
    pub(crate) fn set(&mut self, index: u32, state: FrameState) {
        let frame = &mut self.frames[index as usize];
        self.counts.leave(frame.state);
        frame.state = state;
        self.counts.join(state);
        if state == FrameState::Free {
            self.free.push(index);
        }
    }

    /// Ends what a frame holds, and gives it to the caller, who sets its state at once. False: operations still
    /// read from it.
    pub(crate) fn evict(&mut self, index: u32) -> (Fence, bool) {
        let frame = &mut self.frames[index as usize];
        frame.fence = frame.fence.next();
        let FrameState::Sealed { pins, .. } = frame.state else {
            unreachable!("only a sealed frame is evicted")
        };
        self.counts.sealed -= 1;
        self.counts.pinned -= u64::from(pins > 0);
        let free = frame.busy == 0;
        if free {
            frame.state = FrameState::Free;
            self.counts.free += 1;
        } else {
            frame.state = FrameState::Evicting;
            self.counts.evicting += 1;
        }
        (frame.fence, free)
    }

    /// What was taken is filled from now on.
    #[inline(always)]
    pub(crate) fn fill(&mut self, index: u32, block: BlockIndex, filler: Filler) -> Fence {
        let frame = &mut self.frames[index as usize];
        assert!(frame.state == FrameState::Free, "only a free frame is filled");
        frame.state = FrameState::Filling { block, filler };
        self.counts.free -= 1;
        self.counts.filling += 1;
        frame.fence
    }

    /// What was filled for a block is its copy from now on.
    #[inline(always)]
    pub(crate) fn seal(&mut self, index: u32, block: BlockIndex, verified: bool, pins: u32) {
        let frame = &mut self.frames[index as usize];
        let ours = matches!(frame.state, FrameState::Filling { block: other, .. } if other == block);
        assert!(ours, "only a frame filled for the block is sealed");
        frame.state = FrameState::Sealed { block, pins, verified };
        self.counts.filling -= 1;
        self.counts.sealed += 1;
        self.counts.pinned += u64::from(pins > 0);
    }

    /// One more lease pins what a frame holds.
    pub(crate) fn pin(&mut self, index: u32) {
        let FrameState::Sealed { pins, .. } = &mut self.frames[index as usize].state else {
            unreachable!("only a sealed frame is pinned")
        };
        *pins += 1;
        self.counts.pinned += u64::from(*pins == 1);
    }

    /// A lease lets go of what a frame holds. Whether no other pins it.
    pub(crate) fn unpin(&mut self, index: u32) -> bool {
        let FrameState::Sealed { pins, .. } = &mut self.frames[index as usize].state else {
            unreachable!("only a sealed frame is pinned")
        };
        assert!(*pins > 0, "a leased block is pinned");
        *pins -= 1;
        let free = *pins == 0;
        self.counts.pinned -= u64::from(free);
        free
    }

    /// Takes a free frame. The caller sets its state at once.
    pub(crate) fn take_free(&mut self) -> Option<u32> {
        let index = self.free.pop()?;
        assert!(self.frames[index as usize].state == FrameState::Free, "the free list holds free frames");
        Some(index)
    }

    /// Whether what a frame holds was sealed by the chunk's sealer, as far as is known.
    pub(crate) fn is_sealers(&self, index: u32) -> bool {
        let verified =
            !matches!(self.frames[index as usize].state, FrameState::Sealed { verified: false, .. });
        !verified || self.may_be_written()
    }

    /// Somebody else than the daemon may store into it.
    pub(crate) fn may_be_written(&self) -> bool {
        match self.kind {
            ChunkKind::Window { .. } | ChunkKind::Closing { .. } | ChunkKind::Replacing => true,
            ChunkKind::Creating { .. } | ChunkKind::Pool | ChunkKind::Retiring | ChunkKind::Dropping => false,
        }
    }

    /// Nothing readable, being filled or in flight is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.counts.filling == 0 && self.counts.sealed == 0 && self.counts.evicting == 0 && self.busy == 0
    }
}

impl FrameCounts {
    /// A frame comes into this state.
    fn join(&mut self, state: FrameState) {
        match state {
            FrameState::Free => self.free += 1,
            FrameState::Filling { .. } => self.filling += 1,
            FrameState::Sealed { pins, .. } => {
                self.sealed += 1;
                self.pinned += u64::from(pins > 0);
            }
            FrameState::Evicting => self.evicting += 1,
            FrameState::Quarantined => self.quarantined += 1,
        }
    }

    /// A frame was in this state.
    fn leave(&mut self, state: FrameState) {
        match state {
            FrameState::Free => self.free -= 1,
            FrameState::Filling { .. } => self.filling -= 1,
            FrameState::Sealed { pins, .. } => {
                self.sealed -= 1;
                self.pinned -= u64::from(pins > 0);
            }
            FrameState::Evicting => self.evicting -= 1,
            FrameState::Quarantined => self.quarantined -= 1,
        }
    }

    /// Adds another chunk's counts.
    pub(crate) fn sum(&mut self, other: FrameCounts) {
        self.free += other.free;
        self.filling += other.filling;
        self.sealed += other.sealed;
        self.evicting += other.evicting;
        self.quarantined += other.quarantined;
        self.pinned += other.pinned;
    }

    /// All frames.
    pub fn total(&self) -> u64 {
        self.free + self.filling + self.sealed + self.evicting + self.quarantined
    }
}

/// All chunks: found by id through a hash of it, walked in the order of ids.
#[derive(Debug, Default)]
pub(crate) struct ChunkTable {
    slots: Vec<Option<Chunk>>,
    free: Vec<u32>,
    index: Index,
    order: BTreeMap<ChunkId, u32>,
    created: u64,
    /// Of them, those in Pinned.
    pinned: u32,
    /// The chunk that was used last, and its slot: mostly the next one too.
    last: Option<(ChunkId, u32)>,
    /// Chunks that were dropped.
    pub(crate) gone: Gone,
}

/// Ids are counted: spread over all tags, each its own.
fn tag(id: ChunkId) -> u32 {
    u32::try_from(id.get()).expect("an id of a chunk has 32 bits").wrapping_mul(0x9e37_79b1)
}

impl ChunkTable {
    /// Chunks of Pinned alive, dropping ones included.
    pub(crate) fn pinned_len(&self) -> u32 {
        self.pinned
    }

    /// Whether there are ids left for more chunks.
    pub(crate) fn may_insert(&self) -> bool {
        self.created + 1 < ChunkId::NOBODY.get()
    }

    pub(crate) fn find(&self, id: ChunkId) -> Option<&Chunk> {
        let slot = match self.last {
            Some((last, slot)) if last == id => slot,
            Some(_) | None => self.index.find(tag(id), |_| true)?,
        };
        self.slots[slot as usize].as_ref()
    }

    pub(crate) fn at(&self, id: ChunkId) -> &Chunk {
        self.find(id).expect("a chunk is used only while it is alive")
    }

    pub(crate) fn at_mut(&mut self, id: ChunkId) -> &mut Chunk {
        self.find_mut(id).expect("a chunk is used only while it is alive")
    }

    #[inline(always)]
    pub(crate) fn find_mut(&mut self, id: ChunkId) -> Option<&mut Chunk> {
        let slot = match self.last {
            Some((last, slot)) if last == id => slot,
            Some(_) | None => self.look_up(id)?,
        };
        self.slots[slot as usize].as_mut()
    }

    #[cold]
    fn look_up(&mut self, id: ChunkId) -> Option<u32> {
        let slot = self.index.find(tag(id), |_| true)?;
        self.last = Some((id, slot));
        Some(slot)
    }

    /// The frame, if its chunk is alive.
    pub(crate) fn frame(&self, frame: FrameRef) -> Option<&Frame> {
        self.find(frame.chunk)?.frames.get(frame.index as usize)
    }

    /// Adds a chunk under an id that was never used.
    pub(crate) fn insert(&mut self, chunk: Chunk) -> ChunkId {
        assert!(self.may_insert(), "ids of chunks are not used again");
        self.created += 1;
        self.pinned += u32::from(chunk.memory == Memory::Pinned);
        let id = ChunkId::new(self.created);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            count(self.slots.len() - 1)
        });
        self.slots[slot as usize] = Some(chunk);
        self.index.insert(tag(id), slot);
        self.order.insert(id, slot);
        id
    }

    pub(crate) fn remove(&mut self, id: ChunkId) -> Chunk {
        let slot = self.order.remove(&id).expect("a chunk is removed once");
        self.index.remove(tag(id), slot, None);
        self.last = None;
        self.free.push(slot);
        let chunk = self.slots[slot as usize].take().expect("the index names slots in use");
        self.pinned -= u32::from(chunk.memory == Memory::Pinned);
        chunk
    }

    /// The session is over: whatever it mapped, it does no longer.
    pub(crate) fn forget_mapper(&mut self, session: SessionId) {
        for chunk in self.slots.iter_mut().flatten() {
            chunk.mappers.remove(&session);
        }
    }

    /// Those of one memory.
    pub(crate) fn iter_in(&self, memory: Memory) -> impl Iterator<Item = (ChunkId, &Chunk)> {
        self.iter().filter(move |(_, chunk)| chunk.memory == memory)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (ChunkId, &Chunk)> {
        self.order.iter().filter_map(|(id, slot)| Some((*id, self.slots[*slot as usize].as_ref()?)))
    }
}
