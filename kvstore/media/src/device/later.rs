//! Answers that a device's thread puts off until the device has its next work:
//! what follows an answer (a checksum, the core) takes longer than telling the
//! device, and goes on while the device works.

use std::cell::RefCell;

use terrace_core::Fault;

use super::{IoBuffer, IoDone};

type Answer = (IoDone, IoBuffer, Result<(), Fault>);

thread_local! {
    /// `None` on threads that do not put off.
    static ANSWERS: RefCell<Option<Vec<Answer>>> = const { RefCell::new(None) };
}

/// Answers now, or, on a thread that puts off, when it comes to that.
pub(super) fn answer(done: IoDone, buffer: IoBuffer, outcome: Result<(), Fault>) {
    let now = ANSWERS.with_borrow_mut(|answers| match answers {
        Some(answers) => {
            answers.push((done, buffer, outcome));
            None
        }
        None => Some((done, buffer, outcome)),
    });
    if let Some((done, buffer, outcome)) = now {
        done(buffer, outcome);
    }
}

/// From now on this thread puts answers off.
pub(super) fn put_off() {
    ANSWERS.set(Some(Vec::new()));
}

/// Swaps the answers that were put off with `answers`, which is empty and keeps its memory.
pub(super) fn take(answers: &mut Vec<Answer>) {
    ANSWERS.with_borrow_mut(|put_off| {
        if let Some(put_off) = put_off {
            std::mem::swap(put_off, answers);
        }
    });
}

/// Answers that were put off.
pub(super) type Answers = Vec<Answer>;
