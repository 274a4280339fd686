//! The local transport: requests over the Unix socket, answers matched by id.
//!
//! A caller encodes its request, and hands it to the kernel itself if nobody else
//! waits for an answer. A task takes over when others do, or when the kernel's
//! buffer is full. Another task receives.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use terrace_core::ClientId;
use terrace_lane::{LaneConnection, LaneError, LaneReader, LaneWriter, Received, Yields};
use terrace_proto::LANE_VERSION;
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::session_response::Notice;
use terrace_proto::v1::{Durability, GrantOutcome, LaneHello, LaneRequest, LeaseKind, SessionOpened};

use crate::chunks::{Chunks, WriterToken};
use crate::error::ClientError;
use crate::grants::{Grant, Grants};
use crate::keeper::{Keeper, LeaseToken};
use crate::keyed::{self, Answered, Named};
use crate::session::Target;
use crate::status::Status;

// Requests of one session that wait for their answers. Less than the 256 that
// the daemon reads ahead by default, so that chores get through.
const REQUESTS_IN_FLIGHT_MAX: usize = 192;
// Requests are not gathered beyond this, nor for longer: the daemon may begin meanwhile. A call and a wake-up take a
// fifth of that time.
const GATHERED_BYTES_MAX: usize = 32 << 10;
const GATHERED_FOR_MAX: Duration = Duration::from_micros(10);
// Answers are handed out for so long before those that have theirs go on.
const HANDED_OUT_FOR_MAX: Duration = Duration::from_micros(10);
// A thread that always has answers to hand out lets others have its processor so often: they would wait for some
// milliseconds until it is taken away, and ask the daemon for less than that.
const YIELD_AFTER: Duration = Duration::from_micros(50);
// Where they keep it for longer than this, not before that.
const AWAY_MAX: Duration = Duration::from_micros(500);
const YIELD_AGAIN_AFTER: Duration = Duration::from_millis(100);

// An answer is looked for so long before its caller sleeps, or after another has arrived: what needs no device is answered
// in less. Where so many in a row were not, the next hundreds are not looked for.
const WATCHED_FOR_MAX: Duration = Duration::from_micros(50);
// The daemon has some hundreds of blocks to see to, and who sleeps is woken on its processor.
const WRITE_WATCHED_FOR_MAX: Duration = Duration::from_millis(1);
const YIELDED_FOR_MAX: Duration = Duration::from_micros(5);
const WATCHED_IN_VAIN_MAX: u32 = 8;
const WATCHED_AGAIN_AFTER: u32 = 1024;

/// An answer with all that came with it. What a lease granted is owned here, so
/// that an answer nobody waits for any more gives everything back.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub(crate) answer: Answer,
    /// The blocks of a `LeaseResponse`, which itself has none.
    pub(crate) grants: Grants,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Ends the lease of a `LeaseResponse` when dropped.
    pub(crate) lease: Option<LeaseToken>,
    /// One for each granted block of a write lease, in order. Those of neighbours are the same.
    pub(crate) writers: Vec<Arc<WriterToken>>,
}

/// One connection to the daemon's socket.
#[derive(Debug)]
pub(crate) struct LaneLink {
    outbox: Mutex<Outbox>,
    stuck: Notify,
    waiting: Mutex<Waiting>,
    in_flight: Arc<Semaphore>,
    next_id: AtomicU64,
    /// Somebody looks for his answer all the time, and so keeps this thread awake for all.
    watching: AtomicBool,
    /// So many answers in a row took longer than they were looked for.
    watched_in_vain: AtomicU32,
    /// How often answers arrived.
    arrivals: AtomicU64,
    status: Arc<Status>,
    /// What a daemon that answers nothing is given, beyond what it was allowed to wait.
    answer_within: Duration,
}

/// What is on its way out.
#[derive(Debug)]
struct Outbox {
    writer: LaneWriter<LaneRequest>,
    /// When the first of what waits here was asked.
    since: Instant,
}

#[derive(Debug)]
struct Waiting {
    open: bool,
    callers: HashMap<u64, Caller>,
}

#[derive(Debug)]
struct Caller {
    // The kind of lease that was asked for, if one was.
    lease: Option<LeaseKind>,
    answer: oneshot::Sender<Result<Delivered, ClientError>>,
    // Also after the caller went away, until the answer is there.
    _permit: Option<OwnedSemaphorePermit>,
}

/// Whether other requests of the session wait for their answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Company {
    None,
    Others,
}

impl Question<'_> {
    /// How long it is looked for, if it is one of those that are mostly answered from what is in memory, in a moment.
    fn is_looked_for(&self, allowed: Duration) -> Option<Duration> {
        match &self.op {
            Op::Lease(lease) if lease.kind() == LeaseKind::Write => Some(WRITE_WATCHED_FOR_MAX),
            Op::Seal(seal) if seal.durability() == Durability::Unspecified => Some(WRITE_WATCHED_FOR_MAX),
            // Somebody waits for it: the keeper's own come without him.
            Op::Release(_) => self.keeper.map(|_| WATCHED_FOR_MAX),
            _ => (self.keys.is_some() && allowed == Duration::ZERO).then_some(WATCHED_FOR_MAX),
        }
    }
}

/// Whoever has it looks for his answer. There is one.
struct Watch<'a>(&'a AtomicBool);

impl<'a> Watch<'a> {
    fn begin(watching: &'a AtomicBool) -> Option<Self> {
        (!watching.swap(true, Ordering::Acquire)).then(|| Self(watching))
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Whether more answers may have arrived than were handed out.
enum Rest {
    None,
    MayBeThere,
}

/// What is asked. The keys of a look-up or a lease may be apart.
struct Question<'a> {
    op: Op,
    keys: Option<Named>,
    /// Whose leases may be given back with it.
    keeper: Option<&'a Keeper>,
}

/// A connection whose session is open, before its tasks run.
pub(crate) struct Opened {
    pub(crate) link: Arc<LaneLink>,
    pub(crate) reader: LaneReader<Answered>,
    pub(crate) facts: SessionOpened,
}

impl LaneLink {
    /// Connects and says hello.
    pub(crate) async fn open(
        path: &Path,
        target: &Target,
        client: ClientId,
        status: Arc<Status>,
    ) -> Result<Opened, ClientError> {
        let opening = Self::open_now(path, target, client, status);
        let within = target.hello_within();
        timeout(within, opening).await.map_err(|_| ClientError::Unreachable {
            address: path.display().to_string(),
            detail: format!("connected, but no answer in {within:?}"),
        })?
    }

    async fn open_now(
        path: &Path,
        target: &Target,
        client: ClientId,
        status: Arc<Status>,
    ) -> Result<Opened, ClientError> {
        let (_peer, mut reader, mut writer) = LaneConnection::connect(path).await?.split();
        let hello = LaneHello {
            version: LANE_VERSION,
            tenant: target.tenant.clone(),
            token: target.token.clone(),
            client: target.client_name.clone(),
            client_id: Bytes::copy_from_slice(&client.to_bytes()),
        };
        writer.queue(&LaneRequest { id: 1, op: Some(Op::Hello(hello)) }, Vec::new())?;
        writer.flush().await?;
        let first = reader.next().await?.ok_or_else(|| ClientError::Unreachable {
            address: path.display().to_string(),
            detail: "it closed the connection at hello".to_owned(),
        })?;
        let facts = match first.message.result {
            Some(Answer::Error(error)) => {
                return Err(ClientError::refused(error).at_hello(&format!("lane version {LANE_VERSION}")));
            }
            Some(Answer::Session(session)) => match session.notice {
                Some(Notice::Opened(opened)) => opened,
                _ => return Err(ClientError::Protocol { detail: "a session that opens with a notice" }),
            },
            _ => return Err(ClientError::Protocol { detail: "a hello that is not answered by a session" }),
        };
        let link = Self {
            outbox: Mutex::new(Outbox { writer, since: Instant::now() }),
            stuck: Notify::new(),
            waiting: Mutex::new(Waiting { open: true, callers: HashMap::new() }),
            in_flight: Arc::new(Semaphore::new(REQUESTS_IN_FLIGHT_MAX)),
            next_id: AtomicU64::new(2),
            watching: AtomicBool::new(false),
            watched_in_vain: AtomicU32::new(0),
            arrivals: AtomicU64::new(0),
            status,
            answer_within: target.answer_within(),
        };
        Ok(Opened { link: Arc::new(link), reader: reader.reading(), facts })
    }

    /// Asks and waits for the answer. When cancelled, a lease that is granted
    /// afterwards is released.
    pub(crate) async fn call(&self, op: Op) -> Result<Delivered, ClientError> {
        self.call_within(op, Duration::ZERO).await
    }

    /// As [`LaneLink::call`], for an answer that may take `allowed` more.
    pub(crate) async fn call_within(&self, op: Op, allowed: Duration) -> Result<Delivered, ClientError> {
        let permit = self.permit().await?;
        self.ask(Question { op, keys: None, keeper: None }, Some(permit), allowed).await
    }

    /// As [`LaneLink::call`], for a look-up or a lease whose keys are apart. What `keeper` has to give back goes with it.
    pub(crate) async fn call_keyed(
        &self,
        op: Op,
        keys: Named,
        keeper: &Keeper,
    ) -> Result<Delivered, ClientError> {
        let permit = self.permit().await?;
        let question = Question { op, keys: Some(keys), keeper: Some(keeper) };
        self.ask(question, Some(permit), Duration::ZERO).await
    }

    /// Whether frames to write were asked for that were not answered yet, be it to somebody who has gone.
    pub(crate) fn is_asked_for_frames(&self) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.callers.values().any(|caller| caller.lease == Some(LeaseKind::Write))
    }

    /// Leave to have a request under way. Questions that were given up keep theirs until they are answered.
    async fn permit(&self) -> Result<OwnedSemaphorePermit, ClientError> {
        let within = self.answer_within;
        let permit = timeout(within, Arc::clone(&self.in_flight).acquire_owned()).await;
        permit.map_err(|_| ClientError::NoAnswer { waited: within })?.map_err(|_| ClientError::Disconnected)
    }

    /// As [`LaneLink::call`], for the session's own chores: never behind callers that wait.
    pub(crate) async fn call_at_once(&self, op: Op) -> Result<Delivered, ClientError> {
        self.ask(Question { op, keys: None, keeper: None }, None, Duration::ZERO).await
    }

    /// The same, for a caller who waits. What `keeper` has to give back goes with it.
    pub(crate) async fn call_awaited(&self, op: Op, keeper: &Keeper) -> Result<Delivered, ClientError> {
        self.ask(Question { op, keys: None, keeper: Some(keeper) }, None, Duration::ZERO).await
    }

    async fn ask(
        &self,
        question: Question<'_>,
        permit: Option<OwnedSemaphorePermit>,
        allowed: Duration,
    ) -> Result<Delivered, ClientError> {
        let (lease, allowed) = match &question.op {
            Op::Lease(lease) => {
                (Some(lease.kind()), allowed.saturating_add(Duration::from_millis(lease.wait_ms)))
            }
            _ => (None, allowed),
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, mut answered) = oneshot::channel();
        let look = question.is_looked_for(allowed);
        let company = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if !waiting.open {
                return Err(ClientError::Disconnected);
            }
            waiting.callers.insert(id, Caller { lease, answer, _permit: permit });
            if waiting.callers.len() > 1 { Company::Others } else { Company::None }
        };
        if let Err(error) = self.send(id, question, company) {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).callers.remove(&id);
            return Err(error);
        }
        if let Some(within) = look
            && let Some(answered) = self.watch(&mut answered, within).await
        {
            return answered;
        }
        let within = self.answer_within.saturating_add(allowed);
        match timeout(within, answered).await {
            Ok(answered) => answered.map_err(|_| ClientError::Disconnected)?,
            Err(_) => Err(ClientError::NoAnswer { waited: within }),
        }
    }

    /// Looks for an answer that is mostly there in a moment, in place of going to sleep: to be woken takes longer. Others
    /// have this thread between the looks, and other threads this processor. One question at a time is looked for.
    async fn watch(
        &self,
        answered: &mut oneshot::Receiver<Result<Delivered, ClientError>>,
        within: Duration,
    ) -> Option<Result<Delivered, ClientError>> {
        let vain = self.watched_in_vain.load(Ordering::Relaxed);
        if vain >= WATCHED_IN_VAIN_MAX {
            // Now and then, for it may have become quicker.
            self.watched_in_vain.store((vain + 1) % WATCHED_AGAIN_AFTER, Ordering::Relaxed);
            return None;
        }
        let _watch = Watch::begin(&self.watching)?;
        let mut arrivals = self.arrivals.load(Ordering::Relaxed);
        let (mut until, mut others_ran) = (Instant::now() + within, false);
        let mut yields = Yields::new(YIELDED_FOR_MAX);
        loop {
            match answered.try_recv() {
                Ok(answered) => {
                    self.watched_in_vain.store(0, Ordering::Relaxed);
                    return Some(answered);
                }
                Err(TryRecvError::Closed) => return Some(Err(ClientError::Disconnected)),
                Err(TryRecvError::Empty) => {}
            }
            let (now, arrived) = (Instant::now(), self.arrivals.load(Ordering::Relaxed));
            if arrived != arrivals {
                // Those of others, before this one's turn.
                (until, arrivals) = (now + within, arrived);
            } else if others_ran {
                self.watched_in_vain.store(WATCHED_IN_VAIN_MAX, Ordering::Relaxed);
                return None;
            } else if now >= until {
                self.watched_in_vain.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            // If that was not the daemon, who had this processor wants it again, and who yields to him waits for a
            // hundred times what it takes to be woken.
            let (looked, wanted) = yields.give();
            others_ran = wanted;
            tokio::task::yield_now().await;
            if looked.elapsed() >= WATCHED_FOR_MAX {
                // The caller had something to do meanwhile, and looks for his answer from now on.
                (until, others_ran) = (Instant::now() + within, false);
            }
        }
    }

    /// Who asks alone hands his request to the kernel at once. With others on the way the task that sends does it, after
    /// those that are about to ask as well: many go out by one call, and wake the daemon once. Before the first of them
    /// goes what was to be given back until then.
    fn send(&self, id: u64, question: Question<'_>, company: Company) -> Result<(), ClientError> {
        let Question { op, keys, keeper } = question;
        let encoded = keys.and_then(|keys| keyed::encode(id, &op, &keys));
        let mut outbox = self.outbox();
        let is_first = outbox.writer.queued_bytes() == 0;
        if is_first {
            outbox.since = Instant::now();
            if let Some(release) = keeper.and_then(Keeper::release_by_the_way) {
                // Nobody waits for its answer.
                let id = self.next_id.fetch_add(1, Ordering::Relaxed);
                outbox.writer.queue(&LaneRequest { id, op: Some(release) }, Vec::new())?;
            }
        }
        match encoded {
            Some(message) => outbox.writer.queue_encoded(&message)?,
            None => outbox.writer.queue(&LaneRequest { id, op: Some(op) }, Vec::new())?,
        }
        let gather = outbox.writer.queued_bytes() < GATHERED_BYTES_MAX
            && (is_first || outbox.since.elapsed() < GATHERED_FOR_MAX);
        if company == Company::Others && gather {
            if is_first {
                self.stuck.notify_one();
            }
            return Ok(());
        }
        self.flush(&mut outbox)
    }

    /// Sends what waits for others to ask: its caller does something else until he wants the answer.
    pub(crate) fn send_now(&self) -> Result<(), ClientError> {
        self.flush(&mut self.outbox())
    }

    fn flush(&self, outbox: &mut Outbox) -> Result<(), ClientError> {
        match outbox.writer.try_flush() {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.stuck.notify_one();
                Ok(())
            }
            Err(error) => {
                outbox.writer.close();
                Err(error.into())
            }
        }
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection; the receiving task notices.
    pub(crate) fn close(&self) {
        self.status.close();
        self.outbox().writer.close();
    }

    /// Sends what callers could not. Runs until aborted or disconnected.
    pub(crate) async fn run_writer(self: Arc<Self>) {
        let writable = self.outbox().writer.writable();
        loop {
            self.stuck.notified().await;
            loop {
                let flushed = self.outbox().writer.try_flush();
                match flushed {
                    Ok(true) => break,
                    Ok(false) if writable.ready().await.is_ok() => {}
                    Ok(false) | Err(_) => return self.close(),
                }
            }
        }
    }

    /// Receives until the connection ends; then the session is closed.
    pub(crate) async fn run_reader(
        self: Arc<Self>,
        mut reader: LaneReader<Answered>,
        keeper: Arc<Keeper>,
        chunks: Arc<Chunks>,
    ) {
        let mut yield_at = Instant::now() + YIELD_AFTER;
        loop {
            let arrived = match reader.next().await {
                Ok(Some(first)) => self.hand_out(first, &mut reader, &keeper, &chunks),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            match arrived {
                // More is there already, and those who have their answers are to ask the next meanwhile.
                Ok(Rest::MayBeThere) => {
                    let now = Instant::now();
                    if now >= yield_at {
                        std::thread::yield_now();
                        let away = now.elapsed();
                        yield_at = now + away + if away < AWAY_MAX { YIELD_AFTER } else { YIELD_AGAIN_AFTER };
                    }
                    tokio::task::yield_now().await;
                }
                Ok(Rest::None) => {}
                Err(LaneError::Io(error)) => {
                    tracing::debug!(%error, "lane ended");
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "closing the lane");
                    break;
                }
            }
        }
        self.close();
        self.in_flight.close();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.open = false;
        waiting.callers.clear();
        drop(waiting);
        chunks.forget_all();
    }

    /// What has arrived, for a while.
    fn hand_out(
        &self,
        first: Received<Answered>,
        reader: &mut LaneReader<Answered>,
        keeper: &Arc<Keeper>,
        chunks: &Arc<Chunks>,
    ) -> Result<Rest, LaneError> {
        self.arrivals.fetch_add(1, Ordering::Relaxed);
        let (began, mut next) = (Instant::now(), Some(first));
        while let Some(Received { message, descriptors }) = next {
            if message.response.id != 0 {
                self.deliver(message, descriptors, keeper, chunks);
            } else if let Some(Answer::Session(session)) = message.response.result
                && let Some(notice) = session.notice
            {
                take_notice(notice, keeper, chunks);
            }
            if began.elapsed() >= HANDED_OUT_FOR_MAX {
                return Ok(Rest::MayBeThere);
            }
            next = reader.next_ready()?;
        }
        Ok(Rest::None)
    }

    fn deliver(
        &self,
        Answered { response: message, grants }: Answered,
        descriptors: Vec<OwnedFd>,
        keeper: &Arc<Keeper>,
        chunks: &Arc<Chunks>,
    ) {
        let caller = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).callers.remove(&message.id);
        let Some(caller) = caller else {
            tracing::trace!(id = message.id, "an answer that nobody waits for");
            return;
        };
        let delivered = match message.result {
            None => Err(ClientError::Protocol { detail: "an answer without content" }),
            Some(Answer::Error(error)) => Err(ClientError::refused(error)),
            Some(answer) => {
                let (lease, writers) = match &answer {
                    Answer::Lease(granted) => {
                        own_grants((granted.lease, &grants), caller.lease, keeper, chunks)
                    }
                    _ => (None, Vec::new()),
                };
                Ok(Delivered { answer, grants, descriptors, lease, writers })
            }
        };
        // A caller that went away drops what was granted, which gives it back.
        let _gone = caller.answer.send(delivered);
    }
}

/// Makes what a lease granted ours before anything later on the socket is read:
/// a recall that follows must already see the writers.
fn own_grants(
    (lease, grants): (u64, &Grants),
    kind: Option<LeaseKind>,
    keeper: &Arc<Keeper>,
    chunks: &Arc<Chunks>,
) -> (Option<LeaseToken>, Vec<Arc<WriterToken>>) {
    let lease = (lease != 0).then(|| LeaseToken::new(lease, Arc::clone(keeper)));
    if kind != Some(LeaseKind::Write) {
        return (lease, Vec::new());
    }
    let granted = |block: &Grant| block.outcome == GrantOutcome::Granted;
    let granted: Vec<Grant> = grants.iter().filter(granted).collect();
    let mut writers = Vec::with_capacity(granted.len());
    for blocks in granted.chunk_by(|one, next| one.chunk == next.chunk) {
        let end = blocks.iter().map(|block| block.frame.saturating_add(1)).max().unwrap_or(0);
        let writer = Arc::new(WriterToken::new(chunks, keeper, blocks[0].chunk, end));
        writers.extend(std::iter::repeat_n(writer, blocks.len()));
    }
    (lease, writers)
}

fn take_notice(notice: Notice, keeper: &Keeper, chunks: &Chunks) {
    match notice {
        Notice::Opened(_) => {}
        Notice::Revoked(revoked) => {
            tracing::warn!(lease = revoked.lease, reason = revoked.reason, "lease revoked");
            keeper.revoke(revoked.lease);
        }
        Notice::Recalled(recalled) => {
            if chunks.recall(recalled.chunk) {
                keeper.return_window(recalled.chunk);
            }
        }
        Notice::Window(opened) => {
            // An older daemon says nothing of the space.
            if opened.space != 0 {
                chunks.is_window_of(opened.chunk, opened.space);
            }
            keeper.map(opened.chunk);
        }
        Notice::Dropped(dropped) => keeper.unmap(dropped.chunk),
        Notice::Rejected(rejected) => {
            tracing::error!(
                space = rejected.space,
                reason = rejected.reason,
                "a block that this session sealed was not what its checksum said"
            );
        }
    }
}
