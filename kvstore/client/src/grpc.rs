//! The remote transport: the same requests as gRPC calls, and the streams.
//!
//! A background task holds the Session stream open. Calls that the transport
//! lost are repeated with the same request id, which the daemon answers as it
//! answered the first.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status as GrpcStatus, Streaming};

use terrace_proto::v1::block_service_client::BlockServiceClient;
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::session_response::Notice;
use terrace_proto::v1::{
    ReadRequest, ReadResponse, SessionOpened, SessionRequest, SessionResponse, SnapshotRequest, WatchRequest,
    WriteRequest, WriteResponse,
};
use terrace_proto::{MESSAGE_BYTES_MAX, SESSION_METADATA};

use crate::channel::channel;
use crate::error::ClientError;
use crate::session::Target;
use crate::status::Status;
use crate::stream::{EventStream, SnapshotStream};

/// Attempts at a call that the transport lost.
pub(crate) const ATTEMPTS_MAX: u32 = 3;
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// One session over gRPC.
#[derive(Debug)]
pub(crate) struct GrpcLink {
    client: BlockServiceClient<Channel>,
    session: MetadataValue<Ascii>,
    status: Arc<Status>,
    next_request: AtomicU64,
    answer_within: Duration,
    task: AbortHandle,
}

impl Drop for GrpcLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl GrpcLink {
    /// Connects and opens a session.
    pub(crate) async fn open(
        address: &str,
        target: &Target,
    ) -> Result<(Arc<Self>, SessionOpened), ClientError> {
        let opening = Self::open_now(address, target);
        let within = target.hello_within();
        timeout(within, opening).await.map_err(|_| ClientError::Unreachable {
            address: address.to_owned(),
            detail: format!("no session in {within:?}"),
        })?
    }

    async fn open_now(address: &str, target: &Target) -> Result<(Arc<Self>, SessionOpened), ClientError> {
        let mut client = BlockServiceClient::new(channel(address).await?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (opening, requests) = mpsc::channel(1);
        let hello = SessionRequest {
            tenant: target.tenant.clone(),
            token: target.token.clone(),
            client: target.client_name.clone(),
        };
        opening.send(hello).await.map_err(|_| ClientError::Disconnected)?;
        let notices = client.session(ReceiverStream::new(requests)).await;
        let mut notices =
            notices.map_err(|status| ClientError::from(status).at_hello("terrace.v1"))?.into_inner();
        let first = notices.message().await?.ok_or(ClientError::Disconnected)?;
        let Some(Notice::Opened(facts)) = first.notice else {
            return Err(ClientError::Protocol { detail: "a session that opens with a notice" });
        };
        let session = MetadataValue::try_from(hex(&facts.session))
            .map_err(|_| ClientError::Protocol { detail: "a session token that is no metadata" })?;
        let status = Arc::new(Status::new());
        let task = tokio::spawn(hold(opening, notices, Arc::clone(&status))).abort_handle();
        let next_request = AtomicU64::new(1);
        let answer_within = target.answer_within();
        let link = Self { client, session, status, next_request, answer_within, task };
        Ok((Arc::new(link), facts))
    }

    pub(crate) fn status(&self) -> &Arc<Status> {
        &self.status
    }

    pub(crate) fn request_id(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn close(&self) {
        self.status.close();
        // Both halves of the Session stream go with the task, which ends the session.
        self.task.abort();
    }

    fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(SESSION_METADATA, self.session.clone());
        request
    }

    /// Asks and waits for the answer.
    pub(crate) async fn call(&self, op: Op) -> Result<Answer, ClientError> {
        let mut attempt = 1;
        loop {
            if self.status.is_closed() {
                return Err(ClientError::Disconnected);
            }
            let wait_ms = if let Op::Lease(lease) = &op { lease.wait_ms } else { 0 };
            match self.within(Duration::from_millis(wait_ms), self.call_once(op.clone())).await? {
                Err(status) if attempt < ATTEMPTS_MAX && status.code() == Code::Unavailable => {
                    tokio::time::sleep(RETRY_DELAY * attempt).await;
                    attempt += 1;
                }
                Err(status) => return Err(self.failed(status)),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    /// The future's output, if it comes in `beyond` and the time in which a daemon must say something.
    pub(crate) async fn within<T>(
        &self,
        beyond: Duration,
        future: impl Future<Output = T>,
    ) -> Result<T, ClientError> {
        let waited = self.answer_within.saturating_add(beyond);
        timeout(waited, future).await.map_err(|_| ClientError::NoAnswer { waited })
    }

    async fn call_once(&self, op: Op) -> Result<Answer, GrpcStatus> {
        let mut client = self.client.clone();
        macro_rules! ask {
            ($name:ident, $method:ident, $message:expr) => {
                client.$method(self.request($message)).await.map(|answer| Answer::$name(answer.into_inner()))
            };
        }
        match op {
            Op::OpenSpace(message) => ask!(OpenSpace, open_space, message),
            Op::Exists(message) => ask!(Exists, exists, message),
            Op::Match(message) => ask!(Match, r#match, message),
            Op::Lease(message) => ask!(Lease, lease, message),
            Op::Seal(message) => ask!(Seal, seal, message),
            Op::Renew(message) => ask!(Renew, renew, message),
            Op::Release(message) => ask!(Release, release, message),
            Op::Abort(message) => ask!(Abort, abort, message),
            Op::Touch(message) => ask!(Touch, touch, message),
            Op::Prefetch(message) => ask!(Prefetch, prefetch, message),
            Op::Retain(message) => ask!(Retain, retain, message),
            Op::Clear(message) => ask!(Clear, clear, message),
            Op::Hello(_) | Op::MapChunk(_) | Op::ReturnWindow(_) | Op::Shrink(_) => {
                Err(GrpcStatus::unimplemented("this request exists on the lane only"))
            }
        }
    }

    /// A failure, told apart from the end of the session.
    pub(crate) fn failed(&self, status: GrpcStatus) -> ClientError {
        // The daemon no longer knows the session: its stream is about to end.
        if self.status.is_closed() || status.code() == Code::Unauthenticated {
            return ClientError::Disconnected;
        }
        status.into()
    }

    pub(crate) async fn read(&self, request: ReadRequest) -> Result<Streaming<ReadResponse>, GrpcStatus> {
        Ok(self.client.clone().read(self.request(request)).await?.into_inner())
    }

    pub(crate) async fn write(
        &self,
        parts: mpsc::Receiver<WriteRequest>,
    ) -> Result<WriteResponse, GrpcStatus> {
        Ok(self.client.clone().write(self.request(ReceiverStream::new(parts))).await?.into_inner())
    }

    pub(crate) async fn watch(
        self: &Arc<Self>,
        from_sequence: u64,
        incarnation: u64,
        session: Arc<Status>,
    ) -> Result<EventStream, ClientError> {
        let request = self.request(WatchRequest { from_sequence, incarnation });
        let stream = self.client.clone().watch(request).await.map_err(|status| self.failed(status))?;
        Ok(EventStream::new(stream.into_inner(), Arc::clone(self), session))
    }

    pub(crate) async fn snapshot(
        self: &Arc<Self>,
        session: Arc<Status>,
    ) -> Result<SnapshotStream, ClientError> {
        let request = self.request(SnapshotRequest {});
        let stream = self.client.clone().snapshot(request).await.map_err(|status| self.failed(status))?;
        Ok(SnapshotStream::new(stream.into_inner(), Arc::clone(self), session))
    }
}

/// Holds the Session stream open until it ends.
async fn hold(
    _opening: mpsc::Sender<SessionRequest>,
    mut notices: Streaming<SessionResponse>,
    status: Arc<Status>,
) {
    loop {
        match notices.message().await {
            Ok(Some(message)) => match message.notice {
                Some(Notice::Revoked(revoked)) => {
                    tracing::warn!(lease = revoked.lease, reason = revoked.reason, "lease revoked");
                }
                Some(Notice::Rejected(rejected)) => {
                    tracing::error!(reason = rejected.reason, "a block of this session was rejected");
                }
                Some(Notice::Opened(_) | Notice::Recalled(_) | Notice::Window(_) | Notice::Dropped(_))
                | None => {}
            },
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "session stream ended");
                break;
            }
        }
    }
    status.close();
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}
