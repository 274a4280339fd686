//! What the shell knows of the world: spaces, devices, and what survived on them.

use crate::api::FoundBlock;
use crate::core::{Core, Deadline};
use crate::cost::Compute;
use crate::evict::Evictable;
use crate::ids::{DeviceId, SpaceId, TenantId};
use crate::state::block::{BlockIndex, Nvme};
use crate::state::disk::{DiskState, SlotState};
use crate::state::space::{HEADER_PAGE_BYTES, Pool, Space, SpaceIndex, frame_bytes, frames_in};
use crate::units::{ByteCount, TokenCount};

impl Core {
    /// Idempotent. Past the limit the space stays unknown, and its requests are refused.
    pub(crate) fn space_known(
        &mut self,
        id: SpaceId,
        tenant: TenantId,
        block_bytes: ByteCount,
        block_tokens: TokenCount,
        generation: u64,
    ) {
        if let Some(index) = self.spaces.find(id) {
            let space = self.spaces.at_mut(index);
            space.generation = space.generation.max(generation);
            return;
        }
        let Some(frame) = frame_bytes(block_bytes) else { return };
        if self.spaces.len() >= self.config.limits.spaces || block_bytes.get() == 0 {
            self.counters.throttled += 1;
            return;
        }
        let chunk = self.config.chunk_bytes.get();
        let devices = self.disks.devices.len();
        self.tenants.entry(tenant).or_default();
        self.spaces.insert(Space {
            id,
            tenant,
            block_bytes,
            frame_bytes: frame,
            frames_per_chunk: frames_in(chunk, frame),
            frames_per_slot: frames_in(chunk.saturating_sub(HEADER_PAGE_BYTES), frame),
            generation,
            clearing: 0,
            pinned: Pool::default(),
            hbm: (0..self.gpus.len()).map(|_| Pool::default()).collect(),
            slots_open: vec![std::collections::BTreeSet::new(); devices],
            slots_carving: vec![0; devices],
            device_next: 0,
            evictable_nvme: Evictable::default(),
            compute: Compute::new(block_bytes),
            block_tokens,
            blocks_nvme: 0,
        });
    }

    /// Whether a space was taken in. The shell may know more of them than there is room for here: it asks before it
    /// answers a client.
    pub fn knows_space(&self, space: SpaceId) -> bool {
        self.spaces.find(space).is_some()
    }

    pub(crate) fn slots_unscanned(&mut self, device: DeviceId, slots: &[u32]) {
        for &slot in slots {
            if self.disks.find_slot(device, slot).is_none() {
                continue;
            }
            let held = self.disks.slot_mut(device, slot);
            held.unscanned = true;
            let state = held.state;
            self.disks.device_mut(device).slots_free.remove(&slot);
            if let SlotState::Carved { space } = state {
                self.open_slots(space, device).remove(&slot);
            }
        }
    }

    pub(crate) fn slots_scanned(&mut self, device: DeviceId, slots: &[u32]) {
        for &slot in slots {
            if self.disks.find_slot(device, slot).is_none() {
                continue;
            }
            let held = self.disks.slot_mut(device, slot);
            held.unscanned = false;
            match held.state {
                SlotState::Free => {
                    self.disks.device_mut(device).slots_free.insert(slot);
                }
                SlotState::Carved { space } if !held.free.is_empty() => {
                    self.open_slots(space, device).insert(slot);
                }
                SlotState::Carved { .. }
                | SlotState::Carving { .. }
                | SlotState::Retiring { .. }
                | SlotState::Quarantined => {}
            }
        }
        self.disk_changed = true;
    }

    /// A slot with another geometry than its space has is taken for unused.
    pub(crate) fn slot_carved(
        &mut self,
        device: DeviceId,
        slot: u32,
        space: SpaceId,
        frame_bytes: ByteCount,
    ) {
        let Some(index) = self.spaces.find(space) else { return };
        if self.spaces.at(index).frame_bytes == frame_bytes {
            self.carve_found(device, slot, index);
        }
    }

    fn carve_found(&mut self, device: DeviceId, slot: u32, space: SpaceIndex) -> bool {
        let frames = self.spaces.at(space).frames_per_slot;
        if frames == 0 || self.disks.find_slot(device, slot).is_none() {
            return false;
        }
        let held = self.disks.slot_mut(device, slot);
        match held.state {
            SlotState::Free => {}
            SlotState::Carved { space: carved } => return carved == space,
            SlotState::Carving { .. } | SlotState::Retiring { .. } | SlotState::Quarantined => return false,
        }
        held.state = SlotState::Carved { space };
        held.carve(frames);
        let unscanned = held.unscanned;
        self.disks.device_mut(device).slots_free.remove(&slot);
        if !unscanned {
            self.open_slots(space, device).insert(slot);
        }
        true
    }

    /// Indexes what survived. What does not fit the tables is left alone: a cache may miss.
    pub(crate) fn blocks_found(&mut self, blocks: &[FoundBlock]) {
        self.blocks.warm(blocks.iter().map(|found| found.block));
        self.blocks.warm(blocks.iter().filter_map(|found| found.parent));
        for found in blocks {
            self.write_sequence = self.write_sequence.max(found.write_sequence);
            if self.index_found(found) {
                self.counters.restored += 1;
            } else {
                self.counters.restore_refused += 1;
            }
        }
        self.disk_changed = true;
    }

    fn index_found(&mut self, found: &FoundBlock) -> bool {
        let Some(space) = self.spaces.find(found.space) else { return false };
        if found.length != self.spaces.at(space).block_bytes
            || self.blocks.len() + 2 > self.config.limits.blocks
        {
            return false;
        }
        if !self.carve_found(found.frame.device, found.frame.slot, space) {
            return false;
        }
        let Some(cell) = self.disks.cell(found.frame).copied() else { return false };
        match cell.state {
            DiskState::Free => {}
            // Two entries for one frame: the later write is what is there.
            DiskState::Sealed { block } if cell.busy == 0 && self.is_older(block, found) => {
                self.unindex(block)
            }
            DiskState::Sealed { .. }
            | DiskState::Filling { .. }
            | DiskState::Evicting
            | DiskState::Quarantined => {
                return false;
            }
        }
        if let Some(index) = self.blocks.find(found.block) {
            let block = self.blocks.at(index);
            let replaceable = match block.nvme {
                Nvme::None => true,
                Nvme::Sealed { frame, .. } => {
                    self.is_older(index, found) && self.disks.cell(frame).is_some_and(|cell| cell.busy == 0)
                }
                Nvme::Writing { .. } | Nvme::Committing { .. } | Nvme::Deleting => false,
            };
            let differs = block.pinned.is_some() && block.seal().is_some_and(|seal| seal != found.checksum);
            if !replaceable || differs || block.space != space {
                return false;
            }
            if block.residence().nvme {
                self.unindex(index);
            }
        }
        self.enter_found(found, space);
        true
    }

    fn is_older(&self, index: BlockIndex, found: &FoundBlock) -> bool {
        matches!(self.blocks.at(index).nvme, Nvme::Sealed { sequence, .. } if sequence < found.write_sequence)
    }

    /// Drops a copy that a later one replaces. Its frame holds nothing of value.
    fn unindex(&mut self, index: BlockIndex) {
        let Nvme::Sealed { frame, .. } = self.blocks.at(index).nvme else { return };
        self.transition(index, |block| block.nvme = Nvme::None);
        self.disks.slot_mut(frame.device, frame.slot).set(frame.index, DiskState::Evicting);
        self.settle_cell(frame);
        self.blocks.remove_if_gone(index);
    }

    fn enter_found(&mut self, found: &FoundBlock, space: SpaceIndex) {
        let index = self.enter(found.block, space, found.parent.map(|parent| (parent, None)));
        let frame = found.frame;
        let slot = self.disks.slot_mut(frame.device, frame.slot);
        if slot.take(Some(frame.index)).is_none() {
            return;
        }
        slot.set(frame.index, DiskState::Sealed { block: index });
        if slot.free.is_empty() {
            self.open_slots(space, frame.device).remove(&frame.slot);
        }
        let block = self.blocks.at_mut(index);
        block.set_seal(block.seal().or(Some(found.checksum)));
        block.restore_stats(found.stats);
        let sequence = found.write_sequence;
        self.transition(index, |block| block.nvme = Nvme::Sealed { frame, sequence });
    }

    pub(crate) fn device_state(&mut self, device: DeviceId, usable: bool) {
        let Some(found) = self.disks.devices.get_mut(usize::from(device.get())) else { return };
        let was_usable = std::mem::replace(&mut found.usable, usable);
        self.disk_changed = true;
        if was_usable && !usable {
            self.device_lost(device);
        }
        if usable {
            self.clear_again_now();
        }
        if !self.is_persisting() {
            self.give_up_durability();
        }
    }

    pub(crate) fn set_degraded(&mut self, degraded: bool) {
        self.degraded = degraded;
        self.disk_changed = true;
        self.memory_changed = true;
        if degraded {
            self.give_up_durability();
        } else {
            self.persist_paused_until = self.now;
            self.at(self.now, Deadline::Retry);
            self.clear_again_now();
        }
    }

    /// Nobody waits for what may not come: the blocks stay readable.
    fn give_up_durability(&mut self) {
        let waiting: Vec<BlockIndex> = self.durables.keys().copied().collect();
        for index in waiting {
            self.durable(index, false);
        }
    }
}
