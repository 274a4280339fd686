//! Devices of the model that say that all is well when it is not: a write that
//! was torn, lost, or went to another place.

use terrace_core::*;

use crate::node::{GARBAGE, World};

impl World {
    /// A write that is about to end well. Whether the device lied, it alone knows.
    pub(crate) fn write_or_lie(&mut self, target: DiskFrame, header: BlockHeader, payload: u64) {
        if !self.faults || !self.random.percent(3) {
            self.lied.remove(&target);
            return self.write_cell(target, header, payload);
        }
        self.seen.lies += 1;
        match self.random.below(3) {
            // The header came through, the payload did not.
            0 => self.write_cell(target, header, GARBAGE),
            1 => {}
            _ => {
                // A whole block in a frame of another one, which is gone.
                let places: Vec<DiskFrame> = self.cells.keys().copied().collect();
                if !places.is_empty() {
                    let place = places[self.random.index(places.len())];
                    self.write_cell(place, header, payload);
                    self.lied.insert(place);
                }
            }
        }
        self.lied.insert(target);
    }

    /// The device lied about the frame where the catalog says that this block is.
    pub(crate) fn is_harmed(&self, block: BlockId) -> bool {
        self.catalog.get(&block).is_some_and(|(frame, _)| self.lied.contains(frame))
    }
}
