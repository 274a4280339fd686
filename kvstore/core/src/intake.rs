//! What an isolated session seals: it is copied into a frame of the daemon's own,
//! and the copy is compared with the checksum. Only the copy is ever served, so
//! that nothing which the client does to its window changes a block.
//!
//! The frame that the client filled stays its own until the lease ends, and it
//! may go on reading there.

use crate::api::{BlockHeader, Durability, Effect, Fault, Notice, Reply, SealOutcome};
use crate::checksum::Checksum;
use crate::core::{Core, Op};
use crate::cost::seconds;
use crate::ids::{Fence, FrameRef, LeaseId};
use crate::memory::Allocated;
use crate::residence::Vacate;
use crate::state::block::BlockIndex;
use crate::state::chunk::{Filler, FrameState};
use crate::state::count;
use crate::state::session::{Held, LeaseKind, WaitId};
use crate::waiting::{Asker, WaitKind};
use crate::writing::{SealedPart, Sealing};

/// Copies at one time. More would only wait for a processor.
const INTAKES_MAX: u32 = 32;

/// One block that an isolated session seals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Intake {
    /// Its frame in the window, which is held.
    pub(crate) source: FrameRef,
    fence: Fence,
    block: BlockIndex,
    checksum: Checksum,
    sealing: Sealing,
    durability: Durability,
    /// Request and position in it.
    wait: WaitId,
    place: u32,
}

/// What is to be done about one block of a seal.
enum Wish {
    Settled(SealOutcome, Option<BlockIndex>),
    Copy { block: BlockIndex, source: FrameRef },
}

impl Core {
    /// Answers when every block is copied.
    pub(crate) fn take_in(
        &mut self,
        asker: Asker,
        id: LeaseId,
        parts: &[SealedPart],
        durability: Durability,
    ) -> Option<Reply> {
        if let Err(limit) = self.may_wait(asker.session) {
            return Some(Reply::Throttled(limit));
        }
        let outcomes = vec![SealOutcome::Lost; parts.len()];
        let wait = self.wait(asker, None, WaitKind::Seal { outcomes });
        if let Some(wait) = self.waits.get_mut(&wait) {
            wait.pending = count(parts.len()) + 1;
        }
        let sealing = self.sealing(id, asker.session);
        let (mut fresh, mut depths) = (0u32, 0u64);
        for (place, &(position, _, checksum)) in (0u32..).zip(parts) {
            let held = self.leases.get(&id).and_then(|lease| lease.items[position as usize]);
            match self.look_at(held, id, checksum) {
                Wish::Settled(outcome, block) => self.settle_seal((wait, place), outcome, block, durability),
                Wish::Copy { block, source } => {
                    fresh += 1;
                    depths += u64::from(self.blocks.at(block).depth);
                    let fence = self.hold_frame(source);
                    let intake = Intake { source, fence, block, checksum, sealing, durability, wait, place };
                    self.intakes.push_back(intake);
                }
            }
        }
        if let Some(lease) = self.leases.get_mut(&id)
            && let LeaseKind::Write { space, .. } = lease.kind
        {
            let took = seconds(self.now.since(std::mem::replace(&mut lease.mark, self.now)));
            self.observe_compute(space, took, fresh, depths);
        }
        self.part_done(wait);
        None
    }

    fn look_at(&mut self, held: Option<Held>, id: LeaseId, checksum: Checksum) -> Wish {
        let lost = Wish::Settled(SealOutcome::Lost, None);
        let Some(held) = held else { return lost };
        let Some(cell) = self.chunks.frame(held.frame).filter(|cell| cell.fence == held.fence) else {
            return lost;
        };
        let FrameState::Filling { block, filler: Filler::Lease(filler) } = cell.state else { return lost };
        if filler != id.into() {
            return lost;
        }
        match self.blocks.at(block).seal() {
            Some(seal) if seal != checksum => {
                self.counters.seal_conflicts += 1;
                Wish::Settled(SealOutcome::Conflict, None)
            }
            Some(_) if self.blocks.at(block).pinned.is_some() => {
                self.counters.seals_repeated += 1;
                Wish::Settled(SealOutcome::Already, Some(block))
            }
            Some(_) | None => Wish::Copy { block, source: held.frame },
        }
    }

    fn settle_seal(
        &mut self,
        (wait, place): (WaitId, u32),
        outcome: SealOutcome,
        block: Option<BlockIndex>,
        durability: Durability,
    ) {
        if let Some(WaitKind::Seal { outcomes }) = self.waits.get_mut(&wait).map(|wait| &mut wait.kind) {
            outcomes[place as usize] = outcome;
        }
        match durability {
            Durability::Readable => self.part_done(wait),
            Durability::Durable => self.settle_durability(wait, place as usize, block),
        }
    }

    /// Starts copies while there are frames for them.
    pub(crate) fn pump_intakes(&mut self) {
        while self.intakes_running < INTAKES_MAX {
            let Some(intake) = self.intakes.pop_front() else { return };
            if !self.is_wanted(&intake) {
                self.let_frame_go(intake.source, intake.fence);
                self.settle_seal((intake.wait, intake.place), SealOutcome::Lost, None, intake.durability);
                continue;
            }
            let space = self.blocks.at(intake.block).space;
            match self.take_pool_frame(space) {
                Allocated::Frame(target) => self.start_intake(intake, target),
                Allocated::Wait => return self.intakes.push_front(intake),
                Allocated::Never => {
                    self.counters.throttled += 1;
                    self.let_frame_go(intake.source, intake.fence);
                    self.settle_seal((intake.wait, intake.place), SealOutcome::Lost, None, intake.durability);
                }
            }
        }
    }

    /// Its lease still holds the frame, and its space was not cleared. Else its block's entry may be another's.
    fn is_wanted(&self, intake: &Intake) -> bool {
        let same = self.chunks.frame(intake.source).is_some_and(|cell| cell.fence == intake.fence);
        same && self.leases.get(&intake.sealing.lease).is_some_and(|lease| !lease.cleared)
    }

    fn start_intake(&mut self, intake: Intake, target: FrameRef) {
        let block = self.blocks.at(intake.block);
        let space = self.spaces.at(block.space);
        let expect = BlockHeader {
            block: block.id,
            space: space.id,
            tenant: space.tenant,
            parent: block.parent.map(|parent| self.blocks.at(parent).id),
            length: space.block_bytes,
            checksum: intake.checksum,
            generation: space.generation,
            write_sequence: 0,
        };
        let op = self.start(Op::Intake { intake, target });
        let filling = FrameState::Filling { block: intake.block, filler: Filler::Op(op.into()) };
        self.chunks.at_mut(target.chunk).set(target.index, filling);
        self.blocks.at_mut(intake.block).filling += 1;
        self.intakes_running += 1;
        self.effects.push_back(Effect::Copy { op, source: intake.source, target, expect });
    }

    pub(crate) fn intake_done(&mut self, intake: Intake, target: FrameRef, outcome: Result<(), Fault>) {
        self.intakes_running -= 1;
        let wanted = self.is_wanted(&intake);
        self.let_frame_go(intake.source, intake.fence);
        let sealed = match outcome {
            Ok(()) if wanted => {
                self.counters.intakes += 1;
                self.publish_frame(intake.block, target, intake.checksum, intake.sealing)
            }
            Ok(()) => SealOutcome::Lost,
            Err(_) => {
                self.reject_seal(&intake);
                SealOutcome::Lost
            }
        };
        let block = match sealed {
            SealOutcome::Sealed | SealOutcome::Already | SealOutcome::NotDurable => Some(intake.block),
            SealOutcome::Conflict | SealOutcome::Lost => None,
        };
        self.settle_seal((intake.wait, intake.place), sealed, block, intake.durability);
        // Only if it was not published: then it is still Filling, and keeps the block's entry.
        self.abandon_filling(target, Vacate::Free);
        self.memory_changed = true;
    }

    /// The bytes were not what the session said.
    fn reject_seal(&mut self, intake: &Intake) {
        self.counters.checksum_failures += 1;
        let block = self.blocks.at(intake.block);
        let (block, space) = (block.id, self.spaces.at(block.space).id);
        let session = self.leases.get(&intake.sealing.lease).map(|lease| lease.session);
        if let Some(session) = session {
            let notice = Notice::SealRejected { space, block };
            self.effects.push_back(Effect::Notify { session, notice });
        }
    }
}
