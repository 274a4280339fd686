//! Windows: chunks that one session fills. Handed back, a window is closed: it is
//! adopted as an ordinary chunk if nobody can write into it any more. Otherwise it
//! is replaced, and its memory is never used again.

use crate::api::{Effect, Fault, Notice, Refusal, Reply};
use crate::core::{Core, Deadline, Op};
use crate::evict::Relist;
use crate::ids::{ChunkId, Memory, SessionId};
use crate::state::block::BlockIndex;
use crate::state::chunk::{ChunkKind, FrameState};
use crate::state::count;
use crate::units::Micros;

impl Core {
    /// Something in a window was sealed or given back: it may be full, or idle later.
    pub(crate) fn window_settled(&mut self, id: ChunkId) {
        let now = self.now;
        let Some(chunk) = self.chunks.find(id) else { return };
        let ChunkKind::Window { recalled: false, .. } = chunk.kind else { return };
        let full = chunk.free.is_empty() && chunk.counts.filling == 0;
        self.chunks.at_mut(id).touched = now;
        if full {
            self.recall_window(id);
        }
    }

    /// The time at which the window is idle, if nothing happened in it meanwhile.
    pub(crate) fn window_idle(&mut self, id: ChunkId) {
        let Some(chunk) = self.chunks.find(id) else { return };
        let ChunkKind::Window { recalled: false, .. } = chunk.kind else { return };
        let idle_at = chunk.touched.after(self.config.window_idle);
        if chunk.counts.filling > 0 || idle_at > self.now {
            let at = idle_at.max(self.now.after(Micros::new(1 + self.config.window_idle.get() / 2)));
            return self.at(at, Deadline::WindowIdle(id));
        }
        self.recall_window(id);
    }

    fn recall_window(&mut self, id: ChunkId) {
        let chunk = self.chunks.at_mut(id);
        let ChunkKind::Window { owner, recalled: false } = chunk.kind else { return };
        assert!(chunk.counts.filling == 0, "a window is recalled when nothing in it is being filled");
        chunk.kind = ChunkKind::Window { owner, recalled: true };
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
