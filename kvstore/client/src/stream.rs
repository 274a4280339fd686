//! Streams of events and snapshots.

use std::sync::Arc;

use tonic::Streaming;

use terrace_proto::v1::{SnapshotResponse, WatchResponse};

use crate::error::ClientError;
use crate::grpc::GrpcLink;
use crate::status::Status;

/// What a stream of a session carries, until the session ends.
#[derive(Debug)]
struct Parts<T> {
    stream: Streaming<T>,
    link: Arc<GrpcLink>,
    session: Arc<Status>,
}

impl<T> Parts<T> {
    async fn next(&mut self) -> Result<Option<T>, ClientError> {
        tokio::select! {
            biased;
            // The connection may be one beside that of the session, and live on.
            () = self.session.closed() => Err(ClientError::Disconnected),
            part = self.stream.message() => part.map_err(|status| self.link.failed(status)),
        }
    }
}

/// What happens to the tenant's blocks, in sequence. When it ends or says
/// `resync`, take a snapshot and watch from its number on.
#[derive(Debug)]
pub struct EventStream {
    parts: Parts<WatchResponse>,
}

impl EventStream {
    pub(crate) fn new(stream: Streaming<WatchResponse>, link: Arc<GrpcLink>, session: Arc<Status>) -> Self {
        Self { parts: Parts { stream, link, session } }
    }

    /// The next run of events; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// The stream broke, or the session has ended.
    pub async fn next(&mut self) -> Result<Option<WatchResponse>, ClientError> {
        self.parts.next().await
    }
}

/// Everything the tenant holds at one sequence number, in parts.
#[derive(Debug)]
pub struct SnapshotStream {
    parts: Parts<SnapshotResponse>,
}

impl SnapshotStream {
    pub(crate) fn new(
        stream: Streaming<SnapshotResponse>,
        link: Arc<GrpcLink>,
        session: Arc<Status>,
    ) -> Self {
        Self { parts: Parts { stream, link, session } }
    }

    /// The next part; `None` after the last. Cancel-safe.
    ///
    /// # Errors
    /// The stream broke, or the session has ended.
    pub async fn next(&mut self) -> Result<Option<SnapshotResponse>, ClientError> {
        self.parts.next().await
    }
}
