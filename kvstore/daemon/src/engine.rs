//! The shell around the core: one lock, inputs in, effects out.
//!
//! Promises: every effect is performed or started, in order, before the next
//! input; nothing under the lock waits; a request is answered once, or its
//! receiver learns that the session is gone. Decides nothing.

mod memory;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot};

use terrace_core::{
    ChunkId, ClientId, Config, Core, Done, Effect, Fault, Input, Limit, Locality, Micros, Notice, Now, OpId,
    Reply, Request, RequestId, SessionId, TenantId,
};
use terrace_media::{Access, ChunkMemory, Complete, Media, MediaOp};

use crate::events::EventLogs;
use crate::hbm::{Finish, Hbm, TellLost};
use crate::rates::{OpKind, Rates};
use crate::spaces::Spaces;

/// Notices that a session may leave unread before it is cut off.
const NOTICES_MAX: usize = 1024;
/// How long a thread waits awake for the state: most requests keep it for a few microseconds, and to sleep and be woken takes
/// three times as long, of the thread that had it as well.
const AWAKE_FOR: Duration = Duration::from_micros(20);
/// The ticker looks at the deadlines this often at least, so that it need not be woken for every one that is later.
const TICK_MAX: Micros = Micros::from_millis(500);

/// Drives one core. Shared by every listener.
pub struct Engine {
    state: Mutex<State>,
    media: Arc<Media>,
    hbm: Hbm,
    finish: Finish,
    events: EventLogs,
    spaces: Arc<Spaces>,
    rates: Rates,
    began: Instant,
    sooner: Notify,
    degraded: AtomicBool,
    trouble: Notify,
    sessions_max: usize,
}

struct State {
    core: Core,
    mailboxes: HashMap<SessionId, Mailbox>,
    session_last: u64,
    request_last: u64,
    /// When the ticker wakes up, unless it is told to sooner.
    wakes_at: Now,
    /// Slow effects in flight, for their durations.
    running: HashMap<OpId, (OpKind, Now, u64)>,
    /// Chunks of Pinned that are being made, where devices are to know them.
    making: HashMap<OpId, ChunkId>,
    /// The request that the core is being asked, and its answer if that needs no wait.
    at_hand: Option<(SessionId, RequestId)>,
    answered: Option<Arc<Reply>>,
}

struct Mailbox {
    pending: HashMap<RequestId, oneshot::Sender<Arc<Reply>>>,
    notices: mpsc::Sender<Notice>,
}

/// A session is gone, and with it the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the session has ended")]
pub struct Gone;

/// The way from media's threads back to an engine that is made after them.
#[derive(Clone, Default)]
pub struct Completions(Arc<OnceLock<Weak<Engine>>>);

impl Completions {
    /// The same for devices of Hbm.
    pub(crate) fn finish(&self) -> Finish {
        let slot = self.0.clone();
        Arc::new(move |op, outcome| {
            if let Some(engine) = slot.get().and_then(Weak::upgrade) {
                engine.completed(op, outcome);
            }
        })
    }

    /// Tells the core of a device of Hbm that is lost.
    pub(crate) fn tell_lost(&self) -> TellLost {
        let slot = self.0.clone();
        Arc::new(move |gpu| {
            if let Some(engine) = slot.get().and_then(Weak::upgrade) {
                engine.submit(Input::GpuState { gpu, usable: false });
            }
        })
    }

    /// The callback for media.
    pub fn callback(&self) -> Complete {
        let slot = self.0.clone();
        Box::new(move |op, outcome| {
            // Media completes nothing before the engine has started something.
            if let Some(engine) = slot.get().and_then(Weak::upgrade) {
                engine.completed(op, outcome);
            }
        })
    }
}

impl Engine {
    /// An engine around a new core. `completions` is the one whose callback `media` has.
    ///
    /// # Panics
    /// If another engine has these completions.
    pub fn new(
        config: Config,
        media: Arc<Media>,
        hbm: Hbm,
        events: EventLogs,
        spaces: Arc<Spaces>,
        completions: &Completions,
    ) -> Arc<Self> {
        let sessions_max = config.limits.sessions as usize;
        let engine = Arc::new(Self {
            state: Mutex::new(State {
                core: Core::new(config),
                mailboxes: HashMap::new(),
                session_last: 0,
                request_last: 0,
                wakes_at: Now::default(),
                running: HashMap::new(),
                making: HashMap::new(),
                at_hand: None,
                answered: None,
            }),
            media,
            hbm,
            finish: completions.finish(),
            events,
            spaces,
            rates: Rates::default(),
            began: Instant::now(),
            sooner: Notify::new(),
            degraded: AtomicBool::new(false),
            trouble: Notify::new(),
            sessions_max,
        });
        // A second engine on the same completions would be a mistake in our start order.
        assert!(completions.0.set(Arc::downgrade(&engine)).is_ok(), "completions belong to one engine");
        for gpu in engine.hbm.absent() {
            engine.submit(Input::GpuState { gpu, usable: false });
        }
        let told = Arc::downgrade(&engine);
        engine.media.on_device_change(Box::new(move |device, usable| {
            if let Some(engine) = told.upgrade() {
                engine.submit(Input::DeviceState { device, usable });
            }
        }));
        engine
    }

    /// Microseconds since the engine began. Never goes back.
    pub fn now(&self) -> Now {
        Now::from_micros(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Tells the core, and does what it asks.
    pub fn submit(&self, input: Input) {
        let mut state = self.state();
        self.handle(&mut state, input);
    }

    /// Opens a session. The notices end when the session is closed, or when
    /// its reader leaves too many unread: then close it.
    ///
    /// # Errors
    /// [`Limit::Sessions`].
    pub fn open_session(
        &self,
        tenant: TenantId,
        locality: Locality,
    ) -> Result<(SessionId, mpsc::Receiver<Notice>), Limit> {
        let (sender, notices) = mpsc::channel(NOTICES_MAX);
        let mut state = self.state();
        if state.mailboxes.len() >= self.sessions_max {
            return Err(Limit::Sessions);
        }
        state.session_last += 1;
        let session = SessionId::new(state.session_last);
        state.mailboxes.insert(session, Mailbox { pending: HashMap::new(), notices: sender });
        self.handle(&mut state, Input::SessionOpened { session, tenant, locality });
        Ok((session, notices))
    }

    /// A session that was opened just now goes on for a client that had another.
    pub fn resume_session(&self, session: SessionId, client: ClientId) {
        let mut state = self.state();
        self.handle(&mut state, Input::SessionResumed { session, client });
    }

    /// Ends a session: its leases end, whoever waits for an answer learns that it is gone.
    pub fn close_session(&self, session: SessionId) {
        let mut state = self.state();
        if state.mailboxes.remove(&session).is_some() {
            self.handle(&mut state, Input::SessionClosed { session });
        }
    }

    /// Asks the core, on the caller's own thread. What needs no wait is answered without one: no channel, no wake-up.
    /// Dropping the future forgets the answer, not the request.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn ask(&self, session: SessionId, op: Request) -> Result<Arc<Reply>, Gone> {
        let answer = {
            let mut state = self.state();
            if !state.mailboxes.contains_key(&session) {
                return Err(Gone);
            }
            state.request_last += 1;
            let request = RequestId::new(state.request_last);
            state.at_hand = Some((session, request));
            self.handle(&mut state, Input::Request { session, request, op });
            state.at_hand = None;
            if let Some(reply) = state.answered.take() {
                return Ok(reply);
            }
            let (sender, answer) = oneshot::channel();
            // What the request led to may have ended the session.
            state.mailboxes.get_mut(&session).ok_or(Gone)?.pending.insert(request, sender);
            answer
        };
        answer.await.map_err(|_| Gone)
    }

    /// Asks the core, and lets the answer go.
    pub fn tell(&self, session: SessionId, op: Request) {
        let mut state = self.state();
        state.request_last += 1;
        let request = RequestId::new(state.request_last);
        self.handle(&mut state, Input::Request { session, request, op });
    }

    /// Persists everything sealed so far. Answers blocks written and blocks that could not be.
    ///
    /// # Errors
    /// A limit that keeps the daemon from asking.
    pub async fn flush(&self, tenant: TenantId) -> Result<(u64, u64), Limit> {
        let (session, _notices) = self.open_session(tenant, Locality::Streamed)?;
        let reply = self.ask(session, Request::Flush).await;
        self.close_session(session);
        match reply.as_deref() {
            Ok(&Reply::Flushed { blocks, failed }) => Ok((blocks, failed)),
            Ok(&Reply::Throttled(limit)) => Err(limit),
            Ok(other) => {
                tracing::error!(?other, "a flush was answered by something else");
                Ok((0, 0))
            }
            Err(Gone) => Ok((0, 0)),
        }
    }

    /// The catalog failed a write: nothing is persisted until it is repaired.
    pub fn catalog_failed(&self) {
        let mut state = self.state();
        self.degrade(&mut state);
    }

    /// The catalog works again.
    pub fn catalog_repaired(&self) {
        let mut state = self.state();
        self.degraded.store(false, Ordering::Release);
        self.handle(&mut state, Input::Degraded { degraded: false });
    }

    /// Whether nothing can be persisted now.
    pub fn is_degraded(&self) -> bool {
        self.degraded.load(Ordering::Acquire)
    }

    /// Returns when the catalog has failed. Cancel-safe.
    pub async fn in_trouble(&self) {
        while !self.is_degraded() {
            self.trouble.notified().await;
        }
    }

    /// Looks at the core. `look` must be quick: every request waits for it.
    pub fn view<T>(&self, look: impl FnOnce(&Core) -> T) -> T {
        look(&self.state().core)
    }

    /// A chunk's memory; `None` when it has been dropped.
    pub fn chunk(&self, chunk: ChunkId) -> Option<Arc<ChunkMemory>> {
        self.media.chunk(chunk)
    }

    /// The media below.
    pub fn media(&self) -> &Arc<Media> {
        &self.media
    }

    /// The devices of the Hbm tier.
    pub(crate) fn hbm(&self) -> &Hbm {
        &self.hbm
    }

    /// The media below, when nobody else uses it.
    pub fn into_media(self) -> Option<Media> {
        let Self { media, hbm, .. } = self;
        // Its threads may still give memory back.
        drop(hbm);
        Arc::into_inner(media)
    }

    /// The event logs.
    pub fn events(&self) -> &EventLogs {
        &self.events
    }

    /// The spaces that are known.
    pub fn spaces(&self) -> &Arc<Spaces> {
        &self.spaces
    }

    /// Durations and rates of slow effects.
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// Gives the core its ticks until it is dropped. Cancel-safe.
    pub async fn tick(&self) {
        loop {
            let (deadline, wait) = {
                let mut state = self.state();
                let (now, deadline) = (self.now(), state.core.next_deadline());
                let latest = now.after(TICK_MAX);
                state.wakes_at = deadline.map_or(latest, |deadline| deadline.min(latest));
                (deadline, Duration::from_micros(state.wakes_at.since(now).get()))
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {
                    if deadline.is_some_and(|deadline| self.now() >= deadline) {
                        self.submit(Input::Tick);
                    }
                }
                () = self.sooner.notified() => {}
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        if let Some(state) = self.state_soon() {
            return state;
        }
        // A panic while the core was changing leaves it in an unknown state. To
        // serve from it could serve wrong bytes, so nothing is served any more.
        self.state.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            drop(poisoned);
            tracing::error!("the core panicked; ending the process, blocks on disk survive");
            std::process::abort()
        })
    }

    /// The state, unless others keep it for longer than who waits for it should stay awake.
    fn state_soon(&self) -> Option<MutexGuard<'_, State>> {
        let mut began = None;
        loop {
            if let Ok(state) = self.state.try_lock() {
                return Some(state);
            }
            let now = Instant::now();
            if now.duration_since(*began.get_or_insert(now)) >= AWAKE_FOR {
                return None;
            }
            std::hint::spin_loop();
        }
    }

    fn completed(&self, op: OpId, outcome: Result<Done, Fault>) {
        let mut state = self.state();
        if let Some((kind, started, bytes)) = state.running.remove(&op) {
            let took = Duration::from_micros(self.now().since(started).get());
            self.rates.observe(kind, took, bytes, outcome.as_ref().err().copied());
        }
        self.show_devices(&mut state, op, &outcome);
        let catalog_failed = matches!(outcome, Err(Fault::Catalog));
        self.handle(&mut state, Input::OpDone { op, outcome });
        if catalog_failed {
            self.degrade(&mut state);
        }
    }

    fn degrade(&self, state: &mut State) {
        if !self.degraded.swap(true, Ordering::AcqRel) {
            tracing::error!("the catalog failed: blocks are served, none is persisted until it works again");
            self.handle(state, Input::Degraded { degraded: true });
            self.trouble.notify_one();
        }
    }

    fn handle(&self, state: &mut State, input: Input) {
        state.core.handle(self.now(), input);
        while let Some(effect) = state.core.poll_effect() {
            self.perform(state, effect);
        }
        if let Some(deadline) = state.core.next_deadline()
            && deadline < state.wakes_at
        {
            state.wakes_at = deadline;
            self.sooner.notify_one();
        }
    }

    fn perform(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::Reply { session, request, reply } => {
                answer(state, session, request, reply);
            }
            // Its notices end, and with them its connection.
            Effect::EndSession { session } => drop(state.mailboxes.remove(&session)),
            Effect::Notify { session, notice } => notify(state, session, notice),
            Effect::SetFences { fences } => {
                fences.into_iter().for_each(|(frame, fence)| self.set_fence(frame, fence));
            }
            Effect::CloseWindow { op, chunk } => {
                self.note(state, OpKind::CloseWindow, 0, op);
                if !self.hbm.close_window(op, chunk) {
                    self.media.start(MediaOp::CloseWindow { op, chunk });
                }
            }
            Effect::Publish { events } => {
                events.into_iter().for_each(|(tenant, event)| self.events.publish(tenant, event));
            }
            Effect::Promote { op, device, class } => self.media.promote(op, device, class),
            Effect::Cancel { op, device } => self.media.cancel(op, device),
            Effect::CreateChunk { op, chunk, tenant: _, owner, frame_bytes, frames, memory } => {
                self.note(state, OpKind::CreateChunk, frame_bytes.get() * u64::from(frames), op);
                let access = if owner.is_some() { Access::Window } else { Access::Pool };
                self.create_chunk(state, op, memory, (chunk, access), (frame_bytes, frames));
            }
            Effect::DropChunk { op, chunk, mappers } => {
                tell_mappers(state, chunk, &mappers);
                self.note(state, OpKind::DropChunk, 0, op);
                self.drop_chunk(op, chunk);
            }
            Effect::Read { op, source, source_offset, target, expect, class } => {
                self.note(state, OpKind::Read, expect.length.get(), op);
                if !self.hbm.read(op, (source.device, source_offset), target, expect) {
                    self.media.start(MediaOp::Read { op, source, source_offset, target, expect, class });
                }
            }
            Effect::Write { op, source, target, target_offset, header, via, class } => {
                let bytes = header.length.get();
                let op = MediaOp::Write { op, source, target, target_offset, header, via, class };
                self.start(state, OpKind::Write, bytes, op);
            }
            Effect::CarveSlot { op, device, slot, space, frame_bytes } => {
                let op = MediaOp::CarveSlot { op, device, slot, space, frame_bytes };
                self.start(state, OpKind::CarveSlot, 0, op);
            }
            Effect::Commit { op, put, delete } => {
                self.start(state, OpKind::Commit, 0, MediaOp::Commit { op, put, delete });
            }
            Effect::ClearSpace { op, space, tenant, generation } => {
                self.spaces.cleared(space, generation);
                let op = MediaOp::ClearSpace { op, space, tenant, generation };
                self.start(state, OpKind::ClearSpace, 0, op);
            }
            Effect::Verify { op, frame, expect } => {
                self.note(state, OpKind::Verify, expect.length.get(), op);
                if !self.hbm.verify(op, frame, expect) {
                    self.media.start(MediaOp::Verify { op, frame, expect });
                }
            }
            Effect::Copy { op, source, target, expect } => {
                self.note(state, OpKind::Copy, expect.length.get(), op);
                self.copy(op, source, target, expect);
            }
            Effect::Scrub { op, source, source_offset, expect } => {
                let bytes = expect.length.get();
                let op = MediaOp::Scrub { op, source, source_offset, expect };
                self.start(state, OpKind::Scrub, bytes, op);
            }
        }
    }

    fn start(&self, state: &mut State, kind: OpKind, bytes: u64, op: MediaOp) {
        self.note(state, kind, bytes, op.op());
        self.media.start(op);
    }

    fn note(&self, state: &mut State, kind: OpKind, bytes: u64, op: OpId) {
        state.running.insert(op, (kind, self.now(), bytes));
    }
}

fn answer(state: &mut State, session: SessionId, request: RequestId, reply: Arc<Reply>) {
    if state.at_hand == Some((session, request)) {
        state.answered = Some(reply);
    } else if let Some(mailbox) = state.mailboxes.get_mut(&session)
        && let Some(waiting) = mailbox.pending.remove(&request)
    {
        // Nobody waits any more: the answer is dropped, the lease ends with its session.
        let _ = waiting.send(reply);
    }
}

/// Who has the chunk mapped keeps its memory. A session that leaves its notices unread is not told: it gives up by itself
/// what it has not used for a while.
fn tell_mappers(state: &State, chunk: ChunkId, mappers: &[SessionId]) {
    for session in mappers {
        if let Some(mailbox) = state.mailboxes.get(session)
            && mailbox.notices.capacity() > NOTICES_MAX / 2
        {
            let _ended = mailbox.notices.try_send(Notice::ChunkDropped { chunk });
        }
    }
}

fn notify(state: &mut State, session: SessionId, notice: Notice) {
    if let Some(mailbox) = state.mailboxes.get_mut(&session)
        && mailbox.notices.try_send(notice).is_err()
    {
        tracing::warn!(%session, "a session leaves its notices unread; it is cut off");
        // A channel without a sender ends at its reader, which closes the session.
        mailbox.notices = mpsc::channel(1).0;
    }
}
