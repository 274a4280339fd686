//! Ends that are to be told: noted under an engine's lock, told without it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use crate::copies::{Ends, JobId};
use crate::error::DeviceError;

/// Something to be told, in this order.
#[derive(Debug)]
pub(crate) enum Told<K> {
    Answered(JobId, Result<(), DeviceError>),
    /// With what the job kept: to be dropped before.
    Released(JobId, K),
}

/// Tells what has ended, in order, until nothing has. Whoever calls holds no lock that `next` takes. `telling` is held
/// meanwhile, so that of two callers one tells after the other.
pub(crate) fn tell<K>(telling: &Mutex<()>, ends: &dyn Ends, mut next: impl FnMut() -> VecDeque<Told<K>>) {
    let _telling = telling.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let told = next();
        if told.is_empty() {
            return;
        }
        for end in told {
            match end {
                Told::Answered(id, result) => ends.answered(id, result),
                Told::Released(id, kept) => {
                    drop(kept);
                    ends.released(id);
                }
            }
        }
    }
}
