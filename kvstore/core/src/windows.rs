//! Windows: chunks that one session fills. Handed back, a window is closed: it is
//! adopted as an ordinary chunk if nobody can write into it any more. Otherwise it
//! is replaced, and its memory is never used again.

use std::collections::BTreeSet;

use crate::api::{Effect, Fault, Locality, Notice, Refusal, Reply};
use crate::core::{Core, Deadline, Op};
use crate::evict::Relist;
use crate::ids::{ChunkId, Memory, SessionId, TenantId};
use crate::state::block::BlockIndex;
use crate::state::chunk::{ChunkKind, FrameState};
use crate::state::count;
use crate::state::space::SpaceIndex;
use crate::units::Micros;

/// Windows that nobody writes into yet are this part of the memory, at most.
const AHEAD_PART: u32 = 8;
/// They stay open for so many times as long as others that are idle: whoever writes now and then finds his mapped.
const AHEAD_IDLE: u64 = 32;

/// Windows that are open before anybody needs them.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// Nothing was granted in them yet. Those that are being made are among them.
    pub(crate) windows: BTreeSet<ChunkId>,
    /// Who has written, and has not been given his next window since.
    pub(crate) wrote: BTreeSet<(SessionId, SpaceIndex)>,
    /// Something changed for those.
    pub(crate) due: bool,
}

impl Core {
    /// A session was granted blocks to write, of its own memory. If as many again do not fit into its windows, the next one
    /// is opened now, else when it pauses: to open one, and to map it, takes time from whoever writes.
    pub(crate) fn wrote(&mut self, session: SessionId, space: SpaceIndex, blocks: u32) {
        if self.sessions.get(&session).is_none_or(|open| open.locality != Locality::Local) {
            return;
        }
        self.ahead.wrote.insert((session, space));
        self.ahead.due = true;
        if self.left_in_windows(session, space) < u64::from(blocks) {
            self.open_ahead(session, space);
        }
    }

    /// Sessions that wrote and pause are given the windows that they will need: whoever has filled one before, some more
    /// than one, so that the first is used up without a wait for the second.
    pub(crate) fn pump_ahead(&mut self) {
        if !self.ahead.due || self.burst.is_on(self.now) {
            return;
        }
        self.ahead.due = false;
        for (session, space) in std::mem::take(&mut self.ahead.wrote) {
            let Some(open) = self.sessions.get(&session) else { continue };
            let window = u64::from(self.spaces.at(space).frames_per_chunk);
            let wanted = if open.fills { window + window.div_ceil(8) } else { window / 2 };
            if self.left_in_windows(session, space) < wanted && !self.open_ahead(session, space) {
                // When there is memory.
                self.ahead.wrote.insert((session, space));
            }
        }
    }

    /// Frames of its windows in Pinned that nothing was granted in, those of windows that are being made among them.
    fn left_in_windows(&self, session: SessionId, space: SpaceIndex) -> u64 {
        let Some(open) = self.sessions.get(&session) else { return 0 };
        let windows = open.windows.iter().map(|&id| self.chunks.at(id));
        let own = windows.filter(|chunk| chunk.space == space && chunk.memory == Memory::Pinned);
        own.filter(|chunk| match chunk.kind {
            ChunkKind::Window { recalled, .. } => !recalled,
            ChunkKind::Creating { .. } => true,
            ChunkKind::Closing { .. }
            | ChunkKind::Pool
            | ChunkKind::Replacing
            | ChunkKind::Retiring
            | ChunkKind::Dropping => false,
        })
        .map(|chunk| chunk.counts.free)
        .sum()
    }

    /// Opens a window before it is needed, so that its session has it mapped by then; none that keeps leases or other
    /// windows from it or its tenant. False: not now.
    fn open_ahead(&mut self, session: SessionId, space: SpaceIndex) -> bool {
        let Some(tenant) = self.sessions.get(&session).map(|open| open.tenant) else { return true };
        let most = self.chunks_max() / AHEAD_PART;
        if count(self.ahead.windows.len()) >= most {
            // Somebody writes no more, or into another space.
            self.recall_ahead(None, self.config.window_idle);
        }
        let may = count(self.ahead.windows.len()) < most && self.may_open_ahead(tenant, session);
        if may {
            let window = self.create_chunk(space, Some(session), Memory::Pinned);
            self.ahead.windows.insert(window);
        }
        may
    }

    /// Half of what a tenant and a session may pin, and of the memory kept ready, stays for those who wait.
    fn may_open_ahead(&self, tenant: TenantId, session: SessionId) -> bool {
        let limits = &self.config.limits;
        let of_tenant = self.tenants.get(&tenant).map_or(0, |held| held.leased_bytes);
        let of_session = self.sessions.get(&session).map_or(0, |open| open.leased_bytes);
        let fits = |held: u64, limit: u64| held.saturating_add(self.config.chunk_bytes.get()) <= limit / 2;
        self.may_create_leaving(self.config.chunks_ready_min / 2)
            && fits(of_tenant, limits.leased_bytes_per_tenant.get())
            && fits(of_session, limits.leased_bytes_per_session.get())
    }

    /// Somebody waits for memory: the window that has been ahead for longest goes back, and for so long at least; of this
    /// tenant, if it is one's limit that is in the way. False: there is none.
    pub(crate) fn recall_ahead(&mut self, of: Option<TenantId>, idle: Micros) -> bool {
        let ahead = self.ahead.windows.iter().map(|&id| (id, self.chunks.at(id))).filter(|(_, chunk)| {
            matches!(chunk.kind, ChunkKind::Window { .. })
                && of.is_none_or(|tenant| chunk.tenant == tenant)
                && self.now.since(chunk.touched) >= idle
        });
        let oldest = ahead.min_by_key(|&(id, chunk)| (chunk.touched, id)).map(|(id, _)| id);
        oldest.into_iter().for_each(|id| self.recall_window(id));
        oldest.is_some()
    }

    /// Something in a window was sealed or given back: it may be full, or idle later.
    pub(crate) fn window_settled(&mut self, id: ChunkId) {
        let now = self.now;
        let Some(chunk) = self.chunks.find(id) else { return };
        let ChunkKind::Window { recalled: false, owner } = chunk.kind else { return };
        let full = chunk.free.is_empty() && chunk.counts.filling == 0;
        self.chunks.at_mut(id).touched = now;
        if full {
            if let Some(open) = self.sessions.get_mut(&owner) {
                open.fills = true;
            }
            self.recall_window(id);
        }
    }

    /// The time at which the window is idle, if nothing happened in it meanwhile.
    pub(crate) fn window_idle(&mut self, id: ChunkId) {
        let Some(chunk) = self.chunks.find(id) else { return };
        let ChunkKind::Window { recalled: false, .. } = chunk.kind else { return };
        let idle = self.config.window_idle;
        let patience = if self.ahead.windows.contains(&id) {
            Micros::new(idle.get().saturating_mul(AHEAD_IDLE))
        } else {
            idle
        };
        let idle_at = chunk.touched.after(patience);
        if chunk.counts.filling > 0 || idle_at > self.now {
            // Once somebody writes into it, it is idle sooner.
            let idle_at = idle_at.min(self.now.after(idle));
            let at = idle_at.max(self.now.after(Micros::new(1 + idle.get() / 2)));
            return self.at(at, Deadline::WindowIdle(id));
        }
        self.recall_window(id);
    }

    fn recall_window(&mut self, id: ChunkId) {
        let chunk = self.chunks.at_mut(id);
        let ChunkKind::Window { owner, recalled: false } = chunk.kind else { return };
        assert!(chunk.counts.filling == 0, "a window is recalled when nothing in it is being filled");
        chunk.kind = ChunkKind::Window { owner, recalled: true };
        self.ahead.windows.remove(&id);
        self.counters.windows_recalled += 1;
        self.at(self.now.after(self.config.window_recall_max), Deadline::WindowRecalled(id));
        self.effects
            .push_back(Effect::Notify { session: owner, notice: Notice::WindowRecalled { chunk: id } });
    }

    /// A recalled window was not handed back in time.
    pub(crate) fn window_overdue(&mut self, id: ChunkId) {
        let kind = self.chunks.find(id).map(|chunk| chunk.kind);
        if let Some(ChunkKind::Window { recalled: true, .. }) = kind {
            self.replace_window(id);
        }
    }

    pub(crate) fn return_window(&mut self, session: SessionId, id: ChunkId) -> Reply {
        let refused = Reply::Refused(Refusal::NotYourChunk { chunk: id });
        let Some(chunk) = self.chunks.find(id) else { return refused };
        let ChunkKind::Window { owner, .. } = chunk.kind else { return refused };
        if owner != session {
            return refused;
        }
        if chunk.counts.filling > 0 {
            return Reply::Refused(Refusal::WindowBusy { chunk: id });
        }
        let blocks = u32::try_from(chunk.counts.sealed).unwrap_or(u32::MAX);
        if chunk.private {
            self.empty_window(id);
            return Reply::WindowReturned { blocks };
        }
        self.chunks.at_mut(id).kind = ChunkKind::Closing { owner };
        self.window_left(owner, id);
        let op = self.start(Op::CloseWindow { chunk: id });
        self.effects.push_back(Effect::CloseWindow { op, chunk: id });
        Reply::WindowReturned { blocks }
    }

    /// The shell has looked who can still write into a window that was handed back.
    pub(crate) fn window_closed(&mut self, id: ChunkId, outcome: Result<(), Fault>) {
        let lost = match self.chunks.at(id).memory {
            Memory::Pinned => false,
            Memory::Hbm(gpu) => !self.gpus.at(gpu).usable,
        };
        match outcome {
            Ok(()) if lost => self.replace_window(id),
            Ok(()) => self.adopt_window(id),
            Err(_) => self.replace_window(id),
        }
    }

    /// The window becomes an ordinary chunk: nobody else can write into it any more.
    fn adopt_window(&mut self, id: ChunkId) {
        let chunk = self.chunks.at_mut(id);
        assert!(matches!(chunk.kind, ChunkKind::Closing { .. }), "only a closed window is adopted");
        chunk.kind = ChunkKind::Pool;
        chunk.touched = self.now;
        let (space, tenant, memory) = (chunk.space, chunk.tenant, chunk.memory);
        let charged = std::mem::take(&mut chunk.charged);
        for index in 0..count(chunk.frames.len()) {
            if chunk.frames[index as usize].state == FrameState::Quarantined {
                chunk.set(index, FrameState::Free);
            }
        }
        let sealed = chunk.frames.iter().filter_map(|frame| sealed_block(frame.state));
        // The others are in no list of the memory, before and after.
        let may_be_leaf = |index: &BlockIndex| memory != Memory::Pinned || self.blocks.at(*index).leaf_of().0;
        let leaves: Vec<BlockIndex> = sealed.filter(may_be_leaf).collect();
        if !chunk.free.is_empty() {
            self.spaces.at_mut(space).pool_mut(memory).open.insert(id);
        }
        if charged {
            self.uncharge_tenant(tenant, self.config.chunk_bytes.get());
        }
        for index in leaves.into_iter().rev() {
            self.relist(index, Relist::Keep);
        }
        self.counters.windows_adopted += 1;
        self.memory_changed = true;
    }

    /// Nobody can be sure that the window is not written to any more: its
    /// blocks are moved out, and its memory is never used again.
    pub(crate) fn replace_window(&mut self, id: ChunkId) {
        if self.empty_window(id) {
            self.counters.windows_replaced += 1;
        }
    }

    /// What is in the window moves out, and its memory goes. False: it is no window.
    fn empty_window(&mut self, id: ChunkId) -> bool {
        let Some(chunk) = self.chunks.find(id) else { return false };
        let (ChunkKind::Window { owner, .. } | ChunkKind::Closing { owner }) = chunk.kind else {
            return false;
        };
        assert!(chunk.counts.filling == 0, "leases that fill a window end before it is replaced");
        // Readers of what was sealed in it get the time of a recall to be done.
        let leave_by = self.now.after(self.config.window_recall_max);
        self.at(leave_by, Deadline::Retry);
        let chunk = self.chunks.at_mut(id);
        chunk.kind = ChunkKind::Replacing;
        chunk.leave_by = leave_by;
        self.window_left(owner, id);
        self.emptying.insert(id);
        self.emptying_due = true;
        true
    }
}

fn sealed_block(state: FrameState) -> Option<BlockIndex> {
    match state {
        FrameState::Sealed { block, .. } => Some(block),
        FrameState::Free | FrameState::Filling { .. } | FrameState::Evicting | FrameState::Quarantined => {
            None
        }
    }
}
