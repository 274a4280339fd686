//! BlockService: sessions over TCP, and calls that name one by its token.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};

use terrace_core::{Notice, TenantId};
use terrace_proto::SESSION_METADATA;
use terrace_proto::v1::block_service_server::BlockService;
use terrace_proto::v1::{self, SessionRequest, SessionResponse};

use crate::convert::{self, CallError};
use crate::grpc::idle::in_time;
use crate::grpc::pieces::Pieces;
use crate::grpc::{reading, watching, writing};
use crate::lane::{Stop, stopped};
use crate::service::Service;
use crate::session::{Session, StreamGuard};
use crate::tenant::Peer;

/// The first message of a session must come within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// Messages of a stream that wait for the network.
const STREAM_QUEUE: usize = 4;

type Token = [u8; 16];
type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Sessions by token.
#[derive(Default)]
struct Tokens(Mutex<HashMap<Token, Arc<Session>>>);

impl Tokens {
    fn entries(&self) -> MutexGuard<'_, HashMap<Token, Arc<Session>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Read and Write streams that there may be: of several tenants none has more than half of them.
struct Streams {
    all: Arc<Semaphore>,
    of_tenants: BTreeMap<TenantId, Arc<Semaphore>>,
}

/// A stream among them.
struct StreamPermit {
    _of_all: OwnedSemaphorePermit,
    _of_tenant: Option<OwnedSemaphorePermit>,
}

impl Streams {
    fn new(limit: usize, tenants: impl Iterator<Item = TenantId>) -> Self {
        let half = || Arc::new(Semaphore::new(limit.div_ceil(2)));
        let mut of_tenants: BTreeMap<_, _> = tenants.map(|tenant| (tenant, half())).collect();
        if of_tenants.len() < 2 {
            of_tenants.clear();
        }
        Self { all: Arc::new(Semaphore::new(limit)), of_tenants }
    }

    fn permit(&self, tenant: TenantId) -> Result<StreamPermit, Status> {
        let take = |streams: &Arc<Semaphore>, whose: &str| {
            streams.clone().try_acquire_owned().map_err(|_| {
                let text = format!("throttled by `limits.streams`: {whose}; back off and ask again");
                Status::resource_exhausted(text)
            })
        };
        let of_tenant = self.of_tenants.get(&tenant);
        let of_tenant =
            of_tenant.map(|streams| take(streams, "half of them run for this tenant")).transpose()?;
        Ok(StreamPermit { _of_all: take(&self.all, "too many streams run")?, _of_tenant: of_tenant })
    }
}

/// The service.
pub(crate) struct Blocks {
    service: Arc<Service>,
    tokens: Arc<Tokens>,
    streams: Streams,
    pieces: Arc<Pieces>,
    stop: Stop,
}

impl Blocks {
    pub(crate) fn new(service: Arc<Service>, stop: Stop) -> Self {
        let tenants = service.tenants().all().map(|tenant| tenant.id);
        let streams = Streams::new(service.facts().edges.streams, tenants);
        Self { service, tokens: Arc::default(), streams, pieces: Arc::default(), stop }
    }

    fn session(&self, metadata: &MetadataMap) -> Result<Arc<Session>, Status> {
        let denied = |message: &str| CallError::new(Code::Unauthenticated, message);
        let text = metadata.get(SESSION_METADATA).and_then(|value| value.to_str().ok()).ok_or_else(|| {
            denied(
                "metadata entry `terrace-session` is missing; open a Session first and send its token in hex",
            )
        })?;
        let token = parse_token(text)
            .ok_or_else(|| denied("metadata entry `terrace-session` is not 32 hexadecimal digits"))?;
        let session = self.tokens.entries().get(&token).cloned();
        Ok(session.ok_or_else(|| denied("the session is not open (any more); open a new one"))?)
    }

    /// A stream of a session, within the limit.
    fn stream(&self, metadata: &MetadataMap) -> Result<(StreamGuard, StreamPermit), Status> {
        let guard = self.session(metadata)?.stream()?;
        let permit = self.streams.permit(guard.tenant.id)?;
        Ok((guard, permit))
    }
}

fn parse_token(text: &str) -> Option<Token> {
    if text.len() != 32 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some(u128::from_str_radix(text, 16).ok()?.to_be_bytes())
}

/// The session's own stream: until the client ends it, is cut off, or the daemon stops.
async fn attend(
    session: &Session,
    mut requests: Streaming<SessionRequest>,
    mut notices: mpsc::Receiver<Notice>,
    responses: mpsc::Sender<Result<SessionResponse, Status>>,
    mut stop: Stop,
) {
    loop {
        tokio::select! {
            () = stopped(&mut stop) => return,
            () = responses.closed() => return,
            request = requests.message() => match request {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            },
            notice = notices.recv() => {
                let Some(notice) = notice else { return };
                let wire = convert::notice(&notice, |space| session.handle(space));
                if responses.send(Ok(wire)).await.is_err() {
                    return;
                }
            }
        }
    }
}

macro_rules! unary {
    ($self:ident, $request:ident, $call:ident) => {{
        let session = $self.session($request.metadata())?;
        Ok(Response::new($self.service.$call(&session, $request.into_inner()).await?))
    }};
}

#[tonic::async_trait]
impl BlockService for Blocks {
    type SessionStream = Messages<SessionResponse>;
    type ReadStream = Messages<v1::ReadResponse>;
    type WatchStream = Messages<v1::WatchResponse>;
    type SnapshotStream = Messages<v1::SnapshotResponse>;

    async fn session(&self, request: Request<Streaming<SessionRequest>>) -> Answer<Self::SessionStream> {
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(HELLO_WITHIN, requests.message())
            .await
            .map_err(|_| {
                Status::deadline_exceeded("the first message of a session did not come within 10 s")
            })??
            .ok_or_else(|| Status::invalid_argument("a session begins with a SessionRequest"))?;
        let (session, notices) =
            self.service.open(&first.tenant, &first.token, &first.client, Peer::Remote)?;
        let mut token = [0; 16];
        getrandom::fill(&mut token)
            .map_err(|error| Status::unavailable(format!("no random bytes: {error}")))?;
        let (responses, stream) = mpsc::channel(STREAM_QUEUE);
        responses
            .try_send(Ok(self.service.opened(token)))
            .map_err(|_| Status::internal("internal error: a new queue is full"))?;
        self.tokens.entries().insert(token, session.clone());
        let (tokens, stop) = (self.tokens.clone(), self.stop.clone());
        tokio::spawn(async move {
            attend(&session, requests, notices, responses, stop).await;
            tokens.entries().remove(&token);
            session.close();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn open_space(&self, request: Request<v1::OpenSpaceRequest>) -> Answer<v1::OpenSpaceResponse> {
        unary!(self, request, open_space)
    }

    async fn exists(&self, request: Request<v1::ExistsRequest>) -> Answer<v1::ExistsResponse> {
        unary!(self, request, exists)
    }

    async fn r#match(&self, request: Request<v1::MatchRequest>) -> Answer<v1::MatchResponse> {
        unary!(self, request, matched)
    }

    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Answer<v1::LeaseResponse> {
        unary!(self, request, lease)
    }

    async fn seal(&self, request: Request<v1::SealRequest>) -> Answer<v1::SealResponse> {
        unary!(self, request, seal)
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Answer<v1::RenewResponse> {
        unary!(self, request, renew)
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        unary!(self, request, release)
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Answer<v1::AbortResponse> {
        unary!(self, request, abort)
    }

    async fn touch(&self, request: Request<v1::TouchRequest>) -> Answer<v1::TouchResponse> {
        unary!(self, request, touch)
    }

    async fn prefetch(&self, request: Request<v1::PrefetchRequest>) -> Answer<v1::PrefetchResponse> {
        unary!(self, request, prefetch)
    }

    async fn retain(&self, request: Request<v1::RetainRequest>) -> Answer<v1::RetainResponse> {
        unary!(self, request, retain)
    }

    async fn clear(&self, request: Request<v1::ClearRequest>) -> Answer<v1::ClearResponse> {
        unary!(self, request, clear)
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Answer<Self::ReadStream> {
        let (guard, permit) = self.stream(request.metadata())?;
        let (sender, stream) = mpsc::channel(STREAM_QUEUE + 1);
        // Has room for why the stream ended, even if nobody reads now.
        let last = sender.clone().try_reserve_owned();
        let last = last.map_err(|_| Status::internal("internal error: a new queue is full"))?;
        let pieces = self.pieces.clone();
        let read = reading::Read::new(self.service.clone(), guard, &request.into_inner(), pieces)?;
        tokio::spawn(async move {
            if let Err(error) = read.run(&sender).await {
                last.send(Err(error.into()));
            }
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn write(&self, request: Request<Streaming<v1::WriteRequest>>) -> Answer<v1::WriteResponse> {
        let (guard, _permit) = self.stream(request.metadata())?;
        let mut pieces = request.into_inner();
        let first = in_time(self.service.facts().edges.stream_idle, pieces.message()).await??;
        let Some(v1::write_request::Part::Header(header)) = first.and_then(|first| first.part) else {
            return Err(Status::invalid_argument("the first message of a Write is its header"));
        };
        let closed = guard.clone();
        let write = writing::Write::new(self.service.clone(), guard, header)?;
        tokio::select! {
            () = closed.closed() => Err(CallError::gone().into()),
            written = write.run(pieces) => written.map(Response::new),
        }
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        let session = self.session(request.metadata())?;
        let (sender, stream) = mpsc::channel(STREAM_QUEUE);
        let watch = watching::Watch::new(self.service.clone(), session, request.get_ref())?;
        tokio::spawn(watch.run(sender, self.stop.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn snapshot(&self, request: Request<v1::SnapshotRequest>) -> Answer<Self::SnapshotStream> {
        let session = self.session(request.metadata())?;
        let (sender, stream) = mpsc::channel(STREAM_QUEUE);
        tokio::spawn(watching::snapshot(self.service.clone(), session, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token is read from outside: whatever it is, it is 16 bytes or refused.
    #[test]
    fn tokens_are_hex() {
        assert_eq!(parse_token("000102030405060708090a0b0c0d0e0f").unwrap()[15], 15);
        for bad in ["", "00", "+0102030405060708090a0b0c0d0e0f0", "zz0102030405060708090a0b0c0d0e0f"] {
            assert!(parse_token(bad).is_none(), "{bad}");
        }
    }
}
