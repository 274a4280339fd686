//! Sessions and leases: how they begin, go on, and end.
//!
//! A lease pins frames or fills them. It ends by release, deadline, or the end
//! of its session. A sealed block of a write lease stays pinned until then, so
//! that its writer goes on reading it in place.

use crate::api::{Effect, Limit, Locality, Notice, Refusal, Reply};
use crate::core::{Core, Deadline};
use crate::evict::{Relist, is_by_use};
use crate::ids::{ClientId, LeaseId, SessionId, TenantId};
use crate::residence::Vacate;
use crate::state::chunk::{ChunkKind, Filler, Frame, FrameState};
use crate::state::count;
use crate::state::session::{Held, Lease, LeaseKind, Repeats, Session};
use crate::units::Micros;
use crate::waiting::WaitKind;

/// Why a lease ends. Decides what may still be written into its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseEnd {
    /// Its holder says that it is done.
    Released,
    /// Its holder may not know yet, or may be gone and have left a child behind.
    Abandoned,
}

impl Core {
    pub(crate) fn session_opened(&mut self, session: SessionId, tenant: TenantId, locality: Locality) {
        if self.sessions.len() >= self.config.limits.sessions as usize {
            // Its requests are refused: the session is not open.
            self.counters.throttled += 1;
            return;
        }
        self.tenants.entry(tenant).or_default();
        self.sessions.entry(session).or_insert_with(|| Session {
            tenant,
            locality,
            leases: std::collections::BTreeSet::new(),
            windows: std::collections::BTreeSet::new(),
            leased_bytes: 0,
            waits: std::collections::BTreeSet::new(),
            client: None,
            repeats: Repeats::default(),
            asked: None,
            holds_on: false,
            fills: false,
        });
    }

    /// A client that had another session goes on by this one, which was opened for the same tenant just now.
    pub(crate) fn session_resumed(&mut self, id: SessionId, client: ClientId) {
        let Some(tenant) = self.sessions.get(&id).map(|session| session.tenant) else { return };
        // Rare, and limited by the sessions that may be open.
        let former = self.sessions.iter().find(|(other, session)| {
            **other != id && session.tenant == tenant && session.client == Some(client)
        });
        if let Some(former) = former.map(|(former, _)| *former) {
            self.effects.push_back(Effect::EndSession { session: former });
            self.session_closed(former);
        }
        let answers = self.departed.take((tenant, client)).unwrap_or_default();
        if let Some(session) = self.sessions.get_mut(&id) {
            session.client = Some(client);
            session.repeats = answers;
        }
    }

    /// Whoever asks again must not clear what was written since.
    fn remember_clears(&mut self, id: SessionId) {
        let limit = self.config.limits.replies_remembered;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        for wait in session.waits.iter().filter_map(|wait| self.waits.get(wait)) {
            if let WaitKind::Clear { space, generation, blocks } = wait.kind
                && let Some(repeat) = wait.asker.repeat
            {
                session.repeats.clearing(repeat, (space, generation, blocks), limit);
            }
        }
    }

    /// Ends its leases at once and replaces its windows.
    pub(crate) fn session_closed(&mut self, id: SessionId) {
        self.remember_clears(id);
        let Some(session) = self.sessions.get(&id) else { return };
        let waits: Vec<_> = session.waits.iter().copied().collect();
        let leases: Vec<_> = session.leases.iter().copied().collect();
        let windows: Vec<_> = session.windows.iter().copied().collect();
        for wait in waits {
            if let Some(WaitKind::Read { open, .. }) = self.take_wait(wait).map(|wait| wait.kind) {
                open.into_iter().for_each(|block| self.unwanted(block));
            }
        }
        for lease in leases {
            self.end_lease(lease, LeaseEnd::Abandoned);
        }
        if let Some(session) = self.sessions.remove(&id)
            && let Some(client) = session.client
        {
            self.departed.keep((session.tenant, client), session.repeats);
        }
        for window in windows {
            self.replace_window(window);
        }
        self.ahead.wrote.retain(|&(session, _)| session != id);
        self.chunks.forget_mapper(id);
        self.unclaim(id);
        self.memory_changed = true;
    }

    /// Whether the session maps memory.
    pub(crate) fn is_local(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(|open| match open.locality {
            Locality::Local | Locality::Isolated => true,
            Locality::Streamed => false,
        })
    }

    /// Whether nobody else reads from the memory that the session writes.
    pub(crate) fn is_isolated(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(|open| open.locality == Locality::Isolated)
    }

    /// A lease without items.
    ///
    /// # Errors
    /// The limit that it would pass.
    pub(crate) fn add_lease(
        &mut self,
        session: SessionId,
        tenant: TenantId,
        kind: LeaseKind,
        ttl: Option<Micros>,
        items: usize,
    ) -> Result<LeaseId, Limit> {
        self.may_hold(session, tenant)?;
        let limits = &self.config.limits;
        let ttl = ttl.unwrap_or(limits.lease_ttl_default).min(limits.lease_ttl_max);
        let id = loop {
            self.lease_last = self.lease_last.wrapping_add(1);
            let id = LeaseId::new(u64::from(self.config.incarnation) << 32 | u64::from(self.lease_last));
            if !self.leases.contains_key(&id) {
                break id;
            }
        };
        let since = self.now;
        let lease = Lease {
            session,
            tenant,
            kind,
            items: vec![None; items],
            ttl,
            deadline: None,
            repeat: None,
            cleared: false,
            since,
            mark: since,
        };
        self.leases.insert(id, lease);
        if let Some(open) = self.sessions.get_mut(&session) {
            open.leases.insert(id);
        }
        self.tenants.entry(tenant).or_default().leases += 1;
        Ok(id)
    }

    /// Starts its time anew. A streamed write lease has none: the daemon may be
    /// copying into its frames, and ends it when it is done.
    pub(crate) fn set_lease_deadline(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get(&id) else { return };
        let streamed_write = matches!(lease.kind, LeaseKind::Write { .. }) && !self.is_local(lease.session);
        let held_until = lease.since.after(self.config.limits.lease_hold_max);
        let deadline = (!streamed_write).then(|| self.now.after(lease.ttl).min(held_until));
        if let Some(old) = lease.deadline {
            self.deadlines.remove(&(old, Deadline::Lease(id)));
        }
        if let Some(at) = deadline {
            self.at(at, Deadline::Lease(id));
        }
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.deadline = deadline;
        }
    }

    /// The session's own live lease, or what to answer.
    pub(crate) fn own_lease(&self, session: SessionId, id: LeaseId) -> Result<&Lease, Refusal> {
        if id.get() >> 32 != u64::from(self.config.incarnation) {
            return Err(Refusal::EarlierIncarnation { lease: id });
        }
        match self.leases.get(&id) {
            Some(lease) if lease.session == session => Ok(lease),
            Some(_) | None => Err(Refusal::NotYourLease { lease: id }),
        }
    }

    pub(crate) fn renew(&mut self, session: SessionId, id: LeaseId, ttl: Option<Micros>) -> Reply {
        if let Err(refusal) = self.own_lease(session, id) {
            return Reply::Refused(refusal);
        }
        let limits = &self.config.limits;
        let wanted = ttl.map(|ttl| ttl.min(limits.lease_ttl_max));
        let Some(lease) = self.leases.get_mut(&id) else {
            return Reply::Refused(Refusal::NotYourLease { lease: id });
        };
        lease.ttl = wanted.unwrap_or(lease.ttl);
        let left = lease.since.after(limits.lease_hold_max).since(self.now);
        let ttl = lease.ttl.min(left);
        // A lease that is not answered yet has no deadline to move.
        if lease.deadline.is_some() {
            self.set_lease_deadline(id);
        }
        Reply::Renewed { ttl }
    }

    /// Ends the session's own leases. A lease of an earlier life, or one that
    /// ended already, is not counted; a foreign one refuses the whole request.
    pub(crate) fn release(&mut self, session: SessionId, leases: &[LeaseId]) -> Reply {
        let foreign =
            leases.iter().find(|id| self.leases.get(id).is_some_and(|lease| lease.session != session));
        if let Some(&lease) = foreign {
            return Reply::Refused(Refusal::NotYourLease { lease });
        }
        if let [lease] = leases
            && let Err(refusal) = self.own_lease(session, *lease)
        {
            return Reply::Refused(refusal);
        }
        let mut released = 0;
        for &lease in leases {
            if self.leases.contains_key(&lease) {
                self.end_lease(lease, LeaseEnd::Released);
                released += 1;
            }
        }
        Reply::Released { count: released }
    }

    pub(crate) fn abort(&mut self, session: SessionId, id: LeaseId, indexes: &[u32]) -> Reply {
        let lease = match self.own_lease(session, id) {
            Ok(lease) => lease,
            Err(refusal) => return Reply::Refused(refusal),
        };
        if lease.kind == LeaseKind::Read {
            return Reply::Refused(Refusal::WrongKind { lease: id });
        }
        let blocks = count(lease.items.len());
        if let Some(&index) = indexes.iter().find(|&&index| index >= blocks) {
            return Reply::Refused(Refusal::BadIndex { index, blocks });
        }
        let all: Vec<u32> = (0..blocks).collect();
        let indexes = if indexes.is_empty() { &all } else { indexes };
        let mut aborted = 0;
        for &index in indexes {
            let held = self.leases.get(&id).and_then(|lease| lease.items[index as usize]);
            if held.is_some_and(|held| self.is_filled_by(held, id)) {
                self.drop_item(id, index as usize, LeaseEnd::Released);
                aborted += 1;
            }
        }
        Reply::Aborted { count: aborted }
    }

    fn is_filled_by(&self, held: Held, id: LeaseId) -> bool {
        let frame = self.chunks.frame(held.frame).filter(|frame| frame.fence == held.fence);
        matches!(frame.map(|frame| frame.state),
            Some(FrameState::Filling { filler: Filler::Lease(lease), .. }) if lease == id.into())
    }

    /// Ends a lease by its deadline, and tells its holder.
    pub(crate) fn lease_expired(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        lease.deadline = None;
        let session = lease.session;
        let hoarded = self.now >= lease.since.after(self.config.limits.lease_hold_max);
        let reason = if hoarded {
            self.counters.leases_revoked += 1;
            "held for longer than `limits.lease_hold_max_ms` allows; lease again"
        } else {
            self.counters.leases_expired += 1;
            "expired"
        };
        self.end_lease(id, LeaseEnd::Abandoned);
        let notice = Notice::LeaseRevoked { lease: id, reason };
        self.effects.push_back(Effect::Notify { session, notice });
    }

    /// Gives back all that a lease holds, from the last block to the first, so
    /// that parents end up newer than their children.
    pub(crate) fn end_lease(&mut self, id: LeaseId, how: LeaseEnd) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let (tenant, session, items) = (lease.tenant, lease.session, std::mem::take(&mut lease.items));
        self.uncharge(tenant, session, items.iter().flatten().map(|held| held.bytes).sum());
        for held in items.into_iter().rev().flatten() {
            self.let_go(held, how);
        }
        self.forget_lease(id);
    }

    /// Takes a lease that holds nothing out of every table.
    pub(crate) fn forget_lease(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.remove(&id) else { return };
        assert!(lease.items.iter().all(Option::is_none), "a lease gives back all it holds before it ends");
        if let Some(at) = lease.deadline {
            self.deadlines.remove(&(at, Deadline::Lease(id)));
        }
        if let Some(session) = self.sessions.get_mut(&lease.session) {
            session.leases.remove(&id);
            if let Some(repeat) = lease.repeat {
                session.repeats.ended(repeat);
            }
        }
        self.tenants.entry(lease.tenant).or_default().leases -= 1;
    }

    /// Gives back one block of a lease.
    pub(crate) fn drop_item(&mut self, id: LeaseId, position: usize, how: LeaseEnd) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let Some(held) = lease.items[position].take() else { return };
        let (tenant, session) = (lease.tenant, lease.session);
        self.uncharge(tenant, session, held.bytes);
        self.let_go(held, how);
    }

    /// Unpins what a lease held, or ends what it was filling. The caller uncharges the tenant.
    #[inline(always)]
    fn let_go(&mut self, held: Held, how: LeaseEnd) {
        let frame = held.frame;
        let Some(chunk) = self.chunks.find_mut(frame.chunk) else { return };
        let cell = chunk.frames.get(frame.index as usize).filter(|cell| cell.fence == held.fence);
        let Some(&Frame { state, .. }) = cell else { return };
        match state {
            FrameState::Sealed { block, .. } => {
                if chunk.unpin(frame.index) {
                    let (tick, now) = (self.tick, self.now);
                    let by_use = is_by_use(self.config.policy);
                    let entry = self.blocks.at_mut(block);
                    if by_use {
                        entry.touch(tick, now);
                    }
                    if entry.children_pinned == 0 || entry.is_listed() || !entry.hbm.is_empty() {
                        self.relist(block, Relist::Touch);
                    }
                    self.memory_changed = true;
                    self.emptying_due = true;
                }
            }
            FrameState::Filling { .. } => {
                let windowed = !matches!(chunk.kind, ChunkKind::Pool | ChunkKind::Retiring);
                let how = match how {
                    LeaseEnd::Abandoned if windowed => Vacate::Quarantine,
                    LeaseEnd::Abandoned | LeaseEnd::Released => Vacate::Free,
                };
                self.abandon_filling(frame, how);
                self.window_settled(frame.chunk);
            }
            FrameState::Free | FrameState::Evicting | FrameState::Quarantined => {}
        }
    }
}
