//! The jobs of a cuFile engine: what waits, what is in a call, what is late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::{FileJob, FileLimits, FileRefused};
use crate::copies::JobId;
use crate::error::DeviceError;
use crate::told::Told;

#[derive(Debug)]
struct Entry {
    id: JobId,
    deadline: Instant,
    within: Duration,
    answered: bool,
    /// Until a thread takes it.
    job: Option<FileJob>,
}

#[derive(Debug)]
pub(super) struct Table {
    limits: FileLimits,
    entries: BTreeMap<u64, Entry>,
    queue: VecDeque<u64>,
    next_key: u64,
    deadlines: BTreeSet<(Instant, u64)>,
    /// Threads that are in a call, and since when.
    calls: BTreeMap<usize, Instant>,
    pub(super) told: VecDeque<Told<Box<FileJob>>>,
    pub(super) closing: bool,
}

impl Table {
    pub(super) fn new(limits: FileLimits) -> Self {
        Self {
            limits,
            entries: BTreeMap::new(),
            queue: VecDeque::new(),
            next_key: 0,
            deadlines: BTreeSet::new(),
            calls: BTreeMap::new(),
            told: VecDeque::new(),
            closing: false,
        }
    }

    fn hangs(&self, now: Instant) -> bool {
        let silent = |since: &&Instant| now.duration_since(**since) >= self.limits.silence_max;
        self.calls.values().filter(silent).count() >= self.limits.threads.max(1)
    }

    pub(super) fn enqueue(&mut self, job: FileJob, now: Instant) -> Result<(), Box<FileRefused>> {
        let error = if self.closing {
            DeviceError::Lost { detail: "the engine of files is closed".to_owned() }
        } else if self.hangs(now) {
            DeviceError::Hung { call: "every call of cuFile", within: self.limits.silence_max }
        } else if self.entries.len() >= self.limits.jobs_max {
            DeviceError::Throttled { limit: "file_jobs_max" }
        } else {
            let key = self.next_key;
            self.next_key += 1;
            let deadline = now + job.within;
            self.deadlines.insert((deadline, key));
            let entry = Entry { id: job.id, deadline, within: job.within, answered: false, job: Some(job) };
            self.entries.insert(key, entry);
            self.queue.push_back(key);
            return Ok(());
        };
        Err(Box::new(FileRefused { job, error }))
    }

    /// What a thread does next, oldest first: jobs that are given as the first one is, and go the same way, as many
    /// as can be given so at once.
    pub(super) fn take(&mut self, thread: usize, now: Instant) -> Vec<(u64, FileJob)> {
        let mut taken: Vec<(u64, FileJob)> = Vec::new();
        while taken.first().is_none_or(|(_, first)| taken.len() < first.submission.jobs_max()) {
            let Some(key) = self.queue.front() else { break };
            let entry = self.entries.get_mut(key).expect("what is queued is in the table");
            let next = entry.job.as_ref().expect("what is queued has its job");
            let way = |job: &FileJob| (job.submission, job.operation);
            if taken.first().is_some_and(|(_, first)| way(first) != way(next)) {
                break;
            }
            taken.push((*key, entry.job.take().expect("it was there a line above")));
            self.queue.pop_front();
        }
        if !taken.is_empty() {
            self.calls.insert(thread, now);
        }
        taken
    }

    /// A thread is back from its call.
    pub(super) fn rested(&mut self, thread: usize) {
        self.calls.remove(&thread);
    }

    fn answer(&mut self, key: u64, result: Result<(), DeviceError>) {
        let entry = self.entries.get_mut(&key).expect("whoever answers has the job");
        if entry.answered {
            return;
        }
        entry.answered = true;
        self.deadlines.remove(&(entry.deadline, key));
        self.told.push_back(Told::Answered(entry.id, result));
    }

    /// A call has ended. The first answer stands.
    pub(super) fn finish(&mut self, key: u64, job: FileJob, result: Result<(), DeviceError>) {
        self.answer(key, result);
        self.entries.remove(&key);
        self.told.push_back(Told::Released(job.id, Box::new(job)));
    }

    fn refuse_waiting(&mut self, key: u64, error: DeviceError) {
        let job = self.entries.get_mut(&key).and_then(|entry| entry.job.take());
        let job = job.expect("what waits has its job");
        self.queue.retain(|queued| *queued != key);
        self.finish(key, job, Err(error));
    }

    /// Ends the waits whose time is over, and answers when to look again.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some((_, key)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now) {
            let entry = &self.entries[&key];
            let late = DeviceError::Late(entry.within);
            if entry.job.is_some() {
                self.refuse_waiting(key, late);
            } else {
                self.answer(key, Err(late));
            }
        }
        self.next_deadline()
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    pub(super) fn close(&mut self) {
        self.closing = true;
        let waiting: Vec<_> = self.queue.iter().copied().collect();
        for key in waiting {
            self.refuse_waiting(
                key,
                DeviceError::Lost { detail: "the engine of files is closed".to_owned() },
            );
        }
    }

    pub(super) fn under_way(&self) -> usize {
        self.entries.len()
    }
}
