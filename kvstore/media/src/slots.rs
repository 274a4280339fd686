//! The devices with their superblocks: opening, where a slot lies, which
//! generations are valid.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terrace_core::{BlockHeader, ByteCount, DeviceId, Fault, SpaceId, TenantId};

use crate::api::{DeviceFacts, MediaConfig, MediaError};
use crate::device::{BlockIo, Device, DeviceFile};
use crate::side::SideIo;
use crate::superblock::{CLEARED_MAX, DATA_START, Superblock};

/// All devices of the node, by `DeviceId`.
pub(crate) struct Slots {
    devices: Vec<Entry>,
    chunk_bytes: u64,
}

struct Entry {
    io: Arc<dyn BlockIo>,
    side: SideIo,
    superblock: Mutex<Superblock>,
    path: PathBuf,
    slots: u32,
    fresh: bool,
}

impl Slots {
    /// Opens every device. Nothing is written before all were found good.
    pub(crate) fn open(config: &MediaConfig, notes: &mut Vec<String>) -> Result<Self, MediaError> {
        let chunk_bytes = config.chunk_bytes.get();
        let mut opened = Vec::with_capacity(config.devices.len());
        for device in &config.devices {
            let bytes = device_bytes(device.slots, chunk_bytes)?;
            let file = Arc::new(DeviceFile::open(&device.path, bytes)?);
            let side = SideIo::new(Arc::clone(&file), config.backend);
            let found = if file.fresh { None } else { Superblock::read(&side, &device.path)? };
            if let Some(superblock) = &found {
                check(superblock, config, &device.path)?;
            }
            opened.push((device, bytes, file, side, found));
        }
        let known = opened.iter().filter_map(|(.., found)| found.as_ref().map(|found| found.incarnation));
        let incarnation = known.max().unwrap_or(0);
        let mut devices = Vec::with_capacity(opened.len());
        for (number, (device, bytes, file, side, found)) in opened.into_iter().enumerate() {
            if file.missing_bytes > 0 && found.as_ref().is_some_and(|found| found.slots >= device.slots) {
                notes.push(format!(
                    "{}: {} bytes were missing at its end; the blocks there are lost",
                    device.path.display(),
                    file.missing_bytes
                ));
            }
            file.preallocate(bytes)?;
            let fresh = found.is_none();
            let mut superblock = found.unwrap_or_else(|| Superblock {
                uuid: random_uuid(&device.path),
                node: config.node,
                chunk_bytes: config.chunk_bytes,
                slots: 0,
                incarnation,
                sequence: 0,
                cleared: std::collections::BTreeMap::new(),
            });
            if fresh || superblock.slots != device.slots {
                superblock.slots = device.slots;
                superblock.write(&side, &device.path)?;
            }
            let in_flight = config.bytes_in_flight_max.get();
            let io: Arc<dyn BlockIo> = Arc::new(Device::start(file, config.backend, in_flight)?);
            let id = u16::try_from(number).map_err(|_| MediaError::BadConfig("more than 65,536 devices"))?;
            let io = match &config.hooks.wrap_device {
                Some(wrap) => wrap(DeviceId::new(id), io),
                None => io,
            };
            let (path, slots) = (device.path.clone(), device.slots);
            devices.push(Entry { io, side, superblock: Mutex::new(superblock), path, slots, fresh });
        }
        Ok(Self { devices, chunk_bytes })
    }

    fn entry(&self, device: DeviceId) -> Option<&Entry> {
        self.devices.get(usize::from(device.get()))
    }

    /// Device ids, in order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = DeviceId> + use<> {
        let count = u16::try_from(self.devices.len()).expect("open refuses more");
        (0..count).map(DeviceId::new)
    }

    pub(crate) fn io(&self, device: DeviceId) -> Option<&Arc<dyn BlockIo>> {
        self.entry(device).map(|entry| &entry.io)
    }

    pub(crate) fn side(&self, device: DeviceId) -> Option<&SideIo> {
        self.entry(device).map(|entry| &entry.side)
    }

    pub(crate) fn slots(&self, device: DeviceId) -> u32 {
        self.entry(device).map_or(0, |entry| entry.slots)
    }

    pub(crate) fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    pub(crate) fn fresh(&self, device: DeviceId) -> bool {
        self.entry(device).is_some_and(|entry| entry.fresh)
    }

    pub(crate) fn uuid(&self, device: DeviceId) -> Option<[u8; 16]> {
        self.entry(device).map(|entry| lock(entry).uuid)
    }

    /// First byte of a slot.
    pub(crate) fn slot_start(&self, device: DeviceId, slot: u32) -> Option<u64> {
        let entry = self.entry(device)?;
        (slot < entry.slots).then(|| DATA_START + u64::from(slot) * self.chunk_bytes)
    }

    /// May frames of this slot be written here? Keeps a wrong offset away from superblocks and slot headers.
    pub(crate) fn inside_slot(&self, device: DeviceId, slot: u32, offset: u64, bytes: u64) -> bool {
        let Some(start) = self.slot_start(device, slot) else { return false };
        let end = offset.checked_add(bytes);
        offset >= start + crate::memory::PAGE_BYTES && end.is_some_and(|end| end <= start + self.chunk_bytes)
    }

    /// May this header be served? What any device knows of clears counts: a clear may have been cut short
    /// between two of them, and a device may have come back from an earlier time.
    pub(crate) fn allows(&self, device: DeviceId, header: &BlockHeader) -> bool {
        let allows = |entry: &Entry| lock(entry).allows(header.tenant, header.space, header.generation);
        self.entry(device).is_some() && self.devices.iter().all(allows)
    }

    /// Lowest valid generation of a space, as the devices know it.
    pub(crate) fn lowest(&self, tenant: TenantId, space: SpaceId) -> u64 {
        let of_device = |entry: &Entry| lock(entry).cleared.get(&(tenant, space)).copied().unwrap_or(0);
        self.devices.iter().map(of_device).max().unwrap_or(0)
    }

    /// Raises a lowest valid generation on every device, durably.
    pub(crate) fn raise_lowest(
        &self,
        tenant: TenantId,
        space: SpaceId,
        generation: u64,
    ) -> Result<(), Fault> {
        for entry in &self.devices {
            // Not locked during the write: only the commit thread writes superblocks once they are open.
            let mut next = lock(entry).clone();
            let lowest = next.cleared.entry((tenant, space)).or_insert(0);
            if *lowest >= generation {
                continue;
            }
            *lowest = generation;
            if let Err(error) = next.write(&entry.side, &entry.path) {
                tracing::error!(%error, "a cleared space could not be recorded");
                return Err(match error {
                    MediaError::TableFull { .. } => Fault::NoSpace,
                    _ => Fault::Device,
                });
            }
            *lock(entry) = next;
        }
        Ok(())
    }

    /// The highest incarnation that any superblock names.
    pub(crate) fn incarnation(&self) -> u32 {
        self.devices.iter().map(|entry| lock(entry).incarnation).max().unwrap_or(0)
    }

    /// Records this life of the daemon on every device, and what the others know of clears.
    pub(crate) fn set_incarnation(&self, incarnation: u32) -> Result<(), MediaError> {
        let mut cleared = std::collections::BTreeMap::new();
        for entry in &self.devices {
            for (space, lowest) in &lock(entry).cleared {
                let known = cleared.entry(*space).or_insert(*lowest);
                *known = (*known).max(*lowest);
            }
        }
        for entry in &self.devices {
            let mut superblock = lock(entry);
            let mut next = superblock.clone();
            next.incarnation = incarnation;
            if cleared.len() <= CLEARED_MAX {
                next.cleared.clone_from(&cleared);
            }
            next.write(&entry.side, &entry.path)?;
            *superblock = next;
        }
        Ok(())
    }

    pub(crate) fn facts(&self) -> Vec<DeviceFacts> {
        let facts_of = |entry: &Entry| {
            let io = entry.io.facts();
            DeviceFacts {
                path: entry.path.clone(),
                uuid: lock(entry).uuid,
                slots: entry.slots,
                backend: io.backend,
                writable: io.writable,
                read_bytes: io.read_bytes,
                write_bytes: io.write_bytes,
                errors: io.errors,
                queued: io.queued,
            }
        };
        self.devices.iter().map(facts_of).collect()
    }
}

fn lock(entry: &Entry) -> MutexGuard<'_, Superblock> {
    entry.superblock.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A device's identity need only differ from that of a device that took its
/// place: the kernel's random uuid, or the time if /proc is not there.
fn random_uuid(path: &Path) -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_else(|_| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        format!("{}{now:?}{}", path.display(), std::process::id())
    });
    let mut uuid = [0u8; 16];
    let (front, back) = uuid.split_at_mut(8);
    front.copy_from_slice(&crate::header::crc(text.as_bytes()).to_le_bytes());
    back.copy_from_slice(&crate::header::crc(format!("{text}/2").as_bytes()).to_le_bytes());
    uuid
}

/// The frame size of a slot and the number of frames in it.
pub(crate) fn frames_of(chunk_bytes: u64, frame_bytes: ByteCount) -> u32 {
    let room = chunk_bytes.saturating_sub(crate::memory::PAGE_BYTES);
    u32::try_from(room.checked_div(frame_bytes.get()).unwrap_or(0)).unwrap_or(u32::MAX)
}
