//! Spaces: geometry of their frames, and what each holds in every tier.

use std::collections::{BTreeMap, BTreeSet};

use crate::cost::Compute;
use crate::evict::{Evictable, Tier};
use crate::ids::{ChunkId, Memory, SpaceId, TenantId};
use crate::state::count;
use crate::units::{ByteCount, TokenCount};

/// Bytes of a header page: before each frame's payload, and at the start of a device's chunk slot.
pub const HEADER_PAGE_BYTES: u64 = 4096;

/// Index of a space. Spaces are never forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SpaceIndex(pub(crate) u32);

/// One space.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) id: SpaceId,
    pub(crate) tenant: TenantId,
    pub(crate) block_bytes: ByteCount,
    pub(crate) frame_bytes: ByteCount,
    pub(crate) frames_per_chunk: u32,
    pub(crate) frames_per_slot: u32,
    pub(crate) generation: u64,
    /// Clears whose new generation is not durable yet. Nothing is persisted meanwhile.
    pub(crate) clearing: u32,
    /// What it has in Pinned, and on each device of Hbm.
    pub(crate) pinned: Pool,
    pub(crate) hbm: Vec<Pool>,
    /// Slots with free frames, by device.
    pub(crate) slots_open: Vec<BTreeSet<u32>>,
    /// Slots being carved, by device.
    pub(crate) slots_carving: Vec<u32>,
    /// Device to try first for the next block: consecutive blocks go to different devices.
    pub(crate) device_next: usize,
    pub(crate) evictable_nvme: Evictable,
    pub(crate) compute: Compute,
    pub(crate) block_tokens: TokenCount,
    pub(crate) blocks_nvme: u64,
}

/// A space's share of one memory.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// Pool chunks with free frames.
    pub(crate) open: BTreeSet<ChunkId>,
    /// Pool chunks being created.
    pub(crate) creating: u32,
    /// Blocks evicted since a chunk of another space was looked for.
    pub(crate) evicted: u32,
    /// Chunks alive, of any kind.
    pub(crate) chunks: u32,
    /// Its blocks that may leave.
    pub(crate) evictable: Evictable,
    /// Its blocks that are sealed here.
    pub(crate) blocks: u64,
}

impl Space {
    #[inline(always)]
    pub(crate) fn pool(&self, memory: Memory) -> &Pool {
        match memory {
            Memory::Pinned => &self.pinned,
            Memory::Hbm(gpu) => &self.hbm[usize::from(gpu.get())],
        }
    }

    #[inline(always)]
    pub(crate) fn pool_mut(&mut self, memory: Memory) -> &mut Pool {
        match memory {
            Memory::Pinned => &mut self.pinned,
            Memory::Hbm(gpu) => &mut self.hbm[usize::from(gpu.get())],
        }
    }

    /// Its blocks that may leave a tier.
    pub(crate) fn evictable(&mut self, tier: Tier) -> &mut Evictable {
        match tier {
            Tier::Pinned => &mut self.pinned.evictable,
            Tier::Nvme => &mut self.evictable_nvme,
        }
    }
}

/// All spaces.
#[derive(Debug, Default)]
pub(crate) struct SpaceTable {
    spaces: Vec<Space>,
    index: BTreeMap<SpaceId, SpaceIndex>,
}

impl SpaceTable {
    pub(crate) fn len(&self) -> u32 {
        count(self.spaces.len())
    }

    pub(crate) fn find(&self, id: SpaceId) -> Option<SpaceIndex> {
        self.index.get(&id).copied()
    }

    pub(crate) fn at(&self, index: SpaceIndex) -> &Space {
        &self.spaces[index.0 as usize]
    }

    pub(crate) fn at_mut(&mut self, index: SpaceIndex) -> &mut Space {
        &mut self.spaces[index.0 as usize]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (SpaceIndex, &Space)> {
        self.spaces.iter().enumerate().map(|(index, space)| (SpaceIndex(count(index)), space))
    }

    /// Adds a space that is not known.
    pub(crate) fn insert(&mut self, space: Space) -> SpaceIndex {
        let index = SpaceIndex(self.len());
        let before = self.index.insert(space.id, index);
        assert!(before.is_none(), "a space is added once");
        self.spaces.push(space);
        index
    }
}

/// Length of a frame: header page and payload, both rounded to 4 KiB. `None` if it overflows.
pub fn frame_bytes(block: ByteCount) -> Option<ByteCount> {
    let payload = block.round_up(HEADER_PAGE_BYTES)?;
    payload.get().checked_add(HEADER_PAGE_BYTES).map(ByteCount::new)
}

/// Frames of this length that fit into `bytes`.
pub(crate) fn frames_in(bytes: u64, frame: ByteCount) -> u32 {
    u32::try_from(bytes.checked_div(frame.get()).unwrap_or(0)).unwrap_or(u32::MAX)
}
