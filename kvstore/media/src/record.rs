//! Superblocks of a running store: written and synced through the scheduler
//! like anything else, so that a device which does not answer is noticed and
//! taken out, but with an end to the wait, because the commit thread waits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use terrace_core::{Fault, IoClass};

use crate::device::{AlignedPages, BlockIo, IoBuffer, IoOp, IoRequest, Patience};

/// Writes the superblocks of one device, one at a time.
pub(crate) struct Recorder {
    io: Arc<dyn BlockIo>,
    patience: Patience,
    /// The device has a write that it has not answered, whether or not somebody still waits for it.
    writing: Arc<AtomicBool>,
}

impl Recorder {
    pub(crate) fn new(io: Arc<dyn BlockIo>, patience: Patience) -> Self {
        Self { io, patience, writing: Arc::default() }
    }

    /// Writes pages and syncs them, within the patience for the one and the other. After an error
    /// nothing is known of what was written; it may still be on its way, and until it has arrived
    /// every further write is refused at once: two could otherwise pass each other.
    pub(crate) fn write_synced(&self, offset: u64, pages: AlignedPages) -> io::Result<()> {
        if self.writing.swap(true, Ordering::AcqRel) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it has not answered an earlier write"));
        }
        let writing = Arc::clone(&self.writing);
        let bytes = pages.bytes();
        let written = self.start(IoOp::Write, offset, bytes, IoBuffer::Pages(pages), move || {
            writing.store(false, Ordering::Release);
        });
        wait(&written, self.patience.io)?;
        let synced = self.start(IoOp::Sync, 0, 0, IoBuffer::Nothing, || {});
        wait(&synced, self.patience.sync)
    }

    fn start(
        &self,
        op: IoOp,
        offset: u64,
        bytes: u64,
        buffer: IoBuffer,
        ended: impl FnOnce() + Send + 'static,
    ) -> Receiver<Result<(), Fault>> {
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |_: IoBuffer, outcome| {
            ended();
            // Nobody waits any more for what comes late.
            let _ = sender.send(outcome);
        });
        // All commits wait for it, and it is short.
        let class = IoClass::DecodeFetch;
        self.io.submit(IoRequest { op, offset, bytes, buffer, class, done });
        receiver
    }
}

fn wait(outcome: &Receiver<Result<(), Fault>>, patience: Duration) -> io::Result<()> {
    match outcome.recv_timeout(patience) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Fault::NoSpace)) => Err(io::ErrorKind::StorageFull.into()),
        Ok(Err(_)) => Err(io::Error::other("the device failed")),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the device does not answer")),
    }
}
