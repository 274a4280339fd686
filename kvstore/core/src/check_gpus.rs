//! The same walk for devices of Hbm: their tables, the blocks' own entries, the
//! lists and the operations agree.

use std::collections::BTreeMap;

use crate::check::Held;
use crate::core::{Core, Op};
use crate::ids::{GpuId, Memory};
use crate::state::block::BlockIndex;
use crate::state::chunk::{ChunkKind, FrameState};
use crate::state::gpu::Coming;
use crate::waiting::WaitKind;

impl Core {
    /// Every memory of the node.
    pub(crate) fn memories(&self) -> impl Iterator<Item = Memory> + use<> {
        std::iter::once(Memory::Pinned).chain(self.gpus.ids().map(Memory::Hbm))
    }

    pub(crate) fn check_gpus(&self, held: &Held) {
        let mut coming = BTreeMap::<BlockIndex, u8>::new();
        for gpu in self.gpus.ids() {
            let device = self.gpus.at(gpu);
            assert_eq!(
                device.running,
                held.gpus.get(&gpu).copied().unwrap_or(0),
                "copies of {gpu} are counted"
            );
            let chunks = self.chunks.iter_in(Memory::Hbm(gpu));
            assert_eq!(u64::from(device.chunks), chunks.count() as u64, "chunks of {gpu} are counted");
            let most = device.config.bytes.get() / self.config.chunk_bytes.get();
            assert!(u64::from(device.chunks) <= most, "the memory of {gpu} is limited");
            assert!(device.running <= device.config.copies_in_flight, "copies of {gpu} are limited");
            for entry in device.entries.iter() {
                let index = entry.block;
                assert!(self.blocks.try_at(index).is_some(), "an entry of {gpu} is of a live block");
                if entry.coming != Coming::No {
                    *coming.entry(index).or_default() += 1;
                }
                assert_eq!(
                    self.blocks.at(index).hbm.contains(gpu),
                    entry.frame.is_some(),
                    "a block and {gpu} agree"
                );
                assert_eq!(
                    entry.links.is_listed(),
                    self.place_in_hbm(entry).is_some(),
                    "{:?}: list of {gpu}",
                    self.blocks.at(index).id
                );
                assert!(
                    entry.frame.is_some() || entry.children > 0 || entry.coming != Coming::No,
                    "an entry that says nothing is removed"
                );
                self.check_coming(gpu, index, entry.coming);
            }
            for index in device.arrivals.keys() {
                let there = device.entries.of(*index).map(|entry| entry.coming);
                assert!(there.is_some_and(|coming| coming != Coming::No), "nobody waits for {gpu} in vain");
            }
            for wait in &device.shrinks {
                let kind = self.waits.get(wait).map(|wait| &wait.kind);
                assert!(matches!(kind, Some(WaitKind::Shrink { .. })), "who waits for memory is known");
            }
            if !device.usable {
                self.check_lost(gpu);
            }
            self.check_children(gpu);
        }
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let Some(block) = self.blocks.try_at(index) else { continue };
            assert_eq!(
                block.hbm_coming,
                coming.get(&index).copied().unwrap_or(0),
                "{:?}: devices to which it is on its way",
                block.id
            );
            for gpu in block.hbm.iter() {
                let entry = self.gpus.find(gpu).and_then(|device| device.entries.of(index));
                assert!(entry.is_some_and(|entry| entry.frame.is_some()), "{:?}: {gpu} has it", block.id);
            }
        }
    }

    /// Nothing of a lost device is readable or kept for anybody.
    fn check_lost(&self, gpu: GpuId) {
        for (id, chunk) in self.chunks.iter_in(Memory::Hbm(gpu)) {
            assert_eq!(chunk.counts.sealed, 0, "nothing is served from {id} of a lost device");
            let serves = matches!(chunk.kind, ChunkKind::Pool | ChunkKind::Window { .. });
            assert!(!serves, "{id} of a lost device takes no block");
        }
    }

    fn check_children(&self, gpu: GpuId) {
        let device = self.gpus.at(gpu);
        let mut children = BTreeMap::<BlockIndex, u32>::new();
        let mut blocks = BTreeMap::new();
        for entry in device.entries.iter().filter(|entry| entry.frame.is_some()) {
            let block = self.blocks.at(entry.block);
            *blocks.entry(block.space).or_default() += 1u64;
            if let Some(parent) = block.parent {
                *children.entry(parent).or_default() += 1;
            }
        }
        for entry in device.entries.iter() {
            let found = children.remove(&entry.block).unwrap_or(0);
            assert_eq!(entry.children, found, "children on {gpu}");
        }
        assert!(children.is_empty(), "a parent's entry counts its children on {gpu}");
        for (index, space) in self.spaces.iter() {
            let found = blocks.get(&index).copied().unwrap_or(0);
            assert_eq!(space.pool(Memory::Hbm(gpu)).blocks, found, "blocks of a space on {gpu}");
        }
    }

    fn check_coming(&self, gpu: GpuId, index: BlockIndex, coming: Coming) {
        let id = self.blocks.at(index).id;
        let device = self.gpus.at(gpu);
        match coming {
            Coming::No => {}
            Coming::Queued(class) => {
                let queued = device.wanted.contains(index, class) || device.stalled.contains(&index);
                assert!(queued, "{id}: it is in the queue of {gpu}");
            }
            Coming::Below(_) => {
                let arriving = self.blocks.at(index).arriving();
                let comes = arriving != crate::state::block::Arriving::No;
                assert!(comes, "{id}: it is on its way to Pinned for {gpu}");
            }
            Coming::Moving(op) => {
                let target = match self.ops.get(&op) {
                    Some(Op::Copy { target, .. } | Op::Read { target, .. }) => *target,
                    other => panic!("{id}: its copy to {gpu} is in flight: {other:?}"),
                };
                let state = self.chunks.frame(target).map(|cell| cell.state);
                assert!(matches!(state, Some(FrameState::Filling { .. })), "{id}: a copy fills its frame");
            }
            Coming::Verifying(op) => {
                assert!(matches!(self.ops.get(&op), Some(Op::Verify { .. })), "{id}: it is being verified");
            }
        }
    }
}
