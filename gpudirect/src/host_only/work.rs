//! The thread of the stand-in that copies, and the ends of what it copies.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError};

use super::chunk::Counted;
use super::{Fault, Shared};
use crate::device::Mark;
use crate::error::DeviceError;
use crate::span::{Piece, Span};

const UNDER_WAY: u8 = 0;
const DONE: u8 = 1;
const FAILED: u8 = 2;
const LOST: u8 = 3;

/// Batches in the order of their starts.
#[derive(Debug, Default)]
pub(super) struct Work {
    queue: VecDeque<Flight>,
    busy: bool,
}

impl Work {
    pub(super) fn push(&mut self, flight: Flight) {
        self.queue.push_back(flight);
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy || !self.queue.is_empty()
    }
}

/// A batch under way. It keeps what it touches.
#[derive(Debug)]
pub(super) struct Flight {
    pieces: Arc<[Piece]>,
    state: Arc<AtomicU8>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct HostMark {
    shared: Arc<Shared>,
    state: Arc<AtomicU8>,
    _counted: Counted,
}

impl Flight {
    /// The caller has counted it as a flight.
    pub(super) fn new(shared: Arc<Shared>, pieces: Arc<[Piece]>) -> Self {
        Self { pieces, state: Arc::new(AtomicU8::new(UNDER_WAY)), shared }
    }

    pub(super) fn mark(&self) -> Box<dyn Mark> {
        let counted = Counted::flying(Arc::clone(&self.shared));
        Box::new(HostMark {
            shared: Arc::clone(&self.shared),
            state: Arc::clone(&self.state),
            _counted: counted,
        })
    }

    fn copy(&self, pieces: usize) {
        for piece in &self.pieces[..pieces] {
            let length = usize::try_from(piece.bytes().get()).expect("a piece lies in mapped memory");
            // SAFETY: both ends were checked against their mappings, which `pieces` keeps. They may be the same
            // memory, so this is a move; other writers make the bytes arbitrary, which u8 allows.
            unsafe { std::ptr::copy(start(piece.source()), start(piece.target()), length) };
        }
    }
}

fn start(span: &Span) -> *mut u8 {
    match span {
        Span::Host(host) => host.as_ptr(),
        Span::Device(device) => {
            let address =
                usize::try_from(device.address()).expect("a chunk of host memory has a host address");
            std::ptr::with_exposed_provenance_mut(address)
        }
    }
}

impl Mark for HostMark {
    fn ended(&mut self) -> Result<bool, DeviceError> {
        match self.state.load(Ordering::Acquire) {
            DONE => Ok(true),
            FAILED => Err(DeviceError::Driver { call: "copy", detail: "injected".to_owned() }),
            LOST => Err(DeviceError::Lost { detail: "injected".to_owned() }),
            _ => self.shared.lock().alive().map(|()| false),
        }
    }
}

/// Copies until the device is closed.
pub(super) fn run(shared: &Shared) {
    loop {
        let mut state = shared.lock();
        state.work.busy = false;
        shared.wake.notify_all();
        while !state.closing && (state.holding || state.work.queue.is_empty()) {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closing && (state.holding || state.work.queue.is_empty()) {
            return;
        }
        let Some(flight) = state.work.queue.pop_front() else { continue };
        state.work.busy = true;
        let fails = state.strikes(Fault::FailedCopy);
        let lost = state.lost;
        drop(state);
        let end = if lost {
            LOST
        } else if fails {
            flight.copy(flight.pieces.len() / 2);
            FAILED
        } else {
            flight.copy(flight.pieces.len());
            DONE
        };
        let Flight { pieces, state, shared: _ } = flight;
        drop(pieces);
        state.store(end, Ordering::Release);
    }
}
