//! The model's devices of Hbm: what they hold is lost with them, copies to and
//! from them come late or fail, and engines beside them want their memory.

use terrace_core::*;

use crate::node::{CHUNK_BYTES, GARBAGE, World};

const GPUS: u16 = 2;

/// The first is read into straight from Nvme and copies from the second; the second does neither.
pub(crate) fn configs(chunk_bytes: u64) -> Vec<GpuConfig> {
    vec![
        GpuConfig {
            bytes: ByteCount::new(3 * chunk_bytes),
            bytes_min: ByteCount::new(chunk_bytes),
            reads: HbmReads::Direct,
            peers: GpuSet::NONE.with(GpuId::new(1)),
            copies_in_flight: 4,
        },
        GpuConfig {
            bytes: ByteCount::new(2 * chunk_bytes),
            bytes_min: ByteCount::new(0),
            reads: HbmReads::ThroughPinned,
            peers: GpuSet::NONE,
            copies_in_flight: 3,
        },
    ]
}

impl World {
    pub(crate) fn memory_of(&self, frame: FrameRef) -> Memory {
        self.chunks[&frame.chunk].memory
    }

    pub(crate) fn some_memory(&mut self) -> Memory {
        match self.random.below(10) {
            0..=4 => Memory::Pinned,
            5..=7 => Memory::Hbm(GpuId::new(0)),
            _ => Memory::Hbm(GpuId::new(1)),
        }
    }

    /// Each memory has its own limit.
    pub(crate) fn assert_limited(&self, memory: Memory) {
        let chunks = self.chunks.values().filter(|chunk| chunk.memory == memory).count() as u64;
        let most = match memory {
            Memory::Pinned => 8,
            Memory::Hbm(gpu) => {
                assert!(!self.lost.contains(&gpu), "a lost device gets no chunk");
                configs(CHUNK_BYTES)[usize::from(gpu.get())].bytes.get() / CHUNK_BYTES
            }
        };
        assert!(chunks <= most, "{memory:?} is limited");
    }

    /// A device is read into straight only where that is offered.
    pub(crate) fn assert_may_read(&mut self, target: FrameRef) {
        if let Memory::Hbm(gpu) = self.memory_of(target) {
            assert_eq!(gpu, GpuId::new(0), "the second device is not read into straight");
            assert!(!self.lost.contains(&gpu), "nothing is started on a lost device");
            self.seen.hbm_direct += 1;
        }
    }

    pub(crate) fn count_copy(&mut self, source: FrameRef, target: FrameRef) {
        let ends = [self.memory_of(source), self.memory_of(target)];
        for gpu in ends.into_iter().filter_map(gpu_of) {
            assert!(!self.lost.contains(&gpu), "nothing is started on a lost device");
        }
        self.seen.hbm_peers += u64::from(ends.iter().all(|end| *end != Memory::Pinned));
    }

    /// Whether a copy that fails is the link's fault, and not its source's.
    pub(crate) fn breaks(&mut self, source: FrameRef, target: FrameRef) -> bool {
        let crosses = [source, target].map(|frame| self.memory_of(frame)) != [Memory::Pinned; 2];
        crosses && self.random.percent(60)
    }

    /// A client is granted frames where the core says they are, and of a device only if it may map it.
    pub(crate) fn granted_in(&mut self, session: SessionId, frame: FrameRef, memory: Memory) {
        assert_eq!(self.memory_of(frame), memory, "a grant says where its frame is");
        if let Memory::Hbm(gpu) = memory {
            assert_eq!(
                self.clients[&session].locality,
                Locality::Local,
                "a device is mapped by trusted sessions"
            );
            assert!(!self.lost.contains(&gpu), "a lost device serves nothing");
            self.seen.hbm_reads += 1;
        }
    }

    pub(crate) fn ask_shrink(&mut self, session: SessionId) {
        let gpu = GpuId::new(if self.random.percent(50) { 0 } else { 1 });
        let bytes = ByteCount::new(self.random.below(4) * CHUNK_BYTES);
        let answer_by = Now::from_micros(self.now + self.random.below(400_000));
        self.send(session, Request::Shrink { gpu, bytes, answer_by });
    }

    /// What the daemon says that it leaves free, no chunk of its takes.
    pub(crate) fn shrunk(&mut self, gpu: GpuId, free: ByteCount) {
        let config = configs(CHUNK_BYTES)[usize::from(gpu.get())];
        let held = self.chunks.values().filter(|chunk| chunk.memory == Memory::Hbm(gpu)).count() as u64;
        assert!(held * CHUNK_BYTES + free.get() <= config.bytes.get(), "{gpu} gave back what it still holds");
        assert!(free.get() <= config.bytes.get() - config.bytes_min.get(), "{gpu} keeps what it may keep");
        self.seen.shrunk += u64::from(free.get() > 0);
    }

    /// A device is lost, with all that it holds and all that is in flight on it; or it is back, empty.
    pub(crate) fn gpus_change(&mut self) {
        let gpu = GpuId::new(if self.random.percent(50) { 0 } else { 1 });
        if self.random.percent(60) || self.lost.contains(&gpu) {
            self.lost.remove(&gpu);
            return self.tell(Input::GpuState { gpu, usable: true });
        }
        self.lost.insert(gpu);
        for place in 0..self.pending.len() {
            let on_it = self.is_on(&self.pending[place].effect, gpu);
            self.pending[place].doomed |= on_it;
            self.seen.hbm_doomed += u64::from(on_it);
        }
        self.seen.hbm_lost += 1;
        self.tell(Input::GpuState { gpu, usable: false });
        for chunk in self.chunks.values_mut().filter(|chunk| chunk.memory == Memory::Hbm(gpu)) {
            chunk.frames.iter_mut().for_each(|frame| frame.payload = GARBAGE);
        }
        self.check_reads();
        self.core.check();
    }

    fn is_on(&self, effect: &Effect, gpu: GpuId) -> bool {
        let on = |frame: &FrameRef| self.memory_of(*frame) == Memory::Hbm(gpu);
        match effect {
            Effect::Copy { source, target, .. } => on(source) || on(target),
            Effect::Read { target, .. } => on(target),
            Effect::Verify { frame, .. } => on(frame),
            _ => false,
        }
    }

    pub(crate) fn gpus_back(&mut self) {
        for gpu in (0..GPUS).map(GpuId::new) {
            self.lost.remove(&gpu);
            self.tell(Input::GpuState { gpu, usable: true });
        }
    }
}

fn gpu_of(memory: Memory) -> Option<GpuId> {
    match memory {
        Memory::Pinned => None,
        Memory::Hbm(gpu) => Some(gpu),
    }
}
