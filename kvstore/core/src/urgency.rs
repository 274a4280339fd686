//! How urgent device reads are: the queue of wanted blocks by class, reads that
//! become more urgent or are wanted no more, and what happens to the operations
//! of a device that is given up.
//!
//! Promises: a more urgent block is read first, and the least urgent one is not
//! forgotten. A read that a device already has keeps its frame until it ends,
//! whoever gave up waiting for it.

use std::collections::VecDeque;

use crate::api::{Effect, Grant, IoClass, MissReason};
use crate::core::{Core, Op};
use crate::ids::{DeviceId, Memory, OpId};
use crate::reading::Arrival;
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::count;
use crate::state::gpu::Coming;

/// Classes that reads of wanted blocks have, most urgent first.
const CLASSES: [IoClass; 3] = [IoClass::DecodeFetch, IoClass::PrefillFetch, IoClass::Prefetch];
/// One of this many goes to the least urgent class that waits.
const FAIRNESS: u32 = 8;

/// Blocks to be read or verified, by class. May hold entries that are out of
/// date: the block says whether it is queued, and in which class.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    queues: [VecDeque<BlockIndex>; CLASSES.len()],
    picks: u32,
}

impl Wanted {
    pub(crate) fn push(&mut self, index: BlockIndex, class: IoClass) {
        self.queues[place(class)].push_back(index);
    }

    /// In front of its class: it has waited already.
    fn push_front(&mut self, index: BlockIndex, class: IoClass) {
        self.queues[place(class)].push_front(index);
    }

    pub(crate) fn pop(&mut self) -> Option<(BlockIndex, IoClass)> {
        self.picks = self.picks.wrapping_add(1);
        let waits = |queue: &VecDeque<BlockIndex>| !queue.is_empty();
        let place = if self.picks.is_multiple_of(FAIRNESS) {
            self.queues.iter().rposition(waits)
        } else {
            self.queues.iter().position(waits)
        }?;
        self.queues[place].pop_front().map(|index| (index, CLASSES[place]))
    }

    pub(crate) fn len(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }

    /// For [`Core::check`]; walks the queue.
    pub(crate) fn contains(&self, index: BlockIndex, class: IoClass) -> bool {
        self.queues[place(class)].contains(&index)
    }
}

fn place(class: IoClass) -> usize {
    match class {
        IoClass::DecodeFetch => 0,
        IoClass::PrefillFetch => 1,
        IoClass::Demotion | IoClass::Prefetch | IoClass::Persistence | IoClass::Scrub => 2,
    }
}

impl Core {
    /// A block on its way is wanted by somebody more urgent.
    pub(crate) fn raise(&mut self, index: BlockIndex, class: IoClass) {
        match self.blocks.at(index).arriving() {
            Arriving::Queued(current) if class < current => {
                // Its old entry is out of date from now on.
                self.blocks.at_mut(index).set_arriving(Arriving::Queued(class));
                self.wanted.push(index, class);
            }
            Arriving::Reading(op) => self.raise_read(op.of(self.op_last), class),
            Arriving::No | Arriving::Queued(_) | Arriving::Verifying(_) => {}
        }
    }

    /// If an operation is a read, it is wanted by somebody more urgent.
    pub(crate) fn raise_read(&mut self, op: OpId, class: IoClass) {
        let Some(Op::Read { source, class: current, .. }) = self.ops.get_mut(&op) else { return };
        if class < *current {
            *current = class;
            let device = source.device;
            self.effects.push_back(Effect::Promote { op, device, class });
        }
    }

    /// One of those who waited for the block is gone. If nobody is left, it is
    /// not read, unless its device has the read already.
    pub(crate) fn unwanted(&mut self, index: BlockIndex) {
        let waits = &self.waits;
        let Some(waiters) = self.arrivals.get_mut(&index) else { return };
        waiters.retain(|(wait, _)| waits.contains_key(wait));
        if !waiters.is_empty() {
            return;
        }
        self.arrivals.remove(&index);
        if self.is_wanted_above(index) {
            return;
        }
        match self.blocks.at(index).arriving() {
            Arriving::Queued(_) => {
                self.blocks.at_mut(index).set_arriving(Arriving::No);
                self.blocks.remove_if_gone(index);
            }
            Arriving::Reading(op) => {
                let op = op.of(self.op_last);
                let Some(Op::Read { source, .. }) = self.ops.get(&op) else { return };
                let device = source.device;
                self.effects.push_back(Effect::Cancel { op, device });
            }
            Arriving::No | Arriving::Verifying(_) => {}
        }
    }

    /// Blocks that waited for a frame queue up again.
    pub(crate) fn want_stalled(&mut self) {
        for index in std::mem::take(&mut self.wanted_stalled) {
            self.want_again(index);
        }
    }

    fn want_again(&mut self, index: BlockIndex) {
        let arriving = self.blocks.try_at(index).map(|block| block.arriving());
        if let Some(Arriving::Queued(class)) = arriving {
            self.wanted.push_front(index, class);
        }
    }

    /// A read ended: its device may have another.
    pub(crate) fn read_ended(&mut self, device: DeviceId, stuck: bool) {
        if stuck {
            return;
        }
        self.reads_running -= 1;
        // A read into Hbm may have waited for its turn.
        self.memory_changed |= !self.gpus.is_empty();
        let held = self.disks.device_mut(device);
        held.reads -= 1;
        if let Some(next) = held.reads_waiting.pop_front() {
            self.want_again(next);
        }
    }

    /// A write ended: its device may have another.
    pub(crate) fn write_ended(&mut self, device: DeviceId, stuck: bool) {
        if stuck {
            return;
        }
        self.writes_running -= 1;
        self.disks.device_mut(device).writes -= 1;
        if !self.stalled.is_empty() {
            self.disk_changed = true;
        }
    }

    /// A device is given up. Nobody waits for it any more; what it was given to
    /// do keeps its frames until it ends, and counts against no limit of the others.
    pub(crate) fn device_lost(&mut self, device: DeviceId) {
        let held = self.disks.device_mut(device);
        (held.reads, held.writes) = (0, 0);
        for index in std::mem::take(&mut held.reads_waiting) {
            self.want_again(index);
        }
        let (reads, writes, committing) = self.operations_on(device);
        self.reads_running -= count(reads.len());
        let gpu_of = |id: &OpId| match self.ops.get(id) {
            Some(Op::Read { target, .. }) => self.chunks.at(target.chunk).memory,
            Some(_) | None => Memory::Pinned,
        };
        let into_hbm: Vec<_> = reads
            .iter()
            .filter_map(|(id, index)| match gpu_of(id) {
                Memory::Hbm(gpu) => Some((*id, *index, gpu)),
                Memory::Pinned => None,
            })
            .collect();
        self.writes_running -= count(writes.len());
        for (op, index) in reads {
            if self.blocks.try_at(index).is_some_and(|block| block.arriving() == Arriving::Reading(op.into()))
            {
                let otherwise = Grant::Missing(MissReason::Device);
                self.arrived(index, Arrival { otherwise, again: false });
            }
        }
        for (op, index, gpu) in into_hbm {
            let coming = self.gpus.at(gpu).entries.of(index).map(|entry| entry.coming);
            if coming == Some(Coming::Moving(op)) {
                self.came(index, gpu, Grant::Missing(MissReason::Device));
            }
        }
        for (write, index) in writes {
            let writing = |nvme| matches!(nvme, Nvme::Writing { sequence, .. } if sequence == write);
            if self.blocks.try_at(index).is_some_and(|block| writing(block.nvme)) {
                self.durable(index, false);
            }
        }
        for index in committing {
            self.durable(index, false);
        }
    }

    /// Marks reads and writes of a device as stuck, and lists them and the blocks that it is to make durable.
    #[expect(clippy::type_complexity, reason = "three lists of one walk")]
    fn operations_on(
        &mut self,
        device: DeviceId,
    ) -> (Vec<(OpId, BlockIndex)>, Vec<(u64, BlockIndex)>, Vec<BlockIndex>) {
        let (mut reads, mut writes, mut committing) = (Vec::new(), Vec::new(), Vec::new());
        for (id, op) in &mut self.ops {
            match op {
                Op::Read { block, source, stuck, .. } if source.device == device && !*stuck => {
                    *stuck = true;
                    reads.push((*id, *block));
                }
                Op::Write { block, target, header, stuck, .. } if target.device == device && !*stuck => {
                    *stuck = true;
                    writes.push((header.write_sequence, *block));
                }
                Op::Commit { puts, .. } => {
                    let of_device = puts.iter().filter(|put| put.frame.device == device);
                    committing.extend(of_device.map(|put| put.block));
                }
                Op::Read { .. }
                | Op::Write { .. }
                | Op::CreateChunk { .. }
                | Op::DropChunk { .. }
                | Op::CarveSlot { .. }
                | Op::ClearSpace { .. }
                | Op::Scrub { .. }
                | Op::Verify { .. }
                | Op::CloseWindow { .. }
                | Op::Intake { .. }
                | Op::Copy { .. } => {}
            }
        }
        (reads, writes, committing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prefetch must not delay a decode, nor be starved by it.
    #[test]
    fn urgent_blocks_first_and_none_forgotten() {
        let mut wanted = Wanted::default();
        wanted.push(BlockIndex::new(99), IoClass::Prefetch);
        for index in 0..20 {
            wanted.push(BlockIndex::new(index), IoClass::PrefillFetch);
            wanted.push(BlockIndex::new(index + 20), IoClass::DecodeFetch);
        }
        assert_eq!(wanted.len(), 41);
        let order: Vec<_> = std::iter::from_fn(|| wanted.pop()).collect();
        assert_eq!(order[0], (BlockIndex::new(20), IoClass::DecodeFetch));
        let prefetch = order.iter().position(|(index, _)| *index == BlockIndex::new(99));
        assert_eq!(prefetch, Some(FAIRNESS as usize - 1));
        let decodes = order.iter().take(24).filter(|(_, class)| *class == IoClass::DecodeFetch).count();
        assert!(decodes >= 20, "{order:?}");
    }
}
