//! Whether a session lives, for its guards (one load) and for those who wait.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Shared by a session, its guards and its tasks.
#[derive(Debug)]
pub(crate) struct Status {
    closed: AtomicBool,
    changed: watch::Sender<bool>,
}

impl Status {
    pub(crate) fn new() -> Self {
        Self { closed: AtomicBool::new(false), changed: watch::Sender::new(false) }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed.send_replace(true);
    }

    /// Returns when the session has ended. Cancel-safe.
    pub(crate) async fn closed(&self) {
        let mut changed = self.changed.subscribe();
        // The sender is part of self, so waiting cannot fail while we are here.
        let _ended = changed.wait_for(|closed| *closed).await;
    }
}
