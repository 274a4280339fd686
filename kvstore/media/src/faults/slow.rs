//! A device that answers later than it could.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::device::{BlockIo, IoFacts, IoOp, IoRequest};

/// Reads and writes take longer by a time that can be changed.
pub struct SlowDevice {
    inner: Arc<dyn BlockIo>,
    micros: AtomicU64,
}

impl SlowDevice {
    /// As quick as `inner`, until [`Self::delay`].
    pub fn new(inner: Arc<dyn BlockIo>) -> Self {
        Self { inner, micros: AtomicU64::new(0) }
    }

    /// Answers to what is submitted from now on come later by so many microseconds.
    pub fn delay(&self, micros: u64) {
        self.micros.store(micros, Ordering::SeqCst);
    }
}

impl BlockIo for SlowDevice {
    fn submit(&self, mut request: IoRequest) {
        let delay = Duration::from_micros(self.micros.load(Ordering::SeqCst));
        if !delay.is_zero() && matches!(request.op, IoOp::Read | IoOp::Write) {
            let done = request.done;
            request.done = Box::new(move |buffer, outcome| {
                std::thread::spawn(move || {
                    // The slowness itself.
                    std::thread::sleep(delay);
                    done(buffer, outcome);
                });
            });
        }
        self.inner.submit(request);
    }

    fn facts(&self) -> IoFacts {
        self.inner.facts()
    }
}
