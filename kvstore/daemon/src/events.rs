//! What happens to each tenant's blocks, in sequence, for those who follow.
//!
//! Promises: numbers have no gap; appending never waits, whoever reads; a reader
//! that is too slow is told to take a snapshot, and costs nothing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use terrace_core::{Event, TenantId};

/// Logs of all tenants. A tenant's log exists from the start of the daemon.
#[derive(Debug)]
pub struct EventLogs {
    by_tenant: BTreeMap<TenantId, Arc<EventLog>>,
}

/// One tenant's last events.
#[derive(Debug)]
pub struct EventLog {
    ring: Mutex<Ring>,
    limit: usize,
    grown: Notify,
}

#[derive(Debug)]
struct Ring {
    /// Number of the oldest event that is kept. Numbers start at 1.
    first: u64,
    events: VecDeque<Event>,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Run {
    /// Events from the number that was asked for; may be empty.
    Events(Vec<Event>),
    /// The number is gone, or lies in the future: take a snapshot.
    Resync,
}

impl EventLogs {
    /// One log a tenant, each of at most `limit` events.
    pub fn new(tenants: impl Iterator<Item = TenantId>, limit: usize) -> Self {
        Self { by_tenant: tenants.map(|tenant| (tenant, Arc::new(EventLog::new(limit)))).collect() }
    }

    /// Appends. Tenants that are not configured any more have no readers.
    pub fn publish(&self, tenant: TenantId, event: Event) {
        if let Some(log) = self.by_tenant.get(&tenant) {
            log.append(event);
        }
    }

    /// A tenant's log.
    pub fn of(&self, tenant: TenantId) -> Option<Arc<EventLog>> {
        self.by_tenant.get(&tenant).cloned()
    }
}

impl EventLog {
    fn new(limit: usize) -> Self {
        Self { ring: Mutex::new(Ring { first: 1, events: VecDeque::new() }), limit, grown: Notify::new() }
    }

    fn append(&self, event: Event) {
        let mut ring = self.ring();
        if ring.events.len() >= self.limit {
            ring.events.pop_front();
            ring.first += 1;
        }
        ring.events.push_back(event);
        drop(ring);
        self.grown.notify_waiters();
    }

    /// Number of the next event.
    pub fn next_sequence(&self) -> u64 {
        self.ring().next()
    }

    /// At most `limit` events from `sequence` on.
    pub fn run(&self, sequence: u64, limit: usize) -> Run {
        let ring = self.ring();
        if sequence < ring.first || sequence > ring.next() {
            return Run::Resync;
        }
        // The difference is at most the ring's length.
        let start = usize::try_from(sequence - ring.first).unwrap_or(usize::MAX);
        Run::Events(ring.events.iter().skip(start).take(limit).cloned().collect())
    }

    /// Returns when there is an event of this number or a later one. Cancel-safe.
    pub async fn reached(&self, sequence: u64) {
        loop {
            let grown = self.grown.notified();
            tokio::pin!(grown);
            // Registered before the look, so that no growth is missed.
            grown.as_mut().enable();
            if self.next_sequence() > sequence {
                return;
            }
            grown.await;
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // A panic elsewhere cannot leave the ring half changed.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use terrace_core::{SpaceId, tenant_id};

    use super::*;

    fn event(byte: u8) -> Event {
        Event::Cleared { space: SpaceId::from_bytes([byte; 16]) }
    }

    /// A slow reader could be given a run with a hole, or hold memory: it must be told to start again.
    #[test]
    fn a_slow_reader_is_told() {
        let logs = EventLogs::new([tenant_id("a")].into_iter(), 3);
        for byte in 0..5 {
            logs.publish(tenant_id("a"), event(byte));
            logs.publish(tenant_id("nobody"), event(byte));
        }
        let log = logs.of(tenant_id("a")).unwrap();
        assert!(logs.of(tenant_id("nobody")).is_none());
        assert_eq!(log.next_sequence(), 6);
        assert_eq!(log.run(2, 10), Run::Resync);
        assert_eq!(log.run(3, 2), Run::Events(vec![event(2), event(3)]));
        assert_eq!(log.run(6, 10), Run::Events(vec![]));
        assert_eq!(log.run(7, 10), Run::Resync, "a number from the future is of another life");
    }

    /// A reader that looks just before an event is appended could sleep for ever: it must be woken.
    #[tokio::test]
    async fn readers_are_woken() {
        let logs = Arc::new(EventLogs::new([tenant_id("a")].into_iter(), 3));
        let log = logs.of(tenant_id("a")).unwrap();
        let mut waiting = std::pin::pin!(log.reached(1));
        assert!((&mut waiting).now_or_never().is_none(), "nothing was published");
        logs.publish(tenant_id("a"), event(0));
        tokio::time::timeout(std::time::Duration::from_secs(10), waiting).await.unwrap();
    }
}
