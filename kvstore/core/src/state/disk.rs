//! Devices of the Nvme tier: chunk slots and the frames in them.

use std::collections::{BTreeSet, VecDeque};

use crate::cost::Load;
use crate::ids::{DeviceId, DiskFrame};
use crate::state::block::BlockIndex;
use crate::state::chunk::FrameCounts;
use crate::state::count;
use crate::state::space::{HEADER_PAGE_BYTES, SpaceIndex};
use crate::units::ByteCount;

/// Where the first chunk slot of a device starts; the superblock is before it.
pub const DATA_START: u64 = 1 << 20;

/// Lifecycle of a frame on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskState {
    Free,
    /// Being written, or written and not yet durable.
    Filling {
        block: BlockIndex,
    },
    /// Durable.
    Sealed {
        block: BlockIndex,
    },
    /// Holds nothing any more; free once `busy` is zero.
    Evicting,
    /// A write or sync of it failed.
    Quarantined,
}

/// One frame on a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskCell {
    pub(crate) state: DiskState,
    /// Operations that read or write it, or that change what the catalog says of it.
    pub(crate) busy: u32,
}

/// What a slot is carved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    Carving {
        space: SpaceIndex,
    },
    Carved {
        space: SpaceIndex,
    },
    /// Being emptied for another space.
    Retiring {
        space: SpaceIndex,
    },
    /// Its chunk header could not be written.
    Quarantined,
}

/// A chunk slot of a device.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) state: SlotState,
    /// It may hold blocks that are not known yet.
    pub(crate) unscanned: bool,
    pub(crate) cells: Vec<DiskCell>,
    pub(crate) free: Vec<u32>,
    /// Where each free frame is in `free`: a start takes a million of them by name.
    places: Vec<u32>,
    pub(crate) counts: FrameCounts,
}

impl Slot {
    fn new() -> Self {
        Self {
            state: SlotState::Free,
            unscanned: false,
            cells: Vec::new(),
            free: Vec::new(),
            places: Vec::new(),
            counts: FrameCounts::default(),
        }
    }

    /// Lays out frames in a slot that holds none.
    pub(crate) fn carve(&mut self, frames: u32) {
        assert!(self.counts.free == self.counts.total(), "only an empty slot is carved");
        self.cells = vec![DiskCell { state: DiskState::Free, busy: 0 }; frames as usize];
        self.free = (0..frames).rev().collect();
        self.places = (0..frames).rev().collect();
        self.counts = FrameCounts { free: u64::from(frames), ..FrameCounts::default() };
    }

    /// Changes a frame's state and the counts with it. Not from `Free`: that goes by `take`.
    pub(crate) fn set(&mut self, index: u32, state: DiskState) {
        let cell = &mut self.cells[index as usize];
        *counted(&mut self.counts, cell.state) -= 1;
        cell.state = state;
        *counted(&mut self.counts, state) += 1;
        if state == DiskState::Free {
            self.places[index as usize] = count(self.free.len());
            self.free.push(index);
        }
    }

    /// Takes the next free frame, or a certain one.
    pub(crate) fn take(&mut self, wanted: Option<u32>) -> Option<u32> {
        match wanted {
            None => self.free.pop(),
            Some(index) => {
                let place = *self.places.get(index as usize)? as usize;
                self.free.get(place).filter(|&&free| free == index)?;
                self.free.swap_remove(place);
                if let Some(&moved) = self.free.get(place) {
                    self.places[moved as usize] = count(place);
                }
                Some(index)
            }
        }
    }
}

fn counted(counts: &mut FrameCounts, state: DiskState) -> &mut u64 {
    match state {
        DiskState::Free => &mut counts.free,
        DiskState::Filling { .. } => &mut counts.filling,
        DiskState::Sealed { .. } => &mut counts.sealed,
        DiskState::Evicting => &mut counts.evicting,
        DiskState::Quarantined => &mut counts.quarantined,
    }
}

/// One device.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) usable: bool,
    pub(crate) slots: Vec<Slot>,
    /// Slots that can be carved.
    pub(crate) slots_free: BTreeSet<u32>,
    /// Faults since start.
    pub(crate) faults: u64,
    /// How fast it delivers.
    pub(crate) load: Load,
    /// Reads and writes that it has, stuck ones apart.
    pub(crate) reads: u32,
    pub(crate) writes: u32,
    /// Scrub reads that it has.
    pub(crate) scrubs: u32,
    /// Blocks whose reads wait until it has fewer.
    pub(crate) reads_waiting: VecDeque<BlockIndex>,
}

/// All devices.
#[derive(Debug)]
pub(crate) struct Disks {
    pub(crate) devices: Vec<Device>,
    chunk_bytes: u64,
}

impl Disks {
    pub(crate) fn new(device_slots: &[u32], chunk_bytes: ByteCount) -> Self {
        let devices = device_slots
            .iter()
            .map(|&slots| Device {
                usable: true,
                slots: (0..slots).map(|_| Slot::new()).collect(),
                slots_free: (0..slots).collect(),
                faults: 0,
                load: Load::new(),
                reads: 0,
                writes: 0,
                scrubs: 0,
                reads_waiting: VecDeque::new(),
            })
            .collect();
        Self { devices, chunk_bytes: chunk_bytes.get() }
    }

    pub(crate) fn usable(&self, device: DeviceId) -> bool {
        self.devices.get(usize::from(device.get())).is_some_and(|device| device.usable)
    }

    pub(crate) fn any_usable(&self) -> bool {
        self.devices.iter().any(|device| device.usable)
    }

    /// Most operations that one device may have of a limit for all: one that
    /// hangs leaves the others something. Far above an even share, because that
    /// would bring devices out of step, and blocks are striped by turns.
    pub(crate) fn share(&self, limit: u32) -> u32 {
        let usable = count(self.devices.iter().filter(|device| device.usable).count());
        if usable > 1 { (limit - limit / (2 * usable)).max(2) } else { limit }
    }

    pub(crate) fn find_slot(&self, device: DeviceId, slot: u32) -> Option<&Slot> {
        self.devices.get(usize::from(device.get()))?.slots.get(slot as usize)
    }

    pub(crate) fn slot_mut(&mut self, device: DeviceId, slot: u32) -> &mut Slot {
        &mut self.devices[usize::from(device.get())].slots[slot as usize]
    }

    pub(crate) fn device_mut(&mut self, device: DeviceId) -> &mut Device {
        &mut self.devices[usize::from(device.get())]
    }

    pub(crate) fn cell(&self, frame: DiskFrame) -> Option<&DiskCell> {
        self.find_slot(frame.device, frame.slot)?.cells.get(frame.index as usize)
    }

    pub(crate) fn cell_mut(&mut self, frame: DiskFrame) -> &mut DiskCell {
        &mut self.slot_mut(frame.device, frame.slot).cells[frame.index as usize]
    }

    /// Byte offset of a frame on its device.
    pub(crate) fn offset(&self, frame: DiskFrame, frame_bytes: ByteCount) -> u64 {
        DATA_START
            + u64::from(frame.slot) * self.chunk_bytes
            + HEADER_PAGE_BYTES
            + u64::from(frame.index) * frame_bytes.get()
    }
}

/// A device's id from its place.
pub(crate) fn device_id(place: usize) -> DeviceId {
    DeviceId::new(u16::try_from(count(place)).expect("there are fewer than 2^16 devices"))
}
