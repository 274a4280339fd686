//! Read-only views for the shell's admin service and metrics.

use crate::api::{BlockHeader, Residence};
use crate::core::Core;
use crate::ids::{
    BlockId, ChunkId, DeviceId, DiskFrame, Fence, FrameRef, GpuId, LeaseId, Memory, SessionId, SpaceId,
    TenantId,
};
use crate::state::block::{Block, BlockIndex, Nvme, WRITE_FAULTS_MAX};
use crate::state::chunk::{ChunkKind, Frame, FrameCounts, FrameState};
use crate::state::disk::SlotState;
use crate::state::session::LeaseKind;
use crate::units::{ByteCount, Micros, Now};

/// What happened since start. Plain numbers that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks of read leases granted at once.
    pub hits: u64,
    /// Blocks of read leases found, but not readable in Pinned at once.
    pub hits_nvme: u64,
    /// Blocks of read leases that no tier had.
    pub misses: u64,
    /// Blocks that were not worth a write to Nvme when they were sealed or used again.
    pub admissions_refused: u64,
    /// Blocks not promoted because computing them again was estimated to be quicker.
    pub cheaper_to_recompute: u64,
    /// Blocks published.
    pub seals: u64,
    /// Seals of blocks that were there with the same bytes.
    pub seals_repeated: u64,
    /// Seals of blocks that were there with other bytes.
    pub seal_conflicts: u64,
    /// Blocks evicted from Pinned.
    pub evictions_pinned: u64,
    /// Blocks evicted from Nvme.
    pub evictions_nvme: u64,
    /// Blocks evicted from devices of Hbm.
    pub evictions_hbm: u64,
    /// Blocks brought to a device of Hbm.
    pub promotions_hbm: u64,
    /// Blocks copied from a device of Hbm to Pinned.
    pub demotions_hbm: u64,
    /// Blocks brought from Nvme to Pinned.
    pub promotions: u64,
    /// Blocks written early because memory was needed.
    pub demotions: u64,
    /// Blocks made durable.
    pub persisted: u64,
    /// Blocks moved between chunks.
    pub copies: u64,
    /// Copies that failed their checksum.
    pub checksum_failures: u64,
    /// Operations that a device failed.
    pub device_faults: u64,
    /// Commits and clears that the catalog failed.
    pub commit_faults: u64,
    /// Chunks that could not be created.
    pub memory_faults: u64,
    /// Writes put off because no frame on a device could be freed.
    pub writes_without_room: u64,
    /// Requests and sessions turned away by a limit.
    pub throttled: u64,
    /// Leases ended by their deadline.
    pub leases_expired: u64,
    /// Leases ended because they were held too long.
    pub leases_revoked: u64,
    /// Windows asked back.
    pub windows_recalled: u64,
    /// Windows handed back and kept as chunks.
    pub windows_adopted: u64,
    /// Windows that were not handed back.
    pub windows_replaced: u64,
    /// Blocks copied from windows of isolated sessions.
    pub intakes: u64,
    /// Chunks emptied to use their memory otherwise.
    pub chunks_retired: u64,
    /// Blocks found on devices at start and indexed.
    pub restored: u64,
    /// Blocks found on devices and left alone.
    pub restore_refused: u64,
    /// Circles of parents in the catalog that were cut.
    pub circles_cut: u64,
    /// Spaces cleared.
    pub clears: u64,
    /// Copies on devices that were read again and found whole.
    pub scrub_blocks: u64,
    /// Their payload.
    pub scrub_bytes: u64,
    /// Copies that were found damaged and dropped.
    pub scrub_damaged: u64,
    /// Copies that could not be read; they are kept.
    pub scrub_unreadable: u64,
    /// Passes over all devices that came to their end.
    pub scrub_passes: u64,
}

/// What one block is and where.
#[derive(Clone, Debug)]
pub struct BlockView {
    /// The block.
    pub block: BlockId,
    /// Its space.
    pub space: SpaceId,
    /// The block before it.
    pub parent: Option<BlockId>,
    /// Tiers with a sealed copy.
    pub tiers: Residence,
    /// Its header, while a tier has it.
    pub header: Option<BlockHeader>,
    /// The Pinned copy.
    pub frame: Option<FrameRef>,
    /// Its fence.
    pub fence: Option<Fence>,
    /// Its bytes were compared with the checksum since they arrived.
    pub verified: bool,
    /// Leases that pin its frame in Pinned.
    pub pins: u32,
    /// Operations that read from its frame.
    pub busy: u32,
    /// The Nvme copy, and its byte offset on the device.
    pub disk: Option<(DiskFrame, u64)>,
    /// Its copies in Hbm.
    pub hbm: Vec<HbmCopyView>,
    /// Frames being filled for it.
    pub filling: u32,
    /// Children known; of them in Pinned; of them in Nvme.
    pub children: u32,
    /// See above.
    pub children_pinned: u32,
    /// See above.
    pub children_nvme: u32,
    /// Since its last use.
    pub idle: Micros,
    /// It is evicted last until then.
    pub retained_until: Option<Now>,
    /// Leases that hold it, at most 64.
    pub leases: Vec<LeaseId>,
    /// Why it is where it is, in words.
    pub explanation: &'static str,
}

/// A block's copy on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HbmCopyView {
    /// The device.
    pub gpu: GpuId,
    /// Where.
    pub frame: FrameRef,
    /// Its fence.
    pub fence: Fence,
    /// Its bytes were compared with the checksum since they arrived.
    pub verified: bool,
    /// Leases that pin it.
    pub pins: u32,
}

/// Pinned, or one device of Hbm.
#[derive(Clone, Copy, Debug, Default)]
pub struct PinnedView {
    /// Frames by state.
    pub frames: FrameCounts,
    /// Bytes of all chunks alive.
    pub bytes: ByteCount,
    /// Bytes that chunks may take in all.
    pub bytes_max: ByteCount,
    /// Payload bytes of sealed blocks.
    pub sealed_bytes: ByteCount,
    /// Bytes of chunks that no frame covers.
    pub stranded_bytes: ByteCount,
    /// Chunks alive, windows and dropping ones included.
    pub chunks: u32,
    /// Of these, windows.
    pub windows: u32,
    /// Of these, being emptied or dropped.
    pub leaving: u32,
}

/// One device of Nvme.
#[derive(Clone, Copy, Debug)]
pub struct DeviceView {
    /// The device.
    pub device: DeviceId,
    /// It can be used.
    pub usable: bool,
    /// Frames of carved slots by state.
    pub frames: FrameCounts,
    /// Payload bytes of durable blocks.
    pub sealed_bytes: ByteCount,
    /// Bytes of carved slots that no frame covers.
    pub stranded_bytes: ByteCount,
    /// Slots in all.
    pub slots: u32,
    /// Slots carved for a space.
    pub slots_carved: u32,
    /// Slots not scanned yet.
    pub slots_unscanned: u32,
    /// Faults since start.
    pub faults: u64,
}

/// One device of Hbm.
#[derive(Clone, Copy, Debug)]
pub struct GpuView {
    /// The device.
    pub gpu: GpuId,
    /// It can be used.
    pub usable: bool,
    /// Its chunks and frames.
    pub memory: PinnedView,
    /// What the engines beside it leave of its configured memory, windows and lower bound apart.
    pub free: ByteCount,
    /// Copies to and from it in flight.
    pub running: u32,
    /// Faults since start.
    pub faults: u64,
}

/// All tiers.
#[derive(Clone, Debug)]
pub struct TierViews {
    /// Hbm, by device.
    pub hbm: Vec<GpuView>,
    /// Pinned.
    pub pinned: PinnedView,
    /// Nvme, by device.
    pub devices: Vec<DeviceView>,
}

/// One lease.
#[derive(Clone, Copy, Debug)]
pub struct LeaseView {
    /// The lease.
    pub lease: LeaseId,
    /// Its session.
    pub session: SessionId,
    /// Its tenant.
    pub tenant: TenantId,
    /// It may write.
    pub is_write: bool,
    /// Blocks that it holds.
    pub blocks: u32,
    /// Bytes charged for it.
    pub bytes: ByteCount,
    /// Since it was granted.
    pub age: Micros,
    /// Until it ends by itself.
    pub left: Option<Micros>,
}

/// One space.
#[derive(Clone, Copy, Debug)]
pub struct SpaceView {
    /// The space.
    pub space: SpaceId,
    /// Its tenant.
    pub tenant: TenantId,
    /// Payload of a block.
    pub block_bytes: ByteCount,
    /// Header page and payload of a block.
    pub frame_bytes: ByteCount,
    /// Lowest valid generation.
    pub generation: u64,
    /// Blocks in Pinned.
    pub blocks_pinned: u64,
    /// Blocks in Nvme.
    pub blocks_nvme: u64,
    /// Pinned chunks.
    pub chunks: u32,
}

impl Core {
    /// All that is known of a block.
    pub fn stat(&self, block: BlockId) -> Option<BlockView> {
        let index = self.blocks.find(block)?;
        let entry = self.blocks.at(index);
        let space = self.spaces.at(entry.space);
        let cell = entry.pinned.and_then(|frame| self.chunks.frame(frame));
        let (pins, verified) = cell.map_or((0, false), sealed);
        let hbm = self.hbm_copies(index);
        let leases_hold = pins > 0 || hbm.iter().any(|copy| copy.pins > 0);
        let (disk, sequence) = match entry.nvme {
            Nvme::Sealed { frame, sequence } => Some((frame, sequence)).unzip(),
            Nvme::None | Nvme::Writing { .. } | Nvme::Committing { .. } | Nvme::Deleting => (None, None),
        };
        Some(BlockView {
            block,
            space: space.id,
            parent: entry.parent.map(|parent| self.blocks.at(parent).id),
            tiers: entry.residence(),
            header: entry.seal().map(|_| self.header_of(index, sequence.unwrap_or(0))),
            frame: entry.pinned,
            fence: cell.map(|cell| cell.fence),
            verified,
            pins,
            busy: cell.map_or(0, |cell| cell.busy),
            disk: disk.map(|frame| (frame, self.disks.offset(frame, space.frame_bytes))),
            leases: self.leases_of(entry, &hbm),
            hbm,
            filling: entry.filling.into(),
            children: entry.children,
            children_pinned: entry.children_pinned,
            children_nvme: entry.children_nvme,
            idle: entry.idle(self.now),
            retained_until: self.retained.get(&index).map(|retained| retained.until),
            explanation: explain(entry, leases_hold),
        })
    }

    fn leases_of(&self, block: &Block, on_devices: &[HbmCopyView]) -> Vec<LeaseId> {
        let frames: Vec<FrameRef> =
            block.pinned.into_iter().chain(on_devices.iter().map(|copy| copy.frame)).collect();
        let holds = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.items.iter().flatten().any(|held| frames.contains(&held.frame)));
        holds.map(|(id, _)| *id).take(64).collect()
    }

    /// Frames, bytes and chunks of every tier.
    pub fn tier_views(&self) -> TierViews {
        let bytes_max = u64::from(self.chunks_max()) * self.config.chunk_bytes.get();
        let pinned = self.memory_view(Memory::Pinned, bytes_max);
        let devices = (0..self.disks.devices.len()).map(|place| self.device_view(place)).collect();
        let hbm = self.gpus.ids().map(|gpu| self.gpu_view(gpu)).collect();
        TierViews { hbm, pinned, devices }
    }

    fn gpu_view(&self, gpu: GpuId) -> GpuView {
        let held = self.gpus.at(gpu);
        GpuView {
            gpu,
            usable: held.usable,
            memory: self.memory_view(Memory::Hbm(gpu), held.limit()),
            free: self.given_back(gpu),
            running: held.running,
            faults: held.faults,
        }
    }

    fn hbm_copies(&self, index: BlockIndex) -> Vec<HbmCopyView> {
        let copy = |gpu| {
            let frame = self.gpus.at(gpu).entries.of(index)?.frame?;
            let cell = self.chunks.frame(frame)?;
            let (pins, verified) = sealed(cell);
            Some(HbmCopyView { gpu, frame, fence: cell.fence, verified, pins })
        };
        self.blocks.at(index).hbm.iter().filter_map(copy).collect()
    }

    /// Time until a block of the space would be readable in a memory, by what else waits there.
    pub fn fetch_time(&self, space: SpaceId, there: Residence, memory: Memory) -> Micros {
        let seconds = self.fetch_seconds(space, there, memory).clamp(0.0, 1e9);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate in whole microseconds, of a number between 0 and 1e15"
        )]
        Micros::new((seconds * 1e6) as u64)
    }

    fn fetch_seconds(&self, space: SpaceId, there: Residence, memory: Memory) -> f64 {
        let Some(index) = self.spaces.find(space) else { return 0.0 };
        let bytes = self.spaces.at(index).frame_bytes.get();
        let below = || if there.is_in_memory() { 0.0 } else { self.load_seconds_idle(index) };
        match memory {
            memory if there.is_in(memory) => 0.0,
            Memory::Hbm(gpu) => below() + self.gpus.find(gpu).map_or(0.0, |held| held.load.seconds(bytes)),
            Memory::Pinned => match there.hbm.iter().next() {
                Some(gpu) => self.gpus.at(gpu).load.seconds_idle(bytes),
                None => below(),
            },
        }
    }

    fn memory_view(&self, memory: Memory, bytes_max: u64) -> PinnedView {
        let chunk_bytes = self.config.chunk_bytes.get();
        let mut pinned = PinnedView::default();
        let (mut bytes, mut sealed, mut stranded) = (0, 0, 0);
        for (_, chunk) in self.chunks.iter_in(memory) {
            let space = self.spaces.at(chunk.space);
            pinned.frames.sum(chunk.counts);
            pinned.chunks += 1;
            bytes += chunk_bytes;
            sealed += chunk.counts.sealed * space.block_bytes.get();
            stranded += chunk_bytes - chunk.counts.total() * space.frame_bytes.get();
            match chunk.kind {
                ChunkKind::Window { .. }
                | ChunkKind::Closing { .. }
                | ChunkKind::Creating { owner: Some(_) } => pinned.windows += 1,
                ChunkKind::Replacing | ChunkKind::Retiring | ChunkKind::Dropping => pinned.leaving += 1,
                ChunkKind::Creating { owner: None } | ChunkKind::Pool => {}
            }
        }
        pinned.bytes = ByteCount::new(bytes);
        pinned.bytes_max = ByteCount::new(bytes_max);
        pinned.sealed_bytes = ByteCount::new(sealed);
        pinned.stranded_bytes = ByteCount::new(stranded);
        pinned
    }

    fn device_view(&self, place: usize) -> DeviceView {
        let device = &self.disks.devices[place];
        let chunk_bytes = self.config.chunk_bytes.get();
        let mut frames = FrameCounts::default();
        let (mut carved, mut unscanned, mut sealed, mut stranded) = (0, 0, 0, 0);
        for slot in &device.slots {
            frames.sum(slot.counts);
            unscanned += u32::from(slot.unscanned);
            if let SlotState::Carved { space } | SlotState::Retiring { space } = slot.state {
                let space = self.spaces.at(space);
                carved += 1;
                sealed += slot.counts.sealed * space.block_bytes.get();
                stranded += chunk_bytes - slot.counts.total() * space.frame_bytes.get();
            }
        }
        DeviceView {
            device: crate::state::disk::device_id(place),
            usable: device.usable,
            frames,
            sealed_bytes: ByteCount::new(sealed),
            stranded_bytes: ByteCount::new(stranded),
            slots: crate::state::count(device.slots.len()),
            slots_carved: carved,
            slots_unscanned: unscanned,
            faults: device.faults,
        }
    }

    /// The first live leases, oldest first.
    pub fn leases(&self, limit: usize) -> Vec<LeaseView> {
        let view = |(id, lease): (&LeaseId, &crate::state::session::Lease)| {
            let held = lease.items.iter().flatten();
            LeaseView {
                lease: *id,
                session: lease.session,
                tenant: lease.tenant,
                is_write: lease.kind != LeaseKind::Read,
                blocks: crate::state::count(held.clone().count()),
                bytes: ByteCount::new(held.map(|held| held.bytes).sum()),
                age: self.now.since(lease.since),
                left: lease.deadline.map(|at| at.since(self.now)),
            }
        };
        self.leases.iter().take(limit).map(view).collect()
    }

    /// Live leases.
    pub fn lease_count(&self) -> usize {
        self.leases.len()
    }

    /// Open sessions.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Operations in flight.
    pub fn operation_count(&self) -> usize {
        self.ops.len()
    }

    /// Copies to Nvme that are not begun: of blocks that are there, and that no device refused for want of room.
    pub fn writes_waiting(&self) -> usize {
        let due = self.due.iter().filter(|&&(_, index, id)| {
            let block = self.blocks.try_at(index).filter(|block| block.id == id);
            block.is_some_and(|block| block.nvme == Nvme::None && block.write_faults() < WRITE_FAULTS_MAX)
        });
        due.count() + self.urgent.len() + self.queued()
    }

    /// Requests that wait.
    pub fn waiting_count(&self) -> usize {
        self.waits.len()
    }

    /// Entries of the residency table.
    pub fn block_count(&self) -> u32 {
        self.blocks.len()
    }

    /// The tenant that a chunk belongs to, while it is alive.
    pub fn chunk_tenant(&self, chunk: ChunkId) -> Option<TenantId> {
        self.chunks.find(chunk).map(|chunk| chunk.tenant)
    }

    /// Every known space.
    pub fn spaces(&self) -> Vec<SpaceView> {
        let view = |space: &crate::state::space::Space| SpaceView {
            space: space.id,
            tenant: space.tenant,
            block_bytes: space.block_bytes,
            frame_bytes: space.frame_bytes,
            generation: space.generation,
            blocks_pinned: space.pinned.blocks,
            blocks_nvme: space.blocks_nvme,
            chunks: space.pinned.chunks,
        };
        self.spaces.iter().map(|(_, space)| view(space)).collect()
    }

    /// Payload bytes that a crash would lose now.
    pub fn unpersisted(&self) -> ByteCount {
        ByteCount::new(self.unpersisted)
    }

    /// What happened since start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The tenant's resident blocks, in pieces of at most `limit`. Give the
    /// cursor back for the next piece; `None` is the end. Blocks that change
    /// meanwhile are in the event stream. A parent comes before its children
    /// but where entries were used again: link by the parent's id.
    pub fn snapshot(
        &self,
        tenant: TenantId,
        cursor: Option<u32>,
        limit: usize,
    ) -> (Vec<SnapshotEntry>, Option<u32>) {
        let mut entries = Vec::new();
        let mut next = cursor.unwrap_or(0);
        // A piece looks at a bounded part of the table, however few of its blocks are the tenant's.
        let end =
            self.blocks.end().min(next.saturating_add(crate::state::count(limit.clamp(1, 1 << 16)) * 4));
        while next < end && entries.len() < limit.max(1) {
            self.snapshot_one(tenant, BlockIndex::new(next), &mut entries);
            next += 1;
        }
        (entries, (next < self.blocks.end()).then_some(next))
    }

    fn snapshot_one(&self, tenant: TenantId, index: BlockIndex, entries: &mut Vec<SnapshotEntry>) {
        let Some(block) = self.blocks.try_at(index) else { return };
        let space = self.spaces.at(block.space);
        if space.tenant != tenant || block.residence() == Residence::default() {
            return;
        }
        entries.push(SnapshotEntry {
            space: space.id,
            block: block.id,
            parent: block.parent.map(|parent| self.blocks.at(parent).id),
            length: space.block_bytes,
            tiers: block.residence(),
        });
    }
}

/// One block of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Its space.
    pub space: SpaceId,
    /// The block.
    pub block: BlockId,
    /// The block before it.
    pub parent: Option<BlockId>,
    /// Its payload.
    pub length: ByteCount,
    /// Tiers with a sealed copy.
    pub tiers: Residence,
}

/// Pins of a sealed frame, and whether it is verified.
fn sealed(cell: &Frame) -> (u32, bool) {
    match cell.state {
        FrameState::Sealed { pins, verified, .. } => (pins, verified),
        FrameState::Free | FrameState::Filling { .. } | FrameState::Evicting | FrameState::Quarantined => {
            (0, false)
        }
    }
}

fn explain(block: &Block, is_leased: bool) -> &'static str {
    let tiers = block.residence();
    if is_leased {
        "leased: it is not evicted before its leases end"
    } else if block.is_retained() {
        "retained: it is evicted after all blocks that are not"
    } else if tiers.pinned && block.children_pinned > 0 {
        "its children are in Pinned: they are evicted before it"
    } else if tiers.pinned && block.is_refused() {
        "not written to Nvme: blocks like it come back too rarely; it is looked at again when it is used"
    } else if tiers.pinned && !tiers.nvme {
        "not durable yet: it is written to Nvme before it is evicted"
    } else if tiers.pinned {
        "a leaf: it is evicted from Pinned when no other leaf of its space is worth less"
    } else if tiers.nvme {
        "in Nvme: it is promoted when it is leased"
    } else if !tiers.hbm.is_empty() {
        "in Hbm alone: it is copied to Pinned before its frame is taken"
    } else if block.filling > 0 {
        "being filled: it is readable when it is sealed"
    } else {
        "no tier has it; blocks after it name it as their parent"
    }
}
