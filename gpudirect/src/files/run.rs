//! The threads of a cuFile engine: those that call the library, each for as long
//! as the library takes, and the watch, which ends waits and never calls it.

use std::sync::PoisonError;
use std::time::Instant;

use super::library::Library;
use super::stream::Stream;
use super::{FileJob, Shared, Submission};
use crate::device::Device;
use crate::error::DeviceError;

/// One thread of the library's callers.
pub(super) fn run(device: &dyn Device, library: &Library, shared: &Shared, number: usize) {
    // A lost device shows at the first job.
    let bound = device.bind_thread();
    // Made when it is first wanted.
    let mut stream = None;
    loop {
        let taken = {
            let mut table = shared.lock();
            loop {
                let taken = table.take(number, Instant::now());
                if !taken.is_empty() {
                    break taken;
                }
                if table.closing {
                    drop(table);
                    shared.alarm.notify_all();
                    return;
                }
                table = shared.work.wait(table).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let results = match &bound {
            Err(error) => vec![Err(error.clone()); taken.len()],
            Ok(()) => perform(library, &mut stream, &taken),
        };
        {
            let mut table = shared.lock();
            for ((key, job), result) in taken.into_iter().zip(results) {
                table.finish(key, job, result);
            }
            table.rested(number);
        }
        shared.tell();
    }
}

/// Jobs that are given in the same manner, to their end.
fn perform(
    library: &Library,
    stream: &mut Option<Stream>,
    jobs: &[(u64, FileJob)],
) -> Vec<Result<(), DeviceError>> {
    match jobs.first().map_or(Submission::Calls, |(_, job)| job.submission) {
        Submission::Calls => jobs.iter().map(|(_, job)| library.call(job)).collect(),
        Submission::Batches => library.batch(jobs),
        Submission::Streams => {
            let stream = match stream.take().map_or_else(|| Stream::open(library), Ok) {
                Ok(opened) => stream.insert(opened),
                Err(error) => return vec![Err(error); jobs.len()],
            };
            stream.run(jobs)
        }
    }
}

/// Ends waits. Never calls the library.
pub(super) fn watch(shared: &Shared) {
    loop {
        let next = {
            let mut table = shared.lock();
            if table.closing && table.under_way() == 0 {
                return;
            }
            table.expire(Instant::now())
        };
        shared.tell();
        let table = shared.lock();
        if !table.told.is_empty() {
            continue;
        }
        let now = Instant::now();
        let next = next.into_iter().chain(table.next_deadline()).min();
        match next {
            Some(at) if at <= now => {}
            Some(at) => {
                drop(shared.alarm.wait_timeout(table, at - now).unwrap_or_else(PoisonError::into_inner))
            }
            None => drop(shared.alarm.wait(table).unwrap_or_else(PoisonError::into_inner)),
        }
    }
}
