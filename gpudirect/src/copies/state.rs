//! The table of an engine: what waits, what flies, what is late. Pure: whoever
//! holds the lock changes it, and nothing here calls a driver.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::ByteCount;

use super::{CopyCounts, CopyLimits, Job, JobId};
use crate::device::{Lane, Registered};
use crate::error::DeviceError;
use crate::span::{Direction, Piece};
use crate::told::Told;

/// One start of this many goes to the least urgent class that waits.
const FAIRNESS: u32 = 8;

/// Which thread runs a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Path {
    /// Registered memory: the device fetches it.
    Direct,
    /// Other memory: the driver copies it first.
    Bounce,
}

impl Path {
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Direct => "copies",
            Self::Bounce => "bounces",
        }
    }
}

/// What a waiting job keeps.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) pieces: Arc<[Piece]>,
    pub(super) slices: Vec<Arc<Registered>>,
}

/// A job to be started now.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) key: u64,
    pub(super) lane: Lane,
    pub(super) waiting: Waiting,
}

#[derive(Debug)]
enum Phase {
    Queued(Waiting),
    Flying { since: Instant },
}

#[derive(Debug)]
struct Entry {
    id: JobId,
    lane: Lane,
    path: Path,
    bytes: u64,
    within: Duration,
    deadline: Instant,
    answered: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, Default)]
struct Flying {
    batches: usize,
    bytes: u64,
}

#[derive(Debug)]
pub(super) struct State {
    limits: CopyLimits,
    entries: BTreeMap<u64, Entry>,
    next_key: u64,
    queues: BTreeMap<(Path, Lane), VecDeque<u64>>,
    flying: BTreeMap<(Path, Direction), Flying>,
    /// Of jobs without an answer.
    deadlines: BTreeSet<(Instant, u64)>,
    /// Of jobs that fly: when they were started.
    flights: BTreeSet<(Instant, u64)>,
    /// When the watch looks next; `None` while it looks or has nothing to wait for.
    pub(super) alarm_at: Option<Instant>,
    /// With what a job kept while it waited, if it never started.
    pub(super) told: VecDeque<Told<Option<Waiting>>>,
    pub(super) lost: Option<DeviceError>,
    /// Whether the device was shut after it was lost, and how that went.
    pub(super) shut: Option<Result<(), DeviceError>>,
    pub(super) shutting: bool,
    pub(super) closing: bool,
    starts: u32,
    bytes: u64,
    totals: CopyCounts,
}

impl State {
    pub(super) fn new(limits: CopyLimits) -> Self {
        Self {
            limits,
            entries: BTreeMap::new(),
            next_key: 0,
            queues: BTreeMap::new(),
            flying: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            flights: BTreeSet::new(),
            alarm_at: None,
            told: VecDeque::new(),
            lost: None,
            shut: None,
            shutting: false,
            closing: false,
            starts: 0,
            bytes: 0,
            totals: CopyCounts::default(),
        }
    }

    /// Whether there is room for a job of so many bytes.
    pub(super) fn admits(&self, bytes: u64) -> Result<(), DeviceError> {
        if self.closing {
            return Err(closed());
        }
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        if self.entries.len() >= self.limits.jobs_max {
            return Err(DeviceError::Throttled { limit: "copy_jobs_max" });
        }
        let after = self.bytes.checked_add(bytes);
        if after.is_none_or(|after| after > self.limits.bytes_max.get()) {
            return Err(DeviceError::Throttled { limit: "copy_bytes_max" });
        }
        Ok(())
    }

    /// Queues a job, and answers whether the watch must look earlier than it meant to.
    pub(super) fn enqueue(
        &mut self,
        job: &Job,
        lane: Lane,
        path: Path,
        bytes: u64,
        waiting: Waiting,
        now: Instant,
    ) -> Result<bool, DeviceError> {
        self.admits(bytes)?;
        let key = self.next_key;
        self.next_key += 1;
        let deadline = now + job.within;
        let phase = Phase::Queued(waiting);
        let Job { id, within, .. } = *job;
        self.entries.insert(key, Entry { id, lane, path, bytes, within, deadline, answered: false, phase });
        self.deadlines.insert((deadline, key));
        self.queues.entry((path, lane)).or_default().push_back(key);
        self.bytes += bytes;
        if path == Path::Bounce {
            self.totals.bounced_total += 1;
        }
        Ok(self.alarm_at.is_none_or(|at| deadline < at))
    }

    /// Takes what may start now on this path. It counts as flying from here on.
    pub(super) fn take(&mut self, path: Path, now: Instant) -> Vec<Starting> {
        let mut taken = Vec::new();
        for direction in Direction::ALL {
            while self.has_room(path, direction) {
                let Some((key, lane)) = self.next(path, direction) else { break };
                let entry = self.entries.get_mut(&key).expect("what is queued is in the table");
                let phase = std::mem::replace(&mut entry.phase, Phase::Flying { since: now });
                let Phase::Queued(waiting) = phase else { unreachable!("what is queued has not started") };
                let flying = self.flying.entry((path, direction)).or_default();
                flying.batches += 1;
                flying.bytes += entry.bytes;
                self.flights.insert((now, key));
                taken.push(Starting { key, lane, waiting });
            }
        }
        taken
    }

    fn has_room(&self, path: Path, direction: Direction) -> bool {
        let flying = self.flying.get(&(path, direction)).copied().unwrap_or_default();
        flying.batches < self.limits.flights_max && flying.bytes < self.limits.flight_bytes_max.get()
    }

    /// The most urgent job of a direction; now and then the least urgent one.
    fn next(&mut self, path: Path, direction: Direction) -> Option<(u64, Lane)> {
        let mut waiting = self
            .queues
            .iter_mut()
            .filter(|((of, lane), queue)| *of == path && lane.direction == direction && !queue.is_empty());
        // Only real starts count: looks into empty queues would make every second one fair.
        let next = self.starts.wrapping_add(1);
        let found = if next.is_multiple_of(FAIRNESS) { waiting.next_back() } else { waiting.next() };
        let ((_, lane), queue) = found?;
        self.starts = next;
        queue.pop_front().map(|key| (key, *lane))
    }

    fn answer(&mut self, key: u64, result: Result<(), DeviceError>) {
        let entry = self.entries.get_mut(&key).expect("whoever answers has the job");
        if entry.answered {
            return;
        }
        entry.answered = true;
        self.deadlines.remove(&(entry.deadline, key));
        match &result {
            Ok(()) => {
                self.totals.done_total += 1;
                let bytes = self.totals.done_bytes_total.get() + entry.bytes;
                self.totals.done_bytes_total = ByteCount::new(bytes);
            }
            Err(error) => {
                self.totals.failed_total += 1;
                self.totals.late_total += u64::from(matches!(error, DeviceError::Late(_)));
            }
        }
        self.told.push_back(Told::Answered(entry.id, result));
    }

    /// The device has let go of a job: the first answer stands, and its memory is free.
    pub(super) fn finish(&mut self, key: u64, result: Result<(), DeviceError>) {
        self.answer(key, result);
        let entry = self.entries.remove(&key).expect("a job ends once");
        self.bytes -= entry.bytes;
        let kept = match entry.phase {
            Phase::Queued(waiting) => {
                let queue = self.queues.get_mut(&(entry.path, entry.lane));
                queue.expect("what is queued has a queue").retain(|queued| *queued != key);
                Some(waiting)
            }
            Phase::Flying { since } => {
                self.flights.remove(&(since, key));
                let flying = self.flying.get_mut(&(entry.path, entry.lane.direction));
                let flying = flying.expect("what flies is counted");
                flying.batches -= 1;
                flying.bytes -= entry.bytes;
                None
            }
        };
        self.told.push_back(Told::Released(entry.id, kept));
    }

    /// Ends the waits whose time is over, and answers when to look again.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some((deadline, key)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now) {
            let entry = &self.entries[&key];
            debug_assert_eq!(entry.deadline, deadline, "one deadline a job");
            let late = Err(DeviceError::Late(entry.within));
            match entry.phase {
                Phase::Queued(_) => self.finish(key, late),
                Phase::Flying { .. } => self.answer(key, late),
            }
        }
        let oldest = self.flights.first().map(|(since, _)| *since + self.limits.silence_max);
        if oldest.is_some_and(|silent| silent <= now) && self.lost.is_none() {
            self.lose(&DeviceError::Hung { call: "a batch of copies", within: self.limits.silence_max });
        }
        let silent = if self.lost.is_some() { None } else { oldest };
        self.next_deadline().into_iter().chain(silent).min()
    }

    /// Of the job that is due first.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Answers everything with the loss. What waits is released; what flies is not yet.
    pub(super) fn lose(&mut self, error: &DeviceError) {
        if self.lost.is_none() {
            self.lost = Some(error.clone());
        }
        self.refuse_all(error);
    }

    fn refuse_all(&mut self, error: &DeviceError) {
        let keys: Vec<_> = self.entries.keys().copied().collect();
        for key in keys {
            match self.entries[&key].phase {
                Phase::Queued(_) => self.finish(key, Err(error.clone())),
                Phase::Flying { .. } => self.answer(key, Err(error.clone())),
            }
        }
    }

    /// Refuses what waits and what comes. What flies keeps its answer until it ends or is late.
    pub(super) fn close(&mut self) {
        self.closing = true;
        let waiting = |entry: &Entry| matches!(entry.phase, Phase::Queued(_));
        let keys: Vec<_> =
            self.entries.iter().filter(|(_, entry)| waiting(entry)).map(|(key, _)| *key).collect();
        for key in keys {
            self.finish(key, Err(closed()));
        }
    }

    /// Nothing waits or flies.
    pub(super) fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn counts(&self) -> CopyCounts {
        let mut counts = self.totals;
        for entry in self.entries.values() {
            match entry.phase {
                Phase::Queued(_) => counts.queued += 1,
                Phase::Flying { .. } => {
                    counts.flying += 1;
                    counts.held += u64::from(entry.answered);
                }
            }
        }
        counts.bytes = ByteCount::new(self.bytes);
        counts
    }
}

fn closed() -> DeviceError {
    DeviceError::Lost { detail: "its engine of copies is closed".to_owned() }
}
