//! `Clear`: every copy of a space's blocks is dropped at once; the answer waits
//! until its new generation is durable. If that fails it is tried again, until
//! then nothing of the space is written to a device, and nobody waits for that.

use crate::api::{Effect, Event, Fault, Grant, MissReason, Refusal, Reply};
use crate::core::{Clearing, Core, Deadline, Op, RETRY_AFTER};
use crate::ids::{DiskFrame, SpaceId, TenantId};
use crate::reading::Arrival;
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::disk::DiskState;
use crate::state::session::{LeaseKind, WaitId};
use crate::state::space::SpaceIndex;
use crate::units::{Micros, Now};
use crate::waiting::{Asker, WaitKind};

/// A clear that fails again and again is tried every minute at last.
const PAUSE_DOUBLES_MAX: u32 = 6;

impl Core {
    pub(crate) fn clear(&mut self, asker: Asker, tenant: TenantId, id: SpaceId) -> Option<Reply> {
        let Some(space) = self.spaces.find(id).filter(|&space| self.spaces.at(space).tenant == tenant) else {
            return Some(Reply::Refused(Refusal::UnknownSpace));
        };
        if self.degraded {
            return Some(Reply::Refused(Refusal::Degraded));
        }
        if let Err(limit) = self.may_wait(asker.session) {
            return Some(Reply::Throttled(limit));
        }
        let held = self.spaces.at_mut(space);
        held.generation += 1;
        held.clearing += 1;
        let generation = held.generation;
        let (blocks, cells) = self.drop_space(space);
        for lease in self.leases.values_mut() {
            if matches!(lease.kind, LeaseKind::Write { space: written, .. } if written == space) {
                lease.cleared = true;
            }
        }
        self.events.push((tenant, Event::Cleared { space: id }));
        self.counters.clears += 1;
        let wait = self.wait(asker, None, WaitKind::Clear { space, generation, blocks });
        if let Some(wait) = self.waits.get_mut(&wait) {
            wait.pending = 1;
        }
        self.start_clear(Clearing { space, generation, cells, failures: 0 }, Some(wait));
        None
    }

    fn start_clear(&mut self, clearing: Clearing, wait: Option<WaitId>) {
        let held = self.spaces.at(clearing.space);
        let (id, tenant, generation) = (held.id, held.tenant, clearing.generation);
        let op = self.start(Op::ClearSpace { clearing, wait });
        self.effects.push_back(Effect::ClearSpace { op, space: id, tenant, generation });
    }

    /// Takes every copy of the space's blocks out of the index. Frames on
    /// devices are held until the catalog has forgotten them. Walks the whole
    /// table: a space is cleared by hand.
    fn drop_space(&mut self, space: SpaceIndex) -> (u64, Vec<DiskFrame>) {
        let mut dropped = 0;
        let mut cells = Vec::new();
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let Some(block) = self.blocks.try_at(index).filter(|block| block.space == space) else {
                continue;
            };
            let residence = block.residence();
            dropped += u64::from(residence.is_in_memory() || residence.nvme);
            match block.nvme {
                Nvme::Writing { frame, .. } | Nvme::Committing { frame, .. } | Nvme::Sealed { frame, .. } => {
                    self.disks.slot_mut(frame.device, frame.slot).set(frame.index, DiskState::Evicting);
                    self.disks.cell_mut(frame).busy += 1;
                    cells.push(frame);
                }
                Nvme::None | Nvme::Deleting => {}
            }
            let deleting = block_is_deleting(self.blocks.at(index).nvme);
            if !deleting {
                self.transition(index, |block| block.nvme = Nvme::None);
            }
            self.drop_pinned(index);
            if !residence.hbm.is_empty() || self.blocks.at(index).hbm_coming > 0 {
                self.drop_everywhere_in_hbm(index);
            }
            if self.blocks.try_at(index).is_none() {
                continue;
            }
            if self.blocks.at(index).arriving() == Arriving::No {
                self.blocks.remove_if_gone(index);
            } else {
                self.arrived(index, Arrival { otherwise: Grant::Missing(MissReason::Unknown), again: false });
            }
        }
        (dropped, cells)
    }

    pub(crate) fn clear_done(
        &mut self,
        clearing: Clearing,
        wait: Option<WaitId>,
        outcome: Result<(), Fault>,
    ) {
        let fault = match outcome {
            Ok(()) => {
                self.cleared(clearing);
                if let Some(wait) = wait {
                    self.part_done(wait);
                }
                return;
            }
            Err(Fault::Catalog) => Refusal::Degraded,
            Err(
                Fault::Device
                | Fault::NotStarted
                | Fault::NoSpace
                | Fault::Checksum
                | Fault::NoMemory
                | Fault::StillMapped,
            ) => Refusal::NotRecorded,
        };
        self.counters.commit_faults += 1;
        self.clear_failed(clearing);
        if let Some(wait) = wait.and_then(|wait| self.take_wait(wait)) {
            self.answer(wait.asker, Reply::Refused(fault));
        }
    }

    fn cleared(&mut self, mut clearing: Clearing) {
        let space = clearing.space;
        // A later generation says all that an earlier one would.
        if let Some((_, earlier)) = self.clears_again.remove(&space) {
            if earlier.generation <= clearing.generation {
                clearing.cells.extend(earlier.cells);
                self.spaces.at_mut(space).clearing -= 1;
            } else {
                self.clears_again.insert(space, (self.now, earlier));
                self.at(self.now, Deadline::Retry);
            }
        }
        for cell in clearing.cells {
            self.disks.cell_mut(cell).busy -= 1;
            self.settle_cell(cell);
        }
        self.spaces.at_mut(space).clearing -= 1;
        self.disk_changed = true;
    }

    /// It is tried again, after longer and longer. Who waits for a block of the space to be durable is answered.
    fn clear_failed(&mut self, mut clearing: Clearing) {
        let space = clearing.space;
        if let Some((_, other)) = self.clears_again.remove(&space) {
            clearing.generation = clearing.generation.max(other.generation);
            clearing.failures = clearing.failures.max(other.failures);
            clearing.cells.extend(other.cells);
            self.spaces.at_mut(space).clearing -= 1;
        }
        let pause = Micros::new(RETRY_AFTER.get() << clearing.failures.min(PAUSE_DOUBLES_MAX));
        clearing.failures += 1;
        let at = self.now.after(pause);
        self.clears_again.insert(space, (at, clearing));
        self.at(at, Deadline::Retry);
        let of_space = |index: &BlockIndex| self.blocks.at(*index).space == space;
        let blocks: Vec<BlockIndex> = self.durables.keys().copied().filter(of_space).collect();
        for index in blocks {
            self.durable(index, false);
        }
    }

    /// Nothing of the space is written to a device before its clear, which failed, has been recorded.
    pub(crate) fn is_clear_stuck(&self, space: SpaceIndex) -> bool {
        self.clears_again.contains_key(&space)
    }

    /// Tries again what was refused, where it is due.
    pub(crate) fn clear_again(&mut self) {
        if self.degraded {
            return;
        }
        let due = |&(_, &(at, _)): &(&SpaceIndex, &(Now, Clearing))| at <= self.now;
        let spaces: Vec<SpaceIndex> = self.clears_again.iter().filter(due).map(|(&space, _)| space).collect();
        for space in spaces {
            if let Some((_, clearing)) = self.clears_again.remove(&space) {
                self.start_clear(clearing, None);
            }
        }
    }

    /// Something changed that may have been in the way.
    pub(crate) fn clear_again_now(&mut self) {
        let now = self.now;
        self.clears_again.values_mut().for_each(|(at, _)| *at = now);
        self.clear_again();
    }
}

fn block_is_deleting(nvme: Nvme) -> bool {
    nvme == Nvme::Deleting
}
