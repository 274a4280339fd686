//! What lies at the paths of the devices when the store is opened: looked at before anything is written.
//!
//! A device that cannot be trusted does not keep the others from serving: the node runs without it and leaves
//! every byte of it alone, because it may be somebody else's. What only a human can have meant (a newer format,
//! another chunk size, a device in use) is an error instead.

use std::path::Path;
use std::sync::Arc;

use crate::api::{DeviceConfig, MediaConfig, MediaError};
use crate::device::DeviceFile;
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
    Out(&'c DeviceConfig, MediaError),
}

/// Looks at every device. A device that is out is closed again, so that whoever owns it can lock it.
///
/// # Errors
/// The configuration has to be changed, or no device is left and that is no fault of a device: see [`none_left`].
pub(crate) fn find(config: &MediaConfig) -> Result<Vec<Found<'_>>, MediaError> {
    let mut found = Vec::with_capacity(config.devices.len());
    for device in &config.devices {
        found.push(one(config, device)?);
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
        Found::Good(_) => false,
        Found::Out(_, error) => first_start || matches!(error, MediaError::OtherNode { .. }),
    };
    let Some(mistake) = found.iter().position(is_mistake) else { return Ok(found) };
    match found.into_iter().nth(mistake) {
        Some(Found::Out(_, error)) => Err(error),
        Some(Found::Good(_)) | None => Ok(Vec::new()),
    }
}

fn one<'c>(config: &MediaConfig, device: &'c DeviceConfig) -> Result<Found<'c>, MediaError> {
    let bytes = device_bytes(device.slots, config.chunk_bytes.get())?;
    let file = Arc::new(DeviceFile::open(&device.path, bytes)?);
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
