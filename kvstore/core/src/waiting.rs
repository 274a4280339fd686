//! Requests that wait, and how each gets its one answer.

use std::sync::Arc;

use crate::api::{Effect, Grant, IoClass, MissReason, Reply, SealOutcome};
use crate::core::{Core, Deadline};
use crate::ids::{BlockId, GpuId, LeaseId, Memory, RequestId, SessionId, TenantId};
use crate::leases::LeaseEnd;
use crate::state::block::BlockIndex;
use crate::state::session::WaitId;
use crate::state::space::SpaceIndex;
use crate::units::Now;

/// Who asked, and under which repeat id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker {
    pub(crate) session: SessionId,
    pub(crate) request: RequestId,
    pub(crate) repeat: Option<u64>,
}

/// A request that waits for something.
#[derive(Debug)]
pub(crate) struct Wait {
    pub(crate) asker: Asker,
    /// Whose waiting requests it counts among.
    tenant: Option<TenantId>,
    pub(crate) deadline: Option<Now>,
    /// Parts that are still open.
    pub(crate) pending: u32,
    pub(crate) kind: WaitKind,
}

/// What it will be answered with.
#[derive(Debug)]
pub(crate) enum WaitKind {
    /// `open`: the blocks that were not there when it began to wait. `blocks`: all of it, if it wants them on a device.
    Read {
        lease: LeaseId,
        blocks: Vec<BlockId>,
        grants: Vec<Grant>,
        class: IoClass,
        open: Vec<BlockIndex>,
        memory: Memory,
    },
    Write {
        lease: LeaseId,
        grants: Vec<Grant>,
        blocks: Vec<BlockId>,
        parent: Option<BlockId>,
    },
    Seal {
        outcomes: Vec<SealOutcome>,
    },
    Flush {
        blocks: u64,
        failed: u64,
    },
    Clear {
        space: SpaceIndex,
        generation: u64,
        blocks: u64,
    },
    Shrink {
        gpu: GpuId,
    },
}

impl Core {
    /// Answers a request and everybody who repeated it meanwhile.
    pub(crate) fn answer(&mut self, asker: Asker, reply: Reply) {
        let Asker { session, request, repeat } = asker;
        if matches!(reply, Reply::Throttled(_)) {
            self.counters.throttled += 1;
        }
        let reply = Arc::new(reply);
        let limit = self.config.limits.replies_remembered;
        if let (Some(repeat), Some(open)) = (repeat, self.sessions.get_mut(&session)) {
            for request in open.repeats.finish(repeat, &reply, limit) {
                self.effects.push_back(Effect::Reply { session, request, reply: Arc::clone(&reply) });
            }
        }
        self.effects.push_back(Effect::Reply { session, request, reply });
    }

    /// Adds a request that waits.
    pub(crate) fn wait(&mut self, asker: Asker, deadline: Option<Now>, kind: WaitKind) -> WaitId {
        self.wait_last += 1;
        let id = WaitId(self.wait_last);
        if let Some(at) = deadline {
            self.at(at, Deadline::Answer(id));
        }
        let mut tenant = None;
        if let Some(session) = self.sessions.get_mut(&asker.session) {
            session.waits.insert(id);
            tenant = Some(session.tenant);
        }
        if let Some(tenant) = tenant {
            self.tenants.entry(tenant).or_default().waits += 1;
        }
        self.waits.insert(id, Wait { asker, tenant, deadline, pending: 0, kind });
        id
    }

    /// Takes a waiting request out of every table.
    pub(crate) fn take_wait(&mut self, id: WaitId) -> Option<Wait> {
        let wait = self.waits.remove(&id)?;
        if let Some(at) = wait.deadline {
            self.deadlines.remove(&(at, Deadline::Answer(id)));
        }
        if let Some(session) = self.sessions.get_mut(&wait.asker.session) {
            session.waits.remove(&id);
        }
        if let Some(held) = wait.tenant.and_then(|tenant| self.tenants.get_mut(&tenant)) {
            held.waits -= 1;
        }
        self.writers.remove(&id);
        if let WaitKind::Shrink { gpu } = wait.kind {
            self.gpus.at_mut(gpu).shrinks.remove(&id);
        }
        Some(wait)
    }

    /// Answers a waiting request with what there is.
    pub(crate) fn finish(&mut self, id: WaitId) {
        let Some(wait) = self.take_wait(id) else { return };
        let reply = match wait.kind {
            WaitKind::Read { lease, mut grants, memory, blocks, .. } => {
                self.grant_where_it_is(lease, memory, &blocks, &mut grants);
                let grants = self.refresh(lease, grants);
                self.leased(lease, grants)
            }
            WaitKind::Write { lease, mut grants, .. } => {
                if !self.gpus.is_empty() {
                    self.withdraw(lease, &mut grants);
                }
                self.leased(lease, grants)
            }
            WaitKind::Seal { outcomes } => Reply::Sealed { outcomes },
            WaitKind::Flush { blocks, failed } => Reply::Flushed { blocks, failed },
            WaitKind::Clear { space: _, generation, blocks } => Reply::Cleared { generation, blocks },
            WaitKind::Shrink { gpu } => Reply::Shrunk { free: self.given_back(gpu) },
        };
        self.answer(wait.asker, reply);
    }

    /// One part of a waiting request is settled.
    pub(crate) fn part_done(&mut self, id: WaitId) {
        let Some(wait) = self.waits.get_mut(&id) else { return };
        assert!(wait.pending > 0, "a part of a request is settled once");
        wait.pending -= 1;
        if wait.pending == 0 {
            self.finish(id);
        }
    }

    /// Its answer is due, whatever is missing. What it waits for goes on.
    pub(crate) fn answer_due(&mut self, id: WaitId) {
        let Some(wait) = self.waits.get_mut(&id) else { return };
        wait.deadline = None;
        if let WaitKind::Write { grants, blocks, .. } = &mut wait.kind {
            grants.resize(blocks.len(), Grant::Throttled);
        }
        self.finish(id);
    }

    /// What was granted early may have moved while the rest was waited for.
    fn refresh(&mut self, lease: LeaseId, mut grants: Vec<Grant>) -> Vec<Grant> {
        for (position, grant) in grants.iter_mut().enumerate() {
            let Grant::Granted { block, frame, fence, memory, .. } = *grant else { continue };
            if self.chunks.frame(frame).is_some_and(|cell| cell.fence == fence) {
                continue;
            }
            self.drop_item(lease, position, LeaseEnd::Released);
            let index = self.blocks.find(block);
            let mut granted = |memory| self.grant_resident(lease, position, index?, memory);
            let again = granted(memory).or_else(|| granted(Memory::Pinned));
            *grant = again.unwrap_or(Grant::Missing(MissReason::Unknown));
        }
        grants
    }

    /// Frames of a device that was lost while the rest was waited for are not there to be written any more.
    fn withdraw(&mut self, lease: LeaseId, grants: &mut [Grant]) {
        for (position, grant) in grants.iter_mut().enumerate() {
            let Grant::Granted { frame, fence, .. } = *grant else { continue };
            if self.chunks.frame(frame).is_none_or(|cell| cell.fence != fence) {
                self.drop_item(lease, position, LeaseEnd::Released);
                *grant = Grant::Throttled;
            }
        }
    }

    /// Starts the life of a lease, or ends it if it covers nothing.
    pub(crate) fn leased(&mut self, id: LeaseId, grants: Vec<Grant>) -> Reply {
        let empty = self.leases.get(&id).is_none_or(|lease| lease.items.iter().all(Option::is_none));
        let Some(lease) = self.leases.get(&id) else {
            return Reply::Leased { lease: None, ttl: self.config.limits.lease_ttl_default, blocks: grants };
        };
        let (ttl, session) = (lease.ttl, lease.session);
        if empty {
            self.forget_lease(id);
            let throttled = !grants.is_empty() && grants.iter().all(|grant| *grant == Grant::Throttled);
            if throttled {
                return Reply::Throttled(self.no_frame_limit(session));
            }
            return Reply::Leased { lease: None, ttl, blocks: grants };
        }
        self.set_lease_deadline(id);
        let now = self.now;
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.mark = now;
        }
        Reply::Leased { lease: Some(id), ttl, blocks: grants }
    }

    /// A block is durable, or will not be: settles everybody who waits for that.
    pub(crate) fn durable(&mut self, index: BlockIndex, is_durable: bool) {
        let Some(waiters) = self.durables.remove(&index) else { return };
        for (id, position) in waiters {
            let Some(wait) = self.waits.get_mut(&id) else { continue };
            match &mut wait.kind {
                WaitKind::Seal { outcomes } if !is_durable => {
                    outcomes[position as usize] = SealOutcome::NotDurable;
                }
                WaitKind::Flush { blocks, .. } if is_durable => *blocks += 1,
                WaitKind::Flush { failed, .. } => *failed += 1,
                WaitKind::Seal { .. }
                | WaitKind::Read { .. }
                | WaitKind::Write { .. }
                | WaitKind::Shrink { .. }
                | WaitKind::Clear { .. } => {}
            }
            self.part_done(id);
        }
    }
}
