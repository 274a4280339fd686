//! The commit thread: makes things durable, in the order in which they were
//! asked for.
//!
//! It takes all that waits, syncs the devices concerned, applies one synced
//! batch to the catalog and then answers everybody. What a device reported as
//! failed to sync is answered as failed and is not in the batch. After a failed
//! batch everything is refused until the catalog has been reopened.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use terrace_core::{
    BlockHeader, BlockId, DeviceId, DiskFrame, Done, Fault, IoClass, OpId, SpaceId, TenantId, UseStats,
};

use crate::api::{Carve, Complete, FoundHeader, SpaceRecord};
use crate::catalog::{Batch, Catalog, CatalogError};
use crate::device::{IoBuffer, IoOp, IoRequest};
use crate::open::first_entries;
use crate::scan::Scanned;
use crate::slots::Slots;

/// Changes of one batch at most: bounds the memory of a group.
const BATCH_CHANGES_MAX: usize = 16_384;

pub(crate) type Answer = mpsc::Sender<Result<(), CatalogError>>;

/// Something to be made durable.
pub(crate) enum Job {
    Commit {
        op: OpId,
        put: Vec<(DiskFrame, BlockHeader, UseStats)>,
        delete: Vec<BlockId>,
    },
    /// A slot is about to be carved again: the catalog forgets how it was, then `then` is called.
    Uncarve {
        device: DeviceId,
        slot: u32,
        then: Box<dyn FnOnce(Result<(), CatalogError>) + Send>,
    },
    /// The slot's header page was written.
    Carve {
        op: OpId,
        carve: Carve,
        sequence: u64,
    },
    Clear {
        op: OpId,
        space: SpaceId,
        tenant: TenantId,
        generation: u64,
    },
    PutSpace {
        record: SpaceRecord,
        answer: Answer,
    },
    /// What a scan found in some slots.
    Restore {
        found: Arc<Vec<Scanned>>,
        answer: Answer,
    },
    /// The catalog is damaged: a new one takes its place, and a scan must follow.
    Renew {
        spaces: Vec<SpaceRecord>,
        answer: Answer,
    },
    /// The scan is complete.
    Scanned {
        answer: Answer,
    },
    Reopen {
        answer: Answer,
    },
    /// The last job: marks a clean end.
    Close {
        answer: Answer,
    },
}

/// Its queue, shared with the submitters.
pub(crate) struct Commits {
    queue: Mutex<(VecDeque<Job>, bool)>,
    wake: Condvar,
    commits: AtomicU64,
    batches: AtomicU64,
}

impl Commits {
    pub(crate) fn new() -> Self {
        Self {
            queue: Mutex::new((VecDeque::new(), false)),
            wake: Condvar::new(),
            commits: AtomicU64::new(0),
            batches: AtomicU64::new(0),
        }
    }

    /// The core bounds how many wait.
    pub(crate) fn push(&self, job: Job) {
        self.lock().0.push_back(job);
        self.wake.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.lock().1 = true;
        self.wake.notify_one();
    }

    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.commits.load(Ordering::Relaxed), self.batches.load(Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, (VecDeque<Job>, bool)> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that waits; `None` when stopped and empty.
    fn take(&self) -> Option<VecDeque<Job>> {
        let mut queue = self.lock();
        loop {
            if !queue.0.is_empty() {
                return Some(std::mem::take(&mut queue.0));
            }
            if queue.1 {
                return None;
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What the thread works on.
pub(crate) struct Committer {
    pub(crate) commits: Arc<Commits>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) complete: Arc<Complete>,
    /// How long a device may take to sync before it counts as failed.
    pub(crate) sync_patience: Duration,
}

impl Committer {
    pub(crate) fn run(self) {
        while let Some(mut jobs) = self.commits.take() {
            self.slots.tell_behind();
            while !jobs.is_empty() {
                let group = take_group(&mut jobs);
                if group.is_empty() {
                    if let Some(job) = jobs.pop_front() {
                        self.alone(job);
                    }
                } else {
                    self.group(group);
                }
            }
        }
    }

    /// One sync a device, one batch, many answers.
    fn group(&self, group: Vec<Job>) {
        let failed = sync_devices(&self.slots, &devices_of(&group), self.sync_patience);
        let mut batch = Batch::default();
        let mut answers = Vec::with_capacity(group.len());
        for job in group {
            let touched = devices_of(std::slice::from_ref(&job));
            let fault = touched.iter().find_map(|device| failed.get(device).copied());
            match job {
                Job::Commit { op, put, delete } => {
                    answers.push((op, fault));
                    if fault.is_none() {
                        delete.iter().for_each(|block| batch.delete_block(*block));
                        put.iter().for_each(|(frame, header, stats)| batch.put_block(*frame, header, *stats));
                    }
                }
                Job::Carve { op, carve, sequence } => {
                    answers.push((op, fault));
                    if fault.is_none() {
                        batch.put_carve(&carve, sequence);
                    }
                }
                Job::Clear { .. }
                | Job::Uncarve { .. }
                | Job::PutSpace { .. }
                | Job::Restore { .. }
                | Job::Scanned { .. }
                | Job::Renew { .. }
                | Job::Reopen { .. }
                | Job::Close { .. } => unreachable!("take_group takes commits and carvings only"),
            }
        }
        let written = self.write(batch);
        for (op, fault) in answers {
            self.commits.commits.fetch_add(1, Ordering::Relaxed);
            let outcome = match (fault, &written) {
                (Some(fault), _) => Err(fault),
                (None, Err(_)) => Err(Fault::Catalog),
                (None, Ok(())) => Ok(Done::Plain),
            };
            (self.complete)(op, outcome);
        }
    }

    fn alone(&self, job: Job) {
        match job {
            Job::Clear { op, space, tenant, generation } => {
                (self.complete)(op, self.clear(space, tenant, generation));
            }
            Job::Uncarve { device, slot, then } => {
                let mut batch = Batch::default();
                batch.delete_carve(device, slot);
                then(self.write(batch));
            }
            Job::PutSpace { mut record, answer } => {
                // A clear may have been asked for while the caller made the record.
                record.generation = record.generation.max(self.slots.lowest(record.tenant, record.space));
                let mut batch = Batch::default();
                batch.put_space(&record);
                respond(&answer, self.write(batch));
            }
            Job::Restore { found, answer } => {
                let outcome = self.restore(&found);
                // The caller goes on with it, and copies it if it is still shared.
                drop(found);
                respond(&answer, outcome);
            }
            Job::Scanned { answer } => {
                let mut batch = Batch::default();
                batch.delete_meta("rebuild");
                respond(&answer, self.write(batch));
            }
            Job::Reopen { answer } => respond(&answer, self.catalog.reopen()),
            Job::Renew { spaces, answer } => respond(&answer, self.renew(&spaces)),
            Job::Close { answer } => {
                let mut batch = Batch::default();
                batch.put_meta("clean", &[1]);
                respond(&answer, self.write(batch));
            }
            Job::Commit { .. } | Job::Carve { .. } => self.group(vec![job]),
        }
    }

    fn renew(&self, spaces: &[SpaceRecord]) -> Result<(), CatalogError> {
        let entries = first_entries(&self.slots, spaces, self.slots.incarnation());
        let moved_to = self.catalog.renew(entries)?;
        tracing::error!(moved_to = %moved_to.display(), "catalog damaged: rebuilding it from the devices");
        Ok(())
    }

    fn write(&self, batch: Batch) -> Result<(), CatalogError> {
        self.commits.batches.fetch_add(1, Ordering::Relaxed);
        self.catalog.write(batch)
    }

    fn write_unsynced(&self, batch: Batch) -> Result<(), CatalogError> {
        self.commits.batches.fetch_add(1, Ordering::Relaxed);
        self.catalog.write_unsynced(batch)
    }

    /// Superblocks first: from then on no scan brings an older block back.
    fn clear(&self, space: SpaceId, tenant: TenantId, generation: u64) -> Result<Done, Fault> {
        self.slots.raise_lowest(tenant, space, generation)?;
        let mut doomed = Vec::new();
        let walked = self.catalog.blocks(4096, &mut |batch| {
            let of_space =
                |found: &&FoundHeader| found.header.space == space && found.header.generation < generation;
            doomed.extend(batch.iter().filter(of_space).map(|found| found.header.block));
        });
        walked.map_err(|_| Fault::Catalog)?;
        for piece in doomed.chunks(BATCH_CHANGES_MAX) {
            let mut batch = Batch::default();
            piece.iter().for_each(|block| batch.delete_block(*block));
            self.write(batch).map_err(|_| Fault::Catalog)?;
        }
        let mut spaces = self.catalog.spaces().map_err(|_| Fault::Catalog)?;
        if let Some(record) = spaces.get_mut(&space)
            && record.generation < generation
        {
            record.generation = generation;
            let mut batch = Batch::default();
            batch.put_space(record);
            self.write(batch).map_err(|_| Fault::Catalog)?;
        }
        Ok(Done::Plain)
    }

    /// Adds what a scan found, unless the catalog knows something newer by now. Not synced: until the scan
    /// is complete, the next start repeats it.
    fn restore(&self, found: &[Scanned]) -> Result<(), CatalogError> {
        let mut batch = Batch::default();
        let mut known = self.catalog.spaces()?;
        for scanned in found {
            if let Some(carve) = &scanned.piece.carve {
                batch.put_carve(carve, scanned.carve_sequence);
            }
            if let Some(record) = &scanned.piece.space
                && known.get(&record.space).is_none_or(|known| known.generation < record.generation)
            {
                batch.put_space(record);
                known.insert(record.space, record.clone());
            }
        }
        // The catalog does not show what waits in the batch.
        let mut newest: BTreeMap<BlockId, u64> = BTreeMap::new();
        for found in found.iter().flat_map(|scanned| &scanned.piece.blocks) {
            let (block, sequence) = (found.header.block, found.header.write_sequence);
            let known = match newest.get(&block) {
                Some(newest) => Some(*newest),
                None => self.catalog.block(block)?.map(|known| known.header.write_sequence),
            };
            if known.is_none_or(|known| known < sequence) {
                batch.put_block(found.frame, &found.header, found.stats);
                newest.insert(block, sequence);
            }
            if batch.len() >= BATCH_CHANGES_MAX {
                self.write_unsynced(std::mem::take(&mut batch))?;
            }
        }
        self.write_unsynced(batch)
    }
}

/// The commits and carvings at the front, as many as fit a batch.
fn take_group(jobs: &mut VecDeque<Job>) -> Vec<Job> {
    let mut group = Vec::new();
    let mut changes = 0usize;
    while let Some(job) = jobs.front() {
        let size = match job {
            Job::Commit { put, delete, .. } => put.len() + delete.len(),
            Job::Carve { .. } => 1,
            Job::Clear { .. }
            | Job::Uncarve { .. }
            | Job::PutSpace { .. }
            | Job::Restore { .. }
            | Job::Scanned { .. }
            | Job::Renew { .. }
            | Job::Reopen { .. }
            | Job::Close { .. } => break,
        };
        if !group.is_empty() && changes + size > BATCH_CHANGES_MAX {
            break;
        }
        changes += size;
        group.extend(jobs.pop_front());
    }
    group
}

fn devices_of(jobs: &[Job]) -> BTreeSet<DeviceId> {
    let mut devices = BTreeSet::new();
    for job in jobs {
        match job {
            Job::Commit { put, .. } => devices.extend(put.iter().map(|(frame, ..)| frame.device)),
            Job::Carve { carve, .. } => drop(devices.insert(carve.device)),
            Job::Clear { .. }
            | Job::Uncarve { .. }
            | Job::PutSpace { .. }
            | Job::Restore { .. }
            | Job::Scanned { .. }
            | Job::Renew { .. }
            | Job::Reopen { .. }
            | Job::Close { .. } => {}
        }
    }
    devices
}

/// A caller that went away needs no answer.
fn respond(answer: &Answer, outcome: Result<(), CatalogError>) {
    let _ = answer.send(outcome);
}

/// Syncs devices side by side, each within the patience. Returns those that failed.
pub(crate) fn sync_devices(
    slots: &Slots,
    devices: &BTreeSet<DeviceId>,
    patience: Duration,
) -> BTreeMap<DeviceId, Fault> {
    let (sender, receiver) = mpsc::channel();
    let mut failed = BTreeMap::new();
    for device in devices {
        let Some(io) = slots.io(*device) else {
            failed.insert(*device, Fault::Device);
            continue;
        };
        let (sender, device) = (sender.clone(), *device);
        io.submit(IoRequest {
            op: IoOp::Sync,
            offset: 0,
            bytes: 0,
            buffer: IoBuffer::Nothing,
            class: IoClass::Demotion,
            done: Box::new(move |_, outcome| {
                let _ = sender.send((device, outcome));
            }),
        });
    }
    drop(sender);
    // A device that hangs must not hold up the others for ever. What it was to make durable is answered as
    // failed; if its sync fails later, the device takes no more writes.
    let mut waiting: BTreeSet<DeviceId> =
        devices.iter().filter(|device| !failed.contains_key(*device)).copied().collect();
    let patience_ends = Instant::now() + patience;
    while !waiting.is_empty() {
        let Ok((device, outcome)) =
            receiver.recv_timeout(patience_ends.saturating_duration_since(Instant::now()))
        else {
            break;
        };
        waiting.remove(&device);
        if let Err(fault) = outcome {
            failed.insert(device, fault);
        }
    }
    for device in waiting {
        tracing::error!(%device, "no answer to a sync: what it covers is not durable");
        failed.insert(device, Fault::Device);
    }
    failed
}
