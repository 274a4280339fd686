//! Crashes of the model node, and what its next life finds.

use std::collections::BTreeMap;

use terrace_core::*;

use crate::node::{Cell, DEVICES, GARBAGE, Pending, SLOTS, World, config};

impl World {
    /// The daemon dies: by kill -9, or with the power. What the kernel or the
    /// device had not finished may or may not have happened.
    pub(crate) fn restart(&mut self) {
        let power = self.random.percent(50);
        self.seen.count(self.core.counters());
        self.seen.restarts += 1;
        self.seen.power_cuts += u64::from(power);
        for pending in std::mem::take(&mut self.pending) {
            self.cut_short(&pending);
        }
        if power {
            self.cut_power();
        }
        self.incarnation += 1;
        self.chunks.clear();
        self.clients.clear();
        self.ghosts.clear();
        self.events.clear();
        self.damaged.clear();
        self.committed.clear();
        self.degraded = false;
        self.lost.clear();
        for space in &mut self.spaces {
            space.generation = space.durable_generation;
        }
        // A rebuild finds no block whose frame holds another.
        let mut expected = std::mem::take(&mut self.durable);
        let rebuild = self.random.percent(30);
        expected.retain(|block, ()| !rebuild || !self.is_harmed(*block));
        self.core = Core::new(config(self.incarnation));
        self.tell_spaces();
        if rebuild {
            self.rebuild();
        } else {
            self.restore();
        }
        for block in expected.keys() {
            let there = self.core.stat(*block).is_some_and(|view| view.tiers.nvme);
            assert!(there, "{block} was acknowledged as durable and is gone after a restart");
        }
        self.committed = self.catalog.keys().copied().collect();
        self.durable = expected;
        self.core.check();
    }

    fn cut_short(&mut self, pending: &Pending) {
        let happened = self.random.below(3);
        match &pending.effect {
            Effect::Write { source, target, header, .. } if happened > 0 => {
                let now = self.frame(*source).payload;
                let payload = if happened == 1 { GARBAGE } else { pending.sample.unwrap_or(now) };
                self.write_cell(*target, *header, payload);
            }
            Effect::Commit { put, delete, .. } if happened > 0 => self.commit(put, delete, happened == 1),
            Effect::CarveSlot { device, slot, space, .. } if happened > 0 => {
                self.carved.insert((*device, *slot), *space);
            }
            Effect::ClearSpace { space, generation, .. } if happened > 0 => {
                self.clear_durably(*space, *generation)
            }
            _ => {}
        }
    }

    fn cut_power(&mut self) {
        let frames: Vec<DiskFrame> = self.cells.keys().copied().collect();
        for frame in frames {
            let Some(cell) = self.cells.get_mut(&frame).filter(|cell| !cell.synced) else { continue };
            match (self.random.below(3), cell.before) {
                (0, _) => {}
                (1, Some((header, payload))) => {
                    *cell = Cell { header, payload, synced: true, before: None };
                }
                _ => {
                    self.cells.remove(&frame);
                }
            }
        }
    }

    fn generation_of(&self, space: SpaceId) -> u64 {
        self.spaces.iter().find(|known| known.id == space).map_or(0, |known| known.durable_generation)
    }

    fn found(&self, frame: DiskFrame, header: &BlockHeader) -> FoundBlock {
        FoundBlock {
            block: header.block,
            space: header.space,
            parent: header.parent,
            length: header.length,
            checksum: header.checksum,
            frame,
            write_sequence: header.write_sequence,
            stats: UseStats::default(),
        }
    }

    /// From the catalog.
    fn restore(&mut self) {
        for ((device, slot), space) in self.carved.clone() {
            self.tell(Input::SlotCarved { device, slot, space, frame_bytes: ByteCount::new(8192) });
        }
        let valid =
            self.catalog.values().filter(|(_, header)| header.generation >= self.generation_of(header.space));
        let blocks = valid.map(|(frame, header)| self.found(*frame, header)).collect();
        self.tell(Input::BlocksFound { blocks });
    }

    /// The catalog is lost: from the headers, slot by slot, in any order.
    fn rebuild(&mut self) {
        self.seen.rebuilt += 1;
        // What a scan finds may still be in a device's cache only: it is synced before it is told.
        for cell in self.cells.values_mut() {
            cell.synced = true;
            cell.before = None;
        }
        for device in (0..DEVICES).map(DeviceId::new) {
            self.tell(Input::SlotsUnscanned { device, slots: (0..SLOTS).collect() });
        }
        let mut slots: Vec<(DeviceId, u32)> = (0..DEVICES)
            .flat_map(|device| (0..SLOTS).map(move |slot| (DeviceId::new(device), slot)))
            .collect();
        let mut newest = BTreeMap::<BlockId, (DiskFrame, BlockHeader)>::new();
        while !slots.is_empty() {
            let (device, slot) = slots.swap_remove(self.random.index(slots.len()));
            let Some(space) = self.carved.get(&(device, slot)).copied() else {
                self.tell(Input::SlotsScanned { device, slots: vec![slot] });
                continue;
            };
            self.tell(Input::SlotCarved { device, slot, space, frame_bytes: ByteCount::new(8192) });
            let mut blocks = Vec::new();
            for (frame, cell) in &self.cells {
                let here = frame.device == device && frame.slot == slot && cell.header.space == space;
                if here && cell.header.generation >= self.generation_of(space) {
                    blocks.push(self.found(*frame, &cell.header));
                    let best = newest.entry(cell.header.block).or_insert((*frame, cell.header));
                    if best.1.write_sequence < cell.header.write_sequence {
                        *best = (*frame, cell.header);
                    }
                }
            }
            self.tell(Input::BlocksFound { blocks });
            self.tell(Input::SlotsScanned { device, slots: vec![slot] });
        }
        self.catalog = newest;
    }
}
