//! [`Media`]: starts operations, never waits, and answers by a callback.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use terrace_core::{
    BlockHeader, ByteCount, ChunkId, DeviceId, DiskFrame, Done, Fault, Fence, FrameRef, IoClass, OpId,
    SpaceId, Via,
};
use terrace_lane::fold;

use crate::api::{
    Carve, Complete, FoundHeader, MediaConfig, MediaError, MediaFacts, MediaOp, OpenReport, ScanPiece,
    ScanReport, SpaceRecord,
};
use crate::catalog::{self, Catalog, CatalogError};
use crate::chunks::{ChunkMaker, ChunkTable, Wish, Wishes};
use crate::commit::{Answer, Commits, Committer, Job, sync_devices};
use crate::device::{AlignedPages, DeviceChanged, IoBuffer, IoOp, IoRequest, PagePool};
use crate::facts;
use crate::header::{SlotHeader, decode_header, encode_header, header_bytes};
use crate::memory::{ChunkMemory, Holders, PAGE_BYTES};
use crate::open::{OpenedCatalog, check_config, lock_directory, open_catalog};
use crate::slots::{IO_PATIENCE, SYNC_PATIENCE, Slots};
use crate::work::Workers;
use crate::{scan, scrub};

/// Bounce buffers that are kept for reuse.
const BOUNCE_KEPT: usize = 8;
/// Looks after the devices in a patience.
const LOOKS: u32 = 16;
/// Longest pause between two of them.
const LOOK_PAUSE_MAX: Duration = Duration::from_millis(250);

/// Slots that a scan reads ahead of who takes them.
const SCANNED_AHEAD: usize = 64;
/// Blocks of a scan that go into the catalog together, if so many wait.
const SCANNED_GROUP: usize = 8192;

/// Everything that holds block bytes on this node. Dropped: operations that run
/// are finished and answered; a commit that was not begun is not made.
pub struct Media {
    table: Arc<ChunkTable>,
    wishes: Arc<Wishes>,
    commits: Arc<Commits>,
    catalog: Arc<Catalog>,
    slots: Arc<Slots>,
    workers: Workers,
    bounces: Arc<PagePool>,
    complete: Arc<Complete>,
    spaces: Mutex<BTreeMap<SpaceId, SpaceRecord>>,
    carve_sequence: AtomicU64,
    /// Slots that the catalog may say to be carved.
    carved: Mutex<BTreeSet<(DeviceId, u32)>>,
    /// Slots that a scan has read in this life.
    scanned: Mutex<BTreeSet<(DeviceId, u32)>>,
    scan_stop: Arc<AtomicBool>,
    sync_patience: Duration,
    threads: Vec<JoinHandle<()>>,
    watch: Option<JoinHandle<()>>,
    self_test: Mutex<Option<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
    notes: Vec<String>,
    _lock: File,
}

impl Media {
    /// Locks the data directory, opens devices and catalog, starts the threads.
    /// A damaged catalog is moved aside; then the report asks for a scan.
    ///
    /// # Errors
    /// In use, not ours, of another node or size, too new, or a system error. Nothing is changed by then.
    pub fn open(config: MediaConfig, complete: Complete) -> Result<(Self, OpenReport), MediaError> {
        check_config(&config)?;
        let lock = lock_directory(&config.data_dir)?;
        catalog::check_format(&config.data_dir.join("catalog"))?;
        let mut notes = Vec::new();
        let mut slots = Slots::open(&config, &mut notes)?;
        let OpenedCatalog { catalog, mut report, carve_sequence } =
            open_catalog(&config, &slots, &mut notes)?;
        let incarnation = report.incarnation;
        slots.set_incarnation(incarnation, &report.spaces, &mut notes);
        report.carves.retain(|carve| !slots.is_out(carve.device));
        let (catalog, slots, complete) = (Arc::new(catalog), Arc::new(slots), Arc::new(complete));
        let dir = &config.data_dir;
        let failed = |source| MediaError::File { path: dir.clone(), action: "start threads for it", source };
        let (workers, mut threads) = Workers::start(config.checkers).map_err(failed)?;
        let (table, wishes): (Arc<ChunkTable>, Arc<Wishes>) = Default::default();
        let maker = ChunkMaker {
            wishes: Arc::clone(&wishes),
            table: Arc::clone(&table),
            slots: Arc::clone(&slots),
            complete: Arc::clone(&complete),
        };
        threads.push(
            std::thread::Builder::new()
                .name("media-chunks".to_owned())
                .spawn(move || maker.run())
                .map_err(failed)?,
        );
        let commits = Arc::new(Commits::new());
        let sync_patience = config.hooks.sync_patience.unwrap_or(SYNC_PATIENCE);
        let committer = Committer {
            commits: Arc::clone(&commits),
            catalog: Arc::clone(&catalog),
            slots: Arc::clone(&slots),
            complete: Arc::clone(&complete),
            sync_patience,
        };
        threads.push(
            std::thread::Builder::new()
                .name("media-commit".to_owned())
                .spawn(move || committer.run())
                .map_err(failed)?,
        );
        let patience = config.hooks.io_patience.unwrap_or(IO_PATIENCE);
        let watch = watch(&slots, &table, patience).map_err(failed)?;
        notes.extend(facts::memory_facts().notes);
        report.notes.clone_from(&notes);
        let spaces = report.spaces.iter().map(|record| (record.space, record.clone())).collect();
        let media = Self {
            table,
            wishes,
            commits,
            catalog,
            slots,
            workers,
            bounces: Arc::new(PagePool::new(BOUNCE_KEPT)),
            complete,
            spaces: Mutex::new(spaces),
            carve_sequence: AtomicU64::new(carve_sequence),
            carved: Mutex::new(report.carves.iter().map(|carve| (carve.device, carve.slot)).collect()),
            scanned: Mutex::default(),
            scan_stop: Arc::default(),
            sync_patience,
            threads,
            watch: Some(watch),
            self_test: Mutex::new(None),
            stop: Arc::new(AtomicBool::new(false)),
            notes,
            _lock: lock,
        };
        Ok((media, report))
    }

    /// Measures the devices in a thread of its own, in the idle class; the facts
    /// show what it found. To be asked for once, when blocks are served.
    pub fn start_self_test(&self) {
        let mut running = self.self_test.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return;
        }
        let (slots, stop) = (Arc::clone(&self.slots), Arc::clone(&self.stop));
        let thread = std::thread::Builder::new().name("media-self-test".to_owned());
        match thread.spawn(move || slots.self_test(&stop)) {
            Ok(handle) => *running = Some(handle),
            Err(error) => tracing::warn!(%error, "no thread for the self-test of the devices"),
        }
    }

    /// Bytes that each device has at once, at most; the self-test may lower it again.
    pub fn set_bytes_in_flight_max(&self, bytes: ByteCount) {
        for device in self.slots.ids() {
            if let Some(scheduler) = self.slots.scheduler(device) {
                scheduler.set_bytes_max(bytes.get());
            }
        }
    }

    /// Who is told when a device is taken out or comes back, from a thread of
    /// media; at once, if one is out already. To be said once.
    pub fn on_device_change(&self, changed: DeviceChanged) {
        let alarm = self.slots.alarm();
        if alarm.changed.set(changed).is_err() {
            tracing::error!("somebody is told of the devices already");
        }
        if let Some(changed) = alarm.changed.get() {
            self.slots.unusable().into_iter().for_each(|device| changed(device, false));
        }
    }

    /// A read is more urgent than was said. Of no effect on one that its device has already.
    pub fn promote(&self, op: OpId, device: DeviceId, class: IoClass) {
        if let Some(scheduler) = self.slots.scheduler(device) {
            scheduler.promote(op, class);
        }
    }

    /// A read that nobody wants any more ends with [`Fault::NotStarted`], unless its device has it already.
    pub fn cancel(&self, op: OpId, device: DeviceId) {
        if let Some(scheduler) = self.slots.scheduler(device) {
            scheduler.cancel(op);
        }
    }

    /// Starts an operation. Never blocks and never calls back from inside, so it
    /// may be called with the core's lock held. The core bounds how many are in flight.
    pub fn start(&self, op: MediaOp) {
        match op {
            MediaOp::CreateChunk { op, chunk, access, frame_bytes, frames } => {
                self.wishes.push(Wish::Create { op, chunk, access, frame_bytes, frames });
            }
            MediaOp::CloseWindow { op, chunk } => self.close_window(op, chunk),
            MediaOp::DropChunk { op, chunk } => self.wishes.push(Wish::Drop { op, chunk }),
            MediaOp::Read { op, source, source_offset, target, expect, class } => {
                self.read(op, source, source_offset, target, expect, class);
            }
            MediaOp::Write { op, source, target, target_offset, header, via, class } => match via {
                Via::Direct => self.write_direct(op, source, target, target_offset, &header, class),
                Via::Bounce => self.write_bounced(op, source, target, target_offset, header, class),
            },
            MediaOp::CarveSlot { op, device, slot, space, frame_bytes } => {
                self.carve(op, Carve { device, slot, space, frame_bytes });
            }
            MediaOp::Commit { op, put, delete } => self.commits.push(Job::Commit { op, put, delete }),
            MediaOp::ClearSpace { op, space, tenant, generation } => {
                self.note_generation(space, generation);
                self.commits.push(Job::Clear { op, space, tenant, generation });
            }
            MediaOp::Verify { op, frame, expect } => {
                let Some(memory) = self.find(op, frame.chunk) else { return };
                let complete = Arc::clone(&self.complete);
                self.workers.push(Box::new(move || {
                    let outcome = verified(&memory, frame.index, &expect);
                    drop(memory);
                    complete(op, outcome);
                }));
            }
            MediaOp::Copy { op, source, target, expect } => self.copy(op, source, target, expect),
            MediaOp::Scrub { op, source, source_offset, expect } => {
                self.scrub(op, source, source_offset, expect)
            }
        }
    }

    /// Memory for chunks; some of what is free of it is made ready ahead of need. Nothing is before this is said.
    pub fn set_memory_max(&self, bytes: ByteCount) {
        self.wishes.set_memory_max(bytes);
    }

    /// A chunk, for sharing its descriptors and for streams. Holding it delays its drop.
    pub fn chunk(&self, chunk: ChunkId) -> Option<Arc<ChunkMemory>> {
        self.table.find(chunk)
    }

    /// Stores a fence, release order. A chunk that does not exist has no readers.
    ///
    /// # Panics
    /// If the chunk has no such frame.
    pub fn set_fence(&self, frame: FrameRef, fence: Fence) {
        self.table.with(frame.chunk, |memory| memory.set_fence(frame.index, fence));
    }

    /// Records a space durably. Blocks for a sync: not for async threads.
    ///
    /// # Errors
    /// The record is too long, or the catalog failed.
    pub fn put_space(&self, record: SpaceRecord) -> Result<(), CatalogError> {
        catalog::check_record(&record)?;
        let space = record.space;
        let kept = record.clone();
        self.ask(|answer| Job::PutSpace { record, answer })?;
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).insert(space, kept);
        Ok(())
    }

    /// Lowest generation of a space that was not cleared, by the superblocks; 0
    /// if it was never cleared.
    pub fn lowest_generation(&self, tenant: terrace_core::TenantId, space: SpaceId) -> u64 {
        self.slots.lowest(tenant, space)
    }

    /// Why a space cannot be cleared durably now, if that is known, and what to do about it.
    pub fn clear_obstacle(&self, tenant: terrace_core::TenantId, space: SpaceId) -> Option<String> {
        self.slots.clear_obstacle(tenant, space)
    }

    /// Every block of the catalog, in batches. Blocks while it reads. Returns how many there were.
    ///
    /// # Errors
    /// The catalog is damaged or failed.
    pub fn blocks(&self, batch: usize, take: &mut dyn FnMut(Vec<FoundHeader>)) -> Result<u64, CatalogError> {
        let mut valid = 0u64;
        self.catalog.blocks(batch.max(1), &mut |mut found| {
            found.retain(|found| self.serves(found));
            valid += found.len() as u64;
            if !found.is_empty() {
                take(found);
            }
        })?;
        Ok(valid)
    }

    /// Reads the header pages of every slot and adds what it finds to the
    /// catalog, then tells `take`, slot by slot. Blocks until all is read; other
    /// operations go on meanwhile. After an error it may be called again, and goes on where it was.
    ///
    /// # Errors
    /// The catalog failed. What was found before was told.
    pub fn scan(&self, take: &mut dyn FnMut(ScanPiece)) -> Result<ScanReport, CatalogError> {
        self.scan_but(&BTreeSet::new(), take)
    }

    /// The same without some devices; the next start scans them.
    ///
    /// # Errors
    /// As [`Self::scan`].
    pub fn scan_but(
        &self,
        left_out: &BTreeSet<DeviceId>,
        take: &mut dyn FnMut(ScanPiece),
    ) -> Result<ScanReport, CatalogError> {
        let mut report = ScanReport::default();
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(SCANNED_AHEAD);
            for device in self.slots.ids().filter(|device| !left_out.contains(device)) {
                let (sender, wanted) = (sender.clone(), self.unscanned(device));
                scope.spawn(move || scan::device(&self.slots, device, &wanted, &self.scan_stop, &sender));
            }
            drop(sender);
            while let Ok(first) = receiver.recv() {
                let mut blocks = first.piece.blocks.len();
                let mut group = vec![first];
                while blocks < SCANNED_GROUP
                    && let Ok(next) = receiver.try_recv()
                {
                    blocks += next.piece.blocks.len();
                    group.push(next);
                }
                for scanned in self.restore(group)? {
                    report.slots += 1;
                    report.damaged += scanned.damaged;
                    report.unreadable += u64::from(scanned.unreadable);
                    report.blocks += scanned.piece.blocks.len() as u64;
                    self.note_scanned(scanned.piece.device, scanned.piece.slot);
                    take(scanned.piece);
                }
            }
            Ok(())
        })?;
        report.complete = self.slots.ids().all(|device| self.unscanned(device).is_empty());
        if report.complete {
            self.ask(|answer| Job::Scanned { answer })?;
        }
        Ok(report)
    }

    /// Makes durable what the devices were given, side by side and each within its patience. Says which could not:
    /// nothing that they hold may be taken for durable. Blocks.
    pub fn sync_all(&self) -> BTreeSet<DeviceId> {
        let devices = self.slots.ids().filter(|device| !self.slots.is_out(*device)).collect();
        sync_devices(&self.slots, &devices, self.sync_patience).into_keys().collect()
    }

    /// A device is not used any more in this life. Whoever is told of devices is told of this.
    pub fn eject(&self, device: DeviceId, reason: &str) {
        if let Some(scheduler) = self.slots.scheduler(device) {
            scheduler.eject(reason.to_owned());
        }
    }

    /// Ends a scan early; the next start begins it anew.
    pub fn stop_scan(&self) {
        self.scan_stop.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::stop_scan`] was called.
    pub fn scan_stopped(&self) -> bool {
        self.scan_stop.load(Ordering::Relaxed)
    }

    fn unscanned(&self, device: DeviceId) -> Vec<u32> {
        let scanned = self.scanned.lock().unwrap_or_else(PoisonError::into_inner);
        (0..self.slots.slots(device)).filter(|slot| !scanned.contains(&(device, *slot))).collect()
    }

    fn note_scanned(&self, device: DeviceId, slot: u32) {
        self.scanned.lock().unwrap_or_else(PoisonError::into_inner).insert((device, slot));
    }

    /// Closes the catalog, opens it again and reads it through. Blocks.
    ///
    /// # Errors
    /// It is still not usable.
    pub fn reopen_catalog(&self) -> Result<(), CatalogError> {
        self.ask(|answer| Job::Reopen { answer })
    }

    /// Moves a damaged catalog aside and begins a new one with the spaces that are known. What else it knew is
    /// to be found by [`Self::scan`], which reads every slot again. Blocks.
    ///
    /// # Errors
    /// There is still none that can be used.
    pub fn renew_catalog(&self) -> Result<(), CatalogError> {
        let spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        self.ask(|answer| Job::Renew { spaces, answer })?;
        self.scanned.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// How everything is.
    pub fn facts(&self) -> MediaFacts {
        MediaFacts {
            devices: self.slots.facts(),
            chunk_pages: self.table.pages(),
            lingering: self.wishes.lingering(),
            ready: self.wishes.ready(),
            preparing: self.wishes.is_preparing(),
            catalog_usable: self.catalog.usable(),
            commits: self.commits.counts(),
            notes: self.notes.clone(),
        }
    }

    /// First byte of a frame on a device, `None` if there is no such frame.
    pub fn frame_offset(&self, frame: DiskFrame, frame_bytes: ByteCount) -> Option<u64> {
        let start = self.slots.slot_start(frame.device, frame.slot)?;
        let inside = frame.index < crate::slots::frames_of(self.slots.chunk_bytes(), frame_bytes);
        inside.then(|| start + PAGE_BYTES + u64::from(frame.index) * frame_bytes.get())
    }

    /// Marks a clean end and stops.
    ///
    /// # Errors
    /// The mark could not be written; the next start finds an unclean end, which is safe.
    pub fn close(self) -> Result<(), CatalogError> {
        self.ask(|answer| Job::Close { answer })
    }

    fn ask(&self, job: impl FnOnce(Answer) -> Job) -> Result<(), CatalogError> {
        let (sender, receiver) = mpsc::channel();
        self.commits.push(job(sender));
        receiver.recv().unwrap_or_else(|_| Err(self.catalog.closed()))
    }

    fn serves(&self, found: &FoundHeader) -> bool {
        found.frame.slot < self.slots.slots(found.frame.device)
            && self.slots.allows(found.frame.device, &found.header)
    }

    /// Adds what was found to the catalog, and says what of it counts.
    fn restore(&self, mut group: Vec<scan::Scanned>) -> Result<Vec<scan::Scanned>, CatalogError> {
        for scanned in &mut group {
            self.carve_sequence.fetch_max(scanned.carve_sequence, Ordering::Relaxed);
            let piece = &mut scanned.piece;
            if piece.carve.is_some() {
                self.note_carved(piece.device, piece.slot);
            }
            if let Some(record) = &mut piece.space {
                record.generation = record.generation.max(self.slots.lowest(record.tenant, record.space));
                let mut spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
                let known = spaces.entry(record.space).or_insert_with(|| record.clone());
                known.generation = known.generation.max(record.generation);
            }
        }
        let group = Arc::new(group);
        self.ask(|answer| Job::Restore { found: Arc::clone(&group), answer })?;
        Ok(Arc::unwrap_or_clone(group))
    }

    /// True if the slot was known to be carved.
    fn note_carved(&self, device: DeviceId, slot: u32) -> bool {
        !self.carved.lock().unwrap_or_else(PoisonError::into_inner).insert((device, slot))
    }

    fn note_generation(&self, space: SpaceId, generation: u64) {
        let mut spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = spaces.get_mut(&space) {
            record.generation = record.generation.max(generation);
        }
    }

    fn find(&self, op: OpId, chunk: ChunkId) -> Option<Arc<ChunkMemory>> {
        let memory = self.table.find(chunk);
        if memory.is_none() {
            tracing::error!(%op, %chunk, "an operation names a chunk that does not exist");
            self.refuse(op, Fault::NoMemory);
        }
        memory
    }

    /// Answers from another thread: the caller may hold the lock that the callback takes.
    fn refuse(&self, op: OpId, fault: Fault) {
        self.wishes.push(Wish::Refuse { op, fault });
    }

    fn submit(&self, op: OpId, device: DeviceId, request: IoRequest) {
        match self.slots.scheduler(device) {
            Some(scheduler) => scheduler.submit_tagged(Some(op), request),
            None => {
                tracing::error!(%op, %device, "an operation names a device that does not exist");
                self.refuse(op, Fault::Device);
            }
        }
    }

    fn read(
        &self,
        op: OpId,
        source: DiskFrame,
        offset: u64,
        target: FrameRef,
        expect: BlockHeader,
        class: IoClass,
    ) {
        let Some(memory) = self.find(op, target.chunk) else { return };
        let Some(bytes) = io_bytes(&memory, expect.length) else { return self.refuse(op, Fault::Checksum) };
        let complete = Arc::clone(&self.complete);
        let done = move |buffer: IoBuffer, outcome: Result<(), Fault>| {
            let IoBuffer::Frame(memory, index) = buffer else { return complete(op, Err(Fault::Device)) };
            if let Err(fault) = outcome {
                drop(memory);
                return complete(op, Err(fault));
            }
            // On the device's own thread: it has given the device more work, and to wake another thread costs more.
            let outcome = arrived(&memory, index, &expect);
            drop(memory);
            complete(op, outcome);
        };
        let buffer = IoBuffer::Frame(memory, target.index);
        let request = IoRequest { op: IoOp::Read, offset, bytes, buffer, class, done: Box::new(done) };
        self.submit(op, source.device, request);
    }

    fn write_direct(
        &self,
        op: OpId,
        source: FrameRef,
        target: DiskFrame,
        offset: u64,
        header: &BlockHeader,
        class: IoClass,
    ) {
        let Some(memory) = self.find(op, source.chunk) else { return };
        let Some(bytes) = io_bytes(&memory, header.length) else { return self.refuse(op, Fault::Checksum) };
        if !self.slots.inside_slot(target.device, target.slot, offset, bytes) {
            tracing::error!(%op, ?target, offset, bytes, "a write outside of its slot is refused");
            return self.refuse(op, Fault::Device);
        }
        let mut page = [0u8; 4096];
        encode_header(header, &mut page);
        if memory.fill_header(source.index, &page, header.length).is_err() {
            return self.refuse(op, Fault::Checksum);
        }
        let complete = Arc::clone(&self.complete);
        let done = move |buffer: IoBuffer, outcome: Result<(), Fault>| {
            drop(buffer);
            complete(op, outcome.map(|()| Done::Plain));
        };
        let buffer = IoBuffer::Frame(memory, source.index);
        self.submit(
            op,
            target.device,
            IoRequest { op: IoOp::Write, offset, bytes, buffer, class, done: Box::new(done) },
        );
    }

    /// The client may still write: what is verified is the copy, and the copy is what is written.
    fn write_bounced(
        &self,
        op: OpId,
        source: FrameRef,
        target: DiskFrame,
        offset: u64,
        header: BlockHeader,
        class: IoClass,
    ) {
        let Some(memory) = self.find(op, source.chunk) else { return };
        let Some(bytes) = io_bytes(&memory, header.length) else { return self.refuse(op, Fault::Checksum) };
        if !self.slots.inside_slot(target.device, target.slot, offset, bytes) {
            tracing::error!(%op, ?target, offset, bytes, "a write outside of its slot is refused");
            return self.refuse(op, Fault::Device);
        }
        let Some(io) = self.slots.io(target.device).cloned() else { return self.refuse(op, Fault::Device) };
        let (complete, bounces) = (Arc::clone(&self.complete), Arc::clone(&self.bounces));
        self.workers.push(Box::new(move || {
            let mut pages = bounces.take(bytes);
            let copied = bounce(&memory, source.index, &header, bytes, &mut pages);
            drop(memory);
            if let Err(fault) = copied {
                bounces.give(pages);
                return complete(op, Err(fault));
            }
            let done = move |buffer: IoBuffer, outcome: Result<(), Fault>| {
                if let Some(pages) = buffer.into_pages() {
                    bounces.give(pages);
                }
                complete(op, outcome.map(|()| Done::Plain));
            };
            let buffer = IoBuffer::Pages(pages);
            io.submit(IoRequest { op: IoOp::Write, offset, bytes, buffer, class, done: Box::new(done) });
        }));
    }

    fn close_window(&self, op: OpId, chunk: ChunkId) {
        let Some(memory) = self.find(op, chunk) else { return };
        let complete = Arc::clone(&self.complete);
        self.workers.push(Box::new(move || {
            let outcome = closed(chunk, &memory);
            drop(memory);
            complete(op, outcome);
        }));
    }

    fn copy(&self, op: OpId, source: FrameRef, target: FrameRef, expect: BlockHeader) {
        let Some(from) = self.find(op, source.chunk) else { return };
        let Some(to) = self.find(op, target.chunk) else { return };
        let complete = Arc::clone(&self.complete);
        self.workers.push(Box::new(move || {
            let outcome = match to.copy_from(target.index, &from, source.index, &expect) {
                Ok(true) => Ok(Done::Plain),
                Ok(false) | Err(_) => Err(Fault::Checksum),
            };
            drop((from, to));
            complete(op, outcome);
        }));
    }

    fn scrub(&self, op: OpId, source: DiskFrame, offset: u64, expect: BlockHeader) {
        let bytes =
            expect.length.round_up(PAGE_BYTES).and_then(|payload| payload.get().checked_add(PAGE_BYTES));
        let inside = |bytes: &u64| self.slots.inside_slot(source.device, source.slot, offset, *bytes);
        let (Some(bytes), Some(io)) = (bytes.filter(inside), self.slots.io(source.device)) else {
            tracing::error!(%op, ?source, offset, "a scrub names a frame that does not exist");
            return self.refuse(op, Fault::Device);
        };
        let tools = (Arc::clone(&self.bounces), self.workers.clone(), Arc::clone(&self.complete));
        scrub::start(io, (op, offset, bytes), expect, tools);
    }

    fn carve(&self, op: OpId, carve: Carve) {
        let Some(offset) = self.slots.slot_start(carve.device, carve.slot) else {
            return self.refuse(op, Fault::Device);
        };
        let sequence = self.carve_sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let known = self.spaces.lock().unwrap_or_else(PoisonError::into_inner).get(&carve.space).cloned();
        let header = SlotHeader {
            slot: carve.slot,
            space: carve.space,
            tenant: known
                .as_ref()
                .map_or(terrace_core::TenantId::from_bytes([0; 16]), |record| record.tenant),
            frame_bytes: carve.frame_bytes,
            carve_sequence: sequence,
            generation: known.as_ref().map_or(0, |record| record.generation),
            tenant_name: known.as_ref().map_or_else(String::new, |record| record.tenant_name.clone()),
            manifest: known.map_or_else(Vec::new, |record| record.manifest),
        };
        let mut pages = AlignedPages::new(PAGE_BYTES);
        header.encode(pages.as_mut_slice());
        let (complete, commits) = (Arc::clone(&self.complete), Arc::clone(&self.commits));
        let done = move |_: IoBuffer, outcome: Result<(), Fault>| match outcome {
            Ok(()) => commits.push(Job::Carve { op, carve, sequence }),
            Err(fault) => complete(op, Err(fault)),
        };
        let request = IoRequest {
            op: IoOp::Write,
            offset,
            bytes: PAGE_BYTES,
            buffer: IoBuffer::Pages(pages),
            class: IoClass::Demotion,
            done: Box::new(done),
        };
        let Some(io) = self.slots.io(carve.device).cloned() else { return self.refuse(op, Fault::Device) };
        if !self.note_carved(carve.device, carve.slot) {
            return io.submit(request);
        }
        // The catalog must never know a carving that the slot header contradicts: a crash between the two would
        // have later blocks written where no scan looks for them.
        let complete = Arc::clone(&self.complete);
        let then = move |forgotten: Result<(), CatalogError>| match forgotten {
            Ok(()) => io.submit(request),
            Err(_) => complete(op, Err(Fault::Catalog)),
        };
        self.commits.push(Job::Uncarve { device: carve.device, slot: carve.slot, then: Box::new(then) });
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wishes.stop();
        self.workers.stop();
        self.commits.stop();
        let testing = self.self_test.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                tracing::error!("a media thread panicked");
            }
        };
        self.threads.drain(..).chain(testing).for_each(join);
        // Last: the others may wait for a device that it takes out.
        self.slots.alarm().stop();
        self.watch.take().into_iter().for_each(join);
    }
}

/// The thread that ends waits for devices.
fn watch(slots: &Arc<Slots>, table: &Arc<ChunkTable>, patience: Duration) -> std::io::Result<JoinHandle<()>> {
    let (slots, table) = (Arc::clone(slots), Arc::clone(table));
    let period = (patience / LOOKS).clamp(Duration::from_millis(1), LOOK_PAUSE_MAX);
    let pool = move || table.bytes();
    std::thread::Builder::new().name("media-watch".to_owned()).spawn(move || slots.watch(&pool, period))
}

/// Header page and payload, in whole pages; `None` if they do not fit the frame.
fn io_bytes(memory: &ChunkMemory, length: ByteCount) -> Option<u64> {
    let bytes = length.round_up(PAGE_BYTES)?.get().checked_add(PAGE_BYTES)?;
    (length.get() > 0 && bytes <= memory.frame_bytes().get()).then_some(bytes)
}

/// First the seal, so that nobody new can write once the kernel has said who can.
fn closed(chunk: ChunkId, memory: &ChunkMemory) -> Result<Done, Fault> {
    if let Err(error) = memory.adopt() {
        tracing::error!(%chunk, %error, "a window that was handed back cannot be sealed; it is replaced");
        return Err(Fault::StillMapped);
    }
    match memory.holders() {
        Holders::Nobody | Holders::Readers => Ok(Done::Plain),
        Holders::Writers => {
            tracing::warn!(%chunk, "a window was handed back by somebody who can still write into it; it is replaced");
            Err(Fault::StillMapped)
        }
        Holders::Unknown => Err(Fault::StillMapped),
    }
}

fn verified(memory: &ChunkMemory, index: u32, expect: &BlockHeader) -> Result<Done, Fault> {
    match memory.verify(index, expect) {
        Ok(true) => Ok(Done::Plain),
        Ok(false) | Err(_) => Err(Fault::Checksum),
    }
}

/// Is what came from the device the block that was asked for?
fn arrived(memory: &ChunkMemory, index: u32, expect: &BlockHeader) -> Result<Done, Fault> {
    if memory.header_is(index, &header_bytes(expect)).map_err(|_| Fault::Checksum)? {
        return verified(memory, index, expect);
    }
    let mut page = [0u8; 4096];
    memory.copy_header(index, &mut page).map_err(|_| Fault::Checksum)?;
    match decode_header(&page) {
        Ok(found) => {
            tracing::warn!(expected = %expect.block, found = %found.block, "another block's header page");
        }
        Err(error) => tracing::warn!(block = %expect.block, %error, "damaged header page"),
    }
    Err(Fault::Checksum)
}

fn bounce(
    memory: &ChunkMemory,
    index: u32,
    header: &BlockHeader,
    bytes: u64,
    pages: &mut AlignedPages,
) -> Result<(), Fault> {
    let length = usize::try_from(header.length.get()).map_err(|_| Fault::Checksum)?;
    let end = usize::try_from(bytes).map_err(|_| Fault::Checksum)?;
    let (page, payload) = pages.as_mut_slice()[..end].split_at_mut(4096);
    let (payload, rest) = payload.split_at_mut(length);
    memory.copy_out(index, 0, payload).map_err(|_| Fault::Checksum)?;
    if fold::checksum(header.block, header.generation, payload) != header.checksum {
        return Err(Fault::Checksum);
    }
    rest.fill(0);
    encode_header(header, page);
    Ok(())
}
