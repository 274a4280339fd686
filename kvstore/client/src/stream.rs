//! Streams of events and snapshots.

use std::sync::Arc;

use tonic::Streaming;

use terrace_proto::v1::{SnapshotResponse, WatchResponse};

use crate::error::ClientError;
use crate::grpc::GrpcLink;

/// What happens to the tenant's blocks, in sequence. When it ends or says
/// `resync`, take a snapshot and watch from its number on.
#[derive(Debug)]
pub struct EventStream {
    stream: Streaming<WatchResponse>,
    link: Arc<GrpcLink>,
}

impl EventStream {
    pub(crate) fn new(stream: Streaming<WatchResponse>, link: Arc<GrpcLink>) -> Self {
        Self { stream, link }
    }

    /// The next run of events; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// The stream broke, or the session has ended.
    pub async fn next(&mut self) -> Result<Option<WatchResponse>, ClientError> {
        self.stream.message().await.map_err(|status| self.link.failed(status))
    }
}

/// Everything the tenant holds at one sequence number, in parts.
#[derive(Debug)]
pub struct SnapshotStream {
    stream: Streaming<SnapshotResponse>,
    link: Arc<GrpcLink>,
}

impl SnapshotStream {
    pub(crate) fn new(stream: Streaming<SnapshotResponse>, link: Arc<GrpcLink>) -> Self {
        Self { stream, link }
    }

    /// The next part; `None` after the last. Cancel-safe.
    ///
    /// # Errors
    /// The stream broke, or the session has ended.
    pub async fn next(&mut self) -> Result<Option<SnapshotResponse>, ClientError> {
        self.stream.message().await.map_err(|status| self.link.failed(status))
    }
}
