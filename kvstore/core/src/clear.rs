//! `Clear`: every copy of a space's blocks is dropped at once; the answer waits
//! until its new generation is durable.

use crate::api::{Effect, Event, Fault, Grant, MissReason, Refusal, Reply};
use crate::core::{ClearAgain, Core, Deadline, Op, RETRY_AFTER};
use crate::ids::{DiskFrame, SpaceId, TenantId};
use crate::reading::Arrival;
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::disk::DiskState;
use crate::state::session::{LeaseKind, WaitId};
use crate::state::space::SpaceIndex;
use crate::waiting::{Asker, WaitKind};

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
        self.start_clear(space, generation, cells, Some(wait));
        None
    }

    fn start_clear(
        &mut self,
        space: SpaceIndex,
        generation: u64,
        cells: Vec<DiskFrame>,
        wait: Option<WaitId>,
    ) {
        let held = self.spaces.at(space);
        let (id, tenant) = (held.id, held.tenant);
        let op = self.start(Op::ClearSpace { space, generation, cells, wait });
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
        space: SpaceIndex,
        generation: u64,
        cells: Vec<DiskFrame>,
        wait: Option<WaitId>,
        outcome: Result<(), Fault>,
    ) {
        match outcome {
            Ok(()) => {
                for cell in cells {
                    self.disks.cell_mut(cell).busy -= 1;
                    self.settle_cell(cell);
                }
                self.spaces.at_mut(space).clearing -= 1;
                self.disk_changed = true;
                if let Some(wait) = wait {
                    self.part_done(wait);
                }
            }
            Err(_) => {
                self.counters.commit_faults += 1;
                self.clears_again.push(ClearAgain { space, generation, cells });
                self.at(self.now.after(RETRY_AFTER), Deadline::Retry);
                if let Some(wait) = wait.and_then(|wait| self.take_wait(wait)) {
                    self.answer(wait.asker, Reply::Refused(Refusal::Degraded));
                }
            }
        }
    }

    /// Tries again what the catalog refused.
    pub(crate) fn clear_again(&mut self) {
        if self.degraded {
            return;
        }
        for clear in std::mem::take(&mut self.clears_again) {
            self.start_clear(clear.space, clear.generation, clear.cells, None);
        }
    }
}

fn block_is_deleting(nvme: Nvme) -> bool {
    nvme == Nvme::Deleting
}
