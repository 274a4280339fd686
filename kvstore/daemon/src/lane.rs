//! The listener for processes of this machine: shared memory over a Unix socket.
//!
//! Promises: one task a connection; requests are answered as they finish, and
//! not in order; a session ends when its socket or its process does, whichever
//! is first; whatever arrives, the daemon stays up.

mod decode;
pub(crate) mod encode;

use std::future::Future;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};
use tonic::Code;

use terrace_core::{ClientId, MapAccess, Notice};
use terrace_lane::{
    LaneConnection, LaneError, LaneReader, LaneServer, LaneWriter, ProcessEnd, Received, Yields,
    leave_processor,
};
use terrace_proto::v1::{self, LaneRequest, LaneResponse, lane_request::Op, lane_response};
use terrace_proto::{LANE_VERSION, MESSAGE_BYTES_MAX};

use crate::convert::{self, CallError};
use crate::lane::decode::{Asked, Keys};
use crate::service::{Service, Shared};
use crate::session::Session;
use crate::tenant::Peer;

/// A connection must say hello within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// A connection that is one too many is told so, if it says hello within this time.
const REFUSE_WITHIN: Duration = Duration::from_secs(1);
/// Of these, so many at a time; the rest are closed.
const REFUSALS_MAX: usize = 16;
/// No request is read while more than this waits to be sent.
const UNSENT_BYTES_MAX: usize = 2 * MESSAGE_BYTES_MAX;
/// Requests that are begun, and answers that are sent, before other connections have their turn.
const AT_ONCE: usize = 8;
/// An answer waits for so long for those that go with it, while the next are being worked out: a call and a wake-up take
/// some microseconds, and the client has something to do meanwhile.
const UNSENT_FOR_MAX: Duration = Duration::from_micros(16);
/// A client that asked so soon after its last answer is expected to do so again, and for so long its socket is looked at
/// in place of going to sleep: to be woken takes longer.
const BRISK_WITHIN: Duration = Duration::from_micros(30);
/// A client that fills what it leased at once asks again, or seals, within this time: so long 32 MiB take.
const FILLED_WITHIN: Duration = Duration::from_millis(5);
/// Who yields the processor, and has it back only after so long, gave it to somebody who wanted it.
const YIELDED_FOR_MAX: Duration = Duration::from_micros(5);
/// Somebody who keeps it for so long wants it for himself.
const GIVEN_AWAY_MAX: Duration = Duration::from_micros(500);
/// After either, this long nobody is expected, and nothing is given away.
const CROWDED_FOR: Duration = Duration::from_millis(100);
/// Questions that were read at once: their client asks while he is answered.
const ASKED_AT_ONCE: usize = 4;
/// A thread that left its client's processor, and was woken there again, stays for so long: to leave takes as long as some answers.
const LEFT_AGAIN: Duration = Duration::from_millis(1);
/// Threads that serve connections, at most: the core, which all share, is busy before more of them are.
const LOOPS_MAX: usize = 4;
/// Pause after the kernel refused to accept, for example without descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Stop signal of the daemon: true when it ends.
pub(crate) type Stop = watch::Receiver<bool>;

/// Returns when the daemon stops. Cancel-safe.
pub(crate) async fn stopped(stop: &mut Stop) {
    // An error means that nobody can stop us any more: the daemon is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

type Answer = Pin<Box<dyn Future<Output = (Response, Vec<OwnedFd>)> + Send>>;

/// A message on its way out.
enum Response {
    Wire(LaneResponse),
    /// The answer to a lease, encoded already.
    Encoded {
        id: u64,
        bytes: Vec<u8>,
    },
}

/// Threads of the lane's own, each with an event loop of its own. What arrives on a connection is read, asked and
/// answered by one of them: in a pool whose threads share their work, every socket that becomes readable wakes a second
/// thread to look for more, which costs more than most answers do.
pub(crate) struct Loops {
    loops: Vec<Loop>,
    /// The loops end when this goes.
    _running: watch::Sender<()>,
}

struct Loop {
    handle: Handle,
    /// Each of its connections holds it too.
    held: Arc<()>,
}

impl Loops {
    /// Starts the threads.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (running, _) = watch::channel(());
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(LOOPS_MAX);
        let loops = (0..threads).map(|number| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (handle, mut running) = (runtime.handle().clone(), running.subscribe());
            std::thread::Builder::new().name(format!("lane-{number}")).spawn(move || {
                // An error means that nobody holds the other end any more.
                let _ = runtime.block_on(running.changed());
                // What a request left to a thread for files must not delay the end.
                runtime.shutdown_background();
            })?;
            Ok(Loop { handle, held: Arc::default() })
        });
        Ok(Self { loops: loops.collect::<std::io::Result<_>>()?, _running: running })
    }

    /// Runs a connection to its end on the loop that has the fewest.
    fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let Some(chosen) = self.loops.iter().min_by_key(|each| Arc::strong_count(&each.held)) else { return };
        let held = Arc::clone(&chosen.held);
        chosen.handle.spawn(async move {
            connection.await;
            drop(held);
        });
    }
}

/// Accepts connections until `stop`, and returns when they have ended.
pub(crate) async fn serve(server: LaneServer, loops: Loops, service: Arc<Service>, mut stop: Stop) {
    let most = service.facts().edges.lane_connections;
    let room = Arc::new(Semaphore::new(most));
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            accepted = server.accept_stream() => accepted,
        };
        match accepted {
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the lane socket");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
            Ok(stream) => {
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    tracing::warn!("lane connection refused: `limits.lane_connections` are open");
                    service.metrics().refused(Code::ResourceExhausted);
                    if let Ok(turn) = refusals.clone().try_acquire_owned() {
                        loops.spawn(async move {
                            // Whoever does not listen is not told.
                            let _ = tokio::time::timeout(REFUSE_WITHIN, refuse(stream)).await;
                            drop(turn);
                        });
                    }
                    continue;
                };
                let (service, stop) = (service.clone(), stop.clone());
                loops.spawn(async move {
                    match LaneConnection::from_stream(stream) {
                        Ok(connection) => converse(connection, service, stop).await,
                        Err(error) => tracing::info!(%error, "lane connection ended before hello"),
                    }
                    drop(permit);
                });
            }
        }
    }
    // Each connection gives its permit back when it has ended. Nobody closes the semaphore.
    let _ = room.acquire_many(u32::try_from(most).unwrap_or(u32::MAX)).await;
}

/// Answers the hello of a connection that is one too many.
async fn refuse(stream: UnixStream) -> Result<(), LaneError> {
    let connection: LaneConnection<LaneRequest, LaneResponse> = LaneConnection::from_stream(stream)?;
    let (_, mut reader, mut writer) = connection.split();
    let Some(first) = reader.next().await? else { return Ok(()) };
    let error = CallError::new(
        Code::ResourceExhausted,
        "throttled by `limits.lane_connections`: too many connections are open; back off and ask again",
    );
    let result = Some(lane_response::Result::Error((&error).into()));
    writer.queue(&LaneResponse { id: first.message.id, result }, Vec::new())?;
    writer.flush().await
}

/// One connection from hello to end.
async fn converse(
    connection: LaneConnection<LaneRequest, LaneResponse>,
    service: Arc<Service>,
    mut stop: Stop,
) {
    let (credentials, mut reader, mut writer) = connection.split();
    let pid = credentials.pid;
    let peer = if credentials.is_same_user() { Peer::SameUser } else { Peer::OtherUser(credentials.uid) };
    let process = credentials.pidfd.and_then(ProcessEnd::watch);
    let greeted = tokio::time::timeout(HELLO_WITHIN, greet(&mut reader, &mut writer, &service, peer));
    let greeted = tokio::select! {
        () = stopped(&mut stop) => return,
        greeted = greeted => greeted,
    };
    let (session, mut notices) = match greeted {
        Ok(Ok(Some(opened))) => opened,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => return tracing::info!(pid, %error, "lane connection ended at hello"),
        Err(_) => return tracing::info!(pid, "lane connection said no hello"),
    };
    tracing::debug!(pid, session = %session.id, client = session.client, "lane session");
    let reader = reader.reading();
    let (answers, answered_at) = (FuturesUnordered::new(), Instant::now());
    let (is_brisk, crowded_until) = (false, answered_at);
    let filling = Filling { leases: 0, leased_at: answered_at, at_once: false };
    let mut talk = Talk {
        service,
        session,
        reader,
        writer,
        answers,
        answered_at,
        is_brisk,
        crowded_until,
        filling,
        client_on: None,
        left_at: answered_at,
    };
    let ended = tokio::select! {
        () = stopped(&mut stop) => Ok(()),
        () = process_end(process.as_ref()) => Ok(()),
        ended = talk.run(&mut notices) => ended,
    };
    talk.session.close();
    if let Err(error) = ended {
        tracing::info!(pid, session = %talk.session.id, %error, "lane connection ended");
    }
}

/// Returns when the peer's process has ended; never, if that cannot be seen.
async fn process_end(process: Option<&ProcessEnd>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

type Opened = (Arc<Session>, mpsc::Receiver<Notice>);

/// Answers the first request, which must be hello.
async fn greet(
    reader: &mut LaneReader<LaneRequest>,
    writer: &mut LaneWriter<LaneResponse>,
    service: &Service,
    peer: Peer,
) -> Result<Option<Opened>, LaneError> {
    let Some(first) = reader.next().await? else { return Ok(None) };
    let id = first.message.id;
    let opened = open(first.message, service, peer);
    let (result, opened) = match opened {
        Ok(opened) => {
            // The lane's session is its connection: nobody else may speak for it.
            (lane_response::Result::Session(service.opened([0; 16])), Some(opened))
        }
        Err(error) => {
            service.metrics().refused(error.code);
            (lane_response::Result::Error((&error).into()), None)
        }
    };
    writer.queue(&LaneResponse { id, result: Some(result) }, Vec::new())?;
    writer.flush().await?;
    Ok(opened)
}

fn open(first: LaneRequest, service: &Service, peer: Peer) -> Result<Opened, CallError> {
    let Some(Op::Hello(hello)) = first.op else {
        return Err(CallError::new(Code::FailedPrecondition, "the first request on a lane is LaneHello"));
    };
    check_id(first.id)?;
    if hello.version != LANE_VERSION {
        return Err(CallError::new(
            Code::FailedPrecondition,
            format!("lane version {} is not spoken here; this daemon speaks {LANE_VERSION}", hello.version),
        ));
    }
    let client = match hello.client_id.as_ref() {
        [] => None,
        id => Some(id.try_into().map(ClientId::from_bytes).map_err(|_| {
            CallError::invalid(format!("client_id has {} bytes; it has 16, or none", id.len()))
        })?),
    };
    let opened = service.open(&hello.tenant, &hello.token, &hello.client, peer)?;
    if let Some(client) = client {
        service.resume(&opened.0, client);
    }
    Ok(opened)
}

fn check_id(id: u64) -> Result<(), CallError> {
    if id == 0 { Err(CallError::invalid("request id 0 is kept for notices; choose another")) } else { Ok(()) }
}

struct Talk {
    service: Arc<Service>,
    session: Arc<Session>,
    reader: LaneReader<Asked>,
    writer: LaneWriter<LaneResponse>,
    answers: FuturesUnordered<Answer>,
    /// When the last answers that needed no wait went out, and whether the request after them came soon.
    answered_at: Instant,
    is_brisk: bool,
    /// Others want this processor: until then nobody is expected in place of going to sleep.
    crowded_until: Instant,
    filling: Filling,
    /// The processor that the client asked from, if he said so.
    client_on: Option<u32>,
    /// When this thread left it last.
    left_at: Instant,
}

/// What the client fills at the moment. Who leases a run of blocks, fills them at once and leases the next meanwhile is
/// waited for awake, on another processor than he works on.
#[derive(Debug)]
struct Filling {
    /// Leases for writing that were not sealed in yet.
    leases: u32,
    leased_at: Instant,
    /// The last one was sealed in soon.
    at_once: bool,
}

impl Filling {
    fn asked(&mut self, op: Option<&Op>, now: Instant) {
        match op {
            Some(Op::Lease(lease)) if lease.kind() == v1::LeaseKind::Write => {
                self.leases = self.leases.saturating_add(1);
                self.leased_at = now;
            }
            Some(Op::Seal(_)) => {
                self.leases = self.leases.saturating_sub(1);
                self.at_once = now.duration_since(self.leased_at) < FILLED_WITHIN;
            }
            _ => {}
        }
    }

    /// Nobody came.
    fn over(&mut self) {
        (self.leases, self.at_once) = (0, false);
    }

    fn is_on(&self) -> bool {
        self.at_once && self.leases > 0
    }
}

impl Talk {
    /// Until the peer closes, or the session is cut off.
    async fn run(&mut self, notices: &mut mpsc::Receiver<Notice>) -> Result<(), LaneError> {
        let in_flight_max = self.service.facts().edges.requests_in_flight;
        loop {
            let writable = self.writer.writable();
            let unsent = self.writer.queued_bytes();
            let (awake, patience) = self.expected();
            let may_read = self.answers.len() < in_flight_max && unsent < UNSENT_BYTES_MAX;
            tokio::select! {
                ready = writable.ready(), if unsent > 0 => ready?,
                Some((answer, descriptors)) = self.answers.next(), if !self.answers.is_empty() => {
                    self.queue(&answer, descriptors)?;
                }
                notice = notices.recv(), if unsent < UNSENT_BYTES_MAX => {
                    let Some(notice) = notice else { return Ok(()) };
                    let wire = convert::notice(&notice, |space| self.session.handle(space));
                    let response = LaneResponse { id: 0, result: Some(lane_response::Result::Session(wire)) };
                    self.queue(&Response::Wire(response), Vec::new())?;
                }
                received = self.reader.next(), if may_read => {
                    let Some(received) = received? else { return Ok(()) };
                    // What is answered at once goes out in few pieces; then others have this thread, and their sockets
                    // are looked at.
                    if self.begin_all(received, in_flight_max)? == AT_ONCE {
                        self.give_way();
                        tokio::task::yield_now().await;
                    }
                    continue;
                }
                crowded = awake_until(awake, patience), if awake > self.answered_at => {
                    self.is_brisk = false;
                    if self.is_filling() {
                        self.filling.over();
                    }
                    self.crowded_until = crowded.map_or(self.crowded_until, |now| now + CROWDED_FOR);
                    continue;
                }
            }
            let mut answered = 1;
            while answered < AT_ONCE
                && let Some(Some((answer, descriptors))) = self.answers.next().now_or_never()
            {
                self.queue(&answer, descriptors)?;
                answered += 1;
            }
            self.writer.try_flush()?;
            if answered == AT_ONCE {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Until when the next question is waited for awake, and how long others may have the processor meanwhile.
    fn expected(&self) -> (Instant, Duration) {
        if self.is_filling() && self.answered_at >= self.crowded_until {
            return (self.answered_at + FILLED_WITHIN, GIVEN_AWAY_MAX);
        }
        let expected = if self.is_brisk { BRISK_WITHIN } else { Duration::ZERO };
        (self.answered_at + expected, YIELDED_FOR_MAX)
    }

    /// Threads that serve others have this processor before the kernel takes it away; not where they keep it.
    fn give_way(&mut self) {
        let began = Instant::now();
        if began < self.crowded_until {
            return;
        }
        std::thread::yield_now();
        let ended = Instant::now();
        if ended.duration_since(began) >= GIVEN_AWAY_MAX {
            self.crowded_until = ended + CROWDED_FOR;
        }
    }

    /// Begins to answer a request and more of what came with it, so that a batch costs few wake-ups. How many that were.
    fn begin_all(&mut self, first: Received<Asked>, in_flight_max: usize) -> Result<usize, LaneError> {
        let mut unsent_since = Instant::now();
        self.is_brisk = unsent_since.duration_since(self.answered_at) < BRISK_WITHIN
            && unsent_since >= self.crowded_until;
        self.begin(first.message)?;
        let mut begun = 1;
        while begun < AT_ONCE
            && self.answers.len() < in_flight_max
            && let Some(received) = self.reader.next_ready()?
        {
            let now = Instant::now();
            if now.duration_since(unsent_since) >= UNSENT_FOR_MAX {
                self.writer.try_flush()?;
                unsent_since = now;
            }
            self.begin(received.message)?;
            begun += 1;
        }
        self.writer.try_flush()?;
        self.answered_at = Instant::now();
        self.work_beside(begun);
        Ok(begun)
    }

    fn is_filling(&self) -> bool {
        self.client_on.is_some() && self.filling.is_on()
    }

    /// Who has his answer and fills, or asks many questions at once, has something to do meanwhile. Where this thread was woken on
    /// his processor, either waited for the other until the kernel had looked around: 46 to 115 us a lease of one block, of
    /// 16 under way, where 39 are had in the long run.
    fn work_beside(&mut self, begun: usize) {
        let asks_many = begun >= ASKED_AT_ONCE && self.answered_at.duration_since(self.left_at) >= LEFT_AGAIN;
        if let Some(number) = self.client_on.filter(|_| asks_many || self.is_filling())
            && leave_processor(number)
        {
            self.left_at = self.answered_at;
        }
    }

    fn queue(&mut self, answer: &Response, descriptors: Vec<OwnedFd>) -> Result<(), LaneError> {
        let (id, queued) = match answer {
            Response::Wire(answer) => (answer.id, self.writer.queue(answer, descriptors)),
            Response::Encoded { id, bytes } => (*id, self.writer.queue_encoded(bytes)),
        };
        match queued {
            Err(error @ LaneError::MessageTooLong { .. }) => {
                let refused = CallError::new(Code::OutOfRange, error.to_string());
                let result = Some(lane_response::Result::Error((&refused).into()));
                self.writer.queue(&LaneResponse { id, result }, Vec::new())
            }
            other => other,
        }
    }

    /// Begins to answer. What needs no wait is answered here and now.
    fn begin(&mut self, asked: Asked) -> Result<(), LaneError> {
        let (service, session) = (self.service.clone(), self.session.clone());
        self.filling.asked(asked.request.op.as_ref(), Instant::now());
        if let Some(Op::Lease(lease)) = &asked.request.op {
            self.client_on = lease.processor.checked_sub(1);
        }
        let mut answer: Answer = Box::pin(async move {
            let id = asked.request.id;
            let answered = match check_id(id) {
                Ok(()) => respond(&service, &session, asked).await,
                Err(error) => Err(error),
            };
            answered.unwrap_or_else(|error| {
                service.metrics().refused(error.code);
                let result = Some(lane_response::Result::Error((&error).into()));
                (Response::Wire(LaneResponse { id, result }), Vec::new())
            })
        });
        match (&mut answer).now_or_never() {
            Some((answer, descriptors)) => self.queue(&answer, descriptors),
            None => {
                self.answers.push(answer);
                Ok(())
            }
        }
    }
}

/// Keeps this thread from going to sleep until then. Other connections have it meanwhile, and other threads this processor.
/// Answers when it ended if one of those had it and no request came of that: it was not the client, will want it again,
/// and who yields to it waits for a hundred times what it takes to be woken.
async fn awake_until(then: Instant, patience: Duration) -> Option<Instant> {
    let mut yields = Yields::new(patience);
    loop {
        tokio::task::yield_now().await;
        if Instant::now() >= then {
            return None;
        }
        let (ended, wanted) = yields.give();
        if wanted {
            // Once for the socket to be looked at, and once for whoever reads it.
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            return Some(ended);
        }
    }
}

/// Those that name many keys, whose keys may be apart, and all others.
async fn respond(
    service: &Service,
    session: &Session,
    asked: Asked,
) -> Result<(Response, Vec<OwnedFd>), CallError> {
    let Asked { request: LaneRequest { id, op }, keys } = asked;
    let apart = keys.as_ref().map(Keys::list);
    let (result, descriptors) = match (op, apart) {
        (Some(Op::Lease(wanted)), keys) => {
            let answer = match keys {
                Some(keys) => service.lease_of(session, &wanted, &keys).await?,
                None => service.lease_of(session, &wanted, &wanted.keys).await?,
            };
            let leased = answer.leased()?;
            let with_ids = wanted.block_ids.is_empty();
            match wanted.packed.then(|| encode::packed(&leased, with_ids)).flatten() {
                Some(packed) => (lane_response::Result::Lease(packed), Vec::new()),
                None => {
                    let bytes = encode::leased(id, &leased);
                    return Ok((Response::Encoded { id, bytes }, Vec::new()));
                }
            }
        }
        (Some(Op::Exists(wanted)), Some(keys)) => {
            let found = service.exists_of(session, &wanted, &keys).await?;
            (lane_response::Result::Exists(found), Vec::new())
        }
        (op, _) => answer(service, session, op).await?,
    };
    Ok((Response::Wire(LaneResponse { id, result: Some(result) }), descriptors))
}

type Answered = Result<(lane_response::Result, Vec<OwnedFd>), CallError>;

async fn answer(service: &Service, session: &Session, op: Option<Op>) -> Answered {
    use lane_response::Result as Wire;
    let result = match op {
        None => {
            return Err(CallError::new(
                Code::Unimplemented,
                "this daemon does not know the request; is the client newer?",
            ));
        }
        // Answered above without the generated message.
        Some(Op::Lease(request)) => Wire::Lease(service.lease(session, request).await?),
        Some(Op::Hello(_)) => {
            return Err(CallError::new(
                Code::FailedPrecondition,
                "the session is open already; open a second one by a second connection",
            ));
        }
        Some(Op::OpenSpace(request)) => Wire::OpenSpace(service.open_space(session, request).await?),
        Some(Op::Exists(request)) => Wire::Exists(service.exists(session, request).await?),
        Some(Op::Match(request)) => Wire::Match(service.matched(session, request).await?),
        Some(Op::Seal(request)) => Wire::Seal(service.seal(session, request).await?),
        Some(Op::Renew(request)) => Wire::Renew(service.renew(session, request).await?),
        Some(Op::Release(request)) => Wire::Release(service.release(session, request).await?),
        Some(Op::Abort(request)) => Wire::Abort(service.abort(session, request).await?),
        Some(Op::Touch(request)) => Wire::Touch(service.touch(session, request).await?),
        Some(Op::Prefetch(request)) => Wire::Prefetch(service.prefetch(session, request).await?),
        Some(Op::Retain(request)) => Wire::Retain(service.retain(session, request).await?),
        Some(Op::Clear(request)) => Wire::Clear(service.clear(session, request).await?),
        Some(Op::MapChunk(request)) => return map_chunk(service, session, request).await,
        Some(Op::Shrink(request)) => Wire::Shrunk(service.shrink(session, request).await?),
        Some(Op::ReturnWindow(request)) => {
            Wire::WindowReturned(service.return_window(session, request).await?)
        }
    };
    Ok((result, Vec::new()))
}

async fn map_chunk(service: &Service, session: &Session, request: v1::MapChunk) -> Answered {
    let chunk = request.chunk;
    let (shared, access) = service.map_chunk(session, request).await?;
    let writable = access == MapAccess::Write;
    let failed = |error: &dyn std::fmt::Display| {
        CallError::new(Code::Unavailable, format!("chunk {chunk} cannot be shared now: {error}; try again"))
    };
    let (mapped, descriptors) = match shared {
        Shared::Pinned(memory) => {
            let data = if writable { memory.share_writable() } else { memory.share_data() };
            let shared = data.and_then(|data| Ok(vec![data, memory.share_fences()?]));
            let mapped = v1::MappedChunk {
                chunk,
                bytes: memory.bytes().get(),
                fence_bytes: (u64::from(memory.frames()) * 8).next_multiple_of(terrace_media::PAGE_BYTES),
                writable,
                tier: v1::Tier::Pinned.into(),
                ..Default::default()
            };
            (mapped, shared.map_err(|error| failed(&error))?)
        }
        Shared::Hbm(held) => {
            let device = service.hbm_device(held.gpu).unwrap_or_default();
            let data = held.memory().export().map_err(|error| failed(&error))?;
            let fences = held.fences.share().map_err(|error| failed(&error))?;
            let mapped = v1::MappedChunk {
                chunk,
                bytes: held.memory().bytes().get(),
                fence_bytes: held.fences.bytes().get(),
                writable,
                tier: v1::Tier::Hbm.into(),
                device: device.number,
                device_kind: device.kind,
                device_uuid: device.uuid,
            };
            (mapped, vec![data, fences])
        }
    };
    Ok((lane_response::Result::MappedChunk(mapped), descriptors))
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    // Two clients on one thread wait for each other, and another thread does nothing.
    #[tokio::test]
    async fn a_connection_comes_to_the_thread_that_has_the_fewest() {
        let loops = Loops::start().unwrap();
        let threads = loops.loops.len();
        let connect = || {
            let ((told, on), (end, ended)) = (oneshot::channel(), oneshot::channel::<()>());
            loops.spawn(async move {
                told.send(std::thread::current().id()).unwrap();
                let _ = ended.await;
            });
            (on, end)
        };
        let mut open = Vec::new();
        for _ in 0..2 * threads {
            let (on, end) = connect();
            open.push((on.await.unwrap(), end));
        }
        for (thread, _) in &open {
            assert_eq!(open.iter().filter(|(other, _)| other == thread).count(), 2);
        }
        // Whatever order they were opened in, and however many have been since.
        for place in [0, threads - 1, 0] {
            let (left, end) = open.remove(place);
            drop(end);
            let held = || loops.loops.iter().map(|each| Arc::strong_count(&each.held)).sum::<usize>();
            while held() > 3 * threads - 1 {
                tokio::task::yield_now().await;
            }
            let (on, end) = connect();
            let thread = on.await.unwrap();
            assert_eq!(thread, left);
            open.push((thread, end));
        }
    }
}
