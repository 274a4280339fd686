//! Faults at random: how often, which, and whom they hurt.

use std::collections::{BTreeMap, BTreeSet};

use terrace_core::{BlockId, Fault};

use super::Injected;
use crate::device::{IoOp, IoRequest};
use crate::header::decode_header;
use crate::memory::PAGE_BYTES;

/// How often a device misbehaves. Two devices with one seed and one order of requests misbehave alike.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Where chance begins.
    pub seed: u64,
    /// Of a thousand reads, writes and syncs so many fail, and say so.
    pub failures: u64,
    /// Of a thousand reads and writes of blocks so many go wrong, and say that all is well.
    pub lies: u64,
    /// Of a thousand reads and writes so many are slow.
    pub delays: u64,
}

/// The state of the weather over one device.
pub(super) struct Clouds {
    pub(super) weather: Option<Weather>,
    state: u64,
    /// Which block was written where last, and in how many bytes.
    placed: BTreeMap<u64, (BlockId, u64)>,
    /// Where a misdirected write went. It may still be under way when the place gets its next block.
    scarred: BTreeSet<u64>,
    pub(super) harmed: BTreeSet<BlockId>,
}

impl Clouds {
    pub(super) fn new() -> Self {
        let (placed, scarred, harmed) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { weather: None, state: 1, placed, scarred, harmed }
    }

    /// Who was harmed stays known.
    pub(super) fn set(&mut self, weather: Option<Weather>) {
        self.weather = weather;
        self.state = weather.map_or(1, |weather| weather.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    }

    fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % end.max(1)
    }

    /// What befalls this request, if anything.
    pub(super) fn draw(&mut self, request: &IoRequest) -> Option<Injected> {
        let written = if request.op == IoOp::Write { written_block(request) } else { None };
        let chance = self.below(1000);
        let calm = Weather { seed: 0, failures: 0, lies: 0, delays: 0 };
        let Weather { failures, lies, delays, .. } = self.weather.unwrap_or(calm);
        let fault = match request.op {
            IoOp::Forget(_) => None,
            IoOp::Read | IoOp::Write if chance < delays => Some(Injected::Slow(20)),
            // One failed sync costs all that it covers, and a pause.
            IoOp::Sync if chance < failures / 2 => Some(Injected::Fail(Fault::Device)),
            IoOp::Sync => None,
            IoOp::Read if chance < delays + failures => Some(self.failure(request, Fault::Device)),
            IoOp::Write if chance < delays + failures => {
                let full = self.below(16) == 0;
                Some(self.failure(request, if full { Fault::NoSpace } else { Fault::Device }))
            }
            IoOp::Read if chance < delays + failures + lies => Some(self.lie(request)),
            // A lie about a slot's own header page would hurt all its blocks, and nobody could say which.
            IoOp::Write if chance < delays + failures + lies && written.is_some() => Some(self.lie(request)),
            IoOp::Read | IoOp::Write => None,
        };
        if let Some(block) = written {
            self.note_write(request, block, fault);
        }
        fault
    }

    fn failure(&mut self, request: &IoRequest, fault: Fault) -> Injected {
        if self.below(2) == 0 { Injected::Fail(fault) } else { Injected::Short(self.pages(request)) }
    }

    fn lie(&mut self, request: &IoRequest) -> Injected {
        match self.below(6) {
            0 => Injected::Torn(self.pages(request)),
            1 => Injected::TornSectors(self.below(1 << 53)),
            2 => Injected::BitFlip(self.below(request.bytes)),
            3 => self.elsewhere(request),
            4 if request.op == IoOp::Read => Injected::Stale,
            _ => Injected::Lost,
        }
    }

    /// Some whole pages, not all.
    fn pages(&mut self, request: &IoRequest) -> u64 {
        self.below(request.bytes / PAGE_BYTES) * PAGE_BYTES
    }

    /// The place of another block of this size.
    fn elsewhere(&mut self, request: &IoRequest) -> Injected {
        let others = self
            .placed
            .iter()
            .filter(|(offset, (_, bytes))| **offset != request.offset && *bytes == request.bytes);
        let others: Vec<u64> = others.map(|(offset, _)| *offset).collect();
        let chosen = usize::try_from(self.below(others.len() as u64)).unwrap_or(0);
        others.get(chosen).map_or(Injected::Lost, |offset| Injected::Misdirected(*offset))
    }

    fn note_write(&mut self, request: &IoRequest, block: BlockId, fault: Option<Injected>) {
        if self.scarred.contains(&request.offset) {
            self.harmed.insert(block);
        }
        if let Some(Injected::Misdirected(offset)) = fault {
            self.scarred.insert(offset);
            let victim = self.placed.get(&offset).map(|(block, _)| *block);
            self.harmed.extend(victim);
            // What lies there now is whole, but in a place where nobody looks for it.
            self.placed.insert(offset, (block, request.bytes));
        } else {
            self.placed.insert(request.offset, (block, request.bytes));
        }
        if fault.is_some_and(super::lies) {
            self.harmed.insert(block);
        }
    }

    /// A read of this place, or of several behind it, is about to lie.
    pub(super) fn read_harmed(&mut self, offset: u64, pages: &[u8]) {
        let placed = self.placed.range(offset..offset + pages.len() as u64).map(|(_, (block, _))| *block);
        self.harmed.extend(placed);
        let headers = pages.chunks_exact(4096).filter_map(|page| decode_header(page).ok());
        self.harmed.extend(headers.map(|header| header.block));
    }
}

fn written_block(request: &IoRequest) -> Option<BlockId> {
    let pages = super::content(request)?;
    decode_header(pages.as_slice()).ok().map(|header| header.block)
}
