//! Watch streams and snapshots of a tenant's blocks.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::Status;

use terrace_core::{Event, SnapshotEntry};
use terrace_proto::v1;

use crate::convert::{self, CallError};
use crate::events::{EventLog, Run};
use crate::lane::{Stop, stopped};
use crate::service::Service;
use crate::session::Session;

/// Events and blocks of one message: about 100 KiB.
const PIECE_MAX: usize = 1024;

/// One Watch stream.
pub(super) struct Watch {
    log: Arc<EventLog>,
    session: Arc<Session>,
    incarnation: u64,
    next: u64,
    /// The numbers asked for are of another life.
    stale: bool,
}

impl Watch {
    pub(super) fn new(
        service: Arc<Service>,
        session: Arc<Session>,
        request: &v1::WatchRequest,
    ) -> Result<Self, CallError> {
        let log = service.engine().events().of(session.tenant.id);
        let log = log.ok_or_else(|| CallError::internal("a tenant without an event log"))?;
        let incarnation = u64::from(service.facts().incarnation);
        let from_now = request.from_sequence == 0;
        let next = if from_now { log.next_sequence() } else { request.from_sequence };
        Ok(Self { log, session, incarnation, next, stale: !from_now && request.incarnation != incarnation })
    }

    /// Until the reader goes, the session ends, or the reader must take a snapshot.
    pub(super) async fn run(self, sender: mpsc::Sender<Result<v1::WatchResponse, Status>>, mut stop: Stop) {
        let session = self.session.clone();
        tokio::select! {
            () = stopped(&mut stop) => {}
            () = session.closed() => {}
            () = sender.closed() => {}
            () = self.follow(&sender) => {}
        }
    }

    async fn follow(mut self, sender: &mpsc::Sender<Result<v1::WatchResponse, Status>>) {
        loop {
            let run = if self.stale { Run::Resync } else { self.log.run(self.next, PIECE_MAX) };
            let mut message = v1::WatchResponse {
                incarnation: self.incarnation,
                sequence: self.next,
                ..Default::default()
            };
            match run {
                Run::Resync => {
                    message.sequence = self.log.next_sequence();
                    message.next_sequence = message.sequence;
                    message.resync = true;
                    // If nobody reads, the stream ends all the same.
                    let _ = sender.send(Ok(message)).await;
                    return;
                }
                Run::Events(events) if events.is_empty() => {
                    self.log.reached(self.next).await;
                    continue;
                }
                Run::Events(events) => {
                    self.next += events.len() as u64;
                    message.events = events.iter().map(convert::event).collect();
                }
            }
            message.next_sequence = self.log.next_sequence();
            if sender.send(Ok(message)).await.is_err() {
                return;
            }
        }
    }
}

/// Everything the tenant holds. The sequence is taken before the first piece, so
/// that events from there on bring any mixture of pieces up to date.
pub(super) async fn snapshot(
    service: Arc<Service>,
    session: Arc<Session>,
    sender: mpsc::Sender<Result<v1::SnapshotResponse, Status>>,
) {
    let tenant = session.tenant.id;
    let sequence = service.engine().events().of(tenant).map_or(1, |log| log.next_sequence());
    let incarnation = u64::from(service.facts().incarnation);
    let mut cursor = None;
    loop {
        let (entries, next) = service.engine().view(|core| core.snapshot(tenant, cursor, PIECE_MAX));
        cursor = next;
        let last = next.is_none();
        let blocks = entries.iter().map(|entry| convert::event(&sealed(entry))).collect();
        let piece = v1::SnapshotResponse { incarnation, sequence, blocks, last };
        if sender.send(Ok(piece)).await.is_err() || last || session.is_closed() {
            return;
        }
    }
}

fn sealed(entry: &SnapshotEntry) -> Event {
    Event::Sealed {
        space: entry.space,
        block: entry.block,
        parent: entry.parent,
        length: entry.length,
        tiers: entry.tiers,
    }
}
