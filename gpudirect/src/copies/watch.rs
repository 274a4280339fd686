//! The thread that ends waits. It never calls the driver, so that a driver that
//! hangs takes nobody's deadline with it.

use std::sync::PoisonError;
use std::time::Instant;

use super::Shared;

pub(super) fn watch(shared: &Shared) {
    loop {
        let next = {
            let mut state = shared.lock();
            state.alarm_at = None;
            let next = state.expire(Instant::now());
            if state.closing && state.is_idle() {
                return;
            }
            next
        };
        shared.tell();
        let mut state = shared.lock();
        if !state.told.is_empty() {
            continue;
        }
        let now = Instant::now();
        // A job that came meanwhile may be due before that.
        let next = next.into_iter().chain(state.next_deadline()).min();
        state.alarm_at = next;
        match next {
            Some(at) if at <= now => {}
            Some(at) => {
                drop(shared.alarm.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner))
            }
            None => drop(shared.alarm.wait(state).unwrap_or_else(PoisonError::into_inner)),
        }
    }
}
