//! Scrub: sealed copies on devices are read again, slowly, so that a byte that
//! rotted is found before somebody needs it.
//!
//! A pass walks every frame of every slot once and reads those that hold a
//! block and are not in use. Each device has a walk of its own, and the walks
//! take turns, so that a device which does not answer holds up itself alone;
//! the pass ends when all have. The bytes go to a buffer of the shell, never to a
//! served frame. A copy that does not match is dropped like one that a read
//! found damaged; one that cannot be read is counted and kept, because a device
//! that fails for a while must not cost its blocks.

use crate::api::{Effect, Fault, Scrub};
use crate::core::{Core, Deadline, Op};
use crate::ids::DiskFrame;
use crate::state::block::{BlockIndex, Nvme};
use crate::state::count;
use crate::state::disk::{DiskState, SlotState, device_id};
use crate::units::{ByteCount, Micros, Now};

/// Reads in flight on a device: enough for the rate, few enough to stay out of the way.
const READS_MAX: u32 = 4;
/// Frames looked at in one go, so that an empty device does not hold up everybody else.
const STEPS_MAX: u32 = 4096;
/// The walk goes on after this pause when it has looked at so many.
const STEPS_PAUSE: Micros = Micros::from_millis(1);
/// Reads that came late are caught up with, but no more than this.
const LATE_MAX: Micros = Micros::from_millis(100);
/// From the start to the first pass: a start has better things to read.
const FIRST_PASS_AFTER: Micros = Micros::from_millis(10 * 60 * 1000);
/// From the beginning of a pass to that of the next.
const PASS_PERIOD: Micros = Micros::from_millis(24 * 60 * 60 * 1000);
const MICROS_PER_SECOND: u128 = 1_000_000;

/// How the scrub is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubView {
    /// Rate of the passes that begin by themselves; 0 is none.
    pub bytes_per_second: ByteCount,
    /// The pass that runs: its rate, slots behind it, slots in all.
    pub pass: Option<(ByteCount, u64, u64)>,
    /// Until the next pass begins by itself.
    pub next_pass_in: Option<Micros>,
}

/// One walk over the slots of each device.
#[derive(Debug)]
struct Pass {
    /// Of all devices together.
    rate: u64,
    /// By device.
    walks: Vec<Walk>,
    /// The device whose turn it is.
    turn: usize,
}

/// How far a pass is on one device.
#[derive(Clone, Copy, Debug)]
struct Walk {
    /// Slots left, the current one included.
    slots_left: usize,
    slot: usize,
    /// The next frame in it.
    index: u32,
}

/// What the scrub remembers.
#[derive(Debug, Default)]
pub(crate) struct Scrubber {
    rate: u64,
    pass: Option<Pass>,
    next_pass: Now,
    /// No read begins before.
    due: Now,
    /// Where the next pass begins, so that passes cut short by restarts do not all read the same slots.
    first_slot: usize,
}

enum Next {
    Block(BlockIndex, DiskFrame, u64),
    /// What is left is on devices that have all the reads they may.
    Busy,
    /// Enough frames were looked at for now.
    Later,
    End,
}

impl Core {
    /// The operator or the configuration says what to do.
    pub(crate) fn scrub_told(&mut self, what: Scrub) {
        match what {
            Scrub::Rate { bytes_per_second } => {
                self.scrub.rate = bytes_per_second.get();
                self.scrub.next_pass = self.now.after(FIRST_PASS_AFTER);
                if self.scrub.rate > 0 {
                    self.at(self.scrub.next_pass, Deadline::Scrub);
                }
            }
            Scrub::Start { bytes_per_second } => self.begin_pass(bytes_per_second.get()),
            Scrub::Stop => self.scrub.pass = None,
        }
    }

    /// How it is doing.
    pub fn scrub_view(&self) -> ScrubView {
        let pass = self.scrub.pass.as_ref().map(|pass| {
            let all = self.slots_in_all();
            let left: u64 = pass.walks.iter().map(|walk| walk.slots_left as u64).sum();
            (ByteCount::new(pass.rate), all - left.min(all), all)
        });
        let waits = pass.is_none() && self.scrub.rate > 0;
        ScrubView {
            bytes_per_second: ByteCount::new(self.scrub.rate),
            pass,
            next_pass_in: waits.then(|| self.scrub.next_pass.since(self.now)),
        }
    }

    fn slots_in_all(&self) -> u64 {
        self.disks.devices.iter().map(|device| device.slots.len() as u64).sum()
    }

    fn begin_pass(&mut self, rate: u64) {
        if rate == 0 || self.slots_in_all() == 0 {
            return;
        }
        if self.scrub.first_slot == 0 {
            // A step that is no multiple of the number of slots visits all of them in the end.
            self.scrub.first_slot = (self.config.incarnation as usize).wrapping_mul(0x9e37_79b1);
        }
        let first = self.scrub.first_slot;
        let walk_of =
            |slots: usize| Walk { slots_left: slots, slot: first.checked_rem(slots).unwrap_or(0), index: 0 };
        let walks = self.disks.devices.iter().map(|device| walk_of(device.slots.len())).collect();
        self.scrub.pass = Some(Pass { rate, walks, turn: 0 });
        self.scrub.next_pass = self.now.after(PASS_PERIOD);
        self.scrub.due = self.now;
    }

    /// Starts the reads that are due.
    pub(crate) fn pump_scrub(&mut self) {
        if self.scrub.pass.is_none() {
            if self.scrub.rate == 0 || self.now < self.scrub.next_pass {
                return;
            }
            self.begin_pass(self.scrub.rate);
        }
        while self.now >= self.scrub.due {
            match self.next_to_scrub() {
                Next::Block(block, source, sequence) => self.start_scrub(block, source, sequence),
                // The next read that ends lets it go on.
                Next::Busy => return,
                Next::Later => {
                    self.scrub.due = self.now.after(STEPS_PAUSE);
                    self.at(self.scrub.due, Deadline::Scrub);
                }
                Next::End => {
                    self.scrub.pass = None;
                    self.counters.scrub_passes += 1;
                    if self.scrub.rate > 0 {
                        let next = self.scrub.next_pass.max(self.now.after(STEPS_PAUSE));
                        self.at(next, Deadline::Scrub);
                    }
                    return;
                }
            }
        }
    }

    /// Moves the pass on to the next frame that can be read, on each device in turn.
    fn next_to_scrub(&mut self) -> Next {
        for _ in 0..STEPS_MAX {
            let devices = &self.disks.devices;
            let Some(pass) = self.scrub.pass.as_mut() else { return Next::End };
            let all = pass.walks.len();
            let turn = (pass.turn..pass.turn + all)
                .map(|turn| turn % all)
                .find(|&place| pass.walks[place].slots_left > 0 && devices[place].scrubs < READS_MAX);
            let Some(place) = turn else {
                let idle = devices.iter().all(|device| device.scrubs == 0);
                let walked = pass.walks.iter().all(|walk| walk.slots_left == 0);
                return if idle && walked { Next::End } else { Next::Busy };
            };
            pass.turn = (place + 1) % all;
            let walk = pass.walks[place];
            let found = self.frame_to_scrub(place, walk);
            let slots = self.disks.devices[place].slots.len();
            let next = match found {
                Some(_) => Walk { index: walk.index + 1, ..walk },
                None => Walk { slots_left: walk.slots_left - 1, slot: (walk.slot + 1) % slots, index: 0 },
            };
            if let Some(pass) = self.scrub.pass.as_mut() {
                pass.walks[place] = next;
            }
            if let Some(Some((block, source, sequence))) = found {
                return Next::Block(block, source, sequence);
            }
        }
        Next::Later
    }

    /// `None`: the slot has no such frame, or is not to be read at all. `Some(None)`: this frame is not.
    fn frame_to_scrub(&self, place: usize, walk: Walk) -> Option<Option<(BlockIndex, DiskFrame, u64)>> {
        let device = &self.disks.devices[place];
        let held = &device.slots[walk.slot];
        let readable = device.usable && !held.unscanned && matches!(held.state, SlotState::Carved { .. });
        let cell = held.cells.get(walk.index as usize).filter(|_| readable)?;
        let DiskState::Sealed { block } = cell.state else { return Some(None) };
        let source = DiskFrame { device: device_id(place), slot: count(walk.slot), index: walk.index };
        let Nvme::Sealed { frame, sequence } = self.blocks.at(block).nvme else { return Some(None) };
        let idle = cell.busy == 0 && frame == source;
        Some(idle.then_some((block, source, sequence)))
    }

    fn start_scrub(&mut self, block: BlockIndex, source: DiskFrame, sequence: u64) {
        let expect = self.header_of(block, sequence);
        let frame_bytes = self.spaces.at(self.blocks.at(block).space).frame_bytes;
        let source_offset = self.disks.offset(source, frame_bytes);
        let rate = self.scrub.pass.as_ref().map_or(1, |pass| pass.rate.max(1));
        let cost = u128::from(frame_bytes.get()) * MICROS_PER_SECOND / u128::from(rate);
        let cost = Micros::new(u64::try_from(cost).unwrap_or(u64::MAX));
        let earliest = Now::from_micros(self.now.since(Now::from_micros(LATE_MAX.get())).get());
        self.scrub.due = self.scrub.due.max(earliest).after(cost);
        // When it is due already, the loop goes on, or the next read that ends lets it.
        if self.scrub.due > self.now {
            self.at(self.scrub.due, Deadline::Scrub);
        }
        self.disks.cell_mut(source).busy += 1;
        self.disks.device_mut(source.device).scrubs += 1;
        let op = self.start(Op::Scrub { block, source });
        self.effects.push_back(Effect::Scrub { op, source, source_offset, expect });
    }

    /// A copy was read and compared. Its frame was not used for another block meanwhile.
    pub(crate) fn scrub_done(&mut self, index: BlockIndex, source: DiskFrame, outcome: Result<(), Fault>) {
        self.disks.device_mut(source.device).scrubs -= 1;
        self.disks.cell_mut(source).busy -= 1;
        let block = self.blocks.try_at(index);
        let held = block.filter(|block| matches!(block.nvme, Nvme::Sealed { frame, .. } if frame == source));
        let length = held.map(|block| self.spaces.at(block.space).block_bytes.get());
        match (outcome, length) {
            (Ok(()), length) => {
                self.counters.scrub_blocks += 1;
                self.counters.scrub_bytes += length.unwrap_or(0);
            }
            (Err(Fault::Checksum), Some(_)) => {
                self.counters.scrub_damaged += 1;
                self.counters.checksum_failures += 1;
                self.discard_nvme(index);
            }
            // It was evicted meanwhile, so nothing says what it should hold.
            (Err(Fault::Checksum), None) => {}
            (Err(_), _) => {
                self.counters.scrub_unreadable += 1;
                self.counters.device_faults += 1;
                self.disks.device_mut(source.device).faults += 1;
            }
        }
        self.settle_cell(source);
    }
}
