//! The threads that call the driver: start what may start, look at what flies.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::Shared;
use super::state::{Path, Starting, Waiting};
use crate::device::{Device, Mark, Registered};
use crate::error::DeviceError;

/// How long to wait between two looks at events: a copy of 2 MiB takes 40 us on the fastest link.
const LOOK: Duration = Duration::from_micros(10);

#[derive(Debug)]
struct Flight {
    key: u64,
    /// Without one, only shutting the device ends it.
    mark: Option<Box<dyn Mark>>,
    // Registrations outlive the copies over them.
    slices: Vec<Arc<Registered>>,
}

pub(super) fn run(device: &dyn Device, shared: &Shared, path: Path) {
    fine_timer();
    let mut flights: Vec<Flight> = Vec::new();
    loop {
        let Some(starting) = next(shared, path, &flights) else { break };
        let lost = start(device, shared, starting, &mut flights).and_then(|()| look(shared, &mut flights));
        if let Err(error) = lost {
            shared.lock().lose(&error);
        }
        shared.tell();
        if shared.lock().lost.is_some() {
            bury(device, shared, path, &mut flights);
            shared.tell();
        }
    }
    shared.alarm.notify_all();
}

/// What to start. Waits while there is nothing to do; `None` ends the thread.
fn next(shared: &Shared, path: Path, flights: &[Flight]) -> Option<Vec<Starting>> {
    let mut state = shared.lock();
    loop {
        let starting = state.take(path, Instant::now());
        if !starting.is_empty() {
            return Some(starting);
        }
        if !flights.is_empty() {
            drop(shared.work(path).wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner));
            return Some(Vec::new());
        }
        if state.closing {
            return None;
        }
        state = shared.work(path).wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

fn start(
    device: &dyn Device,
    shared: &Shared,
    starting: Vec<Starting>,
    flights: &mut Vec<Flight>,
) -> Result<(), DeviceError> {
    let mut loss = None;
    for Starting { key, lane, waiting } in starting {
        // After a loss nothing more is started; `finish` keeps the first answer.
        if let Some(loss) = &loss {
            shared.lock().finish(key, Err(DeviceError::clone(loss)));
            continue;
        }
        let Waiting { pieces, slices } = waiting;
        match device.start(lane, pieces) {
            Ok(mark) => flights.push(Flight { key, mark: Some(mark), slices }),
            Err(error) if error.is_lost() => {
                flights.push(Flight { key, mark: None, slices });
                loss = Some(error);
            }
            Err(error) => shared.lock().finish(key, Err(error)),
        }
    }
    loss.map_or(Ok(()), Err)
}

/// Takes out what has ended. An error of the device itself ends the look.
fn look(shared: &Shared, flights: &mut Vec<Flight>) -> Result<(), DeviceError> {
    let mut at = 0;
    while at < flights.len() {
        let result = match flights[at].mark.as_mut().map_or(Ok(false), |mark| mark.ended()) {
            Ok(false) => {
                at += 1;
                continue;
            }
            Ok(true) => Ok(()),
            Err(error) if error.is_lost() => return Err(error),
            Err(error) => Err(error),
        };
        let Flight { key, mark, slices } = flights.swap_remove(at);
        drop((mark, slices));
        shared.lock().finish(key, result);
    }
    Ok(())
}

/// Everything is answered by now. Memory is free when the device is shut; when
/// it cannot be, it stays held, and so does this thread's list of it.
fn bury(device: &dyn Device, shared: &Shared, path: Path, flights: &mut Vec<Flight>) {
    let first = {
        let mut state = shared.lock();
        !std::mem::replace(&mut state.shutting, true)
    };
    if first {
        let shut = device.shut();
        shared.lock().shut = Some(shut);
        shared.wake_all();
    }
    let mut state = shared.lock();
    while state.shut.is_none() {
        state = shared.work(path).wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    let Some(Ok(())) = state.shut else {
        std::mem::forget(std::mem::take(flights));
        return;
    };
    let lost = state.lost.clone().expect("only a lost device is buried");
    drop(state);
    for Flight { key, mark, slices } in flights.drain(..) {
        drop((mark, slices));
        shared.lock().finish(key, Err(lost.clone()));
    }
}

/// Lets this thread's short waits be short: the kernel adds 50 us to each otherwise.
fn fine_timer() {
    // SAFETY: concerns the calling thread's timers alone; a refusal costs speed alone.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000, 0, 0, 0) };
}
