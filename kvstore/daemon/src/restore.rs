//! What survived the last life is told to the core: spaces, carved slots, blocks.
//!
//! From the catalog at once; from header pages in the background when the
//! catalog was lost, while blocks are served.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use terrace_core::{DeviceId, FoundBlock, Input, SpaceId, TenantId};
use terrace_media::{CatalogError, FoundHeader, OpenReport, ScanPiece, SpaceRecord};

use crate::engine::Engine;
use crate::status::Status;

/// Blocks told to the core at once: the lock is held for some hundred microseconds.
const BATCH: usize = 1024;
/// How often a scan that waits for the repair of the catalog looks for it.
const REPAIR_LOOK: Duration = Duration::from_millis(100);

/// Tells what the catalog knows, before the first client. Blocks. True when a
/// scan must follow, because the catalog does not know everything.
pub(crate) fn from_catalog(engine: &Engine, report: &OpenReport, device_slots: &[u32]) -> bool {
    for record in &report.spaces {
        space_found(engine, record);
    }
    if report.scan_needed {
        unscanned(engine, device_slots);
    }
    for carve in &report.carves {
        let (device, slot, space, frame_bytes) = (carve.device, carve.slot, carve.space, carve.frame_bytes);
        engine.submit(Input::SlotCarved { device, slot, space, frame_bytes });
    }
    let mut facts = BTreeMap::new();
    let told = engine.media().blocks(BATCH, &mut |found| {
        let blocks = serving(engine, &mut facts, &found);
        engine.submit(Input::BlocksRestored { blocks });
    });
    engine.submit(Input::Restored);
    match told {
        Ok(blocks) => {
            tracing::info!(blocks, spaces = report.spaces.len(), "catalog read");
            report.scan_needed
        }
        Err(error) => {
            tracing::error!(%error, "the catalog cannot be read through; its blocks are looked for on the devices");
            if !report.scan_needed {
                unscanned(engine, device_slots);
            }
            if let Err(error) = engine.media().renew_catalog() {
                tracing::error!(%error, "a new catalog cannot be made now");
                engine.catalog_failed();
            }
            true
        }
    }
}

/// Until they are scanned, blocks may lie in any slot.
pub(crate) fn unscanned(engine: &Engine, device_slots: &[u32]) {
    for (device, slots) in device_slots.iter().enumerate() {
        let device = DeviceId::new(u16::try_from(device).expect("the configuration allows 64 devices"));
        engine.submit(Input::SlotsUnscanned { device, slots: (0..*slots).collect() });
    }
}

/// Scans every device, again after a failure of the catalog, until all is known. Blocks; clients are
/// served meanwhile. One scan at a time: a second call returns at once, because the first goes on.
pub(crate) fn scan_to_the_end(engine: &Arc<Engine>, status: &Status, device_slots: &[u32]) {
    let Some(_one) = status.scan_alone() else { return };
    let mut left_out = BTreeSet::new();
    while let Err(error) = from_headers(engine, status, device_slots, &mut left_out) {
        tracing::error!(%error, "the scan stopped; it goes on when the catalog works again");
        engine.catalog_failed();
        while engine.is_degraded() {
            if engine.media().scan_stopped() {
                return;
            }
            std::thread::sleep(REPAIR_LOOK);
        }
    }
}

/// Scans every device that can be synced. Blocks until it is done; clients are served meanwhile.
///
/// # Errors
/// The catalog failed. What was found before is known.
fn from_headers(
    engine: &Arc<Engine>,
    status: &Status,
    device_slots: &[u32],
    left_out: &mut BTreeSet<DeviceId>,
) -> Result<(), CatalogError> {
    // After a kill, a header page may be read back that only the drive's cache
    // holds. The core takes found blocks for durable, so make them that first.
    for device in engine.media().sync_all() {
        if left_out.insert(device) {
            leave_out(engine, status, device);
        }
    }
    status.scan_begins(device_slots.iter().map(|slots| u64::from(*slots)).sum());
    let scanned = engine.media().scan_but(left_out, &mut |piece| {
        slot_scanned(engine, &piece);
        status.slot_scanned();
    });
    if left_out.is_empty() || scanned.is_err() {
        status.scan_ends();
    }
    let report = scanned?;
    if !left_out.is_empty() {
        tracing::warn!(
            slots = report.slots,
            blocks = report.blocks,
            devices = left_out.len(),
            "catalog rebuilt from the header pages, but for those of some devices; the next start looks for them"
        );
        return Ok(());
    }
    if !report.complete {
        tracing::info!(
            slots = report.slots,
            "the scan of the devices was ended early; the next start repeats it"
        );
        return Ok(());
    }
    tracing::info!(
        slots = report.slots,
        blocks = report.blocks,
        damaged = report.damaged,
        unreadable = report.unreadable,
        "catalog rebuilt from the header pages"
    );
    status.note(format!(
        "the catalog was rebuilt from the header pages of {} slots: {} blocks, {} damaged pages, {} unreadable slots",
        report.slots, report.blocks, report.damaged, report.unreadable
    ));
    Ok(())
}

/// Nothing that a device holds is known to be durable: it is not used in this life.
fn leave_out(engine: &Engine, status: &Status, device: DeviceId) {
    let path = engine.media().facts().devices.into_iter().nth(usize::from(device.get()));
    let path = path.map(|facts| facts.path.display().to_string()).unwrap_or_default();
    tracing::error!(device = %path, "a device cannot be synced; its blocks are not looked for, and nothing is written to it");
    status.note(format!(
        "{path} could not be synced: it was not scanned, and is not used until the next start"
    ));
    engine.media().eject(device, "it could not be synced, so nothing that it holds is known to be durable");
}

fn slot_scanned(engine: &Engine, piece: &ScanPiece) {
    if let Some(record) = &piece.space {
        space_found(engine, record);
    }
    if let Some(carve) = &piece.carve {
        let (device, slot, space, frame_bytes) = (carve.device, carve.slot, carve.space, carve.frame_bytes);
        engine.submit(Input::SlotCarved { device, slot, space, frame_bytes });
    }
    let mut facts = BTreeMap::new();
    for batch in piece.blocks.chunks(BATCH) {
        let blocks = serving(engine, &mut facts, batch);
        engine.submit(Input::BlocksFound { blocks });
    }
    engine.submit(Input::SlotsScanned { device: piece.device, slots: vec![piece.slot] });
}

fn space_found(engine: &Engine, record: &SpaceRecord) {
    match engine.spaces().found(record) {
        Some(known) => engine.submit(Input::SpaceKnown {
            space: record.space,
            tenant: record.tenant,
            block_bytes: known.manifest.block_bytes,
            block_tokens: known.manifest.tokens_per_block,
            generation: known.generation,
        }),
        None => {
            tracing::warn!(space = %record.space, "a space's manifest cannot be read; its blocks are left alone");
        }
    }
}

/// Whose a space is and its lowest valid generation, if it is known.
type SpaceFacts = BTreeMap<SpaceId, Option<(TenantId, u64)>>;

/// What of these the core is told: blocks of known spaces, of no cleared generation.
fn serving(engine: &Engine, known: &mut SpaceFacts, found: &[FoundHeader]) -> Vec<FoundBlock> {
    let mut blocks = Vec::with_capacity(found.len());
    for FoundHeader { frame, header, stats } in found {
        let facts = known.entry(header.space).or_insert_with(|| {
            engine.spaces().one(header.space).map(|known| (known.tenant, known.generation))
        });
        let serves = facts
            .is_some_and(|(tenant, generation)| header.tenant == tenant && header.generation >= generation);
        if serves {
            blocks.push(FoundBlock {
                block: header.block,
                space: header.space,
                parent: header.parent,
                length: header.length,
                checksum: header.checksum,
                frame: *frame,
                write_sequence: header.write_sequence,
                stats: *stats,
            });
        }
    }
    blocks
}
