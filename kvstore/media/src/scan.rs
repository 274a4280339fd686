//! Reads what a device says of itself: the header page of a slot, then the
//! header pages of its frames, 4 KiB each, in batches.

use terrace_core::{DeviceId, DiskFrame, UseStats};

use crate::api::{Carve, FoundHeader, ScanPiece};
use crate::header::{BadHeader, SlotHeader, decode_header};
use crate::memory::PAGE_BYTES;
use crate::slots::{Slots, frames_of};

/// Header pages read by one call: bounds the memory of a scan.
const BATCH: usize = 256;

/// What a slot held.
pub(crate) struct Scanned {
    pub(crate) piece: ScanPiece,
    pub(crate) carve_sequence: u64,
    /// Pages that were neither empty nor valid.
    pub(crate) damaged: u64,
    pub(crate) unreadable: bool,
}

/// Scans one slot. Blocks.
pub(crate) fn slot(slots: &Slots, device: DeviceId, slot: u32) -> Scanned {
    let mut scanned = Scanned {
        piece: ScanPiece { device, slot, carve: None, space: None, blocks: Vec::new() },
        carve_sequence: 0,
        damaged: 0,
        unreadable: false,
    };
    let Some(header) = slot_header(slots, &mut scanned) else { return scanned };
    scanned.carve_sequence = header.carve_sequence;
    scanned.piece.space = header.record();
    scanned.piece.carve = Some(Carve { device, slot, space: header.space, frame_bytes: header.frame_bytes });
    frames(slots, &header, &mut scanned);
    scanned
}

fn slot_header(slots: &Slots, scanned: &mut Scanned) -> Option<SlotHeader> {
    let (device, slot) = (scanned.piece.device, scanned.piece.slot);
    let (start, side) = (slots.slot_start(device, slot)?, slots.side(device)?);
    let page = side.read_many(&[(start, PAGE_BYTES)]).and_then(|mut pages| pages.remove(0));
    let page = match page {
        Ok(page) => page,
        Err(error) => {
            tracing::warn!(%device, slot, %error, "slot header cannot be read");
            scanned.unreadable = true;
            return None;
        }
    };
    match SlotHeader::decode(page.as_slice()) {
        Ok(header) if header.slot == slot => Some(header),
        Ok(header) => {
            tracing::warn!(%device, slot, found = header.slot, "header of another slot");
            scanned.damaged += 1;
            None
        }
        Err(BadHeader::Empty) => None,
        Err(error) => {
            tracing::warn!(%device, slot, %error, "slot header is damaged");
            scanned.damaged += 1;
            None
        }
    }
}

fn frames(slots: &Slots, header: &SlotHeader, scanned: &mut Scanned) {
    let (device, slot) = (scanned.piece.device, scanned.piece.slot);
    let (Some(start), Some(side)) = (slots.slot_start(device, slot), slots.side(device)) else { return };
    let indexes: Vec<u32> = (0..frames_of(slots.chunk_bytes(), header.frame_bytes)).collect();
    for batch in indexes.chunks(BATCH) {
        let offset = |index: &u32| start + PAGE_BYTES + u64::from(*index) * header.frame_bytes.get();
        let ranges: Vec<(u64, u64)> = batch.iter().map(|index| (offset(index), PAGE_BYTES)).collect();
        let pages = match side.read_many(&ranges) {
            Ok(pages) => pages,
            Err(error) => {
                tracing::warn!(%device, slot, %error, "header pages cannot be read");
                scanned.unreadable = true;
                return;
            }
        };
        for (index, page) in batch.iter().zip(pages) {
            let Ok(page) = page else {
                scanned.unreadable = true;
                continue;
            };
            let frame = DiskFrame { device, slot, index: *index };
            match decode_header(page.as_slice()) {
                // A frame of an earlier carving, or of a generation that was cleared, is as good as empty.
                Ok(found) if found.space != header.space || !slots.allows(device, &found) => {}
                Ok(found) if fits(&found, header) => {
                    scanned.piece.blocks.push(FoundHeader {
                        frame,
                        header: found,
                        stats: UseStats::default(),
                    });
                }
                Ok(_) => scanned.damaged += 1,
                // Payload of an earlier carving may lie here: nothing to report.
                Err(BadHeader::Empty | BadHeader::Magic) => {}
                Err(_) => scanned.damaged += 1,
            }
        }
    }
}

fn fits(found: &terrace_core::BlockHeader, slot: &SlotHeader) -> bool {
    let needed = found.length.round_up(PAGE_BYTES).map(terrace_core::ByteCount::get);
    needed.is_some_and(|payload| payload + PAGE_BYTES <= slot.frame_bytes.get())
}
