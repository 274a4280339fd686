//! The devices with their superblocks: opening, where a slot lies, which
//! generations are valid.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{BlockHeader, ByteCount, DeviceId, Fault, SpaceId, TenantId};

use crate::api::{DeviceFacts, MediaConfig, MediaError, SpaceRecord};
use crate::device::{Alarm, BlockIo, Device, DeviceFile, Measured, Patience, Rig, SCRATCH_BYTES, Scheduler};
use crate::find::{Found, Good, find};
use crate::record::Recorder;
use crate::side::SideIo;
use crate::superblock::{CLEARED_MAX, DATA_START, Superblock};

/// How long a device may take to answer a read or write. More than any device that works takes
/// on a machine that is busy, less than those who wait for it have patience.
pub(crate) const IO_PATIENCE: Duration = Duration::from_secs(4);
/// How long a device may take to sync before its commits count as failed.
pub(crate) const SYNC_PATIENCE: Duration = Duration::from_secs(30);
/// A device that could not record a clear is asked again after so long, if it takes writes.
const TELL_AGAIN: Duration = Duration::from_secs(1);

/// All devices of the node, by `DeviceId`.
pub(crate) struct Slots {
    devices: Vec<Place>,
    chunk_bytes: u64,
    in_flight_max: u64,
    alarm: Arc<Alarm>,
    /// The last clear could not be recorded, which has been said.
    clears_fail: AtomicBool,
}

/// Lowest valid generations.
type Cleared = std::collections::BTreeMap<(TenantId, SpaceId), u64>;

enum Place {
    In(Box<Entry>),
    /// It was found unfit at the start, and is closed.
    Out {
        path: PathBuf,
        slots: u32,
        reason: String,
    },
}

impl Place {
    /// The node runs without the device, and says so.
    fn without(path: PathBuf, slots: u32, error: &MediaError, notes: &mut Vec<String>) -> Self {
        tracing::error!(device = %path.display(), %error, "the node runs without a device; its blocks are misses");
        notes.push(format!("the node runs without a device, whose blocks are misses: {error}"));
        let reason = format!("not used in this life of the daemon: {error}");
        Self::Out { path, slots, reason }
    }
}

struct Entry {
    scheduler: Arc<Scheduler>,
    /// The same.
    io: Arc<dyn BlockIo>,
    file: Arc<DeviceFile>,
    measured: OnceLock<Measured>,
    side: SideIo,
    recorder: Recorder,
    superblock: Mutex<Superblock>,
    /// When it is to be told what it has missed of clears, at the earliest.
    behind: Mutex<Option<Instant>>,
    path: PathBuf,
    slots: u32,
    fresh: bool,
}

impl Entry {
    /// Makes this the device's superblock, durably. Not locked during the write: one thread at a time
    /// records, that of the start and then that of the commits.
    fn record(&self, mut next: Superblock) -> Result<(), MediaError> {
        next.write(&self.path, |offset, pages| self.recorder.write_synced(offset, pages))?;
        *lock(self) = next;
        Ok(())
    }

    fn takes_writes(&self) -> bool {
        self.scheduler.is_usable() && self.io.facts().writable
    }

    fn set_behind(&self, behind: bool) {
        *self.behind.lock().unwrap_or_else(PoisonError::into_inner) =
            behind.then(|| Instant::now() + TELL_AGAIN);
    }

    fn is_to_be_told(&self) -> bool {
        let behind = *self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        behind.is_some_and(|at| at <= Instant::now()) && self.takes_writes()
    }
}

impl Slots {
    /// Opens every device. Nothing is written before all were looked at.
    pub(crate) fn open(config: &MediaConfig, notes: &mut Vec<String>) -> Result<Self, MediaError> {
        let found = find(config)?;
        if u16::try_from(found.len()).is_err() {
            return Err(MediaError::BadConfig("more than 65,536 devices"));
        }
        let superblock = |found: &Found<'_>| match found {
            Found::Good(good) => good.superblock.as_ref().map(|known| known.incarnation),
            Found::Out(..) | Found::Shut(..) => None,
        };
        let incarnation = found.iter().filter_map(superblock).max().unwrap_or(0);
        let alarm = Arc::new(Alarm::default());
        let mut devices = Vec::with_capacity(found.len());
        for (number, found) in (0..).zip(found) {
            devices.push(match found {
                Found::Good(good) => {
                    let entry = start(DeviceId::new(number), good, incarnation, config, &alarm, notes)?;
                    Place::In(Box::new(entry))
                }
                Found::Out(device, error) | Found::Shut(device, error) => {
                    Place::without(device.path.clone(), device.slots, &error, notes)
                }
            });
        }
        let in_flight_max = config.bytes_in_flight_max.get();
        Ok(Self {
            devices,
            chunk_bytes: config.chunk_bytes.get(),
            in_flight_max,
            alarm,
            clears_fail: AtomicBool::new(false),
        })
    }

    /// The device, unless the node runs without it.
    fn entry(&self, device: DeviceId) -> Option<&Entry> {
        match self.devices.get(usize::from(device.get()))? {
            Place::In(entry) => Some(entry),
            Place::Out { .. } => None,
        }
    }

    /// The devices that there are.
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.devices.iter().filter_map(|place| match place {
            Place::In(entry) => Some(&**entry),
            Place::Out { .. } => None,
        })
    }

    /// The node runs without it: nothing is known of what it holds.
    pub(crate) fn is_out(&self, device: DeviceId) -> bool {
        self.entry(device).is_none()
    }

    /// The node has devices, and runs without all of them.
    pub(crate) fn none_left(&self) -> bool {
        !self.devices.is_empty() && self.entries().next().is_none()
    }

    /// Device ids, in order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = DeviceId> + use<> {
        let count = u16::try_from(self.devices.len()).expect("open refuses more");
        (0..count).map(DeviceId::new)
    }

    /// Where the devices are, in order.
    pub(crate) fn paths(&self) -> impl Iterator<Item = (DeviceId, &Path)> {
        self.ids().zip(&self.devices).map(|(id, place)| match place {
            Place::In(entry) => (id, entry.path.as_path()),
            Place::Out { path, .. } => (id, path.as_path()),
        })
    }

    pub(crate) fn io(&self, device: DeviceId) -> Option<&Arc<dyn BlockIo>> {
        self.entry(device).map(|entry| &entry.io)
    }

    pub(crate) fn scheduler(&self, device: DeviceId) -> Option<&Scheduler> {
        self.entry(device).map(|entry| &*entry.scheduler)
    }

    pub(crate) fn alarm(&self) -> &Arc<Alarm> {
        &self.alarm
    }

    /// Devices that are given no work.
    pub(crate) fn unusable(&self) -> Vec<DeviceId> {
        let is_out = |device: &DeviceId| self.scheduler(*device).is_none_or(|device| !device.is_usable());
        self.ids().filter(is_out).collect()
    }

    /// Ends waits that are too long, until the alarm is stopped. `pool` says how many bytes all chunks have.
    pub(crate) fn watch(&self, pool: &dyn Fn() -> u64, period: Duration) {
        while self.alarm.wait(period) {
            let pool = pool();
            let slowdowns: Vec<f64> = self.entries().map(|entry| entry.scheduler.slowdown()).collect();
            for (place, entry) in self.entries().enumerate() {
                entry.scheduler.look(middle_of_others(&slowdowns, place), pool);
            }
        }
    }

    /// Measures the devices, one after another, until told to stop.
    pub(crate) fn self_test(&self, stop: &AtomicBool) {
        for entry in self.entries() {
            if stop.load(Ordering::Acquire) {
                return;
            }
            let end = DATA_START + u64::from(entry.slots) * self.chunk_bytes;
            let Some(scratch) = entry.file.scratch(end, SCRATCH_BYTES) else {
                let note = Some("self-test: there is no room behind the blocks to measure in".to_owned());
                let _ = entry.measured.set(Measured { note, ..Measured::default() });
                continue;
            };
            let measured = Rig { scheduler: &entry.scheduler, scratch, stop }.run();
            entry.file.end_scratch(scratch);
            if let Some(bytes) = measured.in_flight {
                entry.scheduler.set_bytes_max(bytes.min(self.in_flight_max));
            }
            for line in &measured.lines {
                tracing::debug!(path = %entry.path.display(), ?line, "self-test");
            }
            // Set once: there is one self-test in a life.
            let _ = entry.measured.set(measured);
        }
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

    /// It held nothing when it was opened, or cannot be looked into.
    pub(crate) fn fresh(&self, device: DeviceId) -> bool {
        self.entry(device).is_none_or(|entry| entry.fresh)
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
        self.entry(device).is_some() && self.entries().all(allows)
    }

    /// Lowest valid generation of a space, as the devices know it.
    pub(crate) fn lowest(&self, tenant: TenantId, space: SpaceId) -> u64 {
        let of_device = |entry: &Entry| lock(entry).cleared.get(&(tenant, space)).copied().unwrap_or(0);
        self.entries().map(of_device).max().unwrap_or(0)
    }

    /// Raises a lowest valid generation, durably: on every device that takes it, and on one at least. What one device
    /// knows of a clear counts for all, so one that is out brings nothing back while any that knows, or the catalog, is
    /// there; it is told as soon as it takes writes again, and by each start.
    pub(crate) fn raise_lowest(
        &self,
        tenant: TenantId,
        space: SpaceId,
        generation: u64,
    ) -> Result<(), Fault> {
        let mut known = self.cleared();
        let lowest = known.entry((tenant, space)).or_insert(0);
        *lowest = generation.max(*lowest);
        if known.len() > CLEARED_MAX {
            tracing::error!(
                "a cleared space could not be recorded: the superblocks have no room for another"
            );
            return Err(Fault::NoSpace);
        }
        let told = self.entries().filter(|entry| self.tell(entry, &known)).count();
        if told == 0 && !self.devices.is_empty() {
            if !self.clears_fail.swap(true, Ordering::Relaxed) {
                tracing::error!("a cleared space could not be recorded on any device; it is tried again");
            }
            return Err(Fault::Device);
        }
        self.clears_fail.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Tells a device what it has missed of clears. False: it may not know it.
    fn tell(&self, entry: &Entry, known: &Cleared) -> bool {
        let mut next = lock(entry).clone();
        if next.cleared == *known {
            entry.set_behind(false);
            return true;
        }
        next.cleared.clone_from(known);
        let told = entry.takes_writes()
            && match entry.record(next) {
                Ok(()) => true,
                Err(error) => {
                    tracing::error!(%error, "a device could not record a cleared space; it is told later");
                    false
                }
            };
        entry.set_behind(!told);
        told
    }

    /// Tells devices what they have missed of clears while they were out. By the thread of the commits.
    pub(crate) fn tell_behind(&self) {
        if self.entries().any(Entry::is_to_be_told) {
            let known = self.cleared();
            self.entries().filter(|entry| entry.is_to_be_told()).for_each(|entry| {
                self.tell(entry, &known);
            });
        }
    }

    /// Why no clear can be made durable now, if that is known: which devices are in the way, and what to do.
    pub(crate) fn clear_obstacle(&self, tenant: TenantId, space: SpaceId) -> Option<String> {
        let known = self.cleared();
        if known.len() >= CLEARED_MAX && !known.contains_key(&(tenant, space)) {
            return Some(format!(
                "the devices remember {CLEARED_MAX} cleared spaces and have no room for another; use a new weights generation in place of a clear"
            ));
        }
        if self.devices.is_empty() || self.entries().any(Entry::takes_writes) {
            return None;
        }
        let reasons: Vec<String> = self
            .facts()
            .into_iter()
            .map(|device| {
                let why = if device.condition.is_empty() { "it takes no writes" } else { &device.condition };
                format!("{}: {why}", device.path.display())
            })
            .collect();
        Some(format!(
            "no device can record it, and one that comes back would bring the blocks back; repair or replace a device and start the daemon again ({})",
            reasons.join("; ")
        ))
    }

    /// What all devices together know of clears.
    fn cleared(&self) -> Cleared {
        let mut cleared = Cleared::new();
        for entry in self.entries() {
            for (space, lowest) in &lock(entry).cleared {
                let known = cleared.entry(*space).or_insert(*lowest);
                *known = (*known).max(*lowest);
            }
        }
        cleared
    }

    /// The highest incarnation that any superblock names.
    pub(crate) fn incarnation(&self) -> u32 {
        self.entries().map(|entry| lock(entry).incarnation).max().unwrap_or(0)
    }

    /// Records this life of the daemon on every device, and what the others and the catalog know of clears. The node runs
    /// without a device that does not take it: one that only can be read keeps no block, and would pass for one of an
    /// earlier time.
    pub(crate) fn set_incarnation(
        &mut self,
        incarnation: u32,
        spaces: &[SpaceRecord],
        notes: &mut Vec<String>,
    ) {
        let mut cleared = self.cleared();
        for record in spaces.iter().filter(|record| record.generation > 1) {
            if cleared.len() < CLEARED_MAX || cleared.contains_key(&(record.tenant, record.space)) {
                let known = cleared.entry((record.tenant, record.space)).or_insert(0);
                *known = record.generation.max(*known);
            }
        }
        for place in &mut self.devices {
            let Place::In(entry) = place else { continue };
            let mut next = lock(entry).clone();
            next.incarnation = incarnation;
            if cleared.len() <= CLEARED_MAX {
                next.cleared.clone_from(&cleared);
            }
            if let Err(error) = entry.record(next) {
                *place = Place::without(entry.path.clone(), entry.slots, &error, notes);
            }
        }
    }

    pub(crate) fn facts(&self) -> Vec<DeviceFacts> {
        let facts_of = |entry: &Entry| {
            let io = entry.io.facts();
            let (condition, waiting, late) = entry.scheduler.condition();
            let measured = entry.measured.get();
            let mut backend = io.backend;
            if let Some(bytes) = measured.and_then(|measured| measured.in_flight) {
                let bytes = bytes.min(self.in_flight_max);
                backend.push_str(&format!("; {} MiB in flight by the self-test", bytes >> 20));
            }
            DeviceFacts {
                path: entry.path.clone(),
                uuid: lock(entry).uuid,
                slots: entry.slots,
                backend,
                writable: io.writable,
                read_bytes: io.read_bytes,
                write_bytes: io.write_bytes,
                errors: io.errors,
                queued: io.queued,
                waiting,
                usable: condition.is_empty(),
                opened: true,
                condition,
                late,
                self_test: measured.map_or_else(Vec::new, |measured| measured.lines.clone()),
                self_test_note: measured.and_then(|measured| measured.note.clone()).unwrap_or_default(),
            }
        };
        let facts_of_place = |place: &Place| match place {
            Place::In(entry) => facts_of(entry),
            Place::Out { path, slots, reason } => facts_of_out(path, *slots, reason),
        };
        self.devices.iter().map(facts_of_place).collect()
    }
}

/// Starts a device that was found good, and writes its superblock if that is new.
fn start(
    id: DeviceId,
    good: Good<'_>,
    incarnation: u32,
    config: &MediaConfig,
    alarm: &Arc<Alarm>,
    notes: &mut Vec<String>,
) -> Result<Entry, MediaError> {
    let Good { config: device, bytes, file, side, superblock: found } = good;
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
        superblock.write(&device.path, |offset, pages| side.write_synced(offset, pages))?;
    }
    let io: Arc<dyn BlockIo> = Arc::new(Device::start(Arc::clone(&file), config.backend)?);
    let io = match &config.hooks.wrap_device {
        Some(wrap) => wrap(id, io),
        None => io,
    };
    let patience = Patience {
        io: config.hooks.io_patience.unwrap_or(IO_PATIENCE),
        sync: config.hooks.sync_patience.unwrap_or(SYNC_PATIENCE),
    };
    let in_flight_max = config.bytes_in_flight_max.get();
    let scheduler = Arc::new(Scheduler::new(id, io, in_flight_max, patience, Arc::clone(alarm)));
    let io = Arc::clone(&scheduler) as Arc<dyn BlockIo>;
    Ok(Entry {
        recorder: Recorder::new(Arc::clone(&io), patience),
        io,
        scheduler,
        file,
        measured: OnceLock::new(),
        side,
        superblock: Mutex::new(superblock),
        behind: Mutex::new(None),
        path: device.path.clone(),
        slots: device.slots,
        fresh,
    })
}

fn facts_of_out(path: &Path, slots: u32, reason: &str) -> DeviceFacts {
    DeviceFacts {
        path: path.to_owned(),
        uuid: [0; 16],
        slots,
        backend: String::new(),
        writable: false,
        read_bytes: 0,
        write_bytes: 0,
        errors: 0,
        queued: 0,
        waiting: [0; 6],
        usable: false,
        opened: false,
        condition: reason.to_owned(),
        late: 0,
        self_test: Vec::new(),
        self_test_note: String::new(),
    }
}

/// The median of all but one; `None` if there are no others.
fn middle_of_others(values: &[f64], place: usize) -> Option<f64> {
    let mut others: Vec<f64> =
        values.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, value)| *value).collect();
    others.sort_by(f64::total_cmp);
    others.get(others.len() / 2).copied()
}

fn lock(entry: &Entry) -> MutexGuard<'_, Superblock> {
    entry.superblock.lock().unwrap_or_else(PoisonError::into_inner)
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
