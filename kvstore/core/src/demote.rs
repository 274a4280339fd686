//! Copies that cross between memories: out of a device into Pinned, and what
//! becomes of one when it ends; and memory that a device gives back, because
//! the engines beside it need it or because it is lost.

use crate::api::{Fault, Grant, MissReason, Refusal, Reply};
use crate::core::{Core, Deadline, Op};
use crate::ids::{ChunkId, Fence, FrameRef, GpuId, Memory, OpId, SessionId};
use crate::memory::Allocated;
use crate::reading::Arrival;
use crate::residence::Vacate;
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::chunk::{ChunkKind, Filler, FrameState};
use crate::state::count;
use crate::state::gpu::Coming;
use crate::units::{ByteCount, Now};
use crate::waiting::{Asker, WaitKind};

impl Core {
    /// Copies a block from a device to Pinned. `Frame`: the copy runs. `Never`: it cannot.
    pub(crate) fn demote(&mut self, index: BlockIndex, gpu: GpuId) -> Allocated {
        let Some(source) = self.gpus.at(gpu).entries.of(index).and_then(|entry| entry.frame) else {
            return Allocated::Never;
        };
        if self.blocks.at(index).pinned.is_some() {
            return Allocated::Never;
        }
        let held = self.gpus.at(gpu);
        let busy = self.chunks.frame(source).is_some_and(|cell| cell.busy > 0);
        if busy || held.running >= held.config.copies_in_flight {
            return Allocated::Wait;
        }
        let space = self.blocks.at(index).space;
        let target = match self.take_pool_frame(space) {
            Allocated::Frame(target) => target,
            other => return other,
        };
        let op = self.start_moving(index, source, target);
        self.count_crossing(source, target);
        if matches!(self.blocks.at(index).arriving(), Arriving::Queued(_)) {
            // Whoever waits for it in Pinned waits for this copy.
            self.blocks.at_mut(index).set_arriving(Arriving::Reading(op.into()));
        }
        Allocated::Frame(target)
    }

    /// A device from which a block can be copied to Pinned.
    pub(crate) fn device_of(&self, index: BlockIndex) -> Option<GpuId> {
        let block = self.blocks.at(index);
        block.hbm.iter().find(|&gpu| self.gpus.at(gpu).usable)
    }

    /// A due block has no copy in Pinned to be written from: it is copied there first. False: it has none in Hbm.
    pub(crate) fn demote_to_write(&mut self, index: BlockIndex) -> bool {
        let Some(gpu) = self.device_of(index) else { return false };
        match self.demote(index, gpu) {
            // It is queued again when it has come.
            Allocated::Frame(_) => {}
            Allocated::Wait => self.persist_later(index, crate::core::RETRY_AFTER),
            Allocated::Never => {
                self.durable(index, false);
                self.persist_later(index, crate::core::RETRY_AFTER);
            }
        }
        true
    }

    /// A copy with an end on a device counts against that device.
    pub(crate) fn count_crossing(&mut self, source: FrameRef, target: FrameRef) {
        let (from, to) = self.ends(source, target);
        let bytes = self.spaces.at(self.chunks.at(target.chunk).space).frame_bytes.get();
        match (from, to) {
            (_, Memory::Hbm(gpu)) => {
                let held = self.gpus.at_mut(gpu);
                held.running += 1;
                held.load.sent(bytes);
            }
            (Memory::Hbm(gpu), Memory::Pinned) => self.gpus.at_mut(gpu).running += 1,
            (Memory::Pinned, Memory::Pinned) => self.copies_running += 1,
        }
    }

    fn ends(&self, source: FrameRef, target: FrameRef) -> (Memory, Memory) {
        (self.chunks.at(source.chunk).memory, self.chunks.at(target.chunk).memory)
    }

    /// A copy with an end on a device ended. Both frames were its own until now.
    pub(crate) fn crossing_done(
        &mut self,
        op: OpId,
        index: BlockIndex,
        (source, fence): (FrameRef, Fence),
        (target, sent): (FrameRef, Now),
        outcome: Result<(), Fault>,
    ) {
        let (from, to) = self.ends(source, target);
        let bytes = self.spaces.at(self.chunks.at(target.chunk).space).frame_bytes.get();
        let now = self.now;
        if let Memory::Hbm(gpu) = to {
            self.gpus.at_mut(gpu).load.answered(bytes, sent, now, outcome.is_ok());
        }
        if let Memory::Hbm(gpu) = if to == Memory::Pinned { from } else { to } {
            let held = self.gpus.at_mut(gpu);
            held.running -= 1;
            held.faults += u64::from(matches!(outcome, Err(fault) if fault != Fault::Checksum));
        }
        self.memory_changed = true;
        let current = self.let_frame_go(source, fence);
        let mut otherwise = MissReason::Device;
        match outcome {
            Ok(()) if current => self.seal_crossed(index, target, to),
            Err(Fault::Checksum) if current => {
                otherwise = MissReason::Checksum;
                match from {
                    Memory::Pinned => self.reject_pinned(index),
                    Memory::Hbm(gpu) => self.reject_in_hbm(index, gpu),
                }
            }
            Ok(()) | Err(_) => {}
        }
        if to == Memory::Pinned && self.durables.contains_key(&index) {
            // It was to be written from there.
            match self.blocks.at(index).pinned {
                Some(_) => self.persist_now(index),
                None => self.persist_later(index, crate::core::RETRY_AFTER),
            }
        }
        self.settle_crossed(op, index, to, Grant::Missing(otherwise));
        // Only if it was not sealed: then it is still Filling.
        self.abandon_filling(target, Vacate::Free);
    }

    fn seal_crossed(&mut self, index: BlockIndex, target: FrameRef, to: Memory) {
        let there = self.blocks.at(index).residence();
        match to {
            Memory::Pinned if !there.pinned => {
                self.seal_frame(index, target, true, 0);
                self.counters.demotions_hbm += 1;
                let block = self.blocks.at(index);
                if block.nvme == Nvme::None && !block.is_refused() && self.is_written_behind() {
                    let id = block.id;
                    self.write_behind(index, id);
                }
            }
            Memory::Hbm(gpu) if !there.hbm.contains(gpu) && self.gpus.at(gpu).usable => {
                self.seal_in_hbm(index, gpu, target, true, 0);
                self.counters.promotions_hbm += 1;
            }
            Memory::Pinned | Memory::Hbm(_) => {}
        }
    }

    fn settle_crossed(&mut self, op: OpId, index: BlockIndex, to: Memory, otherwise: Grant) {
        match to {
            Memory::Pinned => {
                let waited = self.blocks.try_at(index).map(|block| block.arriving());
                if waited == Some(Arriving::Reading(op.into())) {
                    let again = self.blocks.at(index).residence().nvme;
                    self.arrived(index, Arrival { otherwise, again });
                }
            }
            Memory::Hbm(gpu) => {
                let coming = self.gpus.at(gpu).entries.of(index).map(|entry| entry.coming);
                if coming == Some(Coming::Moving(op)) {
                    self.came(index, gpu, otherwise);
                }
            }
        }
    }

    /// A device's copy turned out to be damaged.
    pub(crate) fn reject_in_hbm(&mut self, index: BlockIndex, gpu: GpuId) {
        self.counters.checksum_failures += 1;
        let frame = self.gpus.at(gpu).entries.of(index).and_then(|entry| entry.frame);
        if let Some(frame) = frame {
            self.tell_sealer(index, frame);
        }
        self.drop_from_hbm(index, gpu);
        if self.blocks.try_at(index).is_some() && self.blocks.at(index).residence() == Default::default() {
            self.durable(index, false);
        }
    }

    /// One step of emptying a chunk of a device: what has another copy goes, what has none is copied to Pinned, and
    /// goes too where there is no room for it.
    pub(crate) fn move_out_of_hbm(&mut self, index: BlockIndex, gpu: GpuId) {
        if matches!(self.gpus.at(gpu).entries.of(index).map(|entry| entry.coming), Some(Coming::Verifying(_)))
        {
            return;
        }
        let there = self.blocks.at(index).residence();
        let elsewhere = there.pinned || there.nvme || !there.hbm.without(gpu).is_empty();
        if !elsewhere && self.demote(index, gpu) != Allocated::Never {
            return;
        }
        if let Some(frame) = self.evict_from_hbm(index, gpu) {
            self.free_frame(frame);
        }
    }

    /// Takes everything out of a lost device's chunks, leases or not.
    pub(crate) fn vacate_gpu(&mut self, gpu: GpuId) {
        let chunks: Vec<ChunkId> = self.chunks.iter_in(Memory::Hbm(gpu)).map(|(id, _)| id).collect();
        for id in chunks {
            for index in 0..count(self.chunks.at(id).frames.len()) {
                let frame = FrameRef { chunk: id, index };
                match self.chunks.at(id).frames[index as usize].state {
                    FrameState::Sealed { block, .. } => self.drop_from_hbm(block, gpu),
                    FrameState::Filling { filler: Filler::Lease(_), .. } => {
                        self.abandon_filling(frame, Vacate::Quarantine);
                    }
                    // The operation ends, and then the frame is free.
                    FrameState::Filling { filler: Filler::Op(_), .. } => {}
                    FrameState::Free | FrameState::Evicting | FrameState::Quarantined => {}
                }
            }
            match self.chunks.at(id).kind {
                ChunkKind::Pool => self.retire(id),
                ChunkKind::Window { .. } => self.replace_window(id),
                ChunkKind::Creating { .. }
                | ChunkKind::Closing { .. }
                | ChunkKind::Replacing
                | ChunkKind::Retiring
                | ChunkKind::Dropping => {}
            }
        }
    }

    /// Nobody waits in Pinned for a copy from a lost device any more. The copies end by themselves.
    pub(crate) fn unwait_copies_of(&mut self, gpu: GpuId) {
        let from = |frame: FrameRef| self.chunks.at(frame.chunk).memory == Memory::Hbm(gpu);
        let copies: Vec<(OpId, BlockIndex)> = self
            .ops
            .iter()
            .filter_map(|(id, op)| {
                let Op::Copy { block, source, .. } = op else { return None };
                from(*source).then_some((*id, *block))
            })
            .collect();
        for (op, index) in copies {
            self.settle_crossed(op, index, Memory::Pinned, Grant::Missing(MissReason::Device));
        }
    }

    /// What the session's engine needs of a device's memory from now on.
    pub(crate) fn shrink(&mut self, asker: Asker, gpu: GpuId, bytes: ByteCount, by: Now) -> Option<Reply> {
        if self.gpus.find(gpu).is_none() {
            return Some(Reply::Refused(Refusal::UnknownGpu { gpu }));
        }
        if let Err(limit) = self.may_wait(asker.session) {
            return Some(Reply::Throttled(limit));
        }
        self.claim(asker.session, gpu, bytes.get());
        let wait = self.wait(asker, Some(by), WaitKind::Shrink { gpu });
        self.gpus.at_mut(gpu).shrinks.insert(wait);
        None
    }

    fn claim(&mut self, session: SessionId, gpu: GpuId, bytes: u64) {
        let claims = &mut self.gpus.at_mut(gpu).claims;
        if bytes == 0 {
            claims.remove(&session);
        } else {
            claims.insert(session, bytes);
        }
        self.memory_changed = true;
    }

    /// What a session's engine needed is the daemon's again.
    pub(crate) fn unclaim(&mut self, session: SessionId) {
        for gpu in self.gpus.ids() {
            if self.gpus.at(gpu).claims.contains_key(&session) {
                self.claim(session, gpu, 0);
            }
        }
    }

    /// Bytes of a device's configured memory that no chunk takes and none may.
    pub(crate) fn given_back(&self, gpu: GpuId) -> ByteCount {
        let held = self.gpus.at(gpu);
        let used = u64::from(held.chunks) * self.config.chunk_bytes.get();
        ByteCount::new(held.config.bytes.get().saturating_sub(used.max(held.limit())))
    }

    /// Gives chunks back while a device has more than it may, and answers those who wait for that.
    pub(crate) fn pump_shrink(&mut self, gpu: GpuId) {
        let memory = Memory::Hbm(gpu);
        let chunk_bytes = self.config.chunk_bytes.get().max(1);
        let most = self.gpus.at(gpu).limit() / chunk_bytes;
        if u64::from(self.gpus.at(gpu).chunks) > most {
            let leaving =
                |kind| matches!(kind, ChunkKind::Retiring | ChunkKind::Replacing | ChunkKind::Dropping);
            let going = self.chunks.iter_in(memory).filter(|(_, chunk)| leaving(chunk.kind)).count();
            let mut stays = self.gpus.at(gpu).chunks - count(going);
            while u64::from(stays) > most && (self.retire_chunk(memory) || self.retire_leased(gpu)) {
                stays -= 1;
            }
            self.pump_emptying();
        }
        if u64::from(self.gpus.at(gpu).chunks) <= most {
            let waiting = std::mem::take(&mut self.gpus.at_mut(gpu).shrinks);
            waiting.into_iter().for_each(|wait| self.finish(wait));
        }
    }

    /// The chunk that was used least lately goes though it is leased: its readers get the time of a recall.
    fn retire_leased(&mut self, gpu: GpuId) -> bool {
        let pool =
            |chunk: &crate::state::chunk::Chunk| chunk.kind == ChunkKind::Pool && chunk.counts.filling == 0;
        let chunks = self.chunks.iter_in(Memory::Hbm(gpu)).filter(|(_, chunk)| pool(chunk));
        let Some((id, _)) = chunks.min_by_key(|&(id, chunk)| (chunk.touched, id)) else { return false };
        let leave_by = self.now.after(self.config.window_recall_max);
        self.at(leave_by, Deadline::Retry);
        let chunk = self.chunks.at_mut(id);
        (chunk.leave_by, chunk.forced) = (leave_by, true);
        self.retire(id);
        true
    }
}
