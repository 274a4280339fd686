//! What happens when the store is opened: the lock of the data directory, the
//! catalog, and what to do where catalog and devices disagree.

use std::fs::File;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use terrace_core::DeviceId;

use crate::api::{Carve, CatalogState, FoundHeader, MediaConfig, MediaError, OpenReport, SpaceRecord};
use crate::catalog::{self, Batch, Catalog, CatalogError};
use crate::device::lock_exclusively;
use crate::known::{forget_paths, put_paths};
use crate::slots::Slots;

pub(crate) fn check_config(config: &MediaConfig) -> Result<(), MediaError> {
    let chunk = config.chunk_bytes.get();
    if chunk == 0 || !chunk.is_multiple_of(2 << 20) {
        return Err(MediaError::BadConfig("chunk_bytes must be a multiple of 2 MiB"));
    }
    Ok(())
}

pub(crate) fn lock_directory(path: &Path) -> Result<File, MediaError> {
    let failed =
        |action: &'static str| move |source| MediaError::File { path: path.to_owned(), action, source };
    std::fs::create_dir_all(path).map_err(failed("make the data directory"))?;
    let mut options = File::options();
    // Whoever can open it can hold the lock, so nobody else may; one of an earlier version is closed to them.
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let lock = options.open(path.join("lock")).map_err(failed("open its lock file"))?;
    keep_to_owner(&path.join("lock"));
    lock_exclusively(&lock, path)?;
    Ok(lock)
}

/// Takes away what group and others may do with a file or folder of ours, if an earlier version let them.
pub(crate) fn keep_to_owner(path: &Path) {
    let narrow = || {
        let mode = std::fs::metadata(path)?.permissions().mode();
        if mode & 0o077 == 0 {
            return Ok(());
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o700))
    };
    let narrowed: std::io::Result<()> = narrow();
    if let Err(error) = narrowed {
        tracing::warn!(path = %path.display(), %error, "other users may open this; make it the daemon's own user's alone");
    }
}

/// An open catalog and what it said.
pub(crate) struct OpenedCatalog {
    pub(crate) catalog: Catalog,
    pub(crate) report: OpenReport,
    pub(crate) carve_sequence: u64,
}

/// Opens the catalog, or begins a new one in place of a damaged one.
pub(crate) fn open_catalog(
    config: &MediaConfig,
    slots: &Slots,
    notes: &mut Vec<String>,
) -> Result<OpenedCatalog, MediaError> {
    let path = config.data_dir.join("catalog");
    let (catalog, state, loaded) = open_or_begin(config, slots, &path)?;
    let mut batch = Batch::default();
    let mut carves = loaded.carves;
    // A new catalog has the mark from its first batch on.
    let mut rebuild = loaded.rebuild;
    for device in slots.ids() {
        rebuild |= replaced_device(&catalog, slots, device, &mut carves, &mut batch, notes)?;
    }
    if !catalog.usable() && batch.len() > 0 {
        // Blocks of a device that is gone would be told of until there is room to forget them.
        catalog::check_room(&path)?;
        return Err(catalog.closed().into());
    }
    if state == CatalogState::Opened && slots.incarnation() > loaded.incarnation {
        notes.push("the catalog is of an earlier time than the devices: they are scanned".to_owned());
        rebuild = true;
    }
    if rebuild {
        // What no scan can look into now is scanned when it is back.
        slots.ids().filter(|id| slots.is_out(*id)).for_each(|id| batch.delete_meta(&device_key(id)));
    }
    rebuild &= slots.ids().any(|device| !slots.fresh(device));
    if rebuild {
        batch.put_meta("rebuild", &[1]);
    } else {
        batch.delete_meta("rebuild");
    }
    let carve_sequence = carves.iter().map(|(_, sequence)| *sequence).max().unwrap_or(0);
    carves.retain(|(carve, _)| carve.slot < slots.slots(carve.device));
    let incarnation = loaded.incarnation.max(slots.incarnation()).saturating_add(1);
    batch.put_meta("incarnation", &incarnation.to_le_bytes());
    batch.delete_meta("clean");
    put_paths(slots.paths(), &mut batch);
    forget_paths(&catalog, config.devices.len(), &mut batch)?;
    if catalog.usable() {
        catalog.write(batch)?;
    } else {
        // The superblocks name this life, so a start that comes before there is room scans the devices.
        catalog.write_later(&batch);
        notes.push(
            "the disk of the catalog was full at the start: nothing is persisted until there is room"
                .to_owned(),
        );
    }
    let mut spaces = loaded.spaces;
    for record in &mut spaces {
        // The superblocks know of a clear first, and a crash may come between. Blocks of an older generation than
        // theirs would be durable in this life and gone in the next.
        record.generation = record.generation.max(slots.lowest(record.tenant, record.space));
    }
    let report = OpenReport {
        incarnation,
        spaces,
        carves: carves.into_iter().map(|(carve, _)| carve).collect(),
        scan_needed: rebuild,
        clean: loaded.clean,
        catalog: state,
        notes: Vec::new(),
    };
    Ok(OpenedCatalog { catalog, report, carve_sequence })
}

fn open_or_begin(
    config: &MediaConfig,
    slots: &Slots,
    path: &Path,
) -> Result<(Catalog, CatalogState, Loaded), MediaError> {
    let open = || Catalog::open(path, Arc::clone(&config.hooks.catalog_fails));
    let attempt = open().and_then(|(catalog, new)| {
        let loaded = load(&catalog)?;
        Ok((catalog, new, loaded))
    });
    match attempt {
        Ok((catalog, true, loaded)) => Ok((catalog, CatalogState::New, loaded)),
        Ok((catalog, false, loaded)) => Ok((catalog, CatalogState::Opened, loaded)),
        Err(error @ (CatalogError::NewerFormat { .. } | CatalogError::NoRoom { .. })) => Err(error.into()),
        // There would be nothing to rebuild it from, and nothing that says how many lives there were.
        Err(error) if slots.none_left() => Err(error.into()),
        Err(error) => {
            catalog::check_room(path)?;
            let moved_to = catalog::move_aside(path).map_err(|source| MediaError::File {
                path: path.to_owned(),
                action: "move the damaged catalog aside",
                source,
            })?;
            tracing::error!(%error, moved_to = %moved_to.display(), "catalog damaged: rebuilding it from the devices");
            let (catalog, _) = open()?;
            let loaded = load(&catalog)?;
            Ok((catalog, CatalogState::Damaged { reason: error.to_string(), moved_to }, loaded))
        }
    }
}

struct Loaded {
    spaces: Vec<SpaceRecord>,
    carves: Vec<(Carve, u64)>,
    incarnation: u32,
    rebuild: bool,
    clean: bool,
}

fn load(catalog: &Catalog) -> Result<Loaded, CatalogError> {
    let incarnation = catalog.meta("incarnation")?.and_then(|value| value.try_into().ok());
    Ok(Loaded {
        spaces: catalog.spaces()?.into_values().collect(),
        carves: catalog.carves()?,
        incarnation: incarnation.map_or(0, u32::from_le_bytes),
        rebuild: catalog.meta("rebuild")?.is_some(),
        clean: catalog.meta("clean")?.is_some(),
    })
}

/// Forgets what the catalog says of a device that another one has replaced. True if that must be scanned.
fn replaced_device(
    catalog: &Catalog,
    slots: &Slots,
    device: DeviceId,
    carves: &mut Vec<(Carve, u64)>,
    batch: &mut Batch,
    notes: &mut Vec<String>,
) -> Result<bool, CatalogError> {
    let name = device_key(device);
    let Some(uuid) = slots.uuid(device) else { return Ok(false) };
    let known = catalog.meta(&name)?;
    match &known {
        Some(known) if *known == uuid => return Ok(false),
        // Added since, or there is no catalog yet.
        None => {}
        Some(_) => {
            tracing::warn!(%device, "another device is in its place: the blocks of the old one are forgotten");
            notes.push(format!("device {device} was replaced; the blocks of the old one are forgotten"));
            catalog.blocks(4096, &mut |found| {
                let of_device = |found: &&FoundHeader| found.frame.device == device;
                found.iter().filter(of_device).for_each(|found| batch.delete_block(found.header.block));
            })?;
            for (carve, _) in carves.iter().filter(|(carve, _)| carve.device == device) {
                batch.delete_carve(device, carve.slot);
            }
            carves.retain(|(carve, _)| carve.device != device);
        }
    }
    batch.put_meta(&name, &uuid);
    Ok(!slots.fresh(device))
}

/// Entry that names the uuid of a device.
pub(crate) fn device_key(device: DeviceId) -> String {
    format!("device/{device}")
}

/// What a catalog that takes the place of a damaged one begins with.
pub(crate) fn first_entries(slots: &Slots, spaces: &[SpaceRecord], incarnation: u32) -> Batch {
    let mut batch = Batch::default();
    batch.put_meta("incarnation", &incarnation.to_le_bytes());
    for device in slots.ids() {
        if let Some(uuid) = slots.uuid(device) {
            batch.put_meta(&device_key(device), &uuid);
        }
    }
    put_paths(slots.paths(), &mut batch);
    spaces.iter().for_each(|record| batch.put_space(record));
    batch
}
