//! What lies at the paths of the devices when the store is opened: looked at before anything is written.
//!
//! A device that cannot be trusted does not keep the others from serving: the node runs without it and leaves
//! every byte of it alone, because it may be somebody else's. Nor does one that cannot be opened, if the node had a
//! device there: disks die. What only a human can have meant (a newer format, another chunk size, a device in use, a
//! path that is new and leads nowhere) is an error instead.

use std::path::Path;
use std::sync::Arc;

use crate::api::{DeviceConfig, MediaConfig, MediaError};
use crate::device::DeviceFile;
use crate::known::Known;
use crate::side::SideIo;
use crate::superblock::{DATA_START, Superblock};

/// A device that can be used.
pub(crate) struct Good<'c> {
    pub(crate) config: &'c DeviceConfig,
    pub(crate) bytes: u64,
    pub(crate) file: Arc<DeviceFile>,
    pub(crate) side: SideIo,
    /// `None` for a new device.
    pub(crate) superblock: Option<Superblock>,
}

/// A device, or why the node runs without it.
pub(crate) enum Found<'c> {
    Good(Good<'c>),
    /// What is there is not to be trusted.
    Out(&'c DeviceConfig, MediaError),
    /// It cannot be opened.
    Shut(&'c DeviceConfig, MediaError),
}

/// Looks at every device. A device that is out is closed again, so that whoever owns it can lock it.
///
/// # Errors
/// The configuration has to be changed, or no device is left and that is no fault of a device: see [`none_left`].
pub(crate) fn find(config: &MediaConfig) -> Result<Vec<Found<'_>>, MediaError> {
    let known = Known::new(&config.data_dir);
    let mut found = Vec::with_capacity(config.devices.len());
    for (number, device) in config.devices.iter().enumerate() {
        found.push(one(config, number, device, &known)?);
    }
    // Some device says that the node has run before, should the catalog be lost.
    let ran = found.iter().any(|found| matches!(found, Found::Good(good) if good.superblock.is_some()));
    let is_new = |(number, found): (usize, &Found<'_>)| match found {
        Found::Shut(device, _) => !known.had(number, &device.path).unwrap_or(ran),
        Found::Good(_) | Found::Out(..) => false,
    };
    if let Some(new) = found.iter().enumerate().position(is_new)
        && let Found::Shut(_, error) = found.swap_remove(new)
    {
        return Err(MediaError::NewAndShut { error: Box::new(error) });
    }
    let is_good = |found: &Found<'_>| matches!(found, Found::Good(_));
    if found.is_empty() || found.iter().any(is_good) {
        return Ok(found);
    }
    none_left(config, found)
}

/// Without a device the node can serve from memory, which is what an operator wants when the only device was
/// overwritten. A device of another node is a mistake in the paths, and so is any strange file at the first start.
fn none_left<'c>(config: &MediaConfig, found: Vec<Found<'c>>) -> Result<Vec<Found<'c>>, MediaError> {
    let first_start = !config.data_dir.join("catalog").join("CURRENT").exists();
    let is_mistake = |out: &Found<'_>| match out {
        // The node had a device there.
        Found::Good(_) | Found::Shut(..) => false,
        Found::Out(_, error) => first_start || matches!(error, MediaError::OtherNode { .. }),
    };
    let Some(mistake) = found.iter().position(is_mistake) else { return Ok(found) };
    match found.into_iter().nth(mistake) {
        Some(Found::Out(_, error)) => Err(error),
        Some(Found::Good(_) | Found::Shut(..)) | None => Ok(Vec::new()),
    }
}

fn one<'c>(
    config: &MediaConfig,
    number: usize,
    device: &'c DeviceConfig,
    known: &Known,
) -> Result<Found<'c>, MediaError> {
    let bytes = device_bytes(device.slots, config.chunk_bytes.get())?;
    let file = match open(number, device, bytes, known) {
        Ok(file) => Arc::new(file),
        Err(error) if is_shut(&error) => return Ok(Found::Shut(device, error)),
        Err(error) => return Err(error),
    };
    let side = SideIo::new(Arc::clone(&file), config.backend);
    let read = if file.fresh { Ok(None) } else { Superblock::read(&side, &device.path) };
    let checked = read.and_then(|superblock| {
        superblock.iter().try_for_each(|superblock| check(superblock, config, &device.path))?;
        Ok(superblock)
    });
    match checked {
        Ok(superblock) => Ok(Found::Good(Good { config: device, bytes, file, side, superblock })),
        Err(error) if is_out(&error) => Ok(Found::Out(device, error)),
        Err(error) => Err(error),
    }
}

/// Opens a device. A file that is not there is made, unless the node had a device there: its file system may not be
/// mounted, and what is made in its place would take the room of another. Nor is one made where raw devices are.
fn open(number: usize, device: &DeviceConfig, bytes: u64, known: &Known) -> Result<DeviceFile, MediaError> {
    let path = &device.path;
    let missing = |error: std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    if std::fs::metadata(path).is_err_and(missing) {
        let raw = path.starts_with("/dev") && !path.starts_with("/dev/shm");
        if raw || path.is_symlink() || known.had(number, path) == Some(true) {
            return Err(MediaError::Gone { path: path.clone() });
        }
    }
    DeviceFile::open(path, bytes)
}

/// Is it the device that does not open, and not the configuration, somebody else or the whole system?
fn is_shut(error: &MediaError) -> bool {
    match error {
        MediaError::Gone { .. } => true,
        MediaError::File { source, .. } => {
            let code = source.raw_os_error();
            code.is_some_and(|code| ![libc::EMFILE, libc::ENFILE, libc::ENOMEM].contains(&code))
        }
        MediaError::NotOurs { .. }
        | MediaError::SuperblockDamaged { .. }
        | MediaError::OtherNode { .. }
        | MediaError::NewerFormat { .. }
        | MediaError::OtherChunkBytes { .. }
        | MediaError::InUse { .. }
        | MediaError::NewAndShut { .. }
        | MediaError::BadConfig(_)
        | MediaError::TableFull { .. }
        | MediaError::Catalog(_) => false,
    }
}

/// Is this about one device alone, so that the others can serve?
fn is_out(error: &MediaError) -> bool {
    match error {
        MediaError::NotOurs { .. }
        | MediaError::SuperblockDamaged { .. }
        | MediaError::OtherNode { .. }
        // Its superblock cannot be read.
        | MediaError::File { .. } => true,
        MediaError::NewerFormat { .. }
        | MediaError::OtherChunkBytes { .. }
        | MediaError::InUse { .. }
        | MediaError::Gone { .. }
        | MediaError::NewAndShut { .. }
        | MediaError::BadConfig(_)
        | MediaError::TableFull { .. }
        | MediaError::Catalog(_) => false,
    }
}

fn device_bytes(slots: u32, chunk_bytes: u64) -> Result<u64, MediaError> {
    let bytes = u64::from(slots).checked_mul(chunk_bytes).and_then(|bytes| bytes.checked_add(DATA_START));
    bytes
        .filter(|_| slots > 0)
        .ok_or(MediaError::BadConfig("a device has at least one slot and fewer than 2^64 bytes"))
}

fn check(superblock: &Superblock, config: &MediaConfig, path: &Path) -> Result<(), MediaError> {
    if superblock.node != config.node {
        return Err(MediaError::OtherNode {
            path: path.to_owned(),
            found: hex(&superblock.node),
            ours: hex(&config.node),
        });
    }
    if superblock.chunk_bytes != config.chunk_bytes {
        return Err(MediaError::OtherChunkBytes {
            path: path.to_owned(),
            found: superblock.chunk_bytes.get(),
            ours: config.chunk_bytes.get(),
        });
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
