//! Reads what a device says of itself: the header pages of its slots, then
//! those of their frames, 4 KiB each, many at once.
//!
//! A window of slots is read at a time, which bounds the memory. A slot is told
//! as soon as its last frame is read, so that it can be used while the next are.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use terrace_core::{BlockHeader, DeviceId, DiskFrame, UseStats};

use crate::api::{Carve, FoundHeader, ScanPiece};
use crate::header::{BadHeader, SlotHeader, decode_header};
use crate::memory::PAGE_BYTES;
use crate::slots::{Slots, frames_of};

/// Slots whose headers are read before the frames of them all.
const WINDOW: usize = 256;

/// What a slot held.
#[derive(Clone, Debug)]
pub(crate) struct Scanned {
    pub(crate) piece: ScanPiece,
    pub(crate) carve_sequence: u64,
    /// Pages that were neither empty nor valid.
    pub(crate) damaged: u64,
    pub(crate) unreadable: bool,
}

impl Scanned {
    fn new(device: DeviceId, slot: u32) -> Self {
        Self {
            piece: ScanPiece { device, slot, carve: None, space: None, blocks: Vec::new() },
            carve_sequence: 0,
            damaged: 0,
            unreadable: false,
        }
    }
}

/// A slot whose frames are being read.
struct Reading {
    header: SlotHeader,
    frames: u32,
    left: u32,
    scanned: Scanned,
}

/// Scans slots of one device and sends each when it is done. Blocks; ends early when nobody takes them
/// any more, or when `stop` is set.
pub(crate) fn device(
    slots: &Arc<Slots>,
    device: DeviceId,
    wanted: &[u32],
    stop: &Arc<AtomicBool>,
    sender: &mpsc::SyncSender<Scanned>,
) {
    for window in wanted.chunks(WINDOW) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let Some(reading) = slot_headers(slots, device, window, sender) else { return };
        if !frames(slots, device, reading, stop, sender) {
            return;
        }
    }
}

/// Reads the slot headers of a window. Slots without a good one are sent at once.
fn slot_headers(
    slots: &Slots,
    device: DeviceId,
    window: &[u32],
    sender: &mpsc::SyncSender<Scanned>,
) -> Option<Vec<Reading>> {
    let side = slots.side(device)?;
    let starts = window.iter().filter_map(|slot| slots.slot_start(device, *slot));
    let ranges: Vec<(u64, u64)> = starts.map(|start| (start, PAGE_BYTES)).collect();
    let pages = side.read_many(&ranges).unwrap_or_else(|error| {
        tracing::warn!(%device, %error, "slot headers cannot be read");
        Vec::new()
    });
    let mut pages = pages.into_iter();
    let mut reading = Vec::with_capacity(window.len());
    for &slot in window {
        let mut scanned = Scanned::new(device, slot);
        let header = match pages.next() {
            Some(Ok(page)) => slot_header(page.as_slice(), &mut scanned),
            Some(Err(_)) | None => {
                tracing::warn!(%device, slot, "slot header cannot be read");
                scanned.unreadable = true;
                None
            }
        };
        let frames = header.as_ref().map_or(0, |header| frames_of(slots.chunk_bytes(), header.frame_bytes));
        match header {
            Some(header) if frames > 0 => reading.push(Reading { header, frames, left: frames, scanned }),
            Some(_) | None => sender.send(scanned).ok()?,
        }
    }
    Some(reading)
}

fn slot_header(page: &[u8], scanned: &mut Scanned) -> Option<SlotHeader> {
    let (device, slot) = (scanned.piece.device, scanned.piece.slot);
    match SlotHeader::decode(page) {
        Ok(header) if header.slot == slot => {
            scanned.carve_sequence = header.carve_sequence;
            scanned.piece.space = header.record();
            let (space, frame_bytes) = (header.space, header.frame_bytes);
            scanned.piece.carve = Some(Carve { device, slot, space, frame_bytes });
            Some(header)
        }
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

/// Reads the frame headers of a window. False: nobody wants more.
fn frames(
    slots: &Arc<Slots>,
    device: DeviceId,
    reading: Vec<Reading>,
    stop: &Arc<AtomicBool>,
    sender: &mpsc::SyncSender<Scanned>,
) -> bool {
    let Some(side) = slots.side(device) else { return false };
    let places: Vec<(u64, u64, u32)> = reading
        .iter()
        .filter_map(|slot| {
            let start = slots.slot_start(device, slot.scanned.piece.slot)?;
            Some((start + PAGE_BYTES, slot.header.frame_bytes.get(), slot.frames))
        })
        .collect();
    let places = places.into_iter().enumerate().flat_map(|(place, (start, frame_bytes, frames))| {
        (0..frames).map(move |index| ((place, index), start + u64::from(index) * frame_bytes))
    });
    let (slots, stop, sender) = (Arc::clone(slots), Arc::clone(stop), sender.clone());
    let taken = Arc::new(AtomicBool::new(true));
    let wanted = Arc::clone(&taken);
    let mut reading: Vec<Option<Reading>> = reading.into_iter().map(Some).collect();
    let take = move |(place, index): (usize, u32), page: std::io::Result<&[u8]>| {
        let Some(slot) = reading.get_mut(place).and_then(Option::as_mut) else { return true };
        frame(&slots, slot, index, page);
        slot.left -= 1;
        if slot.left == 0
            && let Some(mut done) = reading[place].take()
        {
            // Pages come as they are read; whoever is told of them gets one order in every run.
            done.scanned.piece.blocks.sort_unstable_by_key(|found| found.frame.index);
            if sender.send(done.scanned).is_err() {
                wanted.store(false, Ordering::Relaxed);
            }
        }
        wanted.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed)
    };
    if let Err(error) = side.read_pages(Box::new(places), Box::new(take)) {
        tracing::error!(%device, %error, "header pages cannot be read; its slots stay as they are");
        return false;
    }
    taken.load(Ordering::Relaxed)
}

fn frame(slots: &Slots, slot: &mut Reading, index: u32, page: std::io::Result<&[u8]>) {
    let scanned = &mut slot.scanned;
    let frame = DiskFrame { device: scanned.piece.device, slot: scanned.piece.slot, index };
    let page = match page {
        Ok(page) => page,
        Err(error) => {
            if !scanned.unreadable {
                tracing::warn!(?frame, %error, "a header page cannot be read");
            }
            scanned.unreadable = true;
            return;
        }
    };
    match decode_header(page) {
        // A frame of an earlier carving, or of a generation that was cleared, is as good as empty.
        Ok(found) if found.space != slot.header.space || !slots.allows(frame.device, &found) => {}
        Ok(found) if fits(&found, &slot.header) => {
            scanned.piece.blocks.push(FoundHeader { frame, header: found, stats: UseStats::default() });
        }
        Ok(_) => scanned.damaged += 1,
        // Payload of an earlier carving may lie here: nothing to report.
        Err(BadHeader::Empty | BadHeader::Magic) => {}
        Err(_) => scanned.damaged += 1,
    }
}

/// Does a block of this length fit the slot's frames?
pub(crate) fn fits(found: &BlockHeader, slot: &SlotHeader) -> bool {
    let needed = found.length.round_up(PAGE_BYTES).map(terrace_core::ByteCount::get);
    needed.is_some_and(|payload| payload + PAGE_BYTES <= slot.frame_bytes.get())
}
