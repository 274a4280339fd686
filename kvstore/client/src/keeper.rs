//! The chores of a session: renewing leases while their guards live, releasing
//! them afterwards, handing windows back, giving up idle mappings. One task.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::{ReleaseRequest, RenewRequest, ReturnWindow};

use crate::chunks::Chunks;
use crate::error::ClientError;
use crate::lane::{Delivered, LaneLink};
use crate::lease::LeaseState;
use crate::places::{Places, Used};

// Idle mappings are looked for this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
// Renewals that are under way at once; the rest follows in the next round.
const RENEWALS_AT_ONCE: usize = 32;
// Most leases in one Release.
const RELEASES_AT_ONCE: usize = 1024;
// Most that go with one question: it waits until they are released.
const RELEASES_BY_THE_WAY: usize = 64;
// What may be released by the way waits so long for a question to go with.
const BY_THE_WAY: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Keeper {
    chores: Mutex<Chores>,
    wake: Notify,
    next_request: AtomicU64,
}

// All bounded by the leases and windows that the daemon grants to one session.
#[derive(Debug, Default)]
struct Chores {
    leases: BTreeMap<u64, Kept>,
    /// To be released with the next question, or by then.
    soon: Vec<u64>,
    soon_by: Option<Instant>,
    returns: BTreeSet<u64>,
    /// Windows that nothing is granted in yet.
    opened: BTreeSet<u64>,
    /// Chunks that hold nothing any more.
    dropped: BTreeSet<u64>,
}

#[derive(Debug)]
struct Kept {
    state: Arc<LeaseState>,
    ttl: Duration,
    wanted_ms: u64,
    renew_at: Instant,
}

impl Keeper {
    pub(crate) fn new() -> Self {
        Self { chores: Mutex::new(Chores::default()), wake: Notify::new(), next_request: AtomicU64::new(1) }
    }

    fn chores(&self) -> MutexGuard<'_, Chores> {
        self.chores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request id that is unique in the session.
    pub(crate) fn request_id(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed)
    }

    /// Renews a lease from now on, until it is released or revoked.
    pub(crate) fn keep(&self, id: u64, state: Arc<LeaseState>, ttl: Duration, wanted_ms: u64) {
        let renew_at = Instant::now() + ttl / 3;
        self.chores().leases.insert(id, Kept { state, ttl, wanted_ms, renew_at });
        // The task looks at the deadlines again within this time anyway.
        if ttl / 3 < SWEEP_INTERVAL {
            self.wake.notify_one();
        }
    }

    /// The daemon ended a lease: its guards are stale.
    pub(crate) fn revoke(&self, id: u64) {
        let kept = self.chores().leases.remove(&id);
        if let Some(kept) = kept {
            kept.state.end();
        }
    }

    /// Stops renewing; true when the lease was kept until now.
    pub(crate) fn forget(&self, id: u64) -> bool {
        self.chores().leases.remove(&id).is_some()
    }

    /// Releases a lease with the next question; if none is asked, in a moment.
    pub(crate) fn release_soon(&self, id: u64) {
        let mut chores = self.chores();
        chores.leases.remove(&id);
        chores.soon.push(id);
        let waits = chores.soon_by.is_some();
        chores.soon_by.get_or_insert_with(|| Instant::now() + BY_THE_WAY);
        drop(chores);
        // Once for all that follow until then, so that a busy caller wakes nobody.
        if !waits {
            self.wake.notify_one();
        }
    }

    /// What goes with a question that is asked now.
    pub(crate) fn release_by_the_way(&self) -> Option<Op> {
        let mut chores = self.chores();
        let more = chores.soon.len().saturating_sub(RELEASES_BY_THE_WAY);
        let leases = chores.soon.split_off(more);
        drop(chores);
        (!leases.is_empty()).then(|| Op::Release(ReleaseRequest { request_id: self.request_id(), leases }))
    }

    /// Hands a window back as soon as nobody writes into it.
    pub(crate) fn return_window(&self, chunk: u64) {
        self.chores().returns.insert(chunk);
        self.wake.notify_one();
    }

    /// Maps a window before it is needed. Not by the caller, which reads the socket.
    pub(crate) fn map(&self, chunk: u64) {
        self.chores().opened.insert(chunk);
        self.wake.notify_one();
    }

    /// Gives up the mapping of a chunk that the daemon drops. Not by the caller, which reads the socket.
    pub(crate) fn unmap(&self, chunk: u64) {
        self.chores().dropped.insert(chunk);
        self.wake.notify_one();
    }

    /// Does the chores until the session ends.
    pub(crate) async fn run(self: Arc<Self>, link: Arc<LaneLink>, chunks: Arc<Chunks>, places: Arc<Places>) {
        let mut swept = Instant::now();
        loop {
            let deadline = self.next_deadline(swept + SWEEP_INTERVAL);
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep_until(deadline.into()) => {}
            }
            let dropped = std::mem::take(&mut self.chores().dropped);
            dropped.into_iter().for_each(|chunk| chunks.dropped(chunk));
            if self.release(&link).await.is_err() || self.renew(&link).await.is_err() {
                break;
            }
            let opened = std::mem::take(&mut self.chores().opened);
            for chunk in opened {
                if let Err(error) = chunks.map_ahead(&link, chunk).await {
                    tracing::debug!(chunk, %error, "a window is not mapped ahead");
                }
            }
            let returns = std::mem::take(&mut self.chores().returns);
            for chunk in returns {
                let _refused = return_one(&link, &chunks, chunk).await;
            }
            let now = Instant::now();
            if now.duration_since(swept) >= SWEEP_INTERVAL {
                let used = places.take_used();
                chunks.sweep(now, &used.chunks);
                if touch(&link, used).await.is_err() {
                    break;
                }
                swept = now;
            }
        }
    }

    fn next_deadline(&self, sweep: Instant) -> Instant {
        let chores = self.chores();
        let renewals = chores.leases.values().map(|kept| kept.renew_at);
        renewals.chain(chores.soon_by).fold(sweep, Instant::min)
    }

    /// Sends what was queued for release. An error means that the session is over.
    async fn release(&self, link: &LaneLink) -> Result<(), ClientError> {
        let released = self.take_releases(Instant::now());
        for leases in released.chunks(RELEASES_AT_ONCE) {
            self.release_now(link, leases.to_vec()).await?;
        }
        Ok(())
    }

    fn take_releases(&self, now: Instant) -> Vec<u64> {
        let mut chores = self.chores();
        if chores.soon_by.is_none_or(|by| by > now) {
            return Vec::new();
        }
        chores.soon_by = None;
        std::mem::take(&mut chores.soon)
    }

    /// Releases leases and waits for the answer. True: the daemon knows.
    pub(crate) async fn release_now(&self, link: &LaneLink, leases: Vec<u64>) -> Result<bool, ClientError> {
        let request = ReleaseRequest { request_id: self.request_id(), leases };
        released(link.call_at_once(Op::Release(request)).await)
    }

    /// Releases a lease for somebody who waits until the daemon knows; others go with it.
    pub(crate) async fn release_awaited(&self, link: &LaneLink, lease: u64) -> Result<bool, ClientError> {
        let request = ReleaseRequest { request_id: self.request_id(), leases: vec![lease] };
        released(link.call_awaited(Op::Release(request), self).await)
    }

    /// Renews what is due. An error means that the session is over.
    async fn renew(self: &Arc<Self>, link: &Arc<LaneLink>) -> Result<(), ClientError> {
        let due = self.take_due(Instant::now());
        let mut renewals = tokio::task::JoinSet::new();
        for (lease, ttl_ms) in due {
            let (link, keeper) = (Arc::clone(link), Arc::clone(self));
            renewals.spawn(async move {
                let request = RenewRequest { request_id: keeper.request_id(), lease, ttl_ms };
                match link.call_at_once(Op::Renew(request)).await {
                    Ok(_) | Err(ClientError::Throttled { .. } | ClientError::NoAnswer { .. }) => Ok(()),
                    Err(ClientError::Disconnected) => Err(ClientError::Disconnected),
                    Err(error) => {
                        tracing::debug!(lease, %error, "lease cannot be renewed");
                        keeper.revoke(lease);
                        Ok(())
                    }
                }
            });
        }
        while let Some(done) = renewals.join_next().await {
            done.unwrap_or(Err(ClientError::Disconnected))?;
        }
        Ok(())
    }

    fn take_due(&self, now: Instant) -> Vec<(u64, u64)> {
        let mut chores = self.chores();
        let due = chores.leases.iter_mut().filter(|(_, kept)| kept.renew_at <= now);
        due.take(RENEWALS_AT_ONCE)
            .map(|(lease, kept)| {
                kept.renew_at = now + kept.ttl / 3;
                (*lease, kept.wanted_ms)
            })
            .collect()
    }
}

/// Tells the daemon what was read where it was known to lie. An error means that the session is over.
async fn touch(link: &LaneLink, used: Used) -> Result<(), ClientError> {
    for request in used.blocks {
        match link.call_at_once(Op::Touch(request)).await {
            Err(ClientError::Disconnected) => return Err(ClientError::Disconnected),
            Err(error) => tracing::debug!(%error, "blocks that were read are not marked as used"),
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Drops a window's write permission and hands it back. True when it was taken.
pub(crate) async fn return_one(link: &LaneLink, chunks: &Chunks, chunk: u64) -> Result<bool, ClientError> {
    if !chunks.drop_write(chunk) {
        return Ok(false);
    }
    let answer = link.call_at_once(Op::ReturnWindow(ReturnWindow { chunk })).await;
    chunks.window_returned(chunk, answer.is_ok());
    match answer {
        Ok(_) => Ok(true),
        Err(ClientError::Disconnected) => Err(ClientError::Disconnected),
        Err(error) => {
            tracing::debug!(chunk, %error, "window not taken back");
            Ok(false)
        }
    }
}

/// Whether the daemon knows of what was released.
fn released(answer: Result<Delivered, ClientError>) -> Result<bool, ClientError> {
    match answer {
        Err(ClientError::Disconnected) => Err(ClientError::Disconnected),
        Err(error) => {
            tracing::warn!(%error, "leases were not released; they end by themselves");
            Ok(false)
        }
        Ok(_) => Ok(true),
    }
}

/// Ends its lease when dropped.
#[derive(Debug)]
pub(crate) struct LeaseToken {
    id: u64,
    keeper: Arc<Keeper>,
    released: AtomicBool,
}

impl LeaseToken {
    pub(crate) fn new(id: u64, keeper: Arc<Keeper>) -> Self {
        Self { id, keeper, released: AtomicBool::new(false) }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The daemon has been told: it is not told again.
    pub(crate) fn released(&self) {
        self.released.store(true, Ordering::Relaxed);
    }
}

impl Drop for LeaseToken {
    fn drop(&mut self) {
        if !*self.released.get_mut() {
            self.keeper.release_soon(self.id);
        }
    }
}
