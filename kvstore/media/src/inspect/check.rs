//! Comparing devices with themselves and with the catalog: what a start would
//! find, and what it would not.

use std::collections::BTreeMap;
use std::sync::mpsc;

use terrace_core::{BlockHeader, BlockId, DeviceId, DiskFrame};

use super::{OfflineCatalog, OfflineDevice};
use crate::api::{FoundHeader, MediaError};
use crate::header::{BadHeader, SlotHeader, decode_header};
use crate::memory::PAGE_BYTES;
use crate::scan::fits;
use crate::scrub::holds;
use crate::slots::frames_of;
use crate::superblock::{DATA_START, SuperblockFacts};

/// Slots whose headers are read before the frames of them all.
const WINDOW: u32 = 256;
/// Header pages that are read ahead of who compares them.
const PAGES_AHEAD: usize = 4096;

/// How much is looked at and told.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// Payloads are read and compared as well.
    pub payloads: bool,
    /// Findings of each kind that are listed; all are counted.
    pub findings_max: usize,
}

/// What may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FindingKind {
    /// A slot header that is neither empty nor valid.
    DamagedSlot,
    /// The header of another slot: a misdirected write.
    MisdirectedSlot,
    /// The catalog says that the slot is carved otherwise.
    CarveDiffers,
    /// A frame header that is neither empty nor valid.
    DamagedHeader,
    /// A payload that does not match its header.
    DamagedPayload,
    /// A page or frame that cannot be read.
    Unreadable,
    /// The catalog says that a block is here, and another one is: a lost or misdirected write.
    OtherBlock,
    /// The catalog says that a block is here, and nothing is.
    EntryWithoutFrame,
    /// The right block, but not as the catalog says: a lost write, or a catalog of another time.
    EntryDiffers,
    /// A whole block that the catalog does not know: evicted, or never committed.
    FrameWithoutEntry,
    /// A copy of a block that lies elsewhere, too.
    Duplicate,
    /// Of a generation that was cleared.
    Cleared,
}

impl FindingKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::DamagedSlot,
        Self::MisdirectedSlot,
        Self::CarveDiffers,
        Self::DamagedHeader,
        Self::DamagedPayload,
        Self::Unreadable,
        Self::OtherBlock,
        Self::EntryWithoutFrame,
        Self::EntryDiffers,
        Self::FrameWithoutEntry,
        Self::Duplicate,
        Self::Cleared,
    ];

    /// Something is wrong. The rest is what an ordinary life leaves behind.
    pub const fn is_damage(self) -> bool {
        match self {
            Self::DamagedSlot
            | Self::MisdirectedSlot
            | Self::CarveDiffers
            | Self::DamagedHeader
            | Self::DamagedPayload
            | Self::Unreadable
            | Self::OtherBlock
            | Self::EntryWithoutFrame
            | Self::EntryDiffers => true,
            Self::FrameWithoutEntry | Self::Duplicate | Self::Cleared => false,
        }
    }

    /// Its name, for tables and programs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::DamagedSlot => "damaged_slot",
            Self::MisdirectedSlot => "misdirected_slot",
            Self::CarveDiffers => "carve_differs",
            Self::DamagedHeader => "damaged_header",
            Self::DamagedPayload => "damaged_payload",
            Self::Unreadable => "unreadable",
            Self::OtherBlock => "other_block",
            Self::EntryWithoutFrame => "entry_without_frame",
            Self::EntryDiffers => "entry_differs",
            Self::FrameWithoutEntry => "frame_without_entry",
            Self::Duplicate => "duplicate",
            Self::Cleared => "cleared",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub kind: FindingKind,
    /// Place of the device in the list that was given.
    pub device: usize,
    /// Slot.
    pub slot: u32,
    /// Frame; `None` for the slot's own header.
    pub index: Option<u32>,
    /// Which block, if one is concerned.
    pub block: Option<BlockId>,
    /// More, as a sentence.
    pub detail: String,
}

/// What lies on the devices.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// Slots looked at.
    pub slots: u64,
    /// Of these, carved.
    pub carved: u64,
    /// Frames looked at.
    pub frames: u64,
    /// Frames with a valid header.
    pub blocks: u64,
    /// Entries of the catalog that were compared; `None` without a catalog.
    pub entries: Option<u64>,
    /// How often each kind was found.
    pub counts: BTreeMap<FindingKind, u64>,
    /// The first of each kind.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Something is wrong.
    pub fn is_damaged(&self) -> bool {
        self.counts.keys().any(|kind| kind.is_damage())
    }
}

/// Looks at every slot and frame of some devices and, if a catalog is given, at its entries for them.
///
/// # Errors
/// A superblock or the catalog is no good, or a device cannot be read at all.
pub fn check(
    devices: &[OfflineDevice],
    catalog: Option<&OfflineCatalog>,
    options: CheckOptions,
) -> Result<CheckReport, MediaError> {
    let mut check = Check {
        options,
        report: CheckReport::default(),
        entries: BTreeMap::new(),
        seen: BTreeMap::new(),
        copies: BTreeMap::new(),
        carves: BTreeMap::new(),
        ids: Vec::new(),
        with_catalog: catalog.is_some(),
    };
    check.learn(devices, catalog)?;
    for (place, device) in devices.iter().enumerate() {
        check.device(place, device)?;
    }
    check.entries_left();
    Ok(check.report)
}

struct Entry {
    found: FoundHeader,
    met: bool,
}

struct Check {
    options: CheckOptions,
    report: CheckReport,
    entries: BTreeMap<BlockId, Entry>,
    /// First frame in which a block was seen.
    seen: BTreeMap<BlockId, (usize, u32, u32)>,
    /// What lies in the further frames of blocks that were seen before.
    copies: BTreeMap<(usize, u32, u32), BlockId>,
    carves: BTreeMap<(DeviceId, u32), (terrace_core::SpaceId, u64)>,
    /// The number that the catalog has for each device.
    ids: Vec<Option<DeviceId>>,
    with_catalog: bool,
}

/// A header page and where it was.
type Page = (u32, u32, Result<BlockHeader, Unread>);

enum Unread {
    Bad(BadHeader),
    Io(std::io::Error),
}

impl Check {
    fn learn(
        &mut self,
        devices: &[OfflineDevice],
        catalog: Option<&OfflineCatalog>,
    ) -> Result<(), MediaError> {
        let Some(catalog) = catalog else {
            self.ids = vec![None; devices.len()];
            return Ok(());
        };
        let numbers = catalog.devices()?;
        for device in devices {
            let uuid = device.facts()?.uuid;
            self.ids.push(numbers.iter().find(|(_, known)| **known == uuid).map(|(number, _)| *number));
        }
        let (ids, entries) = (&self.ids, &mut self.entries);
        catalog.all(&mut |batch| {
            for found in batch.into_iter().filter(|found| ids.contains(&Some(found.frame.device))) {
                entries.insert(found.header.block, Entry { found, met: false });
            }
        })?;
        self.report.entries = Some(self.entries.len() as u64);
        for (carve, _) in catalog.catalog.carves()? {
            self.carves.insert((carve.device, carve.slot), (carve.space, carve.frame_bytes.get()));
        }
        Ok(())
    }

    fn device(&mut self, place: usize, device: &OfflineDevice) -> Result<(), MediaError> {
        let facts = device.facts()?.clone();
        let mut first = 0;
        while first < facts.slots {
            let window: Vec<u32> = (first..facts.slots.min(first.saturating_add(WINDOW))).collect();
            first = first.saturating_add(WINDOW);
            let carved = self.slot_headers(place, device, &facts, &window)?;
            self.frames(place, device, &facts, carved)?;
        }
        Ok(())
    }

    fn slot_headers(
        &mut self,
        place: usize,
        device: &OfflineDevice,
        facts: &SuperblockFacts,
        window: &[u32],
    ) -> Result<Vec<(u32, SlotHeader)>, MediaError> {
        let start = |slot: &u32| (slot_start(facts, *slot), PAGE_BYTES);
        let ranges: Vec<(u64, u64)> = window.iter().map(start).collect();
        let failed = |source| MediaError::File { path: device.path.clone(), action: "read it", source };
        let pages = device.side.read_many(&ranges).map_err(failed)?;
        let mut carved = Vec::new();
        for (&slot, page) in window.iter().zip(pages) {
            self.report.slots += 1;
            let known = self.ids[place].and_then(|id| self.carves.get(&(id, slot)).copied());
            let finding = match page.map(|page| SlotHeader::decode(page.as_slice())) {
                Err(error) => Some((FindingKind::Unreadable, error.to_string())),
                Ok(Ok(header)) if header.slot != slot => Some((
                    FindingKind::MisdirectedSlot,
                    format!("this is the header of slot {}", header.slot),
                )),
                Ok(Ok(header)) => {
                    let is = (header.space, header.frame_bytes.get());
                    let differs = known.is_some_and(|known| known != is);
                    self.report.carved += 1;
                    carved.push((slot, header));
                    let text = || "the catalog names another space or size of frames".to_owned();
                    differs.then(|| (FindingKind::CarveDiffers, text()))
                }
                Ok(Err(BadHeader::Empty)) if known.is_none() => None,
                Ok(Err(BadHeader::Empty)) => {
                    Some((FindingKind::CarveDiffers, "the catalog says that it is carved".to_owned()))
                }
                Ok(Err(error)) => Some((FindingKind::DamagedSlot, error.to_string())),
            };
            if let Some((kind, detail)) = finding {
                self.find(Finding { kind, device: place, slot, index: None, block: None, detail });
            }
        }
        Ok(carved)
    }

    fn frames(
        &mut self,
        place: usize,
        device: &OfflineDevice,
        facts: &SuperblockFacts,
        carved: Vec<(u32, SlotHeader)>,
    ) -> Result<(), MediaError> {
        let headers: BTreeMap<u32, SlotHeader> = carved.into_iter().collect();
        let sizes: Vec<(u32, u64, u64, u32)> = headers
            .iter()
            .map(|(slot, header)| {
                let frames = frames_of(facts.chunk_bytes.get(), header.frame_bytes);
                (*slot, slot_start(facts, *slot) + PAGE_BYTES, header.frame_bytes.get(), frames)
            })
            .collect();
        let places = sizes.into_iter().flat_map(|(slot, start, frame_bytes, frames)| {
            (0..frames).map(move |index| ((slot, index), start + u64::from(index) * frame_bytes))
        });
        let (sender, receiver) = mpsc::sync_channel::<Page>(PAGES_AHEAD);
        let take = move |(slot, index): (u32, u32), page: std::io::Result<&[u8]>| {
            let found = page.map_err(Unread::Io).and_then(|page| decode_header(page).map_err(Unread::Bad));
            sender.send((slot, index, found)).is_ok()
        };
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || device.side.read_pages(Box::new(places), Box::new(take)));
            for (slot, index, found) in receiver {
                if let Some(header) = headers.get(&slot) {
                    self.frame((place, slot, index), device, facts, header, found);
                }
            }
            let read =
                reader.join().unwrap_or_else(|_| Err(std::io::Error::other("the reading thread panicked")));
            read.map_err(|source| MediaError::File { path: device.path.clone(), action: "read it", source })
        })
    }

    fn frame(
        &mut self,
        at: (usize, u32, u32),
        device: &OfflineDevice,
        facts: &SuperblockFacts,
        slot: &SlotHeader,
        found: Result<BlockHeader, Unread>,
    ) {
        self.report.frames += 1;
        match found {
            // Payload of an earlier carving may lie here.
            Err(Unread::Bad(BadHeader::Empty | BadHeader::Magic)) => {}
            Err(Unread::Bad(error)) => self.tell(at, FindingKind::DamagedHeader, None, error.to_string()),
            Err(Unread::Io(error)) => self.tell(at, FindingKind::Unreadable, None, error.to_string()),
            // Of an earlier carving.
            Ok(header) if header.space != slot.space => {}
            Ok(header) if !fits(&header, slot) => {
                let text = format!("{} bytes do not fit the frame", header.length.get());
                self.tell(at, FindingKind::DamagedHeader, Some(header.block), text);
            }
            Ok(header) => self.block(at, device, facts, slot, &header),
        }
    }

    fn block(
        &mut self,
        at: (usize, u32, u32),
        device: &OfflineDevice,
        facts: &SuperblockFacts,
        slot: &SlotHeader,
        header: &BlockHeader,
    ) {
        self.report.blocks += 1;
        let block = Some(header.block);
        let lowest = facts
            .cleared
            .iter()
            .find(|(tenant, space, _)| (*tenant, *space) == (header.tenant, header.space));
        if let Some((.., lowest)) = lowest
            && header.generation < *lowest
        {
            let text = format!("generation {}, the lowest valid one is {lowest}", header.generation);
            return self.tell(at, FindingKind::Cleared, block, text);
        }
        if self.options.payloads {
            self.payload(at, device, facts, slot, header);
        }
        self.compare(at, header);
        match self.seen.get(&header.block) {
            None => drop(self.seen.insert(header.block, at)),
            Some((_, slot, index)) => {
                let text = format!("seen before in slot {slot}, frame {index}");
                self.copies.insert(at, header.block);
                self.tell(at, FindingKind::Duplicate, block, text);
            }
        }
    }

    /// With what the catalog says of the block.
    fn compare(&mut self, at: (usize, u32, u32), header: &BlockHeader) {
        let here = self.ids[at.0].map(|device| DiskFrame { device, slot: at.1, index: at.2 });
        let (Some(here), true) = (here, self.with_catalog) else { return };
        let finding = match self.entries.get_mut(&header.block) {
            Some(entry) if entry.found.frame == here => {
                entry.met = true;
                let differs = entry.found.header != *header;
                differs.then(|| (FindingKind::EntryDiffers, entry_differs(&entry.found.header, header)))
            }
            // An older copy of it; `Duplicate` tells when the newer one is there as well.
            Some(entry) if entry.found.header.write_sequence >= header.write_sequence => None,
            // Written, and its commit was cut short.
            Some(_) => Some((FindingKind::FrameWithoutEntry, "newer than what the catalog names".to_owned())),
            None => {
                Some((FindingKind::FrameWithoutEntry, format!("write sequence {}", header.write_sequence)))
            }
        };
        if let Some((kind, detail)) = finding {
            self.tell(at, kind, Some(header.block), detail);
        }
    }

    fn payload(
        &mut self,
        at: (usize, u32, u32),
        device: &OfflineDevice,
        facts: &SuperblockFacts,
        slot: &SlotHeader,
        header: &BlockHeader,
    ) {
        let frame_bytes = slot.frame_bytes.get();
        let offset = slot_start(facts, at.1) + PAGE_BYTES + u64::from(at.2) * frame_bytes;
        let block = Some(header.block);
        match device.page(offset, frame_bytes) {
            Ok(bytes) if holds(bytes.as_slice(), header) => {}
            Ok(_) => {
                self.tell(at, FindingKind::DamagedPayload, block, "the checksum does not match".to_owned())
            }
            Err(error) => self.tell(at, FindingKind::Unreadable, block, error.to_string()),
        }
    }

    /// Entries whose frames hold something else, or nothing.
    fn entries_left(&mut self) {
        let mut there = std::mem::take(&mut self.copies);
        there.extend(self.seen.iter().map(|(block, at)| (*at, *block)));
        let left: Vec<FoundHeader> =
            self.entries.values().filter(|entry| !entry.met).map(|entry| entry.found).collect();
        for found in left {
            let device = self.ids.iter().position(|id| *id == Some(found.frame.device));
            let Some(device) = device else { continue };
            let at = (device, found.frame.slot, found.frame.index);
            let block = Some(found.header.block);
            match there.get(&at) {
                Some(other) => {
                    let text = format!("block {other} lies here");
                    self.tell(at, FindingKind::OtherBlock, block, text);
                }
                None => {
                    let text = "nothing valid lies where the catalog says".to_owned();
                    self.tell(at, FindingKind::EntryWithoutFrame, block, text);
                }
            }
        }
    }

    fn tell(&mut self, at: (usize, u32, u32), kind: FindingKind, block: Option<BlockId>, detail: String) {
        self.find(Finding { kind, device: at.0, slot: at.1, index: Some(at.2), block, detail });
    }

    fn find(&mut self, finding: Finding) {
        let count = self.report.counts.entry(finding.kind).or_default();
        *count += 1;
        if *count <= self.options.findings_max as u64 {
            self.report.findings.push(finding);
        }
    }
}

fn slot_start(facts: &SuperblockFacts, slot: u32) -> u64 {
    DATA_START.saturating_add(u64::from(slot).saturating_mul(facts.chunk_bytes.get()))
}

fn entry_differs(entry: &BlockHeader, frame: &BlockHeader) -> String {
    if entry.write_sequence == frame.write_sequence {
        "the catalog says another length, checksum, parent or generation".to_owned()
    } else {
        format!("write sequence {}, the catalog says {}", frame.write_sequence, entry.write_sequence)
    }
}
